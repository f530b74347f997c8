"""Boxes, grids and affines: where voxels are. Arithmetic only: no files, no clocks, no torch.

In reading order::

    boxes        PatchLocation, the one type for boxes; the axis order of users' arrays and stored arrays
    affines      voxel to mm: spacing, and the affine of a crop or of another number of voxels
    orientation  a volume turned so that its axes point to RAS, LPS, ...
    voxel_grid   grids of voxels in space, and where the voxels of one lie in another
    patch_grid   the patches of a regular grid
    padding      boxes that reach over the border of their volume
"""
