"""What crosses the network in a step."""
