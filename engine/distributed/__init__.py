"""The processes of a run: which rank this is, who still answers, who stands still. Leaves: errors only."""
