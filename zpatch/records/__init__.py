"""The records of a store: one line of its manifest for each image.

In reading order::

    names         names of files, subjects and images in a store, and which fit a pattern
    image_record  one line of the manifest: all metadata of an image, and its OME-Zarr metadata
    manifest      the manifest: sealed lines, the last of each image wins
"""
