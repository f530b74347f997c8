"""A transform of TorchIO 1 as a Pipeline; what needs the volume in memory is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple
from zpatch.pipelines import torchio1_volumes as volumes
from zpatch.pipelines.displacements import in_voxels, in_world, margin_to, rotated
from zpatch.pipelines.pipeline import Margin, PatchStep, Pipeline, SubjectStep, followed_by, no_margin
from zpatch.sampling.patch import Patch

Act = Callable[[Any], Callable[[Patch], Patch]]

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


def torchio1_pipeline(transform: Any, on_patches: Act) -> Pipeline:
    """The pipeline of a transform of TorchIO 1, or of a Compose of such.

    ``on_patches(transform)`` makes a function of patches of a transform. Raises OptionError, with what to do
    instead, for a transform that needs the whole volume and is not known, and for one that follows a random
    transform though it must come before.
    """
    return followed_by(list(_steps(transform, on_patches)))


def _steps(transform: Any, on_patches: Act) -> Iterable[SubjectStep | PatchStep]:
    found: list[SubjectStep | PatchStep] = []
    for part in _flat(transform):
        has_patches = any(isinstance(step, PatchStep) for step in found)
        found.append(_step(part, on_patches, has_patches))
    return found


def _flat(transform: Any) -> list[Any]:
    """The transforms of a Compose that is always applied, one after the other."""
    if _name_of(transform) == "Compose" and _probability(transform) == 1:
        return [part for inner in transform.transforms for part in _flat(inner)]
    return [transform]


def _name_of(transform: Any) -> str:
    """The name of TorchIO's class of a transform, also of one that inherits what that class does."""
    does = getattr(type(transform), "apply_transform", None)
    for base in type(transform).__mro__:
        if base.__module__.startswith("torchio.") and getattr(base, "apply_transform", None) is does:
            return base.__name__
    return getattr(transform, "__name__", type(transform).__name__)


def _probability(transform: Any) -> float:
    return float(getattr(transform, "probability", 1))


def _step(transform: Any, on_patches: Act, follows_random: bool) -> SubjectStep | PatchStep:
    name = _name_of(transform)
    if name in volumes.STEPS and _probability(transform) == 1 and not (follows_random and name in POINTWISE):
        return SubjectStep(name, partial(volumes.STEPS[name], transform))
    return PatchStep(name, on_patches(transform), _margin_of(transform))


def _margin_of(transform: Any) -> Margin:
    """What a transform of patches reads around a patch; an OptionError if it cannot act on patches."""
    name = _name_of(transform)
    if name in ("Compose", "OneOf"):
        inner = transform.transforms if name == "Compose" else transform.transforms_dict
        margins = [_margin_of(part) for part in inner]
        return partial(_together, margins, sum if name == "Compose" else max)
    if name in ON_PATCHES or name in POINTWISE:
        return no_margin
    if name in MARGINS:
        MARGINS[name](transform, (1, 1, 1), np.eye(4))  # options that it does not go with are errors
        return partial(MARGINS[name], transform)
    if name in volumes.STEPS:
        raise OptionError(
            f"{name} needs the whole volume, and here it is applied to some volumes only; let it be applied "
            f"to all, first in a Compose"
        )
    why = REFUSED.get(name, "is not known here, and may need the whole volume")
    raise OptionError(
        f"{name} {why}: on patches it would do something else; leave it out, or say "
        f"from_torchio({name}(...), on='patch') to apply it to each patch by itself"
    )


def _together(
    margins: list[Margin], how: Callable[[Iterable[int]], int], patch_size: Triple, affine: Affine
) -> Triple:
    i, j, k = (how(axis) for axis in zip(*(margin(patch_size, affine) for margin in margins), strict=True))
    return i, j, k


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


MARGINS: dict[str, Callable[[Any, Triple, Affine], Triple]] = {
    "RandomAffine": _of_affine,
    "RandomBlur": _of_blur,
    "RandomAnisotropy": _of_anisotropy,
}
