"""Lazy images, subjects and cohorts: voxels with a place in space, by name.

In reading order::

    opened_image   the voxels that an image is made of: source, affine, scaling, record, path
    slide_image    a slide, at a level or at some micrometres per pixel -> an opened image
    open_image     the data that Image takes -> an opened image
    placed_image   where the voxels of an image are, and the image on other grids
    image          Image, ScalarImage, LabelMap, SamplingMap
    tissue_map     where there is tissue on a slide
    normalization  Normalize: intensities on one scale, by statistics of the store or of one pass
    subject        Subject: images by name
    cohort         Cohort: the subjects of a store, from its manifest
    open_subjects  the subjects of a path: of a store, or one for an image that is read in place
    mixtures       what a cohort mixes: spacings, orientations, shapes, ranges of intensity
"""
