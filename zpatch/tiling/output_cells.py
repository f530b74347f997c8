"""An output on another grid than the volume that is blended: which tiles each of its voxels is made from.

A voxel of the output is interpolated between two voxels of an axis. A cell is the voxels of the output whose
second one lies in the same tile, and which are in the same shard; their first one is in that tile too, or it
is the last voxel of the tile before::

    tiles      |    A    |      B      |   C   |
    voxels       .  .  .  .  .  .  .  .  .  .      of the output
    cells       |  a   |      b     |   c   |      b reaches back to A, and c to B

So a cell of the volume, the product of one on each axis, is made from a tile and the last voxels of those
before it. An output on the grid of the volume has the tiles as cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple
from zpatch.resampling.axis_taps import AxisTaps
from zpatch.resampling.interpolation import Interpolation


@dataclass(frozen=True, slots=True, eq=False)
class AxisCell:
    """A cell on one axis: ``length`` voxels of the output from ``first`` on.

    Attributes:
        tile: The number of the tile that holds the last voxels that it is made from.
        reach: How many voxels of the tile before it is made from: 0 or 1.
        shard: The number of its shard, counted along the axis of the volume.
        first: Its first voxel, along the axis of the output.
        length: Voxels of the output.
        taps: How its voxels are interpolated, in voxels from ``reach`` before the tile on; None if the output
            has the voxels of the volume.
    """

    tile: int
    reach: int
    shard: int
    first: int
    length: int
    taps: AxisTaps | None = None

    @property
    def tiles(self) -> range:
        """The numbers of the tiles that it is made from."""
        return range(self.tile - self.reach, self.tile + 1)


def cells_of_tiles(edges: Sequence[int], shard_length: int) -> tuple[AxisCell, ...]:
    """The cells of an output on the grid of the volume, whose tiles lie between ``edges``."""
    return tuple(
        AxisCell(number, 0, first // shard_length, first, stop - first)
        for number, (first, stop) in enumerate(itertools.pairwise(edges))
    )


@dataclass(frozen=True, slots=True, eq=False)
class OutputAxis:
    """An axis of an output: the taps of its voxels.

    If it ``is_reversed``, the voxels are in descending order in the volume.

    >>> halved = OutputAxis(AxisTaps.linear(np.array([0.5, 2.5, 4.5])), shard_length=2)
    >>> [(cell.tile, cell.reach, cell.shard, cell.first, cell.length) for cell in halved.cells([0, 3, 6])]
    [(0, 0, 0, 0, 1), (1, 1, 0, 1, 1), (1, 0, 1, 2, 1)]
    """

    taps: AxisTaps
    shard_length: int
    is_reversed: bool = False

    def cells(self, edges: Sequence[int]) -> tuple[AxisCell, ...]:
        """The cells for tiles between some ``edges``, ascending in the volume."""
        return tuple(self._cells(edges))

    def _cells(self, edges: Sequence[int]) -> Iterator[AxisCell]:
        count, width = self.taps.weights.shape
        last = self.taps.first + width - 1
        tiles = np.searchsorted(edges, last, side="right") - 1
        shards = np.arange(count) // self.shard_length
        changes = 1 + np.flatnonzero((np.diff(tiles) != 0) | (np.diff(shards) != 0))
        cells = list(itertools.pairwise([0, *changes.tolist(), count]))
        for first, stop in reversed(cells) if self.is_reversed else cells:
            tile, shard = int(tiles[first]), int(shards[first])
            needed = self.taps.first[first:stop]
            reach = int(needed.min() < edges[tile])
            taps = AxisTaps(needed - (edges[tile] - reach), self.taps.weights[first:stop])
            along = int(shards[-1]) - shard if self.is_reversed else shard
            yield AxisCell(tile, reach, along, first, stop - first, taps)


@dataclass(frozen=True, slots=True, eq=False)
class OutputGrid:
    """A grid for the output whose axes are parallel to those of the volume that is blended.

    Attributes:
        shape: Its shape (I, J, K).
        matrix: Its voxels to voxels of the volume, 4 x 4.
        mode: ``linear``, or ``nearest`` for values that are classes.
    """

    shape: Triple
    matrix: Affine
    mode: str = "linear"

    @property
    def axes(self) -> Triple:
        """The axis of the grid that is parallel to each axis of the volume."""
        i, j, k = np.abs(self.matrix[:3, :3]).argmax(axis=1).tolist()
        return i, j, k

    @property
    def is_reversed(self) -> tuple[bool, bool, bool]:
        """Whether the voxels of the grid descend along each axis of the volume."""
        i, j, k = (bool(self.matrix[axis, along] < 0) for axis, along in enumerate(self.axes))
        return i, j, k

    def axis(self, axis: int, length: int, shard_shape: Triple) -> OutputAxis:
        """What is parallel to an axis of the volume, of ``length`` voxels."""
        along = self.axes[axis]
        factor = float(self.matrix[axis, along])
        places = np.arange(self.shape[along]) * factor + self.matrix[axis, 3]
        taps = AxisTaps.at(places, length, Interpolation(self.mode), abs(factor))
        return OutputAxis(taps, shard_shape[along], self.is_reversed[axis])
