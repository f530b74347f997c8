"""A network over whole volumes -> predictions in a store: planned, resumable, on many machines.

In reading order::

    prediction_options  the options of predict, checked, and the part that voxels depend on
    model_inputs        the images of a subject on the grid that the network sees, and the mask
    prediction_plan     the plan of one subject: patches, shards, regions, figures
    peak_memory         the bytes that a plan holds at most, before it runs
    regions             outputs -> shards -> regions, to share work or to fit a memory limit
    probe               the network on one patch: its outputs, its memory and its time
    planning            the plans of all subjects: the first that fits of all candidates
    shard_ledger        which shards of an unfinished image are written, by any process
    region_run          one region: read, run the network, blend, write
    subject_job         one subject: begun or resumed, checked, and committed or mended
    shared_work         regions run here or in other processes, which get the network in one file
    prediction_run      the output: opened, its subjects predicted and committed one by one
    inference           predict: options -> plans -> run
"""
