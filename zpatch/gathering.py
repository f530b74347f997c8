"""Which part of which chunk goes where in some boxes, and taking it there: each chunk is decoded once.

The inner loop is compiled (`_gather.c`) where a C compiler was at hand when zpatch was installed; without
it, and for chunks packed in ways that it does not know, numcodecs decodes into a scratch block that stays
in the processor's cache, and numpy copies. Both give the same voxels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.scaling import UNSCALED, Scaling
from zpatch.shards import MappedShard, ShardedArray, open_shard

try:
    from zpatch._gather import gather as _compiled
except ImportError:  # no compiler was there
    _compiled = None  # type: ignore[assignment]

Voxels = NDArray[Any]

# Columns of the rows that the compiled loop takes; then three for each axis.
_MAP, _EXTENT, _OUT, _PARTS = 0, slice(1, 3), 3, slice(4, 16)
_COMPILED_ITEMSIZES = (1, 2, 4, 8)
_COMPILED_SCALED = ("u1", "i1", "u2", "i2")


@dataclass(frozen=True, slots=True, eq=False)
class GatherPlan:
    """What goes where: row ``n`` copies a part of a chunk into a part of ``box[n]``.

    Rows of one chunk follow each other. The chunk is number ``within[n]`` of shard number ``shard[n]``.
    ``parts`` is (rows, 12): for each axis the first voxel in the chunk, the extent, the first in the box.
    """

    shard: NDArray[np.int64]
    within: NDArray[np.int64]
    box: NDArray[np.int64]
    parts: NDArray[np.int64]

    @classmethod
    def of(cls, array: ShardedArray, first: NDArray[np.int64], stop: NDArray[np.int64]) -> GatherPlan:
        """The plan for some boxes inside an array, each given by first voxel and stop, (boxes, 4)."""
        if not len(first):
            none = np.zeros(0, np.int64)
            return cls(none, none, none, np.zeros((0, 12), np.int64))
        chunks = np.array(array.chunks)
        low = first // chunks
        most = ((stop - 1) // chunks - low).max(axis=0) + 1
        touched = np.ones((len(first), 1, 1, 1, 1), dtype=bool)
        tables = []
        shards, per_shard = array.shard_grid, array.chunks_per_shard
        for axis in range(4):
            position = low[:, axis, None] + np.arange(most[axis])
            origin = position * chunks[axis]
            start = np.maximum(origin, first[:, axis, None])
            extent = np.minimum(origin + chunks[axis], stop[:, axis, None]) - start
            shard, within = np.divmod(position, per_shard[axis])
            shard *= math.prod(shards[axis + 1 :])
            within *= math.prod(per_shard[axis + 1 :])
            columns = [start - origin, extent, start - first[:, axis, None], shard, within]
            tables.append(np.stack(columns, axis=-1))
            touched = touched & np.expand_dims(extent > 0, [a + 1 for a in range(4) if a != axis])
        box, *steps = np.nonzero(touched)
        columns = [table[box, step] for table, step in zip(tables, steps, strict=True)]
        shard, within = sum(column[:, 3:] for column in columns).T
        order = np.argsort(shard * math.prod(per_shard) + within, kind="stable")
        parts = np.concatenate([column[:, :3] for column in columns], axis=1)
        return cls(shard[order], within[order], box[order], parts[order])

    @property
    def chunk_starts(self) -> NDArray[np.int64]:
        """The first row of each chunk."""
        changes = np.diff(self.within) | np.diff(self.shard)
        return np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(self.box)]

    def split(self, parts: int) -> list[GatherPlan]:
        """The rows in about equal parts, no chunk in two of them."""
        rows = len(self.box)
        if parts == 1 or not rows:
            return [self]
        edges = np.append(self.chunk_starts[1:], rows)
        wanted = np.linspace(0, rows, parts + 1)[1:]
        cuts = np.unique(edges[np.searchsorted(edges, wanted)]).tolist()
        return [
            GatherPlan(self.shard[a:b], self.within[a:b], self.box[a:b], self.parts[a:b])
            for a, b in itertools.pairwise([0, *cuts])
        ]


def read_region(array: ShardedArray, first: Sequence[int], stop: Sequence[int]) -> Voxels:
    """The stored voxels of one box, given by first voxel and stop in the array's own axis order."""
    low, high = (np.array([ends], dtype=np.int64) for ends in (first, stop))
    out = np.empty((high - low)[0], dtype=array.dtype)
    gather(array, GatherPlan.of(array, low, high), [out])
    return out


def gather(
    array: ShardedArray, plan: GatherPlan, outs: Sequence[Voxels], scaling: Scaling = UNSCALED
) -> None:
    """Decode each chunk of a plan and copy its parts into the boxes ``outs``, (c, z, y, x) of any strides.

    Boxes of another type than the array's get scaled voxels.
    """
    maps, rows = _located(array, plan)
    missing = rows[:, 1] < 0
    if missing.any():
        _fill_in(array, rows[missing], outs, scaling)
        plan = GatherPlan(*(column[~missing] for column in (plan.shard, plan.within, plan.box, plan.parts)))
        rows = rows[~missing]
    starts = plan.chunk_starts
    at, fast = 0, _compiled is not None and _is_compiled(array, outs, scaling)
    while at < len(rows):
        if fast:
            at, damaged = _gather_compiled(array, rows, at, maps, outs, scaling)
            if at == len(rows):
                return
            if damaged:
                # numcodecs may say more of what is wrong; where it finds nothing, the chunk is damaged still.
                mapped, number = maps[rows[at, _MAP]], int(plan.within[at])
                mapped.decode(number, np.empty(array.chunks, array.dtype))
                raise mapped.damaged(number, "cannot be decoded")
        end = (
            int(np.append(starts, len(rows))[np.searchsorted(starts, at, side="right")])
            if fast
            else len(rows)
        )
        _gather_in_python(array, plan, slice(at, end), rows, maps, outs, scaling)
        at = end


def _located(array: ShardedArray, plan: GatherPlan) -> tuple[list[MappedShard], NDArray[np.int64]]:
    """The shards of a plan, and its rows with the map and the extent of each chunk filled in.

    Chunks that are touched for the first time are compared with their checksums.
    """
    rows = np.empty((len(plan.box), 16), dtype=np.int64)
    rows[:, _OUT] = plan.box
    rows[:, _PARTS] = plan.parts
    borders = [0, *(np.flatnonzero(np.diff(plan.shard)) + 1).tolist(), len(rows)]
    runs = list(itertools.pairwise(borders)) if len(rows) else []
    maps, fresh = [], []
    for number, (a, b) in enumerate(runs):
        place = tuple(int(n) for n in np.unravel_index(plan.shard[a], array.shard_grid))
        mapped = open_shard(array, place)
        rows[a:b, _MAP] = number
        rows[a:b, _EXTENT] = mapped.extents[plan.within[a:b]]
        maps.append(mapped)
        if (numbers := mapped.unchecked(plan.within[a:b])).size:
            mapped.fetch(numbers)
            fresh.append((mapped, numbers))
    for mapped, numbers in fresh:
        mapped.check(numbers)
    return maps, rows


def _is_compiled(array: ShardedArray, outs: Sequence[Voxels], scaling: Scaling) -> bool:
    if array.codec.compressor not in ("none", "blosc") or not array.dtype.isnative:
        return False
    written = {out.dtype for out in outs}
    if written == {array.dtype}:
        return scaling == UNSCALED and array.dtype.itemsize in _COMPILED_ITEMSIZES
    return written == {np.dtype(np.float32)} and array.dtype.str[1:] in _COMPILED_SCALED


def _gather_compiled(
    array: ShardedArray,
    rows: NDArray[np.int64],
    start: int,
    maps: Sequence[MappedShard],
    outs: Sequence[Voxels],
    scaling: Scaling,
) -> tuple[int, bool]:
    plain = outs[0].dtype == array.dtype
    return _compiled(
        rows,
        start,
        [mapped.bytes for mapped in maps],
        outs,
        array.chunks,
        array.dtype.itemsize,
        array.codec.compressor,
        "" if plain else array.dtype.str[1:],
        *scaling,
    )


def _gather_in_python(
    array: ShardedArray,
    plan: GatherPlan,
    some: slice,
    rows: NDArray[np.int64],
    maps: Sequence[MappedShard],
    outs: Sequence[Voxels],
    scaling: Scaling,
) -> None:
    scratch = np.empty(array.chunks, dtype=array.dtype)
    decoded = (-1, -1)
    chunks = zip(rows[some, _MAP].tolist(), plan.within[some].tolist(), strict=True)
    for chunk, row in zip(chunks, rows[some].tolist(), strict=True):
        if chunk != decoded:
            maps[chunk[0]].decode(chunk[1], scratch)
            decoded = chunk
        source, target = _slices(row)
        scaling.write(scratch[source], outs[row[_OUT]][target])


def _fill_in(array: ShardedArray, rows: NDArray[np.int64], outs: Sequence[Voxels], scaling: Scaling) -> None:
    """The parts of chunks that are not there, in arrays where that means a fill value."""
    for row in rows.tolist():
        target = outs[row[_OUT]][_slices(row)[1]]
        scaling.write(np.full(target.shape, array.fill, dtype=array.dtype), target)


def _slices(row: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a row's voxels lie in the chunk and in the box."""
    axes = [row[n : n + 3] for n in range(4, 16, 3)]
    return (
        tuple(slice(first, first + extent) for first, extent, _ in axes),
        tuple(slice(target, target + extent) for _, extent, target in axes),
    )
