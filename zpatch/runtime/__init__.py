"""Where work runs and the memory it takes: threads, processes, Dask.

byte_sizes        bytes as people write them, and refusing what exceeds a limit
buffer_pool       memory of patches and tiles, reused
process_memory    how much this process holds, and giving freed memory back
dask_graphs       the door to Dask: a graph computed here or in threads
task_contract     what a task is, and what a cluster must know of a run
attempts          which tasks are still to be started, after how many deaths of workers
dask_cluster      the door to dask.distributed: tasks on a cluster
tasks             run tasks here, in local processes, or on a cluster
"""
