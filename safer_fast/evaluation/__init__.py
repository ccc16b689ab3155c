"""Evaluation: accuracy under attack that can be resumed, and signs of catastrophic overfitting."""
