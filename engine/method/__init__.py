"""HD-PiSSA itself: targets, slices, the layer, the update."""
