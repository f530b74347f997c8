"""The Zarr store: its records, how it is written, committed and verified.

In reading order::

    names             names of files, subjects and images in a store, and which fit a pattern
    image_record      one line of the manifest: all that is known of an image, and its OME-Zarr metadata
    manifest          the manifest: sealed lines, the last of each image wins
    store             a store, opened from its manifest alone
    lock              one writer for a store, and errors of the disk that name it
    value_counts      how often each integer occurs; the compiled loop
    voxel_statistics  mean, percentiles and foreground, in one pass over slabs or shards
    voxel_index       which chunk holds how many voxels of which label, or how much weight
    staged_image      the folder of an image that is being written, and its Zarr metadata
    image_writer      one image, shard by shard, with its statistics and index
    store_writer      stage, sync, rename, commit by a manifest line; recovery after a crash
    verification      whether every file is there, with the bytes that were written
"""
