"""A prediction, planned before anything is written: options -> patches, shards, regions, and their memory.

In reading order::

    prediction_options  the options of predict, checked, and the part that voxels depend on
    model_inputs        the images of a subject on the grid that the network sees, and the mask
    prediction_plan     the plan of one subject: patches, shards, regions, figures
    peak_memory         the bytes that a plan holds at most, before it runs
    regions             outputs -> shards -> regions, to share work or to fit a memory limit
    probe               the network on one patch: its outputs, its memory and its time
    planning            the plans of all subjects: the first that fits of all candidates
"""
