"""NIfTI files into a store, and back.

In reading order::

    conversion_options  the options of a conversion, checked, and the memory that follows from them
    cases               a case and its images, as data; names and kinds of images
    source_files        source folders, looked into: their NIfTI files by name
    case_lists          cases listed in a file: JSON datalists (MSD, MONAI), CSV, TSV
    folder_conventions  cases found by folder names: BIDS, nnU-Net, plain folders
    discovery           which convention a source follows, and the checks that all cases pass
    fingerprints        whether a source file is still the one that was converted
    conversion_plan     what will be converted, in which layout, in how much memory
    pyramid             coarser levels for viewers, from the slab in hand
    case_staging        one case: NIfTI slabs into shards of staged images
    conversion          convert: run the plan, commit case by case, resume
    nifti_export        export: the way back, byte for byte
"""
