"""Numbers of a whole volume, or of its voxels in a mask, in passes over boxes: exact, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import OptionError
from zpatch.images.image import Image
from zpatch.images.normalization import pass_boxes
from zpatch.sources.resampled_source import ResampledSource
from zpatch.store.value_counts import BinnedValues

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Masked:
    """The values of an image, as float32; only those above a number, not 0, or where a ``mask`` is not 0.

    ``labels`` are the values of the mask that count; None for all but 0.
    """

    image: Image
    mask: Image | None = None
    labels: tuple[int, ...] | None = None
    above: float | None = None
    nonzero: bool = False

    def blocks(self) -> Iterator[Values]:
        """The values, box by box; each chunk of the image is read once."""
        if self.mask is not None and self.mask.spatial_shape != self.image.spatial_shape:
            raise OptionError(
                f"the mask has {self.mask.spatial_shape} voxels and the image {self.image.spatial_shape}"
            )
        for box in pass_boxes(self.image.shape, self.image.source.chunk_shape):
            values = self.image.read(box).astype(np.float32, copy=False)
            if self.above is not None:
                yield values[values > self.above]
            elif self.nonzero:
                yield values[values != 0]
            elif self.mask is None:
                yield values.ravel()
            else:
                inside = self.mask.read(box)
                counts = inside != 0 if self.labels is None else np.isin(inside, self.labels)
                yield values[np.broadcast_to(counts, values.shape)]


@dataclass(frozen=True, slots=True)
class Moments:
    """How many values there are, their mean and standard deviation (of a sample: by n - 1), and extremes."""

    count: int
    mean: float
    std: float
    low: float
    high: float


def stored_moments(image: Image) -> Moments | None:
    """The moments of all values of an image, from its store; None where they are not there."""
    opened, stored = image.opened, image.statistics
    while opened.base is not None:
        if not (isinstance(opened.source, ResampledSource) and opened.source.has_all_voxels):
            return None
        opened = opened.base
    if image.num_channels > 1 or not {"count", "mean", "std", "min", "max"} <= stored.keys():
        return None
    count = int(stored["count"])
    std = float(stored["std"]) * math.sqrt(count / (count - 1)) if count > 1 else math.nan
    return Moments(count, float(stored["mean"]), std, float(stored["min"]), float(stored["max"]))


def moments(values: Masked) -> Moments:
    """The moments of some values, which are merged by the formulas of Chan, Golub and LeVeque (1979)."""
    gathered = BinnedValues()
    for block in values.blocks():
        gathered.update(block)
    found = gathered.distribution(foreground=False)
    if found is None:
        return Moments(0, math.nan, math.nan, math.nan, math.nan)
    sample = found.count / (found.count - 1) if found.count > 1 else math.nan
    return Moments(found.count, found.mean, math.sqrt(found.variance * sample), found.low, found.high)


def quantiles(values: Masked, wanted: Sequence[float]) -> list[float]:
    """Quantiles from 0 to 1, linear between neighbours, as numpy.quantile; exact.

    One pass counts values by the leading half of their float32, and a second one counts those of the bins
    that the quantiles are in, one by one.
    """
    bins = np.zeros(2**16, dtype=np.int64)
    for block in values.blocks():
        bins += np.bincount(_ordered(block) >> 16, minlength=2**16)
    total = int(bins.sum())
    if not total:
        return [math.nan] * len(wanted)
    places = [q * (total - 1) for q in wanted]
    ranks = sorted({rank for place in places for rank in (math.floor(place), math.ceil(place))})
    ends = np.cumsum(bins)
    bin_of = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
    chosen = np.zeros(2**16, dtype=bool)
    chosen[list(bin_of.values())] = True
    counts: Counter[int] = Counter()
    for block in values.blocks():
        words = _ordered(block)
        found, times = np.unique(words[chosen[words >> 16]], return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    at_rank = _at_ranks(ranks, bin_of, ends - bins, counts)
    return [
        float(at_rank[math.floor(p)] + (p - math.floor(p)) * (at_rank[math.ceil(p)] - at_rank[math.floor(p)]))
        for p in places
    ]


def _ordered(values: Values) -> NDArray[np.uint32]:
    """The bits of floats as numbers in the order of the floats; -0 is 0."""
    words = (values + np.float32(0)).view(np.uint32)
    return np.where(words >> 31 == 1, ~words, words | np.uint32(2**31))


def _at_ranks(
    ranks: Sequence[int], bin_of: dict[int, int], before: NDArray[np.int64], counts: Counter[int]
) -> dict[int, float]:
    """The value of each rank, from how many values lie before its bin, and the counts in the bin."""
    found = {}
    for rank in ranks:
        left = rank - int(before[bin_of[rank]])
        for word in sorted(word for word in counts if word >> 16 == bin_of[rank]):
            left -= counts[word]
            if left < 0:
                found[rank] = float(_value_of(word))
                break
    return found


def _value_of(word: int) -> np.float32:
    bits = np.uint32(word & 0x7FFFFFFF if word >> 31 else ~word & 0xFFFFFFFF)
    value: np.float32 = bits.view(np.float32)
    return value
