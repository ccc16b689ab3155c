"""Settings of a run, in groups: a file for each part of the package that they set."""
