"""Networks: loaded, known by what they hold, and applied to batches of patches.

In reading order::

    model_files     networks in files: loaded by name, and pickled as the bytes of a file
    model_identity  a digest of what a network is, so that it is not resumed with another network
    network         a network on a device, with its own order of axes, applied to batches of patches
"""
