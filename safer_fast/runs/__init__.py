"""Run folders: all that a run leaves on disk, written and read."""
