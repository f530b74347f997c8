"""Which part of which chunk goes where in some boxes, and taking it there: each chunk is decoded once.

The inner loop is compiled (`_gather.c`) where a C compiler was at hand when zpatch was installed; without
it, and for chunks packed in ways that it does not know, numcodecs decodes into a scratch block that stays
in the processor's cache, and numpy copies. Both give the same voxels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.mapped_shards import MappedShard, open_shard
from zpatch.chunks.scaling import COMPILED_TYPES, UNSCALED, Scaling
from zpatch.chunks.sharded_array import ShardedArray

try:
    from zpatch.chunks._gather import gather as _compiled
except ImportError:  # no compiler was there
    _compiled = None  # type: ignore[assignment]

Voxels = NDArray[Any]

# Columns of a plan's rows. In those that the compiled loop takes, a map and the extent of the chunk's bytes
# stand where the shard and the chunk in it stood. Then, for each axis: first in the chunk, extent, first in
# the box.
_SHARD, _WITHIN, _BOX, _PARTS, _COLUMNS = 0, 1, 3, 4, 16
_MAP, _EXTENT = 0, slice(1, 3)
_COMPILED_ITEMSIZES = (1, 2, 4, 8)
_COMPILED_CODECS = ("none", "blosc")


@dataclass(frozen=True, slots=True, eq=False)
class GatherPlan:
    """What goes where: each of ``rows`` (n, 16) copies a part of a chunk into a part of a box.

    Rows of one chunk follow each other.
    """

    rows: NDArray[np.int64]

    @classmethod
    def of(cls, array: ShardedArray, first: NDArray[np.int64], stop: NDArray[np.int64]) -> GatherPlan:
        """The plan for some boxes inside an array, each given by first voxel and stop, (boxes, 4)."""
        return cls.over(array.chunks, array.shard_grid, first, stop, array.chunks_per_shard)

    @classmethod
    def over(
        cls,
        chunk_shape: Sequence[int],
        shard_grid: Sequence[int],
        first: NDArray[np.int64],
        stop: NDArray[np.int64],
        per_shard: Sequence[int] = (1, 1, 1, 1),
    ) -> GatherPlan:
        """The plan for boxes inside a grid of shards, each of which packs ``per_shard`` chunks."""
        if not len(first):
            return cls(np.zeros((0, _COLUMNS), np.int64))
        chunks = np.array(chunk_shape)
        low = first // chunks
        steps = ((stop - 1) // chunks - low).max(axis=0) + 1
        # For each box, step from its first chunk on, and axis: what a row's columns are made of.
        position = low[:, None] + np.arange(steps.max())[:, None]
        origin = position * chunks
        start = np.maximum(origin, first[:, None])
        extent = np.minimum(origin + chunks, stop[:, None]) - start
        shard, within = np.divmod(position, per_shard)
        table = np.stack(
            [start - origin, extent, start - first[:, None], shard * _strides(shard_grid),
             within * _strides(per_shard)], axis=-1,
        )  # fmt: skip
        touched = extent > 0
        c, z, y, x = (touched[:, : steps[axis], axis] for axis in range(4))
        box, *step = np.nonzero(
            (c[:, :, None] & z[:, None])[..., None, None] & (y[:, :, None] & x[:, None])[:, None, None]
        )
        parts = [table[box, step[axis], axis] for axis in range(4)]
        place = parts[0][:, 3:] + parts[1][:, 3:] + parts[2][:, 3:] + parts[3][:, 3:]
        rows = np.empty((len(box), _COLUMNS), dtype=np.int64)
        rows[:, _SHARD : _WITHIN + 1] = place
        rows[:, _BOX] = box
        for axis, part in enumerate(parts):
            rows[:, _PARTS + 3 * axis : _PARTS + 3 * axis + 3] = part[:, :3]
        return cls(rows[np.argsort(place[:, 0] * math.prod(per_shard) + place[:, 1], kind="stable")])

    @property
    def shards(self) -> NDArray[np.int64]:
        """The shards that are touched, by their numbers in C order."""
        return np.unique(self.rows[:, _SHARD])

    @property
    def chunk_starts(self) -> NDArray[np.int64]:
        """The first row of each chunk."""
        changes = np.diff(self.rows[:, _SHARD]) | np.diff(self.rows[:, _WITHIN])
        return np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(self.rows)]

    def split(self, parts: int) -> list[GatherPlan]:
        """The rows in about equal parts, no chunk in two of them."""
        count = len(self.rows)
        if parts == 1 or not count:
            return [self]
        edges = np.append(self.chunk_starts[1:], count)
        wanted = np.linspace(0, count, parts + 1)[1:]
        cuts = np.unique(edges[np.searchsorted(edges, wanted)]).tolist()
        return [GatherPlan(self.rows[a:b]) for a, b in itertools.pairwise([0, *cuts])]


def _strides(grid: Sequence[int]) -> list[int]:
    """How far apart neighbours along each axis are in C order."""
    return [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]


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
    at = 0
    if array.codec.compressor in _COMPILED_CODECS and _is_compiled(array, outs, scaling) and len(rows):
        while (at := _gather_compiled(array, at, rows, maps, outs, scaling)) < len(rows):
            starts = np.append(plan.chunk_starts, len(rows))  # this chunk is one for numcodecs
            stop = int(starts[np.searchsorted(starts, at, side="right")])
            _gather_in_python(array, plan, slice(at, stop), maps, outs, scaling)
            at = stop
    else:
        _gather_in_python(array, plan, slice(None), maps, outs, scaling)


def copy_chunks(
    chunks: Mapping[int, Voxels], plan: GatherPlan, outs: Sequence[Voxels], scaling: Scaling = UNSCALED
) -> None:
    """As ``gather``, from chunks that lie unpacked in memory, each under the number of its shard.

    They are C-contiguous and of one shape, those at the array's end too.
    """
    if not len(plan.rows):
        return
    numbers, places = np.unique(plan.rows[:, _SHARD], return_inverse=True)
    memory = [chunks[number] for number in numbers.tolist()]
    one = memory[0]
    if _is_compiled(one, outs, scaling):
        rows = plan.rows.copy()
        rows[:, _MAP] = places
        rows[:, _EXTENT] = 0, one.nbytes
        c, z, y, x = one.shape
        _compiled(
            rows, 0, memory, outs, (c, z, y, x), one.itemsize, "none", _scaled_from(one, outs), *scaling
        )
        return
    for row in plan.rows.tolist():
        source, target = _slices(row)
        scaling.write(chunks[row[_SHARD]][source], outs[row[_BOX]][target])


def _located(array: ShardedArray, plan: GatherPlan) -> tuple[list[MappedShard], NDArray[np.int64]]:
    """The shards of a plan, and its rows as the compiled loop takes them.

    Chunks that are touched for the first time are compared with their checksums.
    """
    rows = plan.rows.copy()
    shards = rows[:, _SHARD]
    ends = [*(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(rows)]
    maps: list[MappedShard] = []
    fresh = []
    start = 0
    for end in ends if len(rows) else []:
        place = np.unravel_index(shards[start], array.shard_grid)
        mapped = open_shard(array, tuple(map(int, place)))
        numbers = plan.rows[start:end, _WITHIN]
        if (unchecked := mapped.unchecked(numbers)).size:
            mapped.fetch(unchecked)
            fresh.append((mapped, unchecked))
        rows[start:end, _MAP] = len(maps)
        rows[start:end, _EXTENT] = mapped.extents[numbers]
        maps.append(mapped)
        start = end
    for mapped, unchecked in fresh:
        mapped.check(unchecked)
    return maps, rows


def writes_directly(array: ShardedArray | Voxels, dtype: np.dtype[Any], scaling: Scaling) -> bool:
    """Whether values of a type are best made as chunks are copied, and not of whole boxes afterwards."""
    if scaling == UNSCALED and dtype == array.dtype:
        return True
    return dtype == np.float32 and array.dtype.str[1:] in COMPILED_TYPES


def _is_compiled(array: ShardedArray | Voxels, outs: Sequence[Voxels], scaling: Scaling) -> bool:
    return (
        _compiled is not None
        and array.dtype.isnative
        and array.dtype.itemsize in _COMPILED_ITEMSIZES
        and all(writes_directly(array, dtype, scaling) for dtype in {out.dtype for out in outs})
        and len({out.dtype for out in outs}) == 1
    )


def _gather_compiled(
    array: ShardedArray,
    start: int,
    rows: NDArray[np.int64],
    maps: Sequence[MappedShard],
    outs: Sequence[Voxels],
    scaling: Scaling,
) -> int:
    """Do rows from ``start`` on, up to the first whose chunk is not there or packed in another way.

    Damage is for numcodecs to judge too: it knows frames of old that look like it, and says what is wrong.
    """
    at, _ = _compiled(
        rows,
        start,
        [mapped.bytes for mapped in maps],
        outs,
        array.chunks,
        array.dtype.itemsize,
        array.codec.compressor,
        _scaled_from(array, outs),
        *scaling,
    )
    return at


def _scaled_from(array: ShardedArray | Voxels, outs: Sequence[Voxels]) -> str:
    return "" if outs[0].dtype == array.dtype else array.dtype.str[1:]


def _gather_in_python(
    array: ShardedArray,
    plan: GatherPlan,
    some: slice,
    maps: Sequence[MappedShard],
    outs: Sequence[Voxels],
    scaling: Scaling,
) -> None:
    scratch = np.empty(array.chunks, dtype=array.dtype)
    of_shard = dict(zip(np.unique(plan.rows[:, _SHARD]).tolist(), maps, strict=True))
    decoded = (-1, -1)
    for row in plan.rows[some].tolist():
        if (chunk := (row[_SHARD], row[_WITHIN])) != decoded:
            of_shard[row[_SHARD]].decode(row[_WITHIN], scratch)
            decoded = chunk
        source, target = _slices(row)
        scaling.write(scratch[source], outs[row[_BOX]][target])


def _slices(row: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a row's voxels lie in the chunk and in the box."""
    axes = [row[n : n + 3] for n in range(_PARTS, _COLUMNS, 3)]
    return (
        tuple(slice(first, first + extent) for first, extent, _ in axes),
        tuple(slice(target, target + extent) for _, extent, target in axes),
    )
