"""Exports from checkpoints, and the model card beside each export."""
