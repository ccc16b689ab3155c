"""Selection: scores of layers, criteria, and the choice of those to train."""
