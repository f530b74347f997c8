"""Statistics of an image's voxels, computed in one pass over slabs or shards, in one process or in several.

Integers are counted one by one, so that their percentiles are exact (numpy's, with linear interpolation).
Floats, and integers that are spread over more than four million values, are counted in bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.store.value_counts import (
    BinnedValues,
    CountedValues,
    Distribution,
    State,
    is_counted_at_once,
    nonzero_box,
)

PERCENTILES = (0.5, 50.0, 99.5)
BLOCK_VOXELS = 2**18


class VoxelStatistics:
    """Collects statistics of unscaled voxels; ``result`` gives them for scaled ones.

    The foreground is all voxels whose stored value is not zero. Complex voxels count by magnitude.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._gathered: list[CountedValues | BinnedValues] = []  # the most exact first
        if dtype.kind in "iu":
            self._gathered.append(CountedValues())
        if dtype.kind not in "iu" or dtype.itemsize > 2:
            self._gathered.append(BinnedValues())
        self._box: list[tuple[int, int]] = []

    def update(self, voxels: NDArray[Any], first: tuple[int, int, int]) -> None:
        """Add a box of voxels (c, z, y, x) whose first voxel is at ``first`` (z, y, x)."""
        voxels = np.ascontiguousarray(voxels)
        self._widen_box(voxels, first)
        flat = voxels.reshape(-1)
        length = max(flat.size, 1) if is_counted_at_once(flat.dtype) else BLOCK_VOXELS
        for start in range(0, flat.size, length):
            block = flat[start : start + length]
            self._gathered = [values for values in self._gathered if values.update(block)]

    def state(self) -> dict[str, NDArray[Any]]:
        """The counts so far, as small arrays that can be stored and merged."""
        state = {"box": np.array(self._box, dtype=np.int64)}
        for values in self._gathered:
            state |= values.state()
        return state

    def merge(self, state: State) -> None:
        """Add the ``state`` of other voxels of the same image.

        The result is that of a single pass, but for mean and variance of binned values, whose last digits
        depend on the order in which states are merged.
        """
        self._include(state["box"].tolist())
        self._gathered = [values for values in self._gathered if values.merge(state)]

    def _widen_box(self, voxels: NDArray[Any], first: tuple[int, int, int]) -> None:
        for channel in voxels:
            if (found := nonzero_box(channel)) is not None:
                self._include([(a + n, b + n) for (a, b), n in zip(found, first, strict=True)])

    def _include(self, box: list[tuple[int, int]]) -> None:
        old, new = self._box or box, box or self._box
        self._box = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(old, new, strict=True)]

    def result(self, slope: float = 1.0, inter: float = 0.0) -> Json:
        """The statistics of ``slope * voxel + inter``, as plain JSON; None where nothing was counted.

        ``foreground_box`` is [first, stop] in (I, J, K).
        """
        values = self._gathered[0]
        box = [list(ends) for ends in zip(*self._box[::-1], strict=True)] or None
        return {
            **_summary(values.distribution(foreground=False), slope, inter),
            "nan": values.nan,
            "inf": values.inf,
            "foreground": _summary(values.distribution(foreground=True), slope, inter),
            "foreground_box": box,
        }

    def histogram(self, slope: float = 1.0, inter: float = 0.0) -> NDArray[np.float64]:
        """The scaled values of the foreground in ascending order, and how often each occurs: (2, n)."""
        found = self._gathered[0].distribution(foreground=True)
        if found is None:
            return np.empty((2, 0))
        table = np.stack([slope * found.values + inter, found.frequencies.astype(np.float64)])
        return table if slope > 0 else table[:, ::-1]


def merged_statistics(
    stats: Sequence[Json], histograms: Sequence[NDArray[np.float64]], zeros: Sequence[float]
) -> Json:
    """The statistics of several images as if they were one.

    ``histograms`` (2, n) are of the foreground of each image, ``zeros`` the scaled value of its background.
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
        return _summary(None)
    counts = np.array([part["count"] for part in parts], dtype=np.float64)
    means, stds = (np.array([part[key] for part in parts], dtype=np.float64) for key in ("mean", "std"))
    mean = float((counts * means).sum() / counts.sum())
    variance = float((counts * (stds**2 + (means - mean) ** 2)).sum() / counts.sum())
    values, frequencies = np.concatenate(histograms, axis=1)
    order = np.argsort(values, kind="stable")
    low, high = min(part["min"] for part in parts), max(part["max"] for part in parts)
    whole = Distribution(int(counts.sum()), low, high, mean, variance, values[order], frequencies[order])
    return _summary(whole)


def _summary(found: Distribution | None, slope: float = 1.0, inter: float = 0.0) -> Json:
    """The statistics of ``slope * value + inter``; None for each where there is no value."""
    names = [f"percentile_{percent:g}".replace(".", "_") for percent in PERCENTILES]
    if found is None:
        return {"count": 0, **dict.fromkeys(("min", "max", "mean", "std", *names))}
    low, high = sorted((slope * float(found.low) + inter, slope * float(found.high) + inter))
    ranks = np.cumsum(found.frequencies).astype(np.int64)
    percents = PERCENTILES if slope > 0 else [100 - percent for percent in PERCENTILES]
    percentiles = [_percentile(found.values, ranks, percent) for percent in percents]
    summary = {
        "min": low,
        "max": high,
        "mean": slope * found.mean + inter,
        "std": abs(slope) * math.sqrt(found.variance),
        **{name: slope * value + inter for name, value in zip(names, percentiles, strict=True)},
    }
    # Sums of huge floats overflow, and JSON has no infinity: such a figure is None.
    return {
        "count": found.count,
        **{key: value if math.isfinite(value) else None for key, value in summary.items()},
    }


def _percentile(values: NDArray[np.float64], ranks: NDArray[np.int64], percent: float) -> float:
    """As numpy.percentile. ``values`` are in ascending order, ``ranks`` their cumulative frequencies."""
    position = (int(ranks[-1]) - 1) * percent / 100
    below, above = (
        float(values[np.searchsorted(ranks, rank, side="right")])
        for rank in (math.floor(position), math.ceil(position))
    )
    return below + (above - below) * (position - math.floor(position))
