"""Where work runs and the memory it takes: threads, processes, Dask.

In reading order::

    byte_sizes      bytes as people write them, and refusing to exceed a limit
    buffer_pool     memory of patches and tiles, reused
    process_memory  how much memory this process holds, and returning what is freed
    whole_file      a file that appears whole or not at all
    guarded_files   files that may come from anyone: regular, bounded, not behind a link
    recent          values made once and kept while they are among the last used
    dask_graphs     the door to Dask: a graph computed here or in threads
    task_contract   what a task is, and what a cluster must know of a run
    failures        subjects that fail alone, and which errors are theirs
    attempts        which tasks are still to be started, after how many deaths of workers
    dask_cluster    the door to dask.distributed: tasks on a cluster
    tasks           tasks run here, in local processes, or on a cluster
"""
