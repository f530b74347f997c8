"""Patches to torch: the plan of an epoch, workers that carry it out, the queue, and batches.

In reading order::

    epoch_plan       an epoch before anything is read: its patches, their order, the shares of ranks
    stream_position  where a queue's stream is, and its state as JSON
    shared_slots     shared memory, one patch in each slot
    queue_subjects   the subjects of a queue: prepared by its transform, and checked
    draw_reader      the patches of a draw: located, read as one group, transformed
    worker           what a worker does with a task
    worker_pool      worker processes: started once, watched, named when they die
    queue_options    the options of a queue, which check themselves
    patch_feed       patches as they arrive, epoch after epoch
    patch_buffer     patches that wait until the shuffle hands them out
    patch_queue      Queue
    subjects_loader  SubjectsLoader: batches for a training loop
"""
