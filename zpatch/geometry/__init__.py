"""Boxes, grids and affines: where voxels are. Arithmetic only: no files, no clocks, no torch.

In reading order::

    boxes        PatchLocation, the one way to say where a box is; the axis order of users' and stored arrays
    affines      voxel to mm: spacing, and the affine of a crop or of another number of voxels
    orientation  a volume turned so that its axes point where one wants them
    patch_grid   the patches of a regular grid
    padding      boxes that reach over the border of their volume
"""
