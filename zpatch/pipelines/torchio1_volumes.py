"""Transforms of TorchIO 1 that act on the values of volumes, as steps on lazy images; and all such steps.

Each function takes TorchIO's transform, whose options it reads, and a subject. It gives what TorchIO gives
for the volume in memory: labels exactly, intensities to the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.boxes import Voxels
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.pipelines.pipeline import Remember, Step
from zpatch.pipelines.torchio1_grids import GRID_STEPS, each, names_of
from zpatch.pipelines.volume_statistics import Masked, Moments, moments, quantiles, stored_moments

LANDMARKS = np.array(
    [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]
)  # of the 13 percentiles, those that map intensities


# Intensities


def z_normalization(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ZNormalization: (value - mean) / std, by the values in a mask."""

    def normalised(name: str) -> Image:
        image = subject[name]
        found = _moments_of(transform.masking_method, name, subject, remember)
        if not found.count or not found.std > 0:
            raise OptionError(
                f"the standard deviation of {name!r} is 0 where its mask is; leave the subject out"
            )
        return image.rescaled(1 / found.std, -found.mean / found.std)

    return subject.with_images(**{name: normalised(name) for name in names_of(transform, subject, "scalar")})


def rescale_intensity(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """RescaleIntensity: from percentiles, or a given range, to another range."""
    out_low, out_high = transform.out_min_max

    def rescaled(name: str) -> Image:
        image, values = subject[name], masked_values(transform.masking_method, name, subject, remember)
        q = [p / 100 for p in transform.percentiles]
        low, high = remember(f"{name} cut", lambda: quantiles(values, q))
        if math.isnan(low):
            return image  # an empty mask: TorchIO warns and changes nothing
        low, high = float(np.float32(low)), float(np.float32(high))
        given = transform.in_min_max
        if given is None:
            whole = _moments_of(None, name, subject, remember)
            in_low, in_high = (min(max(value, low), high) for value in (whole.low, whole.high))
        else:
            in_low, in_high = given
        if in_high == in_low:
            return image
        slope = (out_high - out_low) / (in_high - in_low)
        return image.rescaled(slope, out_low - in_low * slope, low, high)

    return subject.with_images(**{name: rescaled(name) for name in names_of(transform, subject, "scalar")})


def histogram_standardization(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """HistogramStandardization (Nyúl and Udupa, 2000): a piecewise linear map to trained landmarks."""

    def standardised(name: str) -> Image:
        values = masked_values(transform.masking_method, name, subject, remember)
        percentiles = sorted({1.0, 99.0, *range(10, 100, 10), 25.0, 50.0, 75.0})
        found = remember(f"{name} percentiles", lambda: quantiles(values, [p / 100 for p in percentiles]))
        knots = np.array(found, dtype=np.float32)[LANDMARKS]
        return mapped_piecewise(subject[name], knots, transform.landmarks_dict[name][LANDMARKS])

    chosen = [name for name in names_of(transform, subject, "scalar") if name in transform.landmarks_dict]
    return subject.with_images(**{name: standardised(name) for name in chosen})


def mapped_piecewise(image: Image, knots: Any, targets: Any, *, right: bool = False) -> Image:
    """The image after a piecewise linear map of ``knots``, ascending values of float32, to others.

    A value that is a knot belongs to the piece above it, or with ``right`` to that below it; these differ
    where knots are equal.
    """
    targets = np.asarray(targets, dtype=np.float64)
    steps = np.diff(knots).astype(np.float64)
    steps[steps < 1e-5] = np.inf
    slopes = np.diff(targets) / steps
    mapped = partial(_piecewise, knots[1:-1], right, slopes, targets[:-1] - slopes * knots[:-1])
    return image.voxelwise(mapped)


def _piecewise(edges: Any, right: bool, slopes: Any, intercepts: Any, values: Voxels) -> Voxels:
    part = np.digitize(values.astype(np.float32), edges, right=right)
    return np.asarray(slopes[part] * values + intercepts[part], dtype=np.float32)


def clamp(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Clamp: values cut to two bounds."""
    low = -math.inf if transform.out_min is None else transform.out_min
    high = math.inf if transform.out_max is None else transform.out_max

    def clamped(image: Image) -> Image:
        return image.voxelwise(partial(_clipped, *_bounds_in(image.dtype, low, high)))

    return each(subject, names_of(transform, subject, "scalar"), clamped)


def _clipped(low: Any, high: Any, voxels: Voxels) -> Voxels:
    return voxels.clip(low, high)


def _bounds_in(dtype: np.dtype[Any], low: float, high: float) -> tuple[Any, Any]:
    """Two bounds in a type of voxels, so that the type stays."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = max(low, limits.min), min(high, limits.max)
    return dtype.type(low), dtype.type(high)


def mask(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Mask: a value where a label map is 0, or where it has none of some labels."""
    where = subject[_mask_name(transform.masking_method, subject)]
    outside = partial(_outside, transform.masking_labels, transform.outside_value)

    return each(
        subject, names_of(transform, subject, "scalar"), lambda image: image.voxelwise(outside, where)
    )


def _outside(labels: Sequence[int] | None, value: float, voxels: Voxels, inside: Voxels) -> Voxels:
    counts = inside != 0 if labels is None else np.isin(inside, labels)
    return np.where(counts, voxels, np.array(value).astype(voxels.dtype))


def _moments_of(method: Any, name: str, subject: Subject, remember: Remember) -> Moments:
    """The moments of an image where a mask is; those of a whole stored image are in its store."""
    if method is None and (known := stored_moments(subject[name])) is not None:
        return known
    values = masked_values(method, name, subject, remember)
    found: Moments = remember(f"{name} moments", lambda: moments(values))
    return found


def masked_values(method: Any, name: str, subject: Subject, remember: Remember) -> Masked:
    """The values of an image that a masking method of TorchIO chooses."""
    image = subject[name]
    if method is None:
        return Masked(image)
    if getattr(method, "__qualname__", "") == "Transform.mean":
        mean = remember(f"{name} mean", lambda: moments(Masked(image)).mean)
        return Masked(image, above=mean)
    return Masked(image, subject[_mask_name(method, subject)])


def _mask_name(method: Any, subject: Subject) -> str:
    if isinstance(method, str) and method in subject.images and subject[method].kind == "label":
        return method
    shown = getattr(method, "__qualname__", method)
    raise OptionError(
        f"masking_method {shown!r} is not supported, which needs the volume in memory; name a label map of "
        f"the subject, or use ZNormalization.mean or None"
    )


# Labels


def remap_labels(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """RemapLabels and RemoveLabels: other numbers for some labels."""
    if transform.masking_method is not None:
        raise OptionError("masking_method is not supported; remap the labels before they are converted")
    return _remapped(subject, names_of(transform, subject, "label"), dict(transform.remapping))


def sequential_labels(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """SequentialLabels: labels numbered from 0 on, in their order."""
    if transform.masking_method is not None:
        raise OptionError("masking_method is not supported; remap the labels before they are converted")
    for name in names_of(transform, subject, "label"):
        image = subject[name]
        found = remember(name, partial(_labels_in, image))
        subject = _remapped(subject, [name], {label: number for number, label in enumerate(found)})
    return subject


def _labels_in(image: Image) -> list[int]:
    found: set[float] = set()
    for block in Masked(image).blocks():
        found.update(np.unique(block).tolist())
    return sorted(int(label) for label in found)


def _remapped(subject: Subject, names: Sequence[str], remapping: Mapping[int, int]) -> Subject:
    relabel = partial(_relabel, tuple(remapping.items()))
    return each(subject, names, lambda image: image.voxelwise(relabel))


def _relabel(remapping: Sequence[tuple[int, int]], labels: Voxels) -> Voxels:
    changed = labels.copy()
    for old, new in remapping:
        changed[labels == old] = new
    return changed


def one_hot(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """OneHot: a channel for each label."""
    for name in names_of(transform, subject, "label"):
        image = subject[name]
        if image.num_channels > 1:
            raise OptionError(f"{name!r} has {image.num_channels} channels; a label map for OneHot has one")
        count = transform.num_classes
        if count is None or count < 0:
            count = 1 + max(remember(name, partial(_labels_in, image)))
        subject = each(subject, [name], partial(_as_channels, int(count)))
    return subject


def _as_channels(count: int, image: Image) -> Image:
    return image.voxelwise(partial(_hot, count))


def _hot(count: int, labels: Voxels) -> Voxels:
    return np.asarray(labels == np.arange(count).reshape(-1, 1, 1, 1), dtype=labels.dtype)


STEPS: Mapping[str, Step] = {
    **GRID_STEPS,
    "ZNormalization": z_normalization,
    "RescaleIntensity": rescale_intensity,
    "HistogramStandardization": histogram_standardization,
    "Clamp": clamp,
    "Mask": mask,
    "RemapLabels": remap_labels,
    "RemoveLabels": remap_labels,
    "SequentialLabels": sequential_labels,
    "OneHot": one_hot,
}
