"""A volume turned so that its axes point to RAS, LPS, ...: permutations and flips, without resampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple, Voxels


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a stored volume is turned relative to its file.

    Axis ``a`` of the file (I, J, K) is axis ``axes[a]`` of the store, reversed if ``flips[a]``.

    >>> turned = Orientation((1, 0, 2), (False, True, False))
    >>> turned.shape((4, 5, 6))
    (5, 4, 6)
    """

    axes: Triple = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def is_identity(self) -> bool:
        """Whether the store has the axes of the file."""
        return self == AS_STORED

    def permute(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """Three values, one for each axis of the file, in the order of the store's axes."""
        return tuple(values[self.axes.index(axis)] for axis in range(3))

    def shape(self, spatial_shape: Triple) -> Triple:
        """Extent (I, J, K) in the store."""
        i, j, k = self.permute(spatial_shape)
        return i, j, k

    def affine(self, affine: Affine, spatial_shape: Triple) -> Affine:
        """The affine of the turned volume: every voxel keeps its world position."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for axis, (target, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            turn[axis, target] = -1 if flip else 1
            turn[axis, 3] = spatial_shape[axis] - 1 if flip else 0
        return np.asarray(affine @ turn)

    def turn(self, voxels: Voxels) -> Voxels:
        """A part of the file (c, z, y, x) in the orientation of the store; a view."""
        return np.asarray(self._flipped(voxels).transpose(self._order))

    def turn_back(self, voxels: Voxels) -> Voxels:
        """A part of the store (c, z, y, x) in the orientation of the file; a view."""
        return self._flipped(voxels.transpose(np.argsort(self._order)))

    def _flipped(self, voxels: Voxels) -> Voxels:
        flipped = tuple(3 - axis for axis, flip in enumerate(self.flips) if flip)
        return np.asarray(np.flip(voxels, flipped))

    @property
    def _order(self) -> list[int]:
        """For each stored axis, the axis of the file (c, z, y, x) that it was."""
        return [0, *(3 - self.axes.index(2 - stored) for stored in range(3))]

    @property
    def slowest(self) -> int:
        """The position of the file's slowest axis, z, among the stored axes (z, y, x)."""
        return 2 - self.axes[2]


AS_STORED = Orientation()
