"""Patches to torch: workers that carry out the plan of an epoch, the queue, and batches.

In reading order::

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
