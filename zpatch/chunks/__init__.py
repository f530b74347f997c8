"""Arrays on disk: chunks packed into shards, written once, read through memory maps by a compiled loop.

In reading order::

    scaling        stored voxels -> values: slope, intercept, bounds
    layout         how an array is cut into chunks, and how chunks are packed into shards
    codec          voxels <-> bytes of a chunk
    file_mark      whether a file of an input is still there, and the file that was opened
    mapped_memory  copies out of memory maps whose files may be cut short meanwhile
    sharded_array  an array on disk, as data: shapes, codec, names of files
    mapped_shards  shard files in memory maps, their index and checksums verified once
    shard_writer   voxels -> one shard file
    gather_plan    boxes -> which part of which chunk is copied where
    gather         a plan -> voxels; the loop is compiled: _gather.c and the headers beside it
    levels         coarser levels for viewers: means of voxels, or the most frequent label
"""
