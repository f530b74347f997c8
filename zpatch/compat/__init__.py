"""The patch APIs of TorchIO and MONAI on zpatch: scripts that use them run after changing one import.

In reading order::

    nifti_cache         NIfTI paths as images: converted once, into a cache
    transforms          transforms of TorchIO and MONAI, and functions of tensors, on patches
    monai               zpatch images in MONAI's pipelines
    epoch_queues        queues with TorchIO's epochs and counts
    generation_errors   errors that are also of the class that TorchIO raises
    torchio1_images     images of TorchIO 0.18 to 1.x
    torchio1_subjects   subjects, their patches and datasets of TorchIO 0.18 to 1.x
    torchio1_samplers   samplers of TorchIO 0.18 to 1.x
    torchio1            TorchIO 0.18 to 1.x: import this instead of torchio
    torchio0            TorchIO about 0.13
    torchio2_subjects   images, subjects and patches of TorchIO 2
    torchio2            TorchIO 2
"""
