"""Checkpoints: one file for all that a resumed run needs, and the folder that keeps the newest."""
