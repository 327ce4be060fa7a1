"""Checkpoints: their format, what goes into them, how they are written, and which of a folder counts."""
