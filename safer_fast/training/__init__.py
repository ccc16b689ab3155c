"""Training: the SAFER step, its objective and optimizer, and the loop around them."""
