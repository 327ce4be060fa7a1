"""Where slices come from: the singular directions of W, computed once by one rank each, or read from a cache."""
