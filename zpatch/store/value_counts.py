"""How often each value occurs: integers one by one, by the compiled loop, and other values in bins.

The values of a bin have the leading 16 bits of their float32 form in common, and differ by less than 0.5 %
from its middle. Means and variances are merged by the formulas of Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from zpatch.store import _count as _compiled
except ImportError:
    _compiled = None  # type: ignore[assignment]

MAX_COUNTED_VALUES = 2**22

_NOT_FINITE = np.arange(2**16) & 0x7F80 == 0x7F80  # bins of infinities and NaN

State = Mapping[str, NDArray[Any]]


def is_counted_at_once(dtype: np.dtype[Any]) -> bool:
    """Whether compiled loops count the values of a type, however many there are."""
    return _compiled is not None and dtype.kind in "iu" and dtype.itemsize <= 2 and dtype.isnative


def value_counts(voxels: NDArray[Any]) -> tuple[int, NDArray[np.int64]] | None:
    """The least integer, and how often it and each larger one occurs; None if they are spread too widely.

    >>> value_counts(np.array([3, 5, 3], np.int16))
    (3, array([2, 0, 1]))
    """
    if is_counted_at_once(voxels.dtype):
        values = 2 ** (8 * voxels.dtype.itemsize)
        counts = np.zeros(values, dtype=np.int64)
        _compiled.count(np.ascontiguousarray(voxels), counts)
        origin = 0
        if voxels.dtype.kind == "i":
            counts, origin = np.roll(counts, values // 2), -values // 2
        used = np.flatnonzero(counts)
        return origin + int(used[0]), counts[used[0] : used[-1] + 1]
    low, high = int(voxels.min()), int(voxels.max())
    if high - low >= MAX_COUNTED_VALUES:
        return None
    shifted = voxels - np.uint64(low) if voxels.dtype == np.uint64 else voxels.astype(np.int64) - low
    return low, np.bincount(shifted.astype(np.int64).reshape(-1))


def byte_counts(voxels: NDArray[Any], length: int) -> NDArray[np.int64]:
    """How often each byte occurs (n, 256), in each of n pieces of ``length`` voxels along the last axis.

    >>> byte_counts(np.array([[3, 3, 5], [0, 0, 5]], np.uint8), 2)[:, [0, 3, 5]]
    array([[2, 2, 0],
           [0, 0, 2]])
    """
    pieces = range(0, voxels.shape[-1], length)
    counts = np.zeros((len(pieces), 256), dtype=np.int64)
    voxels = voxels.view(np.uint8)
    if _compiled is not None and voxels.strides[-1] == 1:
        _compiled.count_pieces(voxels, length, counts)
        return counts
    for n, first in enumerate(pieces):
        counts[n] = np.bincount(voxels[..., first : first + length].reshape(-1), minlength=256)
    return counts


def nonzero_box(voxels: NDArray[Any]) -> list[tuple[int, int]] | None:
    """First and stop, on each axis, of the voxels (z, y, x) that are not zero; None if all are zero.

    >>> nonzero_box(np.array([[[0, 0, 3, 0], [0, 0, 0, 0]]]))
    [(0, 1), (0, 1), (2, 3)]
    """
    dtype = voxels.dtype
    if _compiled is not None and dtype.isnative and dtype.kind in "iuf" and dtype.itemsize <= 8:
        mask = 2 ** (8 * dtype.itemsize - (dtype.kind == "f")) - 1  # -0.0 is zero
        return _compiled.box(np.ascontiguousarray(voxels), mask)
    foreground = voxels != 0
    columns = foreground.any(axis=0)
    if not columns.any():
        return None
    lines = foreground.any(axis=(1, 2)), columns.any(axis=1), columns.any(axis=0)
    hits = [np.flatnonzero(line) for line in lines]
    return [(int(hit[0]), int(hit[-1]) + 1) for hit in hits]


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """Values of voxels: how many there are, their extremes, mean and variance, and how often each occurs.

    ``values`` is in ascending order, ``frequencies`` how often each of them occurs.
    """

    count: int
    low: float
    high: float
    mean: float
    variance: float
    values: NDArray[np.float64]
    frequencies: NDArray[np.int64]


class CountedValues:
    """How often each integer occurs, from the least to the greatest that was seen."""

    nan = inf = 0

    def __init__(self) -> None:
        self._least = 0
        self._counts = np.zeros(0, dtype=np.int64)

    def update(self, block: NDArray[Any]) -> bool:
        """Count a block; False when the values are spread too widely to be counted."""
        found = value_counts(block)
        return found is not None and self._add(*found)

    def _add(self, least: int, counts: NDArray[np.int64]) -> bool:
        if not self._make_room(least, least + counts.size - 1):
            return False
        self._counts[least - self._least :][: counts.size] += counts
        return True

    def state(self) -> dict[str, NDArray[Any]]:
        """The least value, and for each value that occurs its offset from the least and its count."""
        used = np.flatnonzero(self._counts)
        return {
            "least": np.array(self._least),
            "offset": used.astype(np.uint32),
            "offset_count": self._counts[used],
        }

    def merge(self, state: State) -> bool:
        """Add the counts of a state; False when they are missing or the values are spread too widely."""
        if "offset" not in state:
            return False
        least, offsets = int(state["least"]), state["offset"]
        if offsets.size:
            if not self._make_room(least, least + int(offsets[-1])):
                return False
            self._counts[offsets + (least - self._least)] += state["offset_count"]
        return True

    def _make_room(self, low: int, high: int) -> bool:
        """Extend the counts to the values ``low`` to ``high``; False when they would be too many."""
        if self._counts.size:
            low, high = min(low, self._least), max(high, self._least + self._counts.size - 1)
        if high - low >= MAX_COUNTED_VALUES:
            return False
        if (low, high - low + 1) != (self._least, self._counts.size):
            counts = np.zeros(high - low + 1, dtype=np.int64)
            at = self._least - low if self._counts.size else 0
            counts[at : at + self._counts.size] = self._counts
            self._least, self._counts = low, counts
        return True

    def distribution(self, *, foreground: bool) -> Distribution | None:
        """The distribution of all values, or of nonzero values (``foreground``); None if there are none."""
        counts = self._counts.copy()
        if foreground and 0 <= -self._least < counts.size:
            counts[-self._least] = 0
        present = np.flatnonzero(counts)
        if not present.size:
            return None
        values, counts = present.astype(np.float64) + self._least, counts[present]
        count = int(counts.sum())
        mean = float((values * counts).sum() / count)
        variance = float(((values - mean) ** 2 * counts).sum() / count)
        return Distribution(count, values[0], values[-1], mean, variance, values, counts)


class BinnedValues:
    """Moments and extremes of numbers, and their counts in bins by the leading half of their float32."""

    def __init__(self) -> None:
        self.nan = self.inf = 0
        self._count = self._zeros = 0
        self._mean = self._m2 = np.float64(0)
        self._low, self._high = math.inf, -math.inf
        self._low_foreground, self._high_foreground = math.inf, -math.inf
        self._bins = np.zeros(2**16, dtype=np.int64)

    def update(self, block: NDArray[Any]) -> bool:
        """Count a block of numbers, complex ones by their magnitude; always True."""
        block = np.abs(block) if block.dtype.kind == "c" else block
        if _compiled is not None and block.dtype == np.float32 and block.dtype.isnative:
            self._update_compiled(np.ascontiguousarray(block))
        else:
            self._update_numpy(block)
        return True

    def _update_compiled(self, block: NDArray[np.float32]) -> None:
        bins = np.zeros(2**16, dtype=np.int64)
        _compiled.count(block, bins)
        count, positive_zeros, negative_zeros, inf, mean, m2, low, high = _compiled.moments(block)
        self.nan += block.size - count - inf
        self.inf += inf
        self._add_extremes(low, high, positive_zeros + negative_zeros)
        if count:
            self._merge_moments(count, np.float64(mean), np.float64(m2))
        bins[0] -= positive_zeros
        bins[2**15] -= negative_zeros
        bins[_NOT_FINITE] = 0
        self._bins += bins

    def _update_numpy(self, block: NDArray[Any]) -> None:
        with np.errstate(invalid="ignore"):  # signalling NaN
            values = block.astype(np.float64)
        if block.dtype.kind == "f":
            finite = np.isfinite(values)
            if not finite.all():
                nan = int(np.isnan(values).sum())
                self.nan += nan
                self.inf += int(values.size - finite.sum()) - nan
                values = values[finite]
        if not values.size:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean = values.mean()
            self._merge_moments(values.size, mean, ((values - mean) ** 2).sum())
        nonzero = values[values != 0]
        low, high = (nonzero.min(), nonzero.max()) if nonzero.size else (math.inf, -math.inf)
        self._add_extremes(low, high, values.size - nonzero.size)
        limit = float(np.finfo(np.float32).max)
        words = np.clip(nonzero, -limit, limit).astype(np.float32).view(np.uint32)
        self._bins += np.bincount(words >> 16, minlength=2**16)

    def _add_extremes(self, low: float, high: float, zeros: int) -> None:
        """Take account of so many zeros, and of nonzero values from ``low`` to ``high``."""
        self._zeros += zeros
        self._low_foreground, self._high_foreground = (
            min(self._low_foreground, low),
            max(self._high_foreground, high),
        )
        if zeros:
            low, high = min(low, 0.0), max(high, 0.0)
        self._low, self._high = min(self._low, low), max(self._high, high)

    def _merge_moments(self, count: int, mean: np.float64, m2: np.float64) -> None:
        if not self._count:
            self._count, self._mean, self._m2 = count, mean, m2
            return
        delta, total = mean - self._mean, self._count + count
        self._m2 += m2 + delta**2 * self._count * count / total
        self._mean += delta * count / total
        self._count = total

    def state(self) -> dict[str, NDArray[Any]]:
        """Totals, moments, extremes, and the bins in use."""
        used = np.flatnonzero(self._bins)
        return {
            "totals": np.array([self._count, self._zeros, self.nan, self.inf]),
            "moments": np.array([self._mean, self._m2]),
            "extremes": np.array([self._low, self._high, self._low_foreground, self._high_foreground]),
            "bin": used.astype(np.uint16),
            "bin_count": self._bins[used],
        }

    def merge(self, state: State) -> bool:
        """Add a state as if it were one block; always True."""
        count, zeros, nan, inf = state["totals"].tolist()
        if count:
            with np.errstate(over="ignore", invalid="ignore"):
                self._merge_moments(count, *state["moments"])
        self._zeros, self.nan, self.inf = self._zeros + zeros, self.nan + nan, self.inf + inf
        low, high, low_foreground, high_foreground = state["extremes"].tolist()
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._low_foreground = min(self._low_foreground, low_foreground)
        self._high_foreground = max(self._high_foreground, high_foreground)
        self._bins[state["bin"]] += state["bin_count"]
        return True

    def distribution(self, *, foreground: bool) -> Distribution | None:
        """The distribution of all values, or of nonzero values (``foreground``); None if there are none.

        Values are the middles of bins, cut to the extremes.
        """
        count = self._count - self._zeros if foreground else self._count
        if not count:
            return None
        mean, m2 = self._mean, self._m2
        low, high = self._low, self._high
        if foreground:
            with np.errstate(over="ignore", invalid="ignore"):
                mean *= self._count / count
                m2 -= mean**2 * self._zeros * count / self._count
            low, high = self._low_foreground, self._high_foreground
        values, counts = self._ascending(0 if foreground else self._zeros)
        variance = max(float(m2), 0.0) / count
        return Distribution(count, low, high, float(mean), variance, np.clip(values, low, high), counts)

    def _ascending(self, zeros: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Middle value and count of each bin in use, in ascending order."""
        used = np.flatnonzero(self._bins)
        words = (used.astype(np.uint32) << 16) | np.uint32(2**15)
        values = np.append(words.view(np.float32).astype(np.float64), [0.0] if zeros else [])
        counts = np.append(self._bins[used], [zeros] if zeros else []).astype(np.int64)
        order = np.argsort(values)
        return values[order], counts[order]
