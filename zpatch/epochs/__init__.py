"""An epoch before anything is read: which patches, in which order, for which rank, and where a stream is.

In reading order::

    shuffle          how far a patch is handed out from its place in the order of reading
    subject_weights  how often each subject comes in an epoch
    class_balance    weights by which classes come in given shares over a cohort
    epoch_plan       an epoch as a function of (seed, epoch): its patches, their order, the shares of ranks
    stream_position  where a queue's stream is, and its state as JSON
"""
