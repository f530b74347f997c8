"""Patches to torch: the plan of an epoch, workers and their shared memory, the queue, and batches.

Read epoch_plan, stream_position, queue_options, shared_slots, draw_reader, worker, worker_pool, patch_feed,
patch_buffer, patch_queue, patch_batch, subjects_loader.
"""
