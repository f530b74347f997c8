"""Patches on a regular grid.

On an axis of ``n`` voxels, patches of ``p`` voxels with an overlap of ``o`` start at
``range(0, n - p + 1, p - o)``. If voxels are left over, one more patch is flush with the border::

    n = 10, p = 4, o = 2        n = 11, p = 4, o = 2         n = 3, p = 4, padded up to the patch
    0123456789                  0123456789A                  .012
    ====                        ====                         ====
      ====                        ====
        ====                        ====
          ====                        ====
                                       ====   <- flush

With ``border=True`` the grid covers ``o // 2`` voxels more on each side. Positions stay relative to the
volume, so the first starts are below 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from zpatch.errors import PatchLocationError
from zpatch.geometry.boxes import (
    AXIS_NAMES,
    Integers,
    PatchLocation,
    Triple,
    start_around_the_same_centre,
)


def axis_starts(axis_length: int, patch_length: int, overlap: int) -> Integers:
    """First voxels of the patches on one axis.

    >>> axis_starts(11, 4, 2)
    array([0, 2, 4, 6, 7])
    """
    last = axis_length - patch_length
    starts = np.arange(0, last + 1, patch_length - overlap, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)


@dataclass(frozen=True, slots=True, eq=False)
class PatchGrid:
    """All patches of a volume, in lexicographic order, I slowest.

    ``starts`` holds the first voxels of patches on each axis, relative to the volume; ``pad_before`` and
    ``pad_after`` are the voxels by which the grid reaches over the volume on each side.
    """

    spatial_shape: Triple
    patch_size: Triple
    patch_overlap: Triple
    pad_before: Triple
    pad_after: Triple
    starts: tuple[Integers, Integers, Integers]

    @classmethod
    def over(
        cls,
        spatial_shape: Triple,
        patch_size: Triple,
        patch_overlap: Triple = (0, 0, 0),
        *,
        border: bool = False,
    ) -> PatchGrid:
        """The grid over a volume; a volume smaller than the patch is padded to the size of a patch.

        ``border`` pads ``patch_overlap // 2`` voxels on each side of every axis.
        """
        before, after, starts = [], [], []
        for n, p, o in zip(spatial_shape, patch_size, patch_overlap, strict=True):
            wanted = o // 2 if border else 0
            missing = max(p - n - 2 * wanted, 0)
            before.append(wanted + missing // 2)
            after.append(wanted + missing - missing // 2)
            starts.append(axis_starts(n + before[-1] + after[-1], p, o) - before[-1])
        (a, b, c), (d, e, f), (x, y, z) = before, after, starts
        return cls(spatial_shape, patch_size, patch_overlap, (a, b, c), (d, e, f), (x, y, z))

    @property
    def counts(self) -> Triple:
        """Number of patches along I, J, K."""
        i, j, k = map(len, self.starts)
        return i, j, k

    def around_the_same_centres(self, factors: Triple, spatial_shape: Triple) -> PatchGrid:
        """Patches of as many voxels around the same centres, of a volume whose voxels are so much wider."""
        i, j, k = map(start_around_the_same_centre, self.starts, self.patch_size, factors)
        return PatchGrid(spatial_shape, self.patch_size, self.patch_overlap, (0, 0, 0), (0, 0, 0), (i, j, k))

    def __len__(self) -> int:
        i, j, k = self.counts
        return i * j * k

    def location(self, number: int) -> PatchLocation:
        """The patch of that number."""
        if not 0 <= number < len(self):
            raise PatchLocationError(f"patch {number} of a grid of {len(self)} patches")
        _, j, k = self.counts
        return self.at((number // (j * k), number // k % j, number % k))

    def at(self, position: Triple) -> PatchLocation:
        """The patch at a position of the grid."""
        i, j, k = (int(s[n]) for s, n in zip(self.starts, position, strict=True))
        return PatchLocation((i, j, k), self.patch_size)

    def position_of(self, location: PatchLocation) -> Triple:
        """The position of a patch in the grid; PatchLocationError for a box that is no patch of it."""
        position = [int(np.searchsorted(s, v)) for s, v in zip(self.starts, location.index, strict=True)]
        for axis, s, n, v in zip(AXIS_NAMES, self.starts, position, location.index, strict=True):
            if n == len(s) or s[n] != v or location.size != self.patch_size:
                raise PatchLocationError(
                    f"the patch at {location.index} of size {location.size} is not of this grid "
                    f"(axis {axis}; patches of {self.patch_size} voxels)"
                )
        i, j, k = position
        return i, j, k

    def locations(self, slowest_axis: int = 0) -> Iterator[PatchLocation]:
        """All patches, with that axis slowest and the other two in the order I, J, K."""
        order = [slowest_axis, *(a for a in range(3) if a != slowest_axis)]
        for position in itertools.product(*(range(self.counts[a]) for a in order)):
            i, j, k = (position[order.index(a)] for a in range(3))
            yield self.at((i, j, k))
