"""Settings: their types, ranges and help, and what a user types turned into a Config."""
