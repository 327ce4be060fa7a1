"""`hdpissa plan`: memory, bytes and time of a run, without weights and without a GPU."""
