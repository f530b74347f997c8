"""Networks: loaded, known by what they hold, and applied to batches of patches.

In reading order::

    model_files     networks in files: loaded by name, and pickled as the bytes of a file
    model_identity  a digest of what a network is, so that it is not resumed with another network
    model_axes      the order of axes that a network expects: (x, y, z), (z, y, x), (y, x), ...
    network         a network on a device, applied to batches of patches
"""
