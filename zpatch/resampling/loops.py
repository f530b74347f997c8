"""The loops over voxels (c, z, y, x): compiled (`_resample.c`), or in numpy where there was no compiler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.boxes import Integers, Voxels
from zpatch.resampling.axis_taps import AxisTaps, Floats
from zpatch.resampling.interpolation import sum_dtype

try:
    from zpatch.resampling import _resample as _compiled
except ImportError:  # installed without a compiler
    _compiled = None  # type: ignore[assignment]

COMPILED_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
TIE = 1e-9  # sums of weights of two classes that differ by less are equal
POINTS_AT_ONCE = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class PointMap:
    """Where the voxels of a target lie in a source: ``matrix @ (z, y, x, 1)``, (3, 4).

    Coordinates are limited to ``low`` and ``high`` along z, y, x.
    """

    matrix: Floats
    low: Floats
    high: Floats

    def packed(self) -> Floats:
        """All 18 numbers, as the compiled loops take them."""
        return np.concatenate([self.matrix.ravel(), self.low, self.high])

    def lines(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, slice], Floats]]:
        """The coordinates (3, lines, X) of some lines of a target (Z, Y, X), with their z and range of y."""
        depth, height, width = shape
        step = max(1, POINTS_AT_ONCE // max(1, width))
        x = self.matrix[:, 2, None, None] * np.arange(width)
        for z in range(depth):
            for first in range(0, height, step):
                y = np.arange(first, min(first + step, height))[:, None]
                start = self.matrix[:, 0, None, None] * z + self.matrix[:, 1, None, None] * y
                at = start + x + self.matrix[:, 3, None, None]
                limits = self.low[:, None, None], self.high[:, None, None]
                yield (z, slice(first, first + len(y))), np.clip(at, *limits)


def _memory(out: Voxels, dtype: np.dtype[Any]) -> Voxels:
    """Where a loop writes: ``out``, or new memory if that is of another type, or not dense along x."""
    is_dense = out.shape[-1] == 1 or out.strides[-1] == out.itemsize
    return out if out.dtype == dtype and is_dense and out.flags.writeable else np.empty(out.shape, dtype)


def _hand_over(target: Voxels, out: Voxels) -> None:
    if target is not out:
        UNSCALED.write(target, out)


def sum_taps(voxels: Voxels, taps: Sequence[AxisTaps], out: Voxels, scaling: Scaling = UNSCALED) -> None:
    """Resample voxels axis by axis, along z, y, x, scale the result, and write it into ``out``."""
    dtype = sum_dtype(voxels.dtype)
    target = _memory(out, dtype)
    if _compiled is not None and voxels.dtype.str[1:] in COMPILED_TYPES and voxels.flags.c_contiguous:
        tables: list[Any] = []
        for axis in taps:
            tables += [np.ascontiguousarray(axis.first), np.ascontiguousarray(axis.weights)]
        _compiled.lines(voxels, voxels.dtype.str[1:], target, *tables, *scaling)
    else:
        values = voxels.astype(dtype)
        for number, axis in enumerate(taps, start=1):
            values = _along(values, axis, number)
        target[...] = scaling.apply(values)
    _hand_over(target, out)


def _along(values: Voxels, taps: AxisTaps, axis: int) -> Voxels:
    shape = [1] * values.ndim
    shape[axis] = -1
    found: Any = 0
    for t in range(taps.weights.shape[1]):
        weights = taps.weights[:, t].astype(values.dtype).reshape(shape)
        found = found + weights * np.take(values, taps.first + t, axis)
    return np.asarray(found)


def pick(voxels: Voxels, places: Sequence[Integers], out: Voxels) -> None:
    """Write the voxels of some planes, lines and columns into ``out``, of their type."""
    z, y, x = places
    if _compiled is not None and voxels.flags.c_contiguous and out.dtype == voxels.dtype:
        target = _memory(out, out.dtype)
        _compiled.pick(voxels, target, *map(np.ascontiguousarray, places))
        _hand_over(target, out)
    else:
        out[...] = voxels[:, z][:, :, y][..., x]


def nearest(voxels: Voxels, points: PointMap, out: Voxels) -> None:
    """Write the voxel that is nearest to each point into ``out``, of their type."""
    if _compiled is not None and voxels.flags.c_contiguous and out.dtype == voxels.dtype:
        target = _memory(out, out.dtype)
        _compiled.nearest(voxels, target, points.packed())
        _hand_over(target, out)
        return
    limits = np.array(voxels.shape[1:])[:, None, None] - 1
    for (z, lines), at in points.lines(out.shape[1:]):
        a, b, c = np.clip(np.floor(at + 0.5), 0, limits).astype(np.int64)
        out[:, z, lines] = voxels[:, a, b, c]


def interpolate(
    voxels: Voxels, points: PointMap, out: Voxels, *, is_cubic: bool, scaling: Scaling = UNSCALED
) -> None:
    """Interpolate floats at points, scale the result, and write it into ``out``.

    With ``is_cubic`` the voxels are the coefficients of a cubic B-spline.
    """
    target = _memory(out, voxels.dtype)
    if _compiled is not None and voxels.flags.c_contiguous:
        _compiled.points(voxels, target, points.packed(), is_cubic, *scaling)
    else:
        for (z, lines), at in points.lines(out.shape[1:]):
            values: Any = 0
            for weights, (a, b, c) in _corners(voxels.shape[1:], at, is_cubic=is_cubic):
                values = values + weights * voxels[:, a, b, c]
            target[:, z, lines] = scaling.apply(values)
    _hand_over(target, out)


def majority(voxels: Voxels, points: PointMap, out: Voxels) -> None:
    """Write the label with the largest sum of linear weights at each point, the lowest of equal ones."""
    is_simple = voxels.flags.c_contiguous and out.dtype == voxels.dtype
    if _compiled is not None and is_simple and voxels.dtype.str[1:] in COMPILED_TYPES:
        target = _memory(out, out.dtype)
        _compiled.labels(voxels, voxels.dtype.str[1:], target, points.packed(), TIE)
        _hand_over(target, out)
        return
    for (z, lines), at in points.lines(out.shape[1:]):
        corners = list(_corners(voxels.shape[1:], at, is_cubic=False))
        labels = np.stack([voxels[:, a, b, c] for _, (a, b, c) in corners])
        weights = np.stack([np.broadcast_to(weight, labels.shape[1:]) for weight, _ in corners])
        sums = np.stack([np.where(labels == label, weights, 0).sum(axis=0) for label in labels])
        wins = sums >= sums.max(axis=0) - TIE
        highest = np.broadcast_to(labels.max(axis=0), labels.shape)
        out[:, z, lines] = np.where(wins, labels, highest).min(axis=0)


def _corners(
    shape: Sequence[int], at: Floats, *, is_cubic: bool
) -> Iterator[tuple[Floats, tuple[Integers, ...]]]:
    """The voxels around each point: their weights, and their places along z, y, x."""
    axes: list[list[tuple[NDArray[np.float64], Integers]]] = []
    for places, length in zip(at, shape, strict=True):
        taps = (AxisTaps.cubic if is_cubic else AxisTaps.linear)(places.ravel())
        axes.append(
            [
                (
                    taps.weights[:, t].reshape(places.shape),
                    np.clip(taps.first + t, 0, length - 1).reshape(places.shape),
                )
                for t in range(taps.weights.shape[1])
            ]
        )
    for a, z in axes[0]:
        for b, y in axes[1]:
            for c, x in axes[2]:
                yield a * b * c, (z, y, x)
