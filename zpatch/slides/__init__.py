"""Slides and TIFF files, in and out: levels of tiles, each decoded by itself.

In reading order::

    slide_levels     the levels of a pyramid: sizes, micrometres per pixel, and which one is read
    tiles            a level as a grid of tiles, and tiles that cannot be decoded
    pixel_sizes      micrometres per pixel, as the writers of TIFF files note them
    tiff_file        the door to tifffile: files, their pages, and how a tile is decoded
    tiff_level       a level of a series of a TIFF file, as a grid of tiles
    openslide_file   the door to openslide: formats that tifffile does not read
    slide_file       a path -> a slide, opened by either door
    tissue           a thumbnail -> where there is tissue
    tiff_writer      planes of an image, tile by tile -> a pyramidal OME-TIFF
"""
