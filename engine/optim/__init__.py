"""The optimizer of the slices, and what it keeps."""
