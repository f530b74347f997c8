"""How far random transforms move voxels, at most: the margin that a patch is read with.

Bounds are entry by entry: |A B| <= |A| |B|, so that a patch of one shape has another margin along each axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple

Extent = NDArray[np.float64]  # half the sides of a box around the origin


def rotated(extent: Extent, angles: Sequence[float]) -> Extent:
    """A box that holds ``extent`` after rotations by up to these angles (radians), one about each axis.

    >>> rotated(np.array([2.0, 1.0, 0.0]), [0, 0, np.pi / 2]).round(3).tolist()
    [2.236, 2.236, 0.0]
    """
    around = []
    for axis, angle in enumerate(angles):
        first, second = (other for other in range(3) if other != axis)
        entries = np.eye(3)
        entries[first, second] = entries[second, first] = np.sin(min(abs(angle), np.pi / 2))
        around.append(entries)
    most = np.max([a @ b @ c for a, b, c in itertools.permutations(around)], axis=0)
    bound: Extent = np.minimum(most @ extent, np.linalg.norm(extent))
    return bound


def margin_to(extent: Extent, patch_size: Triple) -> Triple:
    """The voxels on each side of a patch up to an extent, and one more for interpolation."""
    beyond = np.maximum(np.ceil(extent - np.array(patch_size) / 2), 0)
    i, j, k = (1 + beyond.astype(int)).tolist()
    return i, j, k


def in_world(patch_size: Triple, affine: Affine) -> Extent:
    """The box along world axes (mm) around a patch."""
    extent: Extent = np.abs(affine[:3, :3]) @ (np.array(patch_size) / 2)
    return extent


def in_voxels(extent: Extent, affine: Affine) -> Extent:
    """The box along voxel axes around a box along world axes (mm)."""
    voxels: Extent = np.abs(np.linalg.inv(affine[:3, :3])) @ extent
    return voxels


def largest(ranges: Any, count: int) -> list[float]:
    """The largest absolute value of each of ``count`` ranges: a number for -n to n, two, or None for 0."""
    given = list(ranges) if isinstance(ranges, list | tuple) else [ranges]
    values = [0.0 if of is None else float(np.max(np.abs(of))) for of in given][:count]
    return values + [0.0] * (count - len(values))
