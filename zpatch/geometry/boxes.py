"""Boxes in voxels, and the axis order of arrays.

A user's array is ``(C, I, J, K)``: I is x, the fastest axis of a NIfTI file, and K is z. A stored array is
``(c, z, y, x)``: the same bytes with the axes reversed, so that neither view costs a copy. Boxes are
(I, J, K), half-open, in voxels.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import OptionError, PatchLocationError, PatchOverlapError, PatchSizeError

Triple = tuple[int, int, int]
Voxels = NDArray[Any]
Integers = NDArray[np.int64]
Start = TypeVar("Start", int, Integers)
Bools = NDArray[np.bool_]

AXIS_NAMES = "IJK"


def triple(value: int | Sequence[int], name: str) -> Triple:
    """One integer, or three, as three integers.

    >>> triple(64, "patch_size")
    (64, 64, 64)
    """
    try:
        i, j, k = map(operator.index, value if isinstance(value, Iterable) else (value,) * 3)
    except (TypeError, ValueError):
        raise OptionError(f"{name} must be one integer or three, not {value!r}", option=name) from None
    return i, j, k


def in_plane(value: int | Sequence[int]) -> int | Sequence[int]:
    """A patch size or overlap for a plane: one number is along I and J.

    >>> in_plane(64), in_plane((64, 32))
    ((64, 64), (64, 32))
    """
    return (value, value) if isinstance(value, int) else value


def _of_plane(value: int | Sequence[int], along_k: int) -> int | Sequence[int]:
    return (*value, along_k) if isinstance(value, Sequence) and len(value) == 2 else value


def patch_size_triple(value: int | Sequence[int]) -> Triple:
    """A patch size in voxels: one integer or three, or two for a plane, each at least 1.

    >>> patch_size_triple((64, 32))
    (64, 32, 1)
    """
    size = triple(_of_plane(value, 1), "patch_size")
    if min(size) < 1:
        raise PatchSizeError(f"patch_size must be at least 1 on every axis, not {value!r}")
    return size


def patch_overlap_triple(value: int | Sequence[int], patch_size: Triple) -> Triple:
    """An overlap in voxels: even, at least 0 and smaller than the patch on every axis; two for a plane."""
    overlap = triple(_of_plane(value, 0), "patch_overlap")
    for axis, o, p in zip(AXIS_NAMES, overlap, patch_size, strict=True):
        if o < 0 or o % 2:
            raise PatchOverlapError(
                f"patch_overlap must be even and at least 0, not {o} on axis {axis}; "
                f"half of it is cut from each side of a patch"
            )
        if o >= p:
            raise PatchOverlapError(
                f"patch_overlap of {o} voxels on axis {axis} is not smaller than the patch ({p}); "
                f"use at most {(p - 1) // 2 * 2}"
            )
    return overlap


@dataclass(frozen=True, slots=True)
class PatchLocation:
    """A box of voxels: the location of a patch in its volume.

    ``index`` is the first voxel (I, J, K), ``size`` the extent in voxels, ``subject_index`` the index of the
    subject in its dataset, if it has one. With padding, the index may be negative and the box may reach over
    the volume's border.

    >>> location = PatchLocation((0, 8, 16), (4, 4, 4))
    >>> location.index_fin
    (4, 12, 20)
    """

    index: Triple
    size: Triple
    subject_index: int | None = None

    @classmethod
    def between(
        cls, index_ini: Iterable[int], index_fin: Iterable[int], subject_index: int | None = None
    ) -> PatchLocation:
        """The box from its first voxel to one past its last voxel.

        >>> PatchLocation.between((0, 8, 16), (4, 12, 20))
        PatchLocation(index=(0, 8, 16), size=(4, 4, 4), subject_index=None)
        """
        i, j, k = map(int, index_ini)
        p, q, r = map(int, index_fin)
        return cls((i, j, k), (p - i, q - j, r - k), subject_index)

    @property
    def index_ini(self) -> Triple:
        """First voxel of the box."""
        return self.index

    @property
    def index_fin(self) -> Triple:
        """One past the last voxel of the box."""
        (i, j, k), (p, q, r) = self.index, self.size
        return i + p, j + q, k + r

    def to_slices(self) -> tuple[slice, slice, slice]:
        """Slices for an (I, J, K) array; the box must not start below 0."""
        if min(self.index) < 0:
            raise PatchLocationError(f"the box at {self.index} starts below 0: slices would wrap around")
        i, j, k = (slice(a, b) for a, b in zip(self.index, self.index_fin, strict=True))
        return i, j, k

    def scaled(self, factor: float | Sequence[float]) -> PatchLocation:
        """The same box on a grid ``factor`` times as fine.

        Both ends are rounded in the same way, so boxes that abut still abut, without a gap or an overlap.

        >>> PatchLocation((5, 5, 5), (5, 5, 5)).scaled(0.5).index_fin
        (5, 5, 5)
        """
        factors = np.broadcast_to(np.asarray(factor, float), (3,))
        ini, fin = np.floor(np.array([self.index, self.index_fin]) * factors + 0.5)
        return PatchLocation.between(ini, fin, self.subject_index)

    def widened(self, margin: Triple, spatial_shape: Triple) -> PatchLocation:
        """The box with so many voxels more on each side, as far as they are inside a volume.

        >>> PatchLocation((2, 5, -1), (4, 4, 4)).widened((3, 3, 3), (20, 10, 20)).index
        (0, 2, -1)
        """
        first = [min(a, max(a - m, 0)) for a, m in zip(self.index, margin, strict=True)]
        stop = [max(b, min(b + m, n)) for b, m, n in zip(self.index_fin, margin, spatial_shape, strict=True)]
        return PatchLocation.between(first, stop)

    def around_the_same_centre(self, factors: Triple) -> PatchLocation:
        """As many voxels around the same centre on a grid whose voxels are ``factors`` times as wide.

        >>> PatchLocation((8, 8, 8), (4, 4, 4)).around_the_same_centre((2, 4, 1)).index
        (3, 1, 8)
        """
        i, j, k = map(start_around_the_same_centre, self.index, self.size, factors)
        return PatchLocation((i, j, k), self.size, self.subject_index)

    def lies_within(self, spatial_shape: Triple) -> bool:
        """Whether the whole box is inside a volume of that shape."""
        return min(self.index + self.size) >= 0 and all(
            b <= n for b, n in zip(self.index_fin, spatial_shape, strict=True)
        )

    def clipped(self, spatial_shape: Triple) -> PatchLocation:
        """The part of the box inside a volume of that shape; its size may be 0."""
        ini, fin = np.clip([self.index, self.index_fin], 0, spatial_shape)
        return PatchLocation.between(ini, fin, self.subject_index)


def start_around_the_same_centre(start: Start, size: int, factor: int) -> Start:
    """First voxel of a patch around the same centre, in voxels ``factor`` times as wide; or those of several.

    It is ``(start + size / 2) / factor - size / 2``, rounded.
    """
    return (2 * start + size * (1 - factor) + factor) // (2 * factor)


def centre_of(start: int, size: int) -> int:
    """The centre voxel of a patch on one axis."""
    return start + size // 2


def allowed_centres(spatial_shape: Triple, patch_size: Triple) -> PatchLocation:
    """The box of voxels that can be the centre of a patch wholly inside the volume.

    The first ``p // 2`` and the last ``(p - 1) // 2`` voxels of each axis cannot. On an axis that is shorter
    than the patch all voxels can.

    >>> allowed_centres((10, 10, 3), (4, 5, 10)).index, allowed_centres((10, 10, 3), (4, 5, 10)).size
    ((2, 2, 0), (7, 6, 3))
    """
    first = [centre_of(0, p) if p <= n else 0 for n, p in zip(spatial_shape, patch_size, strict=True)]
    stop = [n - (p - 1) // 2 if p <= n else n for n, p in zip(spatial_shape, patch_size, strict=True)]
    return PatchLocation.between(first, stop)


def starts_around(centres: Integers, spatial_shape: Triple, patch_size: Triple) -> Integers:
    """First voxels of patches around allowed centres (count, 3).

    On an axis that is shorter than the patch, the patch has the whole axis in its middle.

    >>> starts_around(np.array([[2, 4, 1]]), (10, 10, 3), (4, 5, 10)).tolist()
    [[0, 2, -3]]
    """
    shape, patch = np.array(spatial_shape), np.array(patch_size)
    return np.asarray(np.where(patch > shape, -((patch - shape) // 2), centres - patch // 2))


def check_patch_fits(patch_size: Triple, spatial_shape: Triple, subject: str) -> None:
    """Refuse a patch that is larger than the volume."""
    for axis, p, n in zip(AXIS_NAMES, patch_size, spatial_shape, strict=True):
        if p > n:
            raise PatchSizeError(
                f"patch of {p} voxels does not fit axis {axis} of {subject!r} ({n} voxels); "
                f"use a smaller patch_size, or say padding_mode='constant' to the sampler"
            )


def reversed_axes(voxels: Voxels) -> Voxels:
    """A view of voxels (C, I, J, K) in the stored axis order (c, z, y, x), or the other way round."""
    return voxels.transpose(0, 3, 2, 1)


def stored_corners(boxes: Sequence[PatchLocation], channels: range) -> tuple[Integers, Integers]:
    """First voxel and stop of some boxes, with some channels, in stored axis order (c, z, y, x): (boxes, 4).

    >>> first, stop = stored_corners([PatchLocation((1, 2, 3), (4, 4, 4))], range(2))
    >>> first.tolist(), stop.tolist()
    ([[0, 3, 2, 1]], [[2, 7, 6, 5]])
    """
    first = [(channels.start, *box.index_ini[::-1]) for box in boxes]
    stop = [(channels.stop, *box.index_fin[::-1]) for box in boxes]
    return np.array(first, np.int64).reshape(-1, 4), np.array(stop, np.int64).reshape(-1, 4)


def padded_to_4d(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A stored shape, with a channel axis in front if it has none."""
    c, z, y, x = (1,) * (4 - len(shape)) + tuple(shape)
    return c, z, y, x
