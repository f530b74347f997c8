"""Where each transform of TorchIO 1 acts: on volumes, on patches with or without a margin, or nowhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple
from zpatch.pipelines.displacements import in_voxels, in_world, margin_to, rotated
from zpatch.pipelines.torchio1_volumes import STEPS
from zpatch.pipelines.torchio_pipeline import Places

# These give the same voxels on a patch as on the volume: after random transforms they act on patches.
POINTWISE = ("Clamp", "Mask", "RemapLabels", "RemoveLabels", "OneHot", "To")

# Random transforms of each voxel by itself, of all voxels alike, or of axes.
ON_PATCHES = ("RandomFlip", "RandomNoise", "RandomGamma", "RandomBiasField", "RandomLabelsToImage")

REFUSED = {
    "RandomMotion": "moves the head between lines of k-space, which is of the whole volume",
    "RandomGhosting": "repeats the whole volume at fractions of its extent",
    "RandomSpike": "changes k-space, which is of the whole volume",
    "RandomSwap": "swaps boxes anywhere in the volume",
    "RandomElasticDeformation": "has control points that span the volume",
    "RandomAffineElasticDeformation": "has control points that span the volume",
    "KeepLargestComponent": "looks for components in the whole volume",
    "PCA": "looks for axes in the whole volume",
    "Resize": "gives each volume voxels of another size; use Resample and CropOrPad",
    "ToReferenceSpace": "needs a reference image in memory; use Resample with an image of the subject",
    "Transpose": "reverses axes without their directions; use ToOrientation",
    "Contour": "needs the neighbours of labels; apply it before the cohort is converted",
    "Lambda": "may do anything to the volume",
    "MonaiAdapter": "holds a transform of MONAI; use from_monai",
}


def _of_affine(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """To where voxels of the patch come from: scaled, rotated and moved along world axes, or the inverse."""
    if transform.center != "image":
        raise OptionError(
            "RandomAffine with center='origin' moves voxels by any distance; turn around 'image'"
        )
    angles, moved = (
        np.abs(ranges).reshape(3, 2).max(axis=1) for ranges in (transform.degrees, transform.translation)
    )
    scales = np.maximum(transform.scales, 1e-3)
    extent = in_world(patch_size, affine) * max(scales.max(), 1 / scales.min()) + moved
    return margin_to(in_voxels(rotated(extent, np.radians(angles).tolist()), affine), patch_size)


def _of_blur(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Four standard deviations, where TorchIO cuts its kernel, along axes of voxels."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    reach = 4 * np.array(transform.std_ranges).reshape(3, 2)[:, 1] / spacing
    return margin_to(np.array(patch_size) / 2 + reach, patch_size)


def _of_anisotropy(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Two voxels of the coarsest axis."""
    reach = math.ceil(2 * float(np.max(transform.downsampling_range)))
    return reach, reach, reach


MARGINS = {
    "RandomAffine": _of_affine,
    "RandomBlur": _of_blur,
    "RandomAnisotropy": _of_anisotropy,
}
PLACES = Places(STEPS, POINTWISE, ON_PATCHES, ("RandomFlip",), MARGINS, REFUSED)
