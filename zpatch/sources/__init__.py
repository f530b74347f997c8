"""Where voxels are read from: boxes -> one Dask graph over the chunks that cover them -> voxels.

In reading order::

    voxel_source     the contract of anything that voxels can be read from
    lazy_array       arrays of other libraries that read what is sliced
    zarr_images      OME-Zarr images and Zarr arrays that other programs wrote
    input_files      the files that voxels are read from, as they were: whether they are still there
    image_read       the boxes of one image: into which memory, in which type, how padded
    group_read       boxes of several images -> one Dask graph -> voxels in place
    voxel_sources    sharded arrays, arrays in memory, Dask expressions
    tiled_source     levels of slides, whose tiles are decoded one by one
    resampled_source the voxels of a source on another grid
    window_source    a box of a source as a source of its own, padded beyond the border
    voxelwise_source a function of each voxel of one or several sources
    chunk_cache      chunks kept in memory while the patches of a grid need them
"""
