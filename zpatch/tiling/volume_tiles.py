"""Tiles are pieces of the output volume, not patches (whole-slide imaging calls patches tiles).

A tile of the volume is the product of one tile on each axis. Its contributors are the patches that have
weight anywhere in it, and it is final once all of them are summed.

A sweep passes over the patches of a grid with one axis slowest, the swept axis, and the two others in order.
Only the tiles between their first and their last contributor are in memory; they are its front::

    swept axis  0 ------------------------------------------> n
                | final, written |   front   | not reached yet |
                                 [== patches that arrive now ==]

The rank of a contributor is its number among the contributors of a tile, in sweep order. Contributions are
summed by rank, so that the sums do not depend on the order in which patches arrive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.geometry.boxes import Bools, Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.tiling import windows
from zpatch.tiling.axis_tiles import AxisScale, AxisShare, AxisTile, AxisTiles, Weights
from zpatch.tiling.output_cells import OutputGrid

Slices = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the volume: the box of ``shape`` voxels from ``first`` on, all along I, J, K.

    Attributes:
        number: Its number on each axis.
        first: Its first voxel.
        shape: Its extent.
        shards: The numbers on each axis of the shards that are made from it.
        positions: The numbers of its contributors on each axis; they are at the product of these in the grid.
    """

    number: Triple
    first: Triple
    shape: Triple
    shards: tuple[range, range, range]
    positions: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, i: AxisTile, j: AxisTile, k: AxisTile) -> Tile:
        """The product of a tile on each axis."""
        return cls(
            (i.number, j.number, k.number),
            (i.first, j.first, k.first),
            (i.length, j.length, k.length),
            (i.shards, j.shards, k.shards),
            (i.contributors, j.contributors, k.contributors),
        )

    @property
    def contributors(self) -> int:
        """How many patches add to it."""
        return math.prod(map(len, self.positions))


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What a patch adds to a tile.

    Attributes:
        rank: The number of the patch among the tile's contributors, in sweep order.
        in_patch: The voxels of the patch that are added.
        in_tile: The voxels of the tile that they are added to.
        weights: Their weights along I, J and K; the weight of a voxel is the product.
    """

    rank: int
    in_patch: Slices
    in_tile: Slices
    weights: tuple[Weights, Weights, Weights]


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """The tiles of a volume under a grid, and the shards that they fill.

    Attributes:
        grid: The patches.
        mode: How they overlap: one of ``windows.OVERLAP_MODES``.
        shape: The shape of the blended volume along I, J, K.
        shard_shape: The shape of a shard along I, J, K of the output.
        swept_axis: The slowest axis of the sweep.
        axes: The tiles on each axis.
        output: The grid of the output, if it is resampled from the blended volume.
    """

    grid: PatchGrid
    mode: str
    shape: Triple
    shard_shape: Triple
    swept_axis: int
    axes: tuple[AxisTiles, AxisTiles, AxisTiles]
    output: OutputGrid | None = None

    @classmethod
    def over(
        cls,
        grid: PatchGrid,
        mode: str,
        *,
        swept_axis: int = 0,
        output_shape: Triple | None = None,
        patch_shape: Triple | None = None,
        shard_shape: Triple | None = None,
        output: OutputGrid | None = None,
    ) -> Tiling:
        """The tiles of a grid's volume, or of a blended volume of another shape; without shards it is one.

        ``patch_shape`` is what the network makes of a patch. The output has the voxels that are blended, or
        is resampled from them.
        """
        windows.check_overlap_mode(mode)
        shape = output_shape or grid.spatial_shape
        shards = shard_shape or (output.shape if output else shape)
        sizes = grid.spatial_shape, shape, grid.patch_size, patch_shape or (None,) * 3
        i, j, k = (
            AxisTiles.cut(
                mode,
                grid.starts[axis],
                grid.patch_overlap[axis],
                scale,
                *((None, output.axis(axis, shape[axis], shards)) if output else (shards[axis],)),
            )
            for axis, scale in enumerate(map(AxisScale.of, *sizes))
        )
        return cls(grid, mode, shape, shards, swept_axis, (i, j, k), output)

    @property
    def order(self) -> Triple:
        """The axes in sweep order."""
        return sweep_order(self.swept_axis)

    @property
    def shard_counts(self) -> Triple:
        """Number of shards along I, J, K."""
        i, j, k = (axis.shards for axis in self.axes)
        return i, j, k

    def stored_shard(self, shard: Triple) -> Triple:
        """The position along I, J, K of the output of the shard at a position along the volume's axes."""
        if self.output is None:
            return shard
        found = [0, 0, 0]
        where = zip(shard, self.output.axes, self.output.is_reversed, self.shard_counts, strict=True)
        for number, along, is_reversed, count in where:
            found[along] = count - 1 - number if is_reversed else number
        i, j, k = found
        return i, j, k

    def size_of(self, position: Triple) -> Triple:
        """Extent in the output of the patch at a position."""
        patches = [axis.patches[n] for axis, n in zip(self.axes, position, strict=True)]
        i, j, k = (patch.stop - patch.start for patch in patches)
        return i, j, k

    def tiles_of(self, shard: Triple) -> Iterator[Tile]:
        """The tiles that a shard is made from."""
        of_shard = (axis.tiles_of(n) for axis, n in zip(self.axes, shard, strict=True))
        return itertools.starmap(Tile.of, itertools.product(*of_shard))

    def tiles_hit(self, position: Triple, order: Sequence[int] = (0, 1, 2)) -> Iterator[tuple[Tile, Share]]:
        """The tiles that the patch at a position adds to, and its share in each.

        The tiles are in the order of their numbers, with the axes in ``order`` from slow to fast.
        """
        shares = [axis.patches[n].shares for axis, n in zip(self.axes, position, strict=True)]
        of_i, of_j, of_k = map(order.index, range(3))
        for hit in itertools.product(*(shares[axis] for axis in order)):
            i, j, k = hit[of_i], hit[of_j], hit[of_k]
            yield (
                Tile.of(i.tile, j.tile, k.tile),
                Share(
                    self._rank((i, j, k)),
                    (i.in_patch, j.in_patch, k.in_patch),
                    (i.in_tile, j.in_tile, k.in_tile),
                    (i.weights, j.weights, k.weights),
                ),
            )

    def _rank(self, shares: tuple[AxisShare, AxisShare, AxisShare]) -> int:
        a, b, c = (shares[axis] for axis in self.order)
        return (a.rank * len(b.tile.contributors) + b.rank) * len(c.tile.contributors) + c.rank

    def ranks(self, tile: Tile, patches: Bools) -> list[int]:
        """The ranks of the contributors of a tile among ``patches``, which is over the grid's positions."""
        of_tile = patches[np.ix_(*tile.positions)]
        return np.flatnonzero(of_tile.transpose(self.order).ravel()).tolist()

    def reached(self, tile: Tile, patches: Bools) -> Bools:
        """The voxels (i, j, k) of a tile to which any of ``patches``, over the grid's positions, adds."""
        found = np.zeros(tile.shape, dtype=bool)
        for position in itertools.product(*tile.positions):
            if patches[position]:
                axes = zip(self.axes, position, tile.number, strict=True)
                found[tuple(axis.patches[n].share_of(t).in_tile for axis, n, t in axes)] = True
        return found

    def is_hit(self, number: Triple, patches: Bools) -> bool:
        """Whether any of ``patches``, over the grid's positions, adds to the tile of that number."""
        axes = zip(self.axes, number, strict=True)
        return bool(patches[np.ix_(*(axis.tiles[n].contributors for axis, n in axes))].any())

    def count_made(self, shard: Triple, patches: Bools) -> int:
        """How many voxels of a shard are in cells that any of ``patches``, over the positions, adds to."""
        tiles = [axis.tiles_of(n) for axis, n in zip(self.axes, shard, strict=True)]
        is_hit = np.zeros(list(map(len, tiles)), dtype=bool)
        for place in np.ndindex(is_hit.shape):
            i, j, k = (of[n].number for of, n in zip(tiles, place, strict=True))
            is_hit[place] = self.is_hit((i, j, k), patches)
        lengths = []
        for axis, (number, of) in enumerate(zip(shard, tiles, strict=True)):
            cells = self.axes[axis].cells_of(number)
            starts = [cell.tiles.start - of[0].number for cell in cells]
            stops = [cell.tiles.stop - of[0].number for cell in cells]
            parts = [is_hit.take(range(a, b), axis).any(axis) for a, b in zip(starts, stops, strict=True)]
            is_hit = np.stack(parts, axis)
            lengths.append(np.array([cell.length for cell in cells]))
        i, j, k = lengths
        return int(np.einsum("ijk,i,j,k", is_hit, i, j, k))

    def patches_for(self, shards: Bools) -> Bools:
        """Which patches of the grid add to any of some shards."""
        total = np.zeros(np.add(shards.shape, 1), dtype=np.int64)
        total[1:, 1:, 1:] = shards
        for axis in range(3):
            np.cumsum(total, axis=axis, out=total)
        ends = [axis.shards_hit() for axis in self.axes]
        found = np.zeros(self.grid.counts, dtype=np.int64)
        for corner in itertools.product((0, 1), repeat=3):
            sign = -1 if (3 - sum(corner)) % 2 else 1
            found += sign * total[np.ix_(*(ends[axis][side] for axis, side in enumerate(corner)))]
        return found > 0


def sweep_order(swept_axis: int) -> Triple:
    """The axes of a sweep, slowest first."""
    first, second = (axis for axis in range(3) if axis != swept_axis)
    return swept_axis, first, second
