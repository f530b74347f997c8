"""Patches to torch: workers that carry out the plan of an epoch, the queue, and batches.

In reading order::

    shared_slots     shared memory, one batch in each slot
    queue_stats      where the time goes: what workers and training count, as a short table
    queue_subjects   the subjects of a queue: prepared by its transform, and checked
    draw_reader      the patches of a draw: located, read as one group, transformed
    worker           what a worker does with a task
    worker_pool      worker processes: started once, watched, named when they die
    queue_options    the options of a queue, which check themselves
    batch_slots      which batch is written to which slot, a batch that arrived, and when its slot is free
    device_copies    batches on a GPU, copied beside its other work
    batch_feed       batches as they are filled, epoch after epoch
    patch_queue      Queue
    subjects_loader  SubjectsLoader: batches for a training loop
"""
