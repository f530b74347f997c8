"""Patches to torch: the queue, its workers, batches."""
