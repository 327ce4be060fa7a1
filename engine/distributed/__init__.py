"""The processes of a run: which rank this is, its heartbeat, which rank hangs, fault injection."""
