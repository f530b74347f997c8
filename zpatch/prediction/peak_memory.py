"""How much is held at most while a front sweeps over a volume, known before anything runs.

What is held (sums, write units, decoded chunks) is a product of pieces of the three axes. A piece is there
from one patch of its axis to another, so the whole is there from one place in the sweep to another, and what
is held at each place follows from tables that grow with the axes and not with the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class AxisLives:
    """Pieces of one axis: ``size`` voxels each, held from patch ``birth`` up to and with ``death``."""

    birth: Integers
    death: Integers
    size: Integers

    def within(self, first: int) -> AxisLives:
        """The same, with patches counted from a number on."""
        return AxisLives(self.birth - first, self.death - first, self.size)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What is held of one kind: products of pieces, ``voxel_bytes`` for each voxel; axes in sweep order.

    A kind with negative bytes takes away from another one that counts it too.
    """

    axes: tuple[AxisLives, AxisLives, AxisLives]
    voxel_bytes: int


def peak_bytes(kinds: Sequence[Held], counts: Sequence[int]) -> int:
    """The most that is held at any patch of a sweep of so many patches along each axis, in sweep order.

    >>> pieces = AxisLives(np.array([0, 0]), np.array([0, 1]), np.array([4, 2]))
    >>> peak_bytes([Held((pieces, pieces, pieces), 1)], (2, 2, 2))
    216
    """
    rows, cross = counts[0], counts[1] * counts[2]
    extents, profiles = [], []
    for kind in kinds:
        slow, *others = kind.axes
        born, gone = _over_cross_section(others, counts[1], counts[2])
        # Of what is there in a row, some is all along, some from its birth on, some until its death.
        profiles += [np.full(cross, born[-1]), born, born[-1] - gone, born - gone]
        row = np.arange(rows)[:, None]
        before, after = slow.birth < row, row < slow.death
        begins, ends = slow.birth == row, row == slow.death
        parts = (before & after, begins & after, before & ends, begins & ends)
        extents += [there @ slow.size * kind.voxel_bytes for there in parts]
    table = np.stack(profiles)
    return max(int((of_row @ table).max()) for of_row in np.unique(np.stack(extents, axis=1), axis=0))


def _over_cross_section(axes: Sequence[AxisLives], rows: int, columns: int) -> tuple[Integers, Integers]:
    """Voxels of the cross-section born up to each of its patches, and gone before it."""
    slow, fast = axes
    sizes = np.multiply.outer(slow.size, fast.size).ravel()
    births, deaths = (
        np.add.outer(a * columns, b).ravel() for a, b in ((slow.birth, fast.birth), (slow.death, fast.death))
    )
    born, gone = np.zeros((2, rows * columns + 1), dtype=np.int64)
    np.add.at(born, births, sizes)
    np.add.at(gone, deaths + 1, sizes)
    return np.cumsum(born)[:-1], np.cumsum(gone)[:-1]
