"""Overlapping patches -> one volume, in bounded memory.

In reading order::

    reduction           argmax, softmax, sigmoid, threshold: final voxels of blended ones
    sinks               where final voxels are written: a tensor, or shards of an image
    blend               what a blend is; a batch is checked before it is added
    tile_sums           the sums of one tile; the compiled loop
    grid_blend          patches of a grid, summed tile by tile
    regridding          tiles, resampled onto the grid of the output
    tile_spill          tiles in bounded memory, the least recently used ones on disk
    scattered_blend     patches at any locations: weights are summed too, and divided out at the end
    aggregator_options  what a user may choose of an aggregator
    aggregator          PatchAggregator: batches of patches -> a tensor, or an image on disk

``_blend.c`` holds the compiled loops of ``tile_sums`` and ``reduction``.
"""
