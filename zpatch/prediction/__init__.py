"""A network over whole volumes: planned, resumable, on many machines."""
