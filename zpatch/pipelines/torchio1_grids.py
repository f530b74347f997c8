"""Transforms of TorchIO 1 that change the grid of volumes, as steps on lazy images: the same grids exactly.

Each function takes TorchIO's transform, whose options it reads, and a subject.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.voxel_grid import VoxelGrid
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.pipelines.pipeline import Remember, Step
from zpatch.pipelines.volume_statistics import Masked, moments, quantiles

INTERPOLATIONS = {"nearest": "nearest", "linear": "linear"}
PADDING = ("edge", "reflect", "symmetric", "wrap")


def names_of(transform: Any, subject: Subject, *kinds: str) -> list[str]:
    """The images that a transform acts on: of some kinds, or all, by its ``include`` and ``exclude``."""
    include, exclude = transform.include, transform.exclude or ()
    return [
        name
        for name, image in subject.images.items()
        if (not kinds or image.kind in kinds) and (include is None or name in include) and name not in exclude
    ]


def each(subject: Subject, names: Sequence[str], fn: Callable[[Image], Image]) -> Subject:
    """The subject with ``fn`` of some of its images."""
    return subject.with_images(**{name: fn(subject[name]) for name in names})


def to_canonical(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ToCanonical: axes to RAS."""
    axes = getattr(transform, "orientation", "RAS")
    return each(subject, list(subject), lambda image: image.oriented(axes))


def to_orientation(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ToOrientation: axes to other letters."""
    return each(subject, list(subject), lambda image: image.oriented(transform.orientation))


def resample(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Resample to a spacing, or to the grid of an image of the subject."""
    interpolation = _interpolation(transform.image_interpolation)
    label_interpolation = _interpolation(transform.label_interpolation)
    if getattr(transform, "pre_affine_name", None) is not None:
        raise OptionError("pre_affine_name is not supported; apply it to the affines of the images")
    target = transform.target

    def resampled(image: Image) -> Image:
        grid = _target_grid(target, image, subject)
        if grid.shape == image.spatial_shape and np.allclose(grid.affine, image.affine):
            return image
        is_scalar = image.kind == "scalar"
        antialias = bool(getattr(transform, "antialias", False)) and is_scalar
        mode = interpolation if is_scalar else label_interpolation
        return image.on_grid_of(grid, interpolation=mode, antialias=antialias)

    kinds = ("scalar",) if getattr(transform, "scalars_only", False) else ()
    return each(subject, names_of(transform, subject, *kinds), resampled)


def _interpolation(name: str) -> str:
    if name not in INTERPOLATIONS:
        raise OptionError(f"interpolation {name!r} is not supported, but {', '.join(INTERPOLATIONS)} are")
    return INTERPOLATIONS[name]


def _target_grid(target: Any, image: Image, subject: Subject) -> VoxelGrid:
    if isinstance(target, str) and target in subject.images:
        return subject[target].grid
    if isinstance(target, str | os.PathLike) or hasattr(target, "spatial_shape"):
        raise OptionError(
            "its target is a file or an image elsewhere; name an image of the subject, or a spacing"
        )
    if isinstance(target, tuple) and len(target) == 2:
        i, j, k = map(int, target[0])
        return VoxelGrid((i, j, k), np.asarray(target[1], dtype=np.float64))
    return _centred_grid(image, target)


def _centred_grid(image: Image, spacing: Any) -> VoxelGrid:
    """The grid of another spacing around the same centre that TorchIO makes: no wider than the image."""
    sizes, old = np.broadcast_to(np.array(spacing, dtype=np.float64), 3), np.array(image.spacing)
    shape = np.array(image.spatial_shape)
    new = np.where(shape == 1, 1, np.floor(shape * old / sizes)).astype(int)
    directions = image.affine[:3, :3] / old
    centre = image.affine @ [*((shape - 1) / 2), 1]
    affine = np.eye(4)
    affine[:3, :3] = directions * sizes
    affine[:3, 3] = centre[:3] - affine[:3, :3] @ ((new - 1) / 2)
    i, j, k = new.tolist()
    return VoxelGrid((i, j, k), affine)


def crop_or_pad(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """CropOrPad to a shape, around the middle of the volume."""
    if transform.mask_name is not None:
        raise OptionError("mask_name is not supported; crop the cohort to the mask before it is converted")
    if getattr(transform, "location", "center") != "center":
        raise OptionError("location='random' is a random patch; leave it to the sampler")
    shape = np.array(subject.spatial_shape)
    spacing = np.array(next(iter(subject.images.values())).spacing)
    scale = {"voxels": 1.0, "mm": 1.0, "cm": 10.0}[getattr(transform, "units", "voxels")]
    in_voxels = getattr(transform, "units", "voxels") == "voxels"
    wanted = [
        n if w is None else w if in_voxels else max(1, round(w * scale / s))
        for w, n, s in zip(transform.target_shape, shape, spacing, strict=True)
    ]
    change = np.array(wanted, dtype=int) - shape
    change = np.minimum(change, 0) if transform.only_crop else change
    change = np.maximum(change, 0) if transform.only_pad else change
    first = np.where(change > 0, -((change + 1) // 2), (1 - change) // 2)
    return _windows(transform, subject, first, shape + change, remember)


def crop(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Crop voxels from each side."""
    bounds = np.array(transform.bounds_parameters)
    shape = np.array(subject.spatial_shape) - bounds[::2] - bounds[1::2]
    return _windows(transform, subject, bounds[::2], shape, remember)


def pad(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Pad voxels on each side."""
    bounds = np.array(transform.bounds_parameters)
    shape = np.array(subject.spatial_shape) + bounds[::2] + bounds[1::2]
    return _windows(transform, subject, -bounds[::2], shape, remember)


def ensure_shape_multiple(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """EnsureShapeMultiple: crop or pad to the next multiple."""
    shape, multiple = np.array(subject.spatial_shape), np.array(transform.target_multiple)
    ratio = shape // multiple if transform.method == "crop" else -(-shape // multiple)
    change = np.maximum(ratio * multiple, 1) - shape
    first = np.where(change > 0, -((change + 1) // 2), (1 - change) // 2)
    return _windows(transform, subject, first, shape + change, remember)


def _windows(transform: Any, subject: Subject, first: Any, shape: Any, remember: Remember) -> Subject:
    corner, size = [int(n) for n in first], [int(n) for n in shape]
    if min(size) < 1:
        raise OptionError(f"nothing is left of {subject.spatial_shape} voxels")
    mode = getattr(transform, "padding_mode", 0)

    def window(name: str) -> Image:
        image = subject[name]
        reaches_over = any(
            c < 0 or c + s > n for c, s, n in zip(corner, size, image.spatial_shape, strict=True)
        )
        if not reaches_over or mode in PADDING:
            return image.window(corner, size, padding_mode=str(mode) if reaches_over else "edge")
        fill = _constant(mode, image, partial(remember, name))
        kept = float(np.array(fill).astype(image.dtype)) if image.dtype.kind in "iu" else fill
        return image.window(corner, size, fill=kept)

    return subject.with_images(**{name: window(name) for name in names_of(transform, subject)})


def _constant(mode: Any, image: Image, remember: Callable[[Callable[[], Any]], Any]) -> float:
    if isinstance(mode, int | float):
        return float(mode)
    if mode == "median":
        [found] = remember(lambda: quantiles(Masked(image), [0.5]))
        return float(found)
    which = {"minimum": "low", "maximum": "high", "mean": "mean"}
    if mode not in which:
        raise OptionError(
            f"padding_mode {mode!r} is not supported; use a number or one of {', '.join([*PADDING, *which])}"
        )
    found = remember(lambda: moments(Masked(image)))
    return float(getattr(found, which[mode]))


def copy_affine(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """CopyAffine: the affine of one image for all."""
    reference = subject[transform.target]
    return each(
        subject,
        [name for name in names_of(transform, subject) if name != transform.target],
        lambda image: type(image)(image.opened, affine=reference.affine),
    )


GRID_STEPS: Mapping[str, Step] = {
    "ToCanonical": to_canonical,
    "ToOrientation": to_orientation,
    "Resample": resample,
    "CropOrPad": crop_or_pad,
    "Crop": crop,
    "Pad": pad,
    "EnsureShapeMultiple": ensure_shape_multiple,
    "CopyAffine": copy_affine,
}
