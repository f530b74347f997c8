"""Which voxels of an axis, with which weights, make each voxel of a new axis.

Interpolating along an axis is linear in the voxels, whatever the mode: a new voxel is a weighted sum of a few
neighbours, its taps. A cubic B-spline through the voxels has as coefficients the voxels filtered by
``6 z / (z**2 - 1) * z**abs(n)``, with ``z = sqrt(3) - 2`` (Unser, "Splines: a perfect fit for signal and
image processing", 1999); smoothing is a filter too. A filter of the taps gives the taps of the filtered axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from zpatch.geometry.boxes import Integers
from zpatch.resampling.interpolation import Interpolation

Floats = NDArray[np.float64]

POLE = math.sqrt(3) - 2
SPLINE_RADIUS = 14  # voxels; the filter is then below 1e-8
GAUSSIAN_RADIUS = 4  # standard deviations, as in scipy.ndimage


@dataclass(frozen=True, slots=True, eq=False)
class AxisTaps:
    """The taps of the voxels of an axis: voxel n is the sum over t of ``weights[n, t]`` times voxel
    ``first[n] + t`` of the source.

    >>> taps = AxisTaps.at(np.array([0.25, 2.5]), 4, Interpolation("linear"))
    >>> taps.first.tolist(), taps.weights.tolist()
    ([0, 2], [[0.75, 0.25], [0.5, 0.5]])
    """

    first: Integers
    weights: Floats

    @classmethod
    def at(cls, places: Floats, length: int, interpolation: Interpolation, factor: float = 1) -> Self:
        """The taps at places of an axis of ``length`` voxels; ``factor`` is the new voxel size over the old.

        Places that are all voxels, of the same size, are those voxels.
        """
        is_exact = factor == 1 and bool((places == np.floor(places)).all())
        if is_exact or interpolation.mode == "nearest":
            return cls.of_voxels(np.floor(places + 0.5), length)
        taps = cls.linear(places) if interpolation.mode == "linear" else cls.cubic(places)
        if interpolation.mode == "cubic":
            taps = taps._filtered(_spline_filter())
        return taps._within(length)._smoothed(interpolation.smoothing(factor), length)

    @classmethod
    def filtering(cls, voxels: range, length: int, interpolation: Interpolation, factor: float) -> Self:
        """The taps that filter an axis before it is interpolated at points.

        ``voxels`` may reach over the border, where a cubic spline goes on.
        """
        taps = cls(np.arange(voxels.start, voxels.stop), np.ones((len(voxels), 1)))
        if interpolation.mode == "cubic":
            taps = taps._filtered(_spline_filter())
        return taps._within(length)._smoothed(interpolation.smoothing(factor), length)

    @classmethod
    def of_voxels(cls, voxels: Floats, length: int) -> Self:
        """One tap for each voxel: a voxel of the source, the nearest one for those beyond the border."""
        first = np.clip(voxels, 0, length - 1).astype(np.int64)
        return cls(first, np.ones((len(first), 1)))

    @property
    def picks(self) -> bool:
        """Whether each voxel is a voxel of the source."""
        return self.weights.shape[1] == 1 and bool((self.weights == 1).all())

    @property
    def start(self) -> int:
        """The first voxel of the source that is needed."""
        return int(self.first.min())

    @property
    def stop(self) -> int:
        """One past the last voxel of the source that is needed."""
        return int(self.first.max()) + int(self.weights.shape[1])

    def moved(self, start: int) -> Self:
        """The taps for a source that begins at voxel ``start``."""
        return type(self)(self.first - start, self.weights)

    def some(self, voxels: range) -> Self:
        """The taps of some voxels of the new axis."""
        part = slice(voxels.start, voxels.stop)
        return type(self)(self.first[part], self.weights[part])

    @classmethod
    def linear(cls, places: Floats) -> Self:
        """The two voxels around each place."""
        base = np.floor(places)
        part = places - base
        return cls(base.astype(np.int64), np.stack([1 - part, part], axis=1))

    @classmethod
    def cubic(cls, places: Floats) -> Self:
        """The four coefficients of a cubic B-spline around each place."""
        base = np.floor(places)
        f = places - base
        g = 1 - f
        weights = [g**3 / 6, (4 - 6 * f**2 + 3 * f**3) / 6, (4 - 6 * g**2 + 3 * g**3) / 6, f**3 / 6]
        return cls(base.astype(np.int64) - 1, np.stack(weights, axis=1))

    def _smoothed(self, sigma: float, length: int) -> Self:
        return self._filtered(_gaussian_filter(sigma))._within(length) if sigma else self

    def _filtered(self, kernel: Floats) -> Self:
        """The taps for a source that is first filtered by a symmetric kernel."""
        count, taps = self.weights.shape
        weights = np.zeros((count, taps + len(kernel) - 1))
        for t, weight in enumerate(kernel):
            weights[:, t : t + taps] += weight * self.weights
        return type(self)(self.first - len(kernel) // 2, weights)

    def _within(self, length: int) -> Self:
        """The taps in an axis of some length, whose edge voxels are repeated beyond the border."""
        count, taps = self.weights.shape
        kept = min(taps, length)
        first = np.clip(self.first, 0, length - kept)
        if kept == taps and (first == self.first).all():
            return self
        weights = np.zeros((count, kept))
        rows = np.arange(count)
        for t in range(taps):
            at = np.clip(self.first + t, 0, length - 1) - first
            np.add.at(weights, (rows, np.clip(at, 0, kept - 1)), self.weights[:, t])
        return type(self)(first, weights)


def _spline_filter() -> Floats:
    n = np.abs(np.arange(-SPLINE_RADIUS, SPLINE_RADIUS + 1))
    return np.asarray(6 * POLE / (POLE**2 - 1) * POLE**n)


def _gaussian_filter(sigma: float) -> Floats:
    radius = int(GAUSSIAN_RADIUS * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())
