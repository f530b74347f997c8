"""A box of a new grid -> the box of the old grid that it needs -> its voxels.

Grids whose axes are parallel are resampled axis by axis, others point by point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels, reversed_axes
from zpatch.resampling import loops
from zpatch.resampling.axis_taps import SPLINE_RADIUS, AxisTaps
from zpatch.resampling.interpolation import Interpolation, sum_dtype
from zpatch.resampling.loops import PointMap

REMEMBERED_VOXELS = 2**12  # of a new axis: their taps are remembered
VOXELS_AT_ONCE = 2**8


class ResampledBox(ABC):
    """How a box of the new grid is made: from the voxels of ``needed``, a box of the source."""

    needed: PatchLocation

    @abstractmethod
    def write(self, voxels: Voxels, out: Voxels, scaling: Scaling = UNSCALED) -> None:
        """Write the box into ``out``, (C, I, J, K), from the needed voxels, (C, I, J, K).

        ``scaling`` is applied to the result.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Resampler:
    """The voxels of a source (I, J, K) on a new grid: ``matrix`` is voxel of the new grid to voxel of it.

    Without a change of voxel size an axis keeps its voxels as they are.

    >>> from zpatch.geometry.voxel_grid import VoxelGrid
    >>> matrix = VoxelGrid((4, 1, 1), np.eye(4)).spacing_matrix((2, 1, 1))
    >>> box = Resampler((4, 1, 1), matrix, Interpolation()).box(PatchLocation((0, 0, 0), (2, 1, 1)))
    >>> box.needed.size
    (4, 1, 1)
    >>> out = np.empty((1, 2, 1, 1), np.float32)
    >>> box.write(np.array([0, 2, 4, 6], np.int16).reshape(1, 4, 1, 1), out)
    >>> out.ravel().tolist()
    [1.0, 5.0]
    """

    shape: Triple
    matrix: Affine
    interpolation: Interpolation

    @property
    def axes(self) -> Triple | None:
        """The axis of the new grid that is parallel to each axis of the source; None if one is oblique."""
        used = self.matrix[:3, :3] != 0
        if not (used.sum(axis=0) == 1).all() or not (used.sum(axis=1) == 1).all():
            return None
        i, j, k = used.argmax(axis=1).tolist()
        return i, j, k

    @property
    def only_turns(self) -> bool:
        """Whether the new grid has the voxels of the source, in another order of axes or reversed."""
        whole = bool((self.matrix == np.round(self.matrix)).all())
        return self.axes is not None and whole and bool((np.abs(self.matrix[:3, :3]).sum(axis=0) == 1).all())

    def box(self, box: PatchLocation) -> ResampledBox:
        """How a box of the new grid is made."""
        axes = self.axes
        if axes is None or (self.interpolation.of_labels and self.interpolation.mode == "linear"):
            return _PointBox(self, box)
        return _AxisBox(self, box, axes)

    def needed_size(self, size: Triple) -> Triple:
        """The most voxels of the source along its axes that a box of some size needs, wherever it is."""
        if self.only_turns:
            i, j, k = (np.abs(self.matrix[:3, :3]) @ size).astype(int).tolist()
            return i, j, k
        extents = np.ceil(np.abs(self.matrix[:3, :3]) @ (np.array(size) - 1)).astype(int) + 1
        factors = np.sqrt((self.matrix[:3, :3] ** 2).sum(axis=1)).tolist()
        taps = [
            AxisTaps.at(np.array([0.25]), length, self.interpolation, factor)
            for length, factor in zip(self.shape, factors, strict=True)
        ]
        ends = zip(extents.tolist(), taps, self.shape, strict=True)
        i, j, k = (min(extent + of.weights.shape[1], length) for extent, of, length in ends)
        return i, j, k

    def same_voxels(self, box: PatchLocation) -> PatchLocation | None:
        """The box of the source that has the same voxels in another order; None if there is none."""
        if self.axes is None or not self.only_turns:
            return None
        ends = np.array([box.index_ini, np.array(box.index_fin) - 1])
        low, high = np.sort(ends @ self.matrix[:3, :3].T + self.matrix[:3, 3], axis=0)
        found = PatchLocation.between(low.tolist(), (high + 1).tolist())
        return found if found.lies_within(self.shape) else None

    def turned(self, box: PatchLocation, out: Voxels) -> tuple[PatchLocation, Voxels] | None:
        """The same voxels as a box of the source, and its view of ``out``; None unless they are the same."""
        axes, found = self.axes, self.same_voxels(box)
        if axes is None or found is None:
            return None
        view = out.transpose(0, *(1 + axis for axis in axes))
        flipped = tuple(1 + a for a in range(3) if self.matrix[a, axes[a]] < 0)
        return found, np.flip(view, flipped)


class _AxisBox(ResampledBox):
    """A box that is made axis by axis."""

    def __init__(self, resampler: Resampler, box: PatchLocation, axes: Triple) -> None:
        self._axes = axes
        taps = []
        for axis, (new, length) in enumerate(zip(axes, resampler.shape, strict=True)):
            factor, shift = float(resampler.matrix[axis, new]), float(resampler.matrix[axis, 3])
            voxels = range(box.index_ini[new], box.index_fin[new])
            taps.append(_taps_of(voxels, factor, shift, length, resampler.interpolation))
        self.needed = PatchLocation.between([t.start for t in taps], [t.stop for t in taps])
        self._taps = [t.moved(start) for t, start in zip(taps, self.needed.index, strict=True)][::-1]
        self._keeps_values = resampler.interpolation.keeps_values

    def write(self, voxels: Voxels, out: Voxels, scaling: Scaling = UNSCALED) -> None:
        """Write the box: sums, or the voxels that are picked."""
        view = reversed_axes(out.transpose(0, *(1 + axis for axis in self._axes)))
        source = reversed_axes(voxels)
        if not self._keeps_values:
            loops.sum_taps(source, self._taps, view, scaling)
        elif scaling == UNSCALED and view.dtype == source.dtype:
            loops.pick(source, [t.first for t in self._taps], view)
        else:
            picked = np.empty(view.shape, source.dtype)
            loops.pick(source, [t.first for t in self._taps], picked)
            scaling.write(picked, view)


def _taps_of(
    voxels: range, factor: float, shift: float, length: int, interpolation: Interpolation
) -> AxisTaps:
    """The taps of some voxels of a new axis; of axes that are not very long, all are remembered."""
    if voxels.start < 0 or voxels.stop > REMEMBERED_VOXELS:
        places = np.arange(voxels.start, voxels.stop, dtype=np.float64) * factor + shift
        return AxisTaps.at(places, length, interpolation, abs(factor))
    count = -(-voxels.stop // VOXELS_AT_ONCE) * VOXELS_AT_ONCE
    return _first_taps(count, factor, shift, length, interpolation).some(voxels)


@lru_cache(maxsize=32)
def _first_taps(
    count: int, factor: float, shift: float, length: int, interpolation: Interpolation
) -> AxisTaps:
    return AxisTaps.at(
        np.arange(count, dtype=np.float64) * factor + shift, length, interpolation, abs(factor)
    )


class _PointBox(ResampledBox):
    """A box that is made point by point."""

    def __init__(self, resampler: Resampler, box: PatchLocation) -> None:
        self._interpolation = mode = resampler.interpolation
        ends = np.array(np.meshgrid(*([a, b - 1] for a, b in zip(box.index, box.index_fin, strict=True))))
        corners = resampler.matrix[:3, :3] @ ends.reshape(3, -1) + resampler.matrix[:3, 3:]
        over = SPLINE_RADIUS - 2 if mode.mode == "cubic" else 0  # a spline goes on beyond the border
        limits = [(-over, n - 1 + over) for n in resampler.shape]
        low, high = np.array(limits, dtype=np.float64).T
        reach = 2 if mode.mode == "cubic" else 1
        first = np.floor(np.clip(corners.min(axis=1), low, high)).astype(int) - (reach - 1)
        stop = np.floor(np.clip(corners.max(axis=1), low, high)).astype(int) + reach + 1
        factors = np.sqrt((resampler.matrix[:3, :3] ** 2).sum(axis=1)).tolist()
        self._filters = [
            AxisTaps.filtering(range(a, b), n, mode, factor)
            for a, b, n, factor in zip(first.tolist(), stop.tolist(), resampler.shape, factors, strict=True)
        ]
        self.needed = PatchLocation.between([t.start for t in self._filters], [t.stop for t in self._filters])
        self._points = _points(resampler.matrix, box, first, (low, high))

    def write(self, voxels: Voxels, out: Voxels, scaling: Scaling = UNSCALED) -> None:
        """Write the box, from voxels that are filtered first where the interpolation says so."""
        view, source = reversed_axes(out), self._filtered(reversed_axes(voxels))
        if not self._interpolation.keeps_values:
            loops.interpolate(
                source, self._points, view, is_cubic=self._interpolation.mode == "cubic", scaling=scaling
            )
            return
        find = loops.nearest if self._interpolation.mode == "nearest" else loops.majority
        if scaling == UNSCALED and view.dtype == source.dtype:
            find(source, self._points, view)
        else:
            found = np.empty(view.shape, source.dtype)
            find(source, self._points, found)
            scaling.write(found, view)

    def _filtered(self, voxels: Voxels) -> Voxels:
        taps = [t.moved(start) for t, start in zip(self._filters, self.needed.index, strict=True)][::-1]
        shape = (len(voxels), *(len(t.first) for t in taps))
        if self._interpolation.keeps_values:
            found = np.empty(shape, voxels.dtype)
            loops.pick(voxels, [t.first for t in taps], found)
        else:
            found = np.empty(shape, sum_dtype(voxels.dtype))
            loops.sum_taps(voxels, taps, found)
        return found


def _points(
    matrix: Affine, box: PatchLocation, first: np.ndarray, limits: tuple[np.ndarray, np.ndarray]
) -> PointMap:
    """Where the voxels of a box lie, in voxels of a source that begins at ``first``."""
    start = matrix[:3, :3] @ np.array(box.index) + matrix[:3, 3] - first
    rows = np.concatenate([matrix[:3, :3], start[:, None]], axis=1)
    low, high = (limit - first for limit in limits)
    return PointMap(rows[::-1][:, [2, 1, 0, 3]].copy(), low[::-1].copy(), high[::-1].copy())
