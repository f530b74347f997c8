"""Transforms of other libraries taken apart: what acts on subjects, lazily, and what acts on patches.

In reading order::

    pipeline            Pipeline: steps of subjects, then transforms of patches with a margin
    volume_statistics   mean, deviation and quantiles of a volume, where a mask is, in one or two passes
    displacements       how far random transforms move voxels, at most
    torchio_pipeline    a transform of TorchIO as a Pipeline, or refused by name
    torchio1_grids      transforms of TorchIO 1 that change grids, on lazy images
    torchio1_volumes    transforms of TorchIO 1 that change values, on lazy images
    torchio1_places     where each transform of TorchIO 1 acts
    torchio2_places     where each transform of TorchIO 2 acts, mostly as those of TorchIO 1
    monai_grids         transforms of MONAI that change grids, on lazy images
    monai_linear        transforms of MONAI that map values by numbers of the volume, on lazy images
    monai_volumes       transforms of MONAI of each voxel by itself, on lazy images
    monai_pipeline      a transform of MONAI as a Pipeline, or refused by name
"""
