"""Lazy images, subjects and cohorts: a box of voxels -> the chunks that cover it.

In reading order::

    voxel_source   the contract of anything that voxels can be read from
    lazy_array     arrays of other libraries that read what is sliced
    zarr_images    OME-Zarr images and Zarr arrays that other programs wrote
    input_files    the files that voxels are read from, as they were: whether they are still there
    group_read     boxes of several images -> one Dask graph -> voxels in place
    voxel_sources  sharded arrays, arrays in memory, Dask expressions
    chunk_cache    chunks kept in memory while the patches of a grid need them
    opened_image   the data that Image takes -> source, affine, scaling, record, path
    image          Image, ScalarImage, LabelMap, SamplingMap
    normalization  Normalize: intensities on one scale, by statistics of the store or of one pass
    subject        Subject: images by name
    cohort         Cohort: the subjects of a store, from its manifest
"""
