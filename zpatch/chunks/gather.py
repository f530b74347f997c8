"""A plan of parts of chunks -> voxels; each chunk is decoded once.

Reading a plan locates the chunks in shard files, which changes the first three columns of its rows;
`_gather.c` names them alike::

    column        0     1       2       3     4      5       6       7-9  10-12  13-15
    LocatedRows   MAP   OFFSET  LENGTH  BOX   first  extent  target  z    y      x

    MAP            number of the buffer or file that holds the chunk's bytes
    OFFSET LENGTH  where in it the encoded chunk begins, and its bytes; -1 for a chunk that is missing

The inner loop is compiled (`_gather.c`) where a C compiler was available when zpatch was installed. Without
it, and for chunks in encodings that it does not support, numcodecs decodes into a scratch block that stays in
the processor's cache, and numpy copies. Both give the same voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zpatch.chunks.gather_plan import BOX, CHUNK, PARTS, SHARD, GatherPlan
from zpatch.chunks.mapped_shards import MappedShard, open_shard
from zpatch.chunks.scaling import COMPILED_TYPES, UNSCALED, Scaling
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.geometry.boxes import Integers, Voxels
from zpatch.runtime.guarded_files import OpenFile
from zpatch.work_counts import Work, count, count_fetched, during

try:
    from zpatch.chunks._gather import gather as _compiled
except ImportError:  # installed without a compiler
    _compiled = None  # type: ignore[assignment]


MAP, OFFSET, LENGTH = 0, 1, 2
STREAMED_BYTES = 12 * 2**20  # of boxes that do not stay in the last cache either
DAMAGED, GONE, UNEQUAL = 1, 5, 6  # as in _decode.h
_COMPILED_ITEMSIZES = (1, 2, 4, 8)
_COMPILED_CODECS = ("none", "blosc")


@dataclass(frozen=True, slots=True, eq=False)
class LocatedRows:
    """The rows of a plan as the compiled loop takes them: chunks are named by where their bytes are.

    ``places[row[MAP]]`` is the buffer or the file that has the bytes of a row's chunk, from ``row[OFFSET]``
    on. ``checks`` has a byte for each row, not 0 if its chunk is compared with its checksum; or none.
    """

    rows: Integers
    places: Sequence[Any]
    checks: Any = b""

    @classmethod
    def of(cls, plan: GatherPlan, places: Sequence[Any], maps: Any, extents: Any, checks: Any) -> LocatedRows:
        """``maps`` (n,) and ``extents`` (n, 2), offset and length, are those of each row's chunk."""
        rows = plan.rows.copy()
        rows[:, MAP] = maps
        rows[:, OFFSET : LENGTH + 1] = extents
        return cls(rows, places, checks)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_new(self) -> bool:
        """Whether some chunks are read for the first time."""
        return bool(np.any(self.checks)) or any(isinstance(place, OpenFile) for place in self.places)

    @property
    def buffers(self) -> list[Any]:
        """The buffers; an empty one for each file."""
        return [b"" if isinstance(place, OpenFile) else place for place in self.places]

    @property
    def files(self) -> Integers:
        """The descriptors of the files; -1 for each buffer."""
        numbers = [place.number if isinstance(place, OpenFile) else -1 for place in self.places]
        return np.array(numbers, np.int64)


def read_region(array: ShardedArray, first: Sequence[int], stop: Sequence[int]) -> Voxels:
    """The stored voxels of one box, given by its first voxel and stop in stored axis order."""
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
    if not len(plan.rows):
        return
    with during(Work.DECODING):
        shards, located = _located(array, plan)
        if array.codec.compressor in _COMPILED_CODECS and _is_compiled(array, outs, scaling):
            _gather_located(array, plan, shards, located, outs, scaling)
        else:
            _gather_in_python(array, plan.rows, shards, outs, scaling)


def _gather_located(
    array: ShardedArray,
    plan: GatherPlan,
    shards: Mapping[int, MappedShard],
    located: LocatedRows,
    outs: Sequence[Voxels],
    scaling: Scaling,
) -> None:
    """Copy all rows by the compiled loop, and chunks that it does not support by numcodecs."""
    at, problem = 0, 0
    while True:
        start, (at, problem) = at, _gather_compiled(array, at, located, outs, scaling)
        if located.is_new:
            _mark_read(plan.rows[start:at], shards)
        if at == len(located):
            return
        shard, chunk = plan.rows[at, : CHUNK + 1].tolist()
        if problem == UNEQUAL:
            raise shards[shard].unequal(chunk)
        if problem == DAMAGED:
            raise shards[shard].undecodable(chunk)
        if problem == GONE:
            raise shards[shard].cut_short()
        starts = np.append(plan.chunk_starts, len(located))
        stop = int(starts[np.searchsorted(starts, at, side="right")])  # one chunk, decoded by numcodecs
        _gather_in_python(array, plan.rows[at:stop], shards, outs, scaling)
        at = stop


def copy_chunks(
    chunks: Mapping[int, Voxels], plan: GatherPlan, outs: Sequence[Voxels], scaling: Scaling = UNSCALED
) -> None:
    """As ``gather``, from decoded chunks in memory, each under the number of its shard.

    Chunks are C-contiguous and of one shape, at the array's end too.
    """
    if not len(plan.rows):
        return
    numbers, maps = np.unique(plan.rows[:, SHARD], return_inverse=True)
    memory = [chunks[number] for number in numbers.tolist()]
    one = memory[0]
    if _is_compiled(one, outs, scaling):
        located = LocatedRows.of(plan, memory, maps, (0, one.nbytes), b"")
        _run_compiled(located, 0, outs, one, one.shape, "none", scaling)
        return
    for row in plan.rows.tolist():
        source, target = part_slices(row)
        scaling.write(chunks[row[SHARD]][source], outs[row[BOX]][target])


def _located(array: ShardedArray, plan: GatherPlan) -> tuple[dict[int, MappedShard], LocatedRows]:
    """The shards of a plan by number, and its rows for the compiled loop.

    If shards have no file, the array's metadata are looked at again, and then once more the files: so an
    array that was away for a moment is no array of fill values.
    """
    numbers, chunks = plan.rows[:, SHARD], plan.rows[:, CHUNK]
    maps, extents = np.empty(len(numbers), np.int64), np.empty((len(numbers), 2), np.int64)
    checks = np.empty(len(numbers), np.uint8)
    shards: dict[int, MappedShard] = {}
    places: list[Any] = []
    for start, end in _stretches(numbers):
        place = np.unravel_index(numbers[start], array.shard_grid)
        shard = open_shard(array, tuple(map(int, place)))
        touched = chunks[start:end]
        maps[start:end] = len(shards)
        extents[start:end] = shard.extents[touched]
        checks[start:end] = shard.unchecked(touched)
        places.append(shard.place(touched))
        shards[int(numbers[start])] = shard
    if array.metadata is not None and (missing := [s for s in shards.values() if s.is_missing]):
        array.metadata.check(str(array))
        if not all(shard.is_current() for shard in missing):
            return _located(array, plan)
    return shards, LocatedRows.of(plan, places, maps, extents, checks)


def _stretches(numbers: Integers) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch of equal numbers."""
    ends = [*(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
    return itertools.pairwise([0, *ends])


def _mark_read(rows: Integers, shards: Mapping[int, MappedShard]) -> None:
    for start, end in _stretches(rows[:, SHARD]) if len(rows) else ():
        shards[int(rows[start, SHARD])].mark_read(rows[start:end, CHUNK])


def writes_directly(array: ShardedArray | Voxels, dtype: np.dtype[Any], scaling: Scaling) -> bool:
    """Whether values of a type are made while chunks are copied, and not from whole boxes afterwards."""
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
    array: ShardedArray, start: int, located: LocatedRows, outs: Sequence[Voxels], scaling: Scaling
) -> tuple[int, int]:
    """Copy rows from ``start`` on, up to the first whose chunk is missing, damaged or encoded otherwise.

    Returns the number of that row, and DAMAGED, UNEQUAL or GONE where its chunk or its file is.
    """
    return _run_compiled(located, start, outs, array, array.chunks, array.codec.compressor, scaling)


def _run_compiled(
    located: LocatedRows,
    start: int,
    outs: Sequence[Voxels],
    array: ShardedArray | Voxels,
    chunk_shape: Any,
    compressor: str,
    scaling: Scaling,
) -> tuple[int, int]:
    at, problem, chunks, new, nbytes, nanoseconds = _compiled(
        located.rows,
        located.checks,
        start,
        located.buffers,
        located.files,
        outs,
        sum(out.nbytes for out in outs) >= STREAMED_BYTES,
        chunk_shape,
        array.dtype.itemsize,
        compressor,
        _scaled_from(array, outs),
        *scaling,
    )
    if isinstance(array, ShardedArray):
        count(Work.KNOWN_CHUNKS, chunks - new)
        count_fetched(nanoseconds, new, nbytes)
    return at, problem


def _scaled_from(array: ShardedArray | Voxels, outs: Sequence[Voxels]) -> str:
    return "" if outs[0].dtype == array.dtype else array.dtype.str[1:]


def _gather_in_python(
    array: ShardedArray,
    rows: Integers,
    shards: Mapping[int, MappedShard],
    outs: Sequence[Voxels],
    scaling: Scaling,
) -> None:
    scratch = np.zeros(array.chunks, dtype=array.dtype)  # whose pages take no memory until they are written
    decoded = (-1, -1)
    voxels = scratch
    for row in rows.tolist():
        if (chunk := (row[SHARD], row[CHUNK])) != decoded:
            voxels = shards[row[SHARD]].decode(row[CHUNK], scratch)
            decoded = chunk
        source, target = part_slices(row)
        scaling.write(voxels[source], outs[row[BOX]][target])


def part_slices(row: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The voxels of a row of a plan in the chunk and in the box."""
    c, n_c, to_c, z, n_z, to_z, y, n_y, to_y, x, n_x, to_x = row[PARTS:]
    return (
        (slice(c, c + n_c), slice(z, z + n_z), slice(y, y + n_y), slice(x, x + n_x)),
        (slice(to_c, to_c + n_c), slice(to_z, to_z + n_z), slice(to_y, to_y + n_y), slice(to_x, to_x + n_x)),
    )
