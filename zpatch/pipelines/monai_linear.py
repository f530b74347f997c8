"""Transforms of MONAI that map values linearly, by numbers of the whole volume, as steps on lazy images.

The numbers are exact: they come from the store, or from a pass over the volume.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from zpatch.errors import OptionError
from zpatch.geometry.boxes import Voxels
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.pipelines.monai_grids import keys_of
from zpatch.pipelines.pipeline import Remember, Step
from zpatch.pipelines.volume_statistics import Masked, Moments, moments, quantiles, stored_moments


@dataclass(frozen=True, slots=True)
class Linear:
    """``slope * value + inter`` of values that are first cut to ``low`` and ``high``."""

    slope: float
    inter: float
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def between(cls, a: Sequence[float], b: Sequence[float] | None, *, clip: bool = False) -> Linear:
        """From the range ``a`` to the range ``b``; None is 0 to 1, without clipping."""
        width = a[1] - a[0]
        if width == 0:
            return cls(1.0, -a[0] + (b[0] if b else 0.0))
        low, high = b or (0.0, 1.0)
        slope = (high - low) / width
        cut = tuple(sorted(a)) if clip and b else (-math.inf, math.inf)
        return cls(slope, low - slope * a[0], *cut)


def _mapped(
    transform: Any, subject: Subject, remember: Remember, of: Callable[[Any, Masked, Remember], Linear]
) -> Subject:
    """The subject after the linear map that ``of(options, values, remember)`` makes for each image.

    With ``channel_wise`` it is made for each channel by itself.
    """
    options = _options_of(transform)
    nonzero = bool(getattr(options, "nonzero", False))

    def changed(name: str) -> Image:
        image = subject[name]
        wise = getattr(options, "channel_wise", False) and image.num_channels > 1
        parts = [image.select(channels=[c]) for c in range(image.num_channels)] if wise else [image]
        maps = [
            of(_of_channel(options, c), Masked(part, nonzero=nonzero), _prefixed(remember, f"{name} {c}"))
            for c, part in enumerate(parts)
        ]
        made = _by(maps, image, nonzero)
        dtype = getattr(options, "dtype", None)
        return made if dtype is None else _as_type(made, np.dtype(_numpy_type(dtype)))

    return subject.with_images(**{name: changed(name) for name in keys_of(transform, subject)})


def _options_of(transform: Any) -> Any:
    """The transform of arrays that a transform of dictionaries calls, which has the options."""
    return getattr(transform, "normalizer", None) or transform.scaler


def _of_channel(options: Any, channel: int) -> Any:
    """The options of one channel: its subtrahend and divisor."""
    if not getattr(options, "channel_wise", False):
        return options
    alone = copy.copy(options)
    for name in ("subtrahend", "divisor"):
        given = getattr(options, name, None)
        if given is not None:
            setattr(alone, name, given[channel])
    return alone


def _prefixed(remember: Remember, prefix: str) -> Remember:
    return lambda name, make: remember(f"{prefix} {name}", make)


def _by(maps: Sequence[Linear], image: Image, nonzero: bool) -> Image:
    first = maps[0]
    if len(set(maps)) == 1 and not nonzero:
        return image.rescaled(first.slope, first.inter, first.low, first.high)
    columns = np.array([[m.slope, m.inter, m.low, m.high] for m in maps])
    apply = partial(_linear_block, columns.T.reshape(4, -1, 1, 1, 1), nonzero)
    return image.voxelwise(apply)


def _linear_block(maps: Any, nonzero: bool, voxels: Voxels) -> Voxels:
    slope, inter, low, high = maps
    made = slope * np.clip(voxels.astype(np.float64), low, high) + inter
    return (np.where(voxels != 0, made, 0.0) if nonzero else made).astype(np.float32)


def _numpy_type(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _as_type(image: Image, dtype: np.dtype[Any]) -> Image:
    return image if image.dtype == dtype else image.voxelwise(partial(_cast, dtype))


def _cast(dtype: np.dtype[Any], voxels: Voxels) -> Voxels:
    return voxels.astype(dtype)


def _moments_of(values: Masked, remember: Remember) -> Moments:
    known = None if values.nonzero else stored_moments(values.image)
    found: Moments = known or remember("moments", lambda: moments(values))
    return found


def normalize_intensity(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """NormalizeIntensityd: (value - mean) / standard deviation (by n) of all values, or those not 0."""
    return _mapped(transform, subject, remember, _normalised)


def _normalised(options: Any, values: Masked, remember: Remember) -> Linear:
    if any(np.ndim(of) for of in (options.subtrahend, options.divisor) if of is not None):
        raise OptionError("arrays of subtrahends and divisors need channel_wise=True, one for each channel")
    mean, divisor = options.subtrahend, options.divisor
    if mean is None or divisor is None:
        found = _moments_of(values, remember)
        if not found.count:
            return Linear(1.0, 0.0)
        by_n = found.std * math.sqrt((found.count - 1) / found.count) if found.count > 1 else 0.0
        mean, divisor = found.mean if mean is None else mean, by_n if divisor is None else divisor
    divisor = float(divisor) or 1.0
    return Linear(1 / divisor, -float(mean) / divisor)


def scale_intensity(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ScaleIntensityd: from the extremes of the values to a range, or by a factor."""
    return _mapped(transform, subject, remember, _scaled)


def _scaled(options: Any, values: Masked, remember: Remember) -> Linear:
    if options.minv is None and options.maxv is None:
        return Linear(1.0 + (options.factor or 0.0), 0.0)
    found = _moments_of(values, remember)
    if found.low == found.high:
        return Linear(1.0 if options.minv is None else float(options.minv), 0.0)
    is_open = options.minv is None or options.maxv is None
    return Linear.between((found.low, found.high), None if is_open else (options.minv, options.maxv))


def scale_intensity_range(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ScaleIntensityRanged: from a range to another one."""
    return _mapped(transform, subject, remember, _between_ranges)


def _between_ranges(options: Any, values: Masked, remember: Remember) -> Linear:
    b = None if options.b_min is None or options.b_max is None else (options.b_min, options.b_max)
    return Linear.between((options.a_min, options.a_max), b, clip=options.clip)


def scale_percentiles(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ScaleIntensityRangePercentilesd: from percentiles of the values to a range."""
    return _mapped(transform, subject, remember, _between_percentiles)


def _between_percentiles(options: Any, values: Masked, remember: Remember) -> Linear:
    b = None if options.b_min is None or options.b_max is None else (options.b_min, options.b_max)
    fractions = [options.lower / 100, options.upper / 100]
    if options.relative and b is not None:
        b = (b[1] - b[0]) * fractions[0] + b[0], (b[1] - b[0]) * fractions[1] + b[0]
    found = remember("percentiles", lambda: quantiles(values, fractions))
    return Linear.between(found, b, clip=options.clip)


def clip_percentiles(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ClipIntensityPercentilesd: values cut to percentiles, in their type."""
    if _options_of(transform).sharpness_factor is not None:
        raise OptionError("sharpness_factor is not supported; leave it out, so that values are cut")
    clipped = _mapped(transform, subject, remember, _cut)
    kept = {name: _as_type(clipped[name], subject[name].dtype) for name in keys_of(transform, subject)}
    return clipped.with_images(**kept)


def _cut(options: Any, values: Masked, remember: Remember) -> Linear:
    fractions = [0.0 if options.lower is None else options.lower / 100]
    fractions.append(1.0 if options.upper is None else options.upper / 100)
    return Linear(1.0, 0.0, *remember("percentiles", lambda: quantiles(values, fractions)))


BY_STATISTICS: Mapping[str, Step] = {
    "NormalizeIntensityd": normalize_intensity,
    "ScaleIntensityd": scale_intensity,
    "ScaleIntensityRangePercentilesd": scale_percentiles,
    "ClipIntensityPercentilesd": clip_percentiles,
}
