"""Lazy images, subjects and cohorts: voxels with a place in space, by name.

In reading order::

    opened_image   the data that Image takes -> source, affine, scaling, record, path
    image          Image, ScalarImage, LabelMap, SamplingMap
    normalization  Normalize: intensities on one scale, by statistics of the store or of one pass
    subject        Subject: images by name
    cohort         Cohort: the subjects of a store, from its manifest
"""
