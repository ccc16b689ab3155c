"""Measurements: every speed is a ratio from one run on one machine."""
