"""Voxel -> mm: the spacing of an affine, and the affine of a crop or of another number of voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zpatch.geometry.boxes import Triple

Affine = NDArray[np.float64]

MIN_DETERMINANT = 1e-6  # of the directions of the axes; those of files are float32


def crop_affine(affine: Affine, index: Sequence[float] | Affine) -> Affine:
    """The affine of a patch whose first voxel is ``index``: only the origin changes."""
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] += moved[:3, :3] @ np.asarray(index, dtype=np.float64)
    return moved


def resized_affine(affine: Affine, shape: Triple, new_shape: Triple) -> Affine:
    """The affine of the same volume in another number of voxels: its edges keep their world positions.

    >>> resized_affine(np.eye(4), (4, 4, 4), (2, 4, 4))[0].tolist()
    [2.0, 0.0, 0.0, 0.5]
    """
    factors = np.array(shape) / new_shape
    resized = crop_affine(affine, (factors - 1) / 2)
    resized[:3, :3] *= factors
    return resized


def spacing_mm(affine: Affine) -> tuple[float, float, float]:
    """Voxel size along I, J, K: the lengths of the affine's columns."""
    i, j, k = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0)).tolist()
    return i, j, k


def is_usable(affine: Affine) -> bool:
    """Whether an affine is finite, and the directions of its axes are not in one plane.

    >>> is_usable(np.diag([1e-3, 2, 1, 1])), is_usable(np.diag([0, 2, 1, 1]))
    (True, False)
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not lengths.all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > MIN_DETERMINANT)


def max_corner_distance(first: Affine, second: Affine, spatial_shape: Triple) -> float:
    """The largest distance between a volume's corners under two affines, in voxels of the first."""
    corners = np.array(np.meshgrid(*([0, n - 1] for n in spatial_shape))).reshape(3, -1)
    points = np.vstack([corners, np.ones(corners.shape[1])])
    apart = np.linalg.norm(((first - second) @ points)[:3], axis=0).max()
    return float(apart / max(min(spacing_mm(first)), 1e-12))


def level_factors(spatial_shape: Triple, level: int) -> Triple:
    """How many voxels of a volume a voxel of a coarser level is wide: each level halves axes longer than 1.

    >>> level_factors((100, 3, 1), 2)
    (4, 4, 1)
    """
    i, j, k = (min(2**level, 2 ** (n - 1).bit_length()) for n in spatial_shape)
    return i, j, k
