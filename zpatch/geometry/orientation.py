"""A volume turned so that its axes point to RAS, LPS, ...: permutations and flips, without resampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple, Voxels

WORLD_AXES = ("LR", "PA", "IS")  # the letters for pointing down and up each world axis


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
        return np.asarray(affine @ self.matrix(spatial_shape))

    def matrix(self, spatial_shape: Triple) -> Affine:
        """Voxel (I, J, K) of the turned volume to voxel of the file, 4 x 4."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for axis, (target, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            turn[axis, target] = -1 if flip else 1
            turn[axis, 3] = spatial_shape[axis] - 1 if flip else 0
        return turn

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


def orientation_to(affine: Affine, codes: str) -> Orientation:
    """How to turn a volume so that its axes point to ``codes``, as RAS or LPS.

    An oblique axis belongs to the world axis that it is closest to, as in nibabel's ``io_orientation``: the
    voxel axes are first made orthogonal by the polar decomposition. Raises OptionError for other codes, and
    for an affine that is singular.

    >>> orientation_to(np.diag([-1.0, 1.0, 1.0, 1.0]), "RAS")
    Orientation(axes=(0, 1, 2), flips=(True, False, False))
    """
    axis_of = {letter: axis for axis, letters in enumerate(WORLD_AXES) for letter in letters}
    wanted = [axis_of.get(code, -1) for code in codes]
    if sorted(wanted) != [0, 1, 2]:
        raise OptionError(f"orient must be three letters as RAS, LPS or PIR, not {codes!r}", option="orient")
    axes, flips = [], []
    for world, points_up in _world_axes(affine):
        target = wanted.index(world)
        axes.append(target)
        flips.append(bool(points_up != (codes[target] == WORLD_AXES[world][1])))
    (i, j, k), (a, b, c) = axes, flips
    return Orientation((i, j, k), (a, b, c))


def axis_codes(affine: Affine) -> str:
    """Where the axes of a volume point, as RAS; an oblique axis to the world axis that it is closest to.

    Raises OptionError for an affine that is singular.

    >>> axis_codes(np.diag([-1.0, 1.0, 1.0, 1.0]))
    'LAS'
    """
    return "".join(WORLD_AXES[world][points_up] for world, points_up in _world_axes(affine))


def _world_axes(affine: Affine) -> list[tuple[int, bool]]:
    """The world axis that each voxel axis is closest to, and whether it points up that axis."""
    columns = np.array(affine, dtype=np.float64)[:3, :3]
    lengths = np.sqrt((columns**2).sum(axis=0))
    if not np.isfinite(columns).all() or not (lengths > 0).all():
        raise OptionError("the affine is singular: a voxel axis has no direction, so it cannot be oriented")
    left, sizes, right = np.linalg.svd(columns / lengths)
    if sizes.min() < 1e-6:
        raise OptionError("the affine is singular: its voxel axes lie in a plane, so it cannot be oriented")
    directions, found = left @ right, {}
    for axis in np.argsort(-(directions**2).max(axis=0), kind="stable").tolist():  # the clearest one first
        world = int(np.argmax(np.abs(directions[:, axis])))
        found[axis] = world, bool(directions[world, axis] > 0)
        directions[world] = 0
    return [found[axis] for axis in range(3)]
