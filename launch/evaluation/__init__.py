"""What `hdpissa evaluate` reads, generates and compares."""
