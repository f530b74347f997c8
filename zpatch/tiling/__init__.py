"""A volume cut into tiles that become final while the patches of a grid arrive: numbers only, no voxels.

In reading order::

    windows       weights of patches on one axis; they sum to one at every voxel
    output_cells  an output on another grid: which tiles its voxels are made from
    axis_tiles    one axis of a blended volume cut into tiles
    volume_tiles  the tiles of a volume, and the sweep of patches that makes them final
"""
