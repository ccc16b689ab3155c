"""Loggers: metrics.jsonl, TensorBoard and Weights & Biases behind one RunLog."""
