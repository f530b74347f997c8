"""A network over whole volumes -> predictions in a store: resumable, on many machines.

In reading order::

    shard_ledger    which shards of an unfinished image are written, by any process
    damaged_tiles   tiles of slides that were read as 0, noted by all processes
    stage_times     how long each stage takes, of all processes together
    work_folder     the folder of a subject until its images are complete
    region_run      one region of a plan: read, run the network, blend, write
    subject_job     one subject: begun or resumed, checked, and committed or mended
    stored_jobs     jobs in a file, of which another process reads those that it works on
    shared_work     regions run here or in other processes, which get the network in one file
    prediction_run  the output: opened, its subjects predicted and committed one by one
    inference       predict: options -> plans -> run
"""
