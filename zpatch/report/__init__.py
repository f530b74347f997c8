"""One HTML page about a store."""
