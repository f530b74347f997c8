"""The records of a store: one line of its manifest for each image, and the table that finds them.

In reading order::

    names           names of files, subjects and images in a store, and which fit a pattern
    image_record    one line of the manifest: all metadata of an image, and its OME-Zarr metadata
    image_facts     what the table says of an image, so that its record need not be parsed
    texts           many short texts as two arrays that can be mapped
    manifest_table  the table of a manifest, as arrays that are mapped and shared
    table_builder   lines of a manifest become a table, or are added to one
    manifest        the manifest: sealed lines, the last of each image wins, found through the table
"""
