"""The Zarr store: how it is written, committed and verified.

In reading order::

    store             a store, opened from its manifest alone
    lock              one writer for a store, and errors of the disk that name it
    value_counts      how often each integer occurs; the compiled loop
    voxel_statistics  mean, percentiles and foreground, in one pass over slabs or shards
    voxel_index       the voxels of each label, or the weight, in each chunk
    staged_image      the folder of an image that is being written, and its Zarr metadata
    image_writer      one image, shard by shard, with its statistics and index
    verification      whether every file still holds the bytes that were written
    store_writer      stage, sync, rename, commit by a manifest line; recovery after a crash
"""
