"""Statistics of an image's voxels, gathered slab by slab while they stream past, here or elsewhere.

Integers are counted value by value, so their percentiles are exact (numpy's, linear interpolation). Floats,
and integers spread over more than four million values, are counted by the leading 16 bits of their float32
form, which is within 0.5 % of the value. Mean and variance of those are merged as Chan, Golub and LeVeque
(1979) do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.store.value_counts import MAX_COUNTED_VALUES, is_counted_at_once, value_counts

PERCENTILES = (0.5, 50.0, 99.5)
BLOCK_VOXELS = 2**18


State = Mapping[str, NDArray[Any]]


class VoxelStatistics:
    """Collects statistics of unscaled voxels; ``result`` gives them for scaled ones.

    Foreground is what is stored as something else than zero. Complex voxels count by magnitude.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._counted = _CountedValues() if dtype.kind in "iu" else None
        self._binned = _BinnedValues() if dtype.kind not in "iu" or dtype.itemsize > 2 else None
        self._box: list[tuple[int, int]] = []

    def update(self, voxels: NDArray[Any], first: tuple[int, int, int]) -> None:
        """Take in a box of voxels (c, z, y, x) whose first one lies at ``first`` (z, y, x)."""
        self._widen_box(voxels, first)
        flat = voxels.reshape(-1)
        length = max(flat.size, 1) if is_counted_at_once(flat.dtype) else BLOCK_VOXELS
        for start in range(0, flat.size, length):
            block = flat[start : start + length]
            if self._counted is not None and not self._counted.update(block):
                self._counted = None
            if self._binned is not None:
                self._binned.update(np.abs(block) if block.dtype.kind == "c" else block)

    def state(self) -> dict[str, NDArray[Any]]:
        """What was gathered, as small arrays to be kept: of counts and bins those in use."""
        state = {"box": np.array(self._box, dtype=np.int64)}
        for values in (self._counted, self._binned):
            state |= values.state() if values is not None else {}
        return state

    def merge(self, state: State) -> None:
        """Take in the state of other voxels of the same image.

        Integers come out as in one pass, and so does everything else but mean and variance of what is
        binned: these depend on the order in which states come, in the last digits.
        """
        self._include(state["box"].tolist())
        if self._counted is not None and not self._counted.merge(state):
            self._counted = None
        if self._binned is not None:
            self._binned.merge(state)

    def _widen_box(self, voxels: NDArray[Any], first: tuple[int, int, int]) -> None:
        for channel in voxels:
            foreground = channel != 0
            columns = foreground.any(axis=0)
            if not columns.any():
                continue
            lines = foreground.any(axis=(1, 2)), columns.any(axis=1), columns.any(axis=0)
            self._include([_extent(line, offset) for line, offset in zip(lines, first, strict=True)])

    def _include(self, box: list[tuple[int, int]]) -> None:
        old, new = self._box or box, box or self._box
        self._box = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(old, new, strict=True)]

    def result(self, slope: float = 1.0, inter: float = 0.0) -> Json:
        """The statistics of ``slope * voxel + inter``, as plain JSON; None where nothing was counted.

        ``foreground_box`` is [first, stop] in (I, J, K).
        """
        values = self._counted or self._binned
        assert values is not None
        box = [list(ends) for ends in zip(*self._box[::-1], strict=True)] or None
        return {
            **values.summary(slope, inter, foreground=False),
            "nan": self._binned.nan if self._binned else 0,
            "inf": self._binned.inf if self._binned else 0,
            "foreground": values.summary(slope, inter, foreground=True),
            "foreground_box": box,
        }

    def histogram(self, slope: float = 1.0, inter: float = 0.0) -> NDArray[np.float64]:
        """The foreground's scaled values in ascending order, and how often each occurs: (2, n)."""
        values = self._counted or self._binned
        assert values is not None
        found, counts = values.foreground()
        table = np.stack([slope * found + inter, counts.astype(np.float64)])
        return table if slope > 0 else table[:, ::-1]


def merged_statistics(
    stats: Sequence[Json], histograms: Sequence[NDArray[np.float64]], zeros: Sequence[float]
) -> Json:
    """The statistics of several images as if they were one.

    ``histograms`` are those of their foregrounds, ``zeros`` the value of each one's background voxels.
    Percentiles are as exact as the histograms are.
    """
    foregrounds = [part["foreground"] for part in stats]
    backgrounds = [
        np.array([[zero], [part["count"] - part["foreground"]["count"]]])
        for zero, part in zip(zeros, stats, strict=True)
    ]
    return {
        **_merged(stats, [*histograms, *backgrounds]),
        "nan": sum(part["nan"] for part in stats),
        "inf": sum(part["inf"] for part in stats),
        "foreground": _merged(foregrounds, histograms),
    }


def _merged(parts: Sequence[Json], histograms: Sequence[NDArray[np.float64]]) -> Json:
    parts = [part for part in parts if part["count"]]
    if not parts:
        return _nothing()
    counts = np.array([part["count"] for part in parts], dtype=np.float64)
    means, stds = (np.array([part[key] for part in parts], dtype=np.float64) for key in ("mean", "std"))
    mean = float((counts * means).sum() / counts.sum())
    variance = float((counts * (stds**2 + (means - mean) ** 2)).sum() / counts.sum())
    values, frequencies = np.concatenate(histograms, axis=1)
    order = np.argsort(values, kind="stable")
    ranks = np.cumsum(frequencies[order]).astype(np.int64)
    percentiles = [_exact_percentile(values[order], ranks, q, 1.0) for q in PERCENTILES]
    low, high = min(part["min"] for part in parts), max(part["max"] for part in parts)
    return _scaled(int(counts.sum()), low, high, mean, variance, percentiles, 1.0, 0.0)


def _extent(line: NDArray[np.bool_], offset: int) -> tuple[int, int]:
    hits = np.flatnonzero(line)
    return int(hits[0]) + offset, int(hits[-1]) + 1 + offset


class _CountedValues:
    """How often each integer occurs, from the least to the greatest that was seen."""

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
        """How often each value occurs that does, by its offset from the least."""
        used = np.flatnonzero(self._counts)
        return {
            "least": np.array(self._least),
            "offset": used.astype(np.uint32),
            "offset_count": self._counts[used],
        }

    def merge(self, state: State) -> bool:
        """Add the counts of a state; False when the values are spread too widely, there or together."""
        if "offset" not in state:
            return False
        least, offsets = int(state["least"]), state["offset"]
        if offsets.size:
            if not self._make_room(least, least + int(offsets[-1])):
                return False
            self._counts[offsets + (least - self._least)] += state["offset_count"]
        return True

    def _make_room(self, low: int, high: int) -> bool:
        """Let the counts reach from ``low`` to ``high`` at least; False when they would be too many."""
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

    def _present(self, *, foreground: bool) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        counts = self._counts.copy()
        if foreground and 0 <= -self._least < counts.size:
            counts[-self._least] = 0
        present = np.flatnonzero(counts)
        return present.astype(np.float64) + self._least, counts[present]

    def foreground(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """All values but zero, and their counts."""
        return self._present(foreground=True)

    def summary(self, slope: float, inter: float, *, foreground: bool) -> Json:
        values, counts = self._present(foreground=foreground)
        if not values.size:
            return _nothing()
        count = int(counts.sum())
        mean = float((values * counts).sum() / count)
        variance = float(((values - mean) ** 2 * counts).sum() / count)
        ranks = np.cumsum(counts)
        percentiles = [_exact_percentile(values, ranks, q, slope) for q in PERCENTILES]
        return _scaled(count, values[0], values[-1], mean, variance, percentiles, slope, inter)


def _exact_percentile(
    values: NDArray[np.float64], ranks: NDArray[np.int64], percent: float, slope: float
) -> float:
    percent = percent if slope > 0 else 100 - percent
    position = (int(ranks[-1]) - 1) * percent / 100
    below, above = (
        float(values[np.searchsorted(ranks, rank, side="right")])
        for rank in (math.floor(position), math.ceil(position))
    )
    return below + (above - below) * (position - math.floor(position))


class _BinnedValues:
    """Moments, extremes, and how often each leading half of a float32 occurs."""

    def __init__(self) -> None:
        self.nan = self.inf = 0
        self._count = self._zeros = 0
        self._mean = self._m2 = np.float64(0)
        self._low, self._high = math.inf, -math.inf
        self._low_foreground, self._high_foreground = math.inf, -math.inf
        self._bins = np.zeros(2**16, dtype=np.int64)

    def update(self, block: NDArray[Any]) -> None:
        with np.errstate(invalid="ignore"):  # signalling NaN
            values = block.astype(np.float64)
        if block.dtype.kind == "f" or block.dtype.kind == "c":
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
        self._low, self._high = min(self._low, values.min()), max(self._high, values.max())
        nonzero = values[values != 0]
        self._zeros += values.size - nonzero.size
        if nonzero.size:
            self._low_foreground = min(self._low_foreground, nonzero.min())
            self._high_foreground = max(self._high_foreground, nonzero.max())
        limit = float(np.finfo(np.float32).max)
        words = np.clip(nonzero, -limit, limit).astype(np.float32).view(np.uint32)
        self._bins += np.bincount(words >> 16, minlength=2**16)

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

    def merge(self, state: State) -> None:
        """Take in a state as if it were one block."""
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

    def summary(self, slope: float, inter: float, *, foreground: bool) -> Json:
        count = self._count - self._zeros if foreground else self._count
        if not count:
            return _nothing()
        mean, m2 = self._mean, self._m2
        low, high = self._low, self._high
        if foreground:
            with np.errstate(over="ignore", invalid="ignore"):
                mean *= self._count / count
                m2 -= mean**2 * self._zeros * count / self._count
            low, high = self._low_foreground, self._high_foreground
        values, counts = self._ascending(0 if foreground else self._zeros)
        ranks = np.cumsum(counts)
        values = np.clip(values, low, high)
        percentiles = [_exact_percentile(values, ranks, q, slope) for q in PERCENTILES]
        variance = max(float(m2), 0.0) / count
        return _scaled(count, low, high, float(mean), variance, percentiles, slope, inter)

    def foreground(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The middle of each bin but that of zeros, within the extremes, and its count."""
        values, counts = self._ascending(0)
        return np.clip(values, self._low_foreground, self._high_foreground), counts

    def _ascending(self, zeros: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Middle value and count of each bin in use, in ascending order."""
        used = np.flatnonzero(self._bins)
        words = (used.astype(np.uint32) << 16) | np.uint32(2**15)
        values = np.append(words.view(np.float32).astype(np.float64), [0.0] if zeros else [])
        counts = np.append(self._bins[used], [zeros] if zeros else []).astype(np.int64)
        order = np.argsort(values)
        return values[order], counts[order]


def _nothing() -> Json:
    names = ("min", "max", "mean", "std", *map(_percentile_name, PERCENTILES))
    return {"count": 0, **dict.fromkeys(names)}


def _percentile_name(percent: float) -> str:
    return f"percentile_{percent:g}".replace(".", "_")


def _scaled(
    count: int,
    low: float,
    high: float,
    mean: float,
    variance: float,
    percentiles: list[float],
    slope: float,
    inter: float,
) -> Json:
    ends = sorted((slope * float(low) + inter, slope * float(high) + inter))
    named = zip(map(_percentile_name, PERCENTILES), percentiles, strict=True)
    found = {
        "min": ends[0],
        "max": ends[1],
        "mean": slope * mean + inter,
        "std": abs(slope) * math.sqrt(variance),
        **{name: slope * value + inter for name, value in named},
    }
    # Sums of huge floats overflow; JSON has no infinity, so what cannot be told is None.
    return {"count": count, **{key: value if math.isfinite(value) else None for key, value in found.items()}}
