"""NIfTI, NRRD and MetaImage files into a store, and NIfTI files out of it.

In reading order::

    conversion_options  the options of a conversion, checked, and the memory that follows from them
    cases               a case and its images, as data; names and kinds of images
    source_files        the files of a source: found by name, known again by their fingerprints
    case_lists          cases listed in a file: JSON datalists (MSD, MONAI), CSV, TSV
    folder_conventions  cases found by folder names: BIDS, nnU-Net, plain folders
    discovery           the cases of a source: its convention is detected, and all names are checked
    slab_resampler      slabs of a file -> slabs of another voxel size
    conversion_plan     the cases, the layout of each image, and the memory of a conversion
    pyramid             coarser levels for viewers, built slab by slab
    case_staging        one case: slabs of files into shards of staged images
    conversion          convert: run the plan, commit case by case, resume
    store_export        export: the way back to NIfTI, byte for byte, or to OME-TIFF
"""
