"""Where patches are taken: random numbers, samplers, and the grid.

In reading order::

    randomness       random numbers as a function of (seed, epoch, subject, draw)
    patch            Patch and PatchImage: a patch as torch sees it
    patch_batch      PatchBatch and collate: patches stacked, each copied once
    patch_views      the images of a patch: those of the subject, and coarser levels of them
    centre_draws     centres drawn exactly by their mass, reading only the drawn chunks
    resampled_draws  centres on a resampled map, drawn by the mass of the map that it was made of
    centre_maps      label maps and sampling maps that centres are drawn from
    patch_sampler    what samplers have in common; RandomSampler, which one's own sampler inherits from
    samplers         UniformSampler, WeightedSampler, LabelSampler
    mixed_sampler    MixedSampler: each draw picks one of several samplers
    grid_sampler     GridSampler: all patches of a grid, as a dataset
    location_sampler LocationSampler: the patches of a table of locations
"""
