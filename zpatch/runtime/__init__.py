"""Where work runs and the memory it takes: threads, processes, Dask."""
