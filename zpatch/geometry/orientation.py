"""Turning a volume so that its axes point where one wants them: permutations and flips, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a stored volume was turned from its file.

    Axis ``a`` of the file (I, J, K) became axis ``axes[a]`` of the store, reversed where ``flips[a]``.

    >>> turned = Orientation((1, 0, 2), (False, True, False))
    >>> turned.shape((4, 5, 6))
    (5, 4, 6)
    """

    axes: Triple = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def is_identity(self) -> bool:
        """Whether nothing was turned."""
        return self == AS_STORED

    def permute(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """Three values of the file's axes, in the order of the store's."""
        return tuple(values[self.axes.index(axis)] for axis in range(3))

    def shape(self, spatial_shape: Triple) -> Triple:
        """Extent (I, J, K) in the store."""
        i, j, k = self.permute(spatial_shape)
        return i, j, k

    def affine(self, affine: Affine, spatial_shape: Triple) -> Affine:
        """The affine of the turned volume: every voxel stays where it is in the world."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for axis, (target, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            turn[axis, target] = -1 if flip else 1
            turn[axis, 3] = spatial_shape[axis] - 1 if flip else 0
        return np.asarray(affine @ turn)

    def turn(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """A part of the file (c, z, y, x) as it stands in the store; a view."""
        return np.asarray(self._flipped(voxels).transpose(self._order))

    def turn_back(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """A part of the store (c, z, y, x) as it stands in the file; a view."""
        return self._flipped(voxels.transpose(np.argsort(self._order)))

    def _flipped(self, voxels: NDArray[Any]) -> NDArray[Any]:
        flipped = tuple(3 - axis for axis, flip in enumerate(self.flips) if flip)
        return np.asarray(np.flip(voxels, flipped))

    @property
    def _order(self) -> list[int]:
        """Which of the file's (c, z, y, x) each of the store's is."""
        return [0, *(3 - self.axes.index(2 - stored) for stored in range(3))]

    @property
    def slowest(self) -> int:
        """Where the file's slowest axis, z, is among the store's (z, y, x)."""
        return 2 - self.axes[2]


AS_STORED = Orientation()
