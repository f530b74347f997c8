"""A group of boxes -> which part of which chunk is copied where.

The plan is an array of int64, one row for each part of a chunk that is copied into a box::

    column        0       1       2       3     4      5       6       7-9  10-12  13-15
    GatherPlan    SHARD   CHUNK   -       BOX   first  extent  target  z    y      x

    SHARD          number of the shard in the array's grid of shards, in C order
    CHUNK          number of the chunk in its shard, in C order
    BOX            number of the box
    first          first voxel of the part in the chunk, along c; then the same three along z, y and x
    extent         voxels of the part
    target         first voxel of the part in the box

`_gather.c` names the columns alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.chunks.sharded_array import ShardedArray
from zpatch.geometry.boxes import Integers, Voxels

STORED_ORDER = (0, 1, 2, 3)  # of the axes (c, z, y, x), slowest first
SHARD, CHUNK = 0, 1
BOX, PARTS, COLUMNS = 3, 4, 16


@dataclass(frozen=True, slots=True, eq=False)
class GatherPlan:
    """Which part of which chunk is copied into which box: one of ``rows`` (n, 16) for each part.

    The rows of a chunk follow each other, as do those of a shard. The chunks of a shard follow each other in
    the order of ``axes``, slowest first: if that is the order of the boxes in memory, parts that share lines
    of the processor's cache are written one after the other.
    """

    rows: Integers

    @classmethod
    def of(
        cls, array: ShardedArray, first: Integers, stop: Integers, axes: Sequence[int] = STORED_ORDER
    ) -> GatherPlan:
        """The plan for boxes inside an array, given by their first voxels and stops, (boxes, 4) each."""
        return cls.over(array.chunks, array.shard_grid, first, stop, array.chunks_per_shard, axes)

    @classmethod
    def over(
        cls,
        chunk_shape: Sequence[int],
        shard_grid: Sequence[int],
        first: Integers,
        stop: Integers,
        per_shard: Sequence[int] = (1, 1, 1, 1),
        axes: Sequence[int] = STORED_ORDER,
    ) -> GatherPlan:
        """The plan for boxes inside a grid of shards of ``per_shard`` chunks each."""
        if not len(first):
            return cls(np.zeros((0, COLUMNS), np.int64))
        chunks = np.array(chunk_shape)
        low = first // chunks
        steps = ((stop - 1) // chunks - low).max(axis=0) + 1
        # For each box, each step from its first chunk on and each axis: the numbers that columns are made of.
        position = low[:, None] + np.arange(steps.max())[:, None]
        origin = position * chunks
        start = np.maximum(origin, first[:, None])
        extent = np.minimum(origin + chunks, stop[:, None]) - start
        shard, within = np.divmod(position, per_shard)
        table = np.stack(
            [start - origin, extent, start - first[:, None], shard * _strides(shard_grid),
             within * _strides(per_shard), within * _strides(per_shard, axes)], axis=-1,
        )  # fmt: skip
        touched = extent > 0
        c, z, y, x = (touched[:, : steps[axis], axis] for axis in range(4))
        box, *step = np.nonzero(
            (c[:, :, None] & z[:, None])[..., None, None] & (y[:, :, None] & x[:, None])[:, None, None]
        )
        parts = [table[box, step[axis], axis] for axis in range(4)]
        place = parts[0][:, 3:] + parts[1][:, 3:] + parts[2][:, 3:] + parts[3][:, 3:]
        rows = np.empty((len(box), COLUMNS), dtype=np.int64)
        rows[:, SHARD : CHUNK + 1] = place[:, :2]
        rows[:, BOX] = box
        for axis, part in enumerate(parts):
            rows[:, PARTS + 3 * axis : PARTS + 3 * axis + 3] = part[:, :3]
        return cls(rows[np.argsort(place[:, 0] * math.prod(per_shard) + place[:, 2], kind="stable")])

    @property
    def shards(self) -> Integers:
        """Numbers of the shards that are touched, in C order."""
        return np.unique(self.rows[:, SHARD])

    @property
    def chunk_starts(self) -> Integers:
        """The first row of each chunk."""
        changes = np.diff(self.rows[:, SHARD]) | np.diff(self.rows[:, CHUNK])
        return np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(self.rows)]

    def split(self, parts: int) -> list[GatherPlan]:
        """The rows in about equal parts, none of which shares a chunk with another."""
        count = len(self.rows)
        if parts == 1 or not count:
            return [self]
        edges = np.append(self.chunk_starts[1:], count)
        wanted = np.linspace(0, count, parts + 1)[1:]
        cuts = np.unique(edges[np.searchsorted(edges, wanted)]).tolist()
        return [GatherPlan(self.rows[a:b]) for a, b in itertools.pairwise([0, *cuts])]


def memory_order(outs: Sequence[Voxels]) -> tuple[int, ...]:
    """The axes of boxes in memory, slowest first: those of the first box.

    >>> memory_order([np.zeros((1, 4, 5, 6)).transpose(0, 3, 2, 1)])
    (0, 3, 2, 1)
    """
    steps = outs[0].strides if outs else (0, 0, 0, 0)
    return tuple(sorted(STORED_ORDER, key=lambda axis: -abs(steps[axis])))


def _strides(grid: Sequence[int], axes: Sequence[int] = STORED_ORDER) -> list[int]:
    """By how much the number of a grid's cell grows along each axis, if cells are numbered along ``axes``."""
    return [math.prod(grid[later] for later in axes[axes.index(axis) + 1 :]) for axis in range(len(grid))]
