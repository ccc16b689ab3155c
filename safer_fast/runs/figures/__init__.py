"""Figures: curves and maps of layers, drawn with matplotlib."""
