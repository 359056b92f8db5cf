"""Attention for training: which kernel is fastest here, for each shape, and one of our own for CPUs."""
