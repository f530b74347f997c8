"""Voxels of one grid -> voxels of another: interpolation, as numbers in memory, with no files and no images.

In reading order::

    interpolation  nearest, linear or cubic, and the smoothing before voxels grow
    axis_taps      which voxels of an axis, with which weights, make each voxel of a new axis
    loops          the loops over voxels: compiled, or in numpy
    resampler      a box of the new grid -> the box of the old one that it needs -> its voxels
"""
