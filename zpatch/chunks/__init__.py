"""Arrays on disk: chunks packed into shards, and the compiled loop that reads groups of boxes from them."""
