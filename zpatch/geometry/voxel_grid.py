"""Grids of voxels in space: their shape and affine, and where the voxels of one lie in another.

For one axis of n voxels of s mm, and a wanted spacing of t mm::

    n' = max(1, floor(n * s / t + 0.5))
    x  = (x' + 0.5) * t / s - 0.5        voxel x' of the new grid, in voxels of the old one

The faces of both volumes meet at the low end; at the other end they differ by less than half a voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine, spacing_mm
from zpatch.geometry.boxes import Triple

MAX_LENGTH = 2**31  # voxels on an axis
SAME_PLACE = 1e-4  # voxels: places nearer than this are one, as affines are often stored as float32

Spacing = float | Sequence[float | None]


@dataclass(frozen=True, slots=True, eq=False)
class VoxelGrid:
    """The voxels of a volume in space: ``shape`` (I, J, K), and ``affine``, voxel to mm, 4 x 4.

    >>> grid = VoxelGrid((4, 4, 4), np.diag([1.0, 1.0, 3.0, 1.0])).with_spacing(2.0)
    >>> grid.shape, grid.affine[0].tolist()
    ((2, 2, 6), [2.0, 0.0, 0.0, 0.5])
    """

    shape: Triple
    affine: Affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along I, J, K in mm."""
        return spacing_mm(self.affine)

    def with_spacing(self, spacing: Spacing) -> VoxelGrid:
        """The grid of the same volume in voxels of another size; its axes keep their directions.

        Raises OptionError for a spacing that is not positive, and for an axis of 2**31 voxels or more.
        """
        matrix = self.spacing_matrix(spacing)
        lengths = []
        for n, factor in zip(self.shape, np.diag(matrix)[:3].tolist(), strict=True):
            if not n / factor < MAX_LENGTH:
                raise OptionError(
                    f"a spacing of {spacing} mm makes an axis of over 2**31 voxels of {n} voxels of "
                    f"{format_spacing(self.spacing)} mm; use a larger one",
                    option="spacing",
                )
            lengths.append(max(1, math.floor(n / factor + 0.5)))
        i, j, k = lengths
        return VoxelGrid((i, j, k), self.affine @ matrix)

    def spacing_matrix(self, spacing: Spacing) -> Affine:
        """Voxel of the grid with another spacing to voxel of this one, 4 x 4.

        A spacing that only rounding makes another one is the same: no voxel moves by more than 1e-4 voxels.
        """
        wanted = checked_spacing(spacing, self.spacing)
        factors = []
        for t, s, n in zip(wanted, self.spacing, self.shape, strict=True):
            factors.append(1.0 if abs(t / s - 1) * n <= SAME_PLACE else t / s)
        matrix = np.diag([*factors, 1.0])
        matrix[:3, 3] = [factor / 2 - 0.5 for factor in factors]
        return matrix

    def matrix_from(self, other: VoxelGrid) -> Affine:
        """Voxel of another grid to voxel of this one, 4 x 4.

        Numbers that only rounding keeps from being whole, or 0, are: no voxel of the other grid moves by more
        than 1e-4 voxels. Raises OptionError for a singular affine, and for volumes that do not overlap.
        """
        try:
            matrix: Affine = np.linalg.solve(self.affine, other.affine).astype(np.float64)
        except np.linalg.LinAlgError:
            raise OptionError("the affine of an image is singular, so its voxels have no place") from None
        if not np.isfinite(matrix).all():
            raise OptionError("the affine of an image is singular or not finite, so its voxels have no place")
        self._check_overlap(matrix, other.shape)
        return snapped(matrix, other.shape)

    def is_same(self, other: VoxelGrid) -> bool:
        """Whether the voxels of both are in the same places, to 1e-4 voxels."""
        if self.shape != other.shape:
            return False
        if np.array_equal(self.affine, other.affine):
            return True
        try:
            return np.array_equal(self.matrix_from(other), np.eye(4))
        except OptionError:
            return False

    def _check_overlap(self, matrix: Affine, shape: Triple) -> None:
        ends = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in shape))).reshape(3, -1)
        corners = matrix[:3, :3] @ ends + matrix[:3, 3:]
        if (corners.max(axis=1) <= -0.5).any() or (corners.min(axis=1) >= np.array(self.shape) - 0.5).any():
            raise OptionError(
                "the images do not overlap in space: by their affines, one lies outside the other; check "
                "their affines, or say affine="
            )


def spacing_triple(spacing: Spacing) -> tuple[float | None, float | None, float | None]:
    """A wanted voxel size, one number or three, as three; None is the size that is kept on an axis.

    Raises OptionError for one that is not positive and finite.
    """
    values = [spacing] * 3 if isinstance(spacing, int | float | np.number) else spacing
    try:
        i, j, k = (None if value is None else float(value) for value in values)
    except (TypeError, ValueError):
        raise OptionError(
            f"spacing must be one number of mm or three, not {spacing!r}", option="spacing"
        ) from None
    if not all(t is None or (math.isfinite(t) and t > 0) for t in (i, j, k)):
        raise OptionError(f"spacing must be positive and finite (in mm), not {spacing!r}", option="spacing")
    return i, j, k


def checked_spacing(spacing: Spacing, kept: Sequence[float]) -> tuple[float, float, float]:
    """A wanted voxel size as three numbers; on an axis of which it is None, the one that is kept."""
    i, j, k = (old if new is None else new for new, old in zip(spacing_triple(spacing), kept, strict=True))
    if not all(math.isfinite(s) and s > 0 for s in kept):
        raise OptionError("the affine is singular: an axis has voxels of no size, so it has no spacing")
    return i, j, k


def format_spacing(spacing: Sequence[float]) -> str:
    """A spacing in words: ``0.7 x 0.7 x 1.2``."""
    return " x ".join(f"{value:g}" for value in spacing)


def snapped(matrix: Affine, shape: Triple) -> Affine:
    """A matrix in which numbers that are whole, but for rounding, are; for the voxels of a shape."""
    found, extent = matrix.copy(), np.maximum(np.array(shape) - 1.0, 1.0)
    for axis in range(3):
        row = found[axis]
        main = int(np.argmax(np.abs(row[:3])))
        others = [column for column in range(3) if column != main]
        if (np.abs(row[others]) * extent[others]).sum() <= SAME_PLACE:
            row[others] = 0
        for column in range(3):
            if abs(row[column] - round(row[column])) * extent[column] <= SAME_PLACE / 4:
                row[column] = round(row[column])
        if abs(row[3] - round(row[3])) <= SAME_PLACE:
            row[3] = round(row[3])
    found[3] = [0, 0, 0, 1]
    return found
