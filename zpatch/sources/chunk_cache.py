"""Decoded chunks held in memory during a sweep: each is read once, and released after its last patch.

A sweep reads the patches of a grid with one axis slowest. Patches overlap and do not end at the borders of
chunks, so neighbouring patches, rows and planes of patches need the same chunks again. Held in between are
the unscaled voxels of the chunks that later patches need.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from zpatch.chunks.gather import copy_chunks
from zpatch.chunks.gather_plan import GatherPlan
from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.boxes import Integers, PatchLocation, Triple, Voxels, reversed_axes, stored_corners
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.sources.voxel_source import ReadTasks, VoxelSource, WrappedSource
from zpatch.sources.voxel_sources import ArraySource, LazySource, ShardSource

NEVER = 2**60  # more than any rank, and three of them fit into 64 bits


def patches_of_chunks(
    starts: Integers, patch_length: int, chunk_length: int, axis_length: int
) -> tuple[Integers, Integers]:
    """The first and the last patch on one axis that touch each chunk; for none, the last is before the first.

    >>> patches_of_chunks(np.array([0, 2, 4, 6]), 4, 4, 12)
    (array([0, 1, 3]), array([1, 3, 3]))
    """
    chunks = np.arange(-(-axis_length // chunk_length))
    low = np.maximum(starts, 0) // chunk_length
    high = (np.minimum(starts + patch_length, axis_length) - 1) // chunk_length
    return np.searchsorted(high, chunks), np.searchsorted(low, chunks, side="right") - 1


@dataclass(frozen=True, slots=True, eq=False)
class ChunkLifetimes:
    """The first and the last patch of a sweep that need each chunk.

    The rank of a patch is its number in the order of the sweep; it grows by ``steps`` from one patch to the
    next along I, J, K. The patches that touch a chunk are a box of the grid, so the rank of the first one is
    the sum of ``first[axis][n]`` over the axes, with n the chunk's position on the axis, and likewise for
    ``last``. It is ``NEVER`` or more for a chunk that no patch touches.
    """

    steps: Triple
    first: tuple[Integers, Integers, Integers]
    last: tuple[Integers, Integers, Integers]

    @classmethod
    def of(
        cls,
        chunk_shape: Triple,
        grid: PatchGrid,
        swept_axis: int,
        ranges: tuple[range, range, range],
    ) -> Self:
        """The lifetimes in a sweep over the patches whose numbers along I, J, K are in ``ranges``."""
        slow, middle, fast = swept_axis, *(axis for axis in range(3) if axis != swept_axis)
        step = {fast: 1, middle: grid.counts[fast], slow: grid.counts[fast] * grid.counts[middle]}
        tables = []
        for axis, patches in enumerate(ranges):
            starts = grid.starts[axis][patches.start : patches.stop]
            lengths = grid.patch_size[axis], chunk_shape[axis], grid.spatial_shape[axis]
            first, last = patches_of_chunks(starts, *lengths)
            ranks = (np.stack([first, last]) + patches.start) * step[axis]
            tables.append(np.where(first > last, NEVER, ranks))
        (a, p), (b, q), (c, r) = tables
        return cls((step[0], step[1], step[2]), (a, b, c), (p, q, r))

    def rank(self, position: Triple) -> int:
        """The rank of the patch at a position of the grid."""
        return sum(n * step for n, step in zip(position, self.steps, strict=True))

    @property
    def stored_grid(self) -> Triple:
        """Number of chunks that cover the volume along the stored axes z, y, x."""
        i, j, k = map(len, self.first)
        return k, j, i

    def positions(self, numbers: Sequence[int]) -> Integers:
        """Positions along I, J, K (3, n) of chunks, which are numbered in C order of the stored axes."""
        return np.stack(np.unravel_index(np.array(numbers, np.int64), self.stored_grid)[::-1])

    def ranks(self, numbers: Sequence[int]) -> tuple[Integers, Integers]:
        """The ranks of the first and of the last patch of chunks."""
        i, j, k = self.positions(numbers)
        (a, b, c), (p, q, r) = self.first, self.last
        return a[i] + b[j] + c[k], p[i] + q[j] + r[k]


class CachedSource(WrappedSource):
    """Voxels of another source, read chunk by chunk, and held as long as patches of a sweep need them.

    Boxes are read as from any source; call ``done`` when a patch is read. Boxes that are not of the sweep may
    be read too: a chunk that the sweep does not need yet is held until the next ``done``, and read again
    when the sweep needs it. Chunks are held once the graph that reads them has run; graphs must run one
    after the other.
    """

    def __init__(self, source: VoxelSource, lifetimes: ChunkLifetimes) -> None:
        super().__init__(source)
        self._lifetimes = lifetimes
        channels, *spatial_shape = source.shape
        i, j, k = map(min, spatial_shape, source.chunk_shape)
        self._chunk = channels, k, j, i  # as stored: (c, z, y, x)
        self._held: dict[int, Voxels] = {}  # by number, in C order of the stored axes
        self._spare: list[Voxels] = []
        self._fresh: set[int] = set()  # read since the last done
        self._ends: list[tuple[int, int]] = []  # a heap of (rank of the last patch, number)

    @classmethod
    def of(
        cls,
        source: VoxelSource,
        grid: PatchGrid,
        swept_axis: int,
        ranges: tuple[range, range, range],
    ) -> Self:
        """The cache for a sweep of a grid, ``swept_axis`` slowest and the other axes in the order I, J, K.

        ``ranges`` are the numbers along I, J, K of the patches that will be read; some may be left out.
        """
        return cls(source, ChunkLifetimes.of(source.chunk_shape, grid, swept_axis, ranges))

    @property
    def chunk_bytes(self) -> int:
        """Memory of a chunk with all channels; chunks at the volume's end take as much."""
        c, z, y, x = self._chunk
        return c * z * y * x * self.dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """Memory of the chunks that are held."""
        return len(self._held) * self.chunk_bytes

    @property
    def allocated_bytes(self) -> int:
        """Memory allocated for chunks, held or spare: the most that was held at once."""
        return (len(self._held) + len(self._spare)) * self.chunk_bytes

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """The source's tasks for chunks that are not held, then about ``parts`` tasks that copy to boxes."""
        first, stop = stored_corners(boxes, range(self.shape[0]))
        plan = GatherPlan.over(self._chunk, (1, *self._lifetimes.stored_grid), first, stop)
        views = [reversed_axes(out) for out in outs]
        numbers = plan.shards.tolist()
        chunks = {number: self._held[number] for number in numbers if number in self._held}
        fresh = {number: self._memory() for number in numbers if number not in chunks}
        chunks |= fresh
        reads = self.source.tasks(*self._boxes(fresh), UNSCALED, parts) if fresh else ReadTasks([])
        needs = {**reads.needs, **{(id(chunks), n): task for n, task in enumerate(reads.writes)}}
        read = [(id(chunks), n) for n in range(len(reads.writes))]
        split = plan.split(parts)
        return ReadTasks(
            [(partial(self._copy, chunks, fresh, p, views, scaling), read) for p in split], needs
        )

    def _memory(self) -> Voxels:
        return self._spare.pop() if self._spare else np.empty(self._chunk, self.dtype)

    def _boxes(self, chunks: Mapping[int, Voxels]) -> tuple[list[PatchLocation], list[Voxels]]:
        """The box of the volume that each chunk is, and its memory (C, I, J, K)."""
        length = np.array(self._chunk[:0:-1])
        index = self._lifetimes.positions(list(chunks)).T * length
        size = np.minimum(length, self.shape[1:] - index)
        boxes, outs = [], []
        for (i, j, k), (p, q, r), memory in zip(index.tolist(), size.tolist(), chunks.values(), strict=True):
            boxes.append(PatchLocation((i, j, k), (p, q, r)))
            outs.append(reversed_axes(memory)[:, :p, :q, :r])
        return boxes, outs

    def _copy(
        self,
        chunks: Mapping[int, Voxels],
        fresh: Mapping[int, Voxels],
        plan: GatherPlan,
        outs: Sequence[Voxels],
        scaling: Scaling,
        _reads: Any,
    ) -> None:
        self._held |= fresh  # only now: a chunk whose read failed is not held
        self._fresh |= fresh.keys()
        copy_chunks(chunks, plan, outs, scaling)

    def done(self, position: Triple) -> None:
        """Release the chunks that no patch after ``position``, in the order of the sweep, needs.

        Call it when the patches up to this position of the grid are read, and before any later one is read.
        """
        rank = self._lifetimes.rank(position)
        fresh = list(self._fresh)
        first, last = self._lifetimes.ranks(fresh)
        for entry in zip(np.where(first > rank, rank, last).tolist(), fresh, strict=True):
            heapq.heappush(self._ends, entry)
        self._fresh.clear()
        while self._ends and self._ends[0][0] <= rank:
            _, number = heapq.heappop(self._ends)
            if number in self._held:
                self._spare.append(self._held.pop(number))


def is_quick(source: VoxelSource) -> bool:
    """Whether a source is read as fast as a cache: its voxels are not compressed, or only by LZ4."""
    if isinstance(source, ShardSource):
        return source.array.codec.is_quick
    return isinstance(source, ArraySource) and not isinstance(source, LazySource)


def cached(
    source: VoxelSource, grid: PatchGrid, swept_axis: int, ranges: tuple[range, range, range]
) -> tuple[VoxelSource, Callable[[Triple], None]]:
    """The source to read a sweep's patches from, and its ``done``: a cache, unless the source is quick."""
    if is_quick(source):
        return source, lambda position: None
    cache = CachedSource.of(source, grid, swept_axis, ranges)
    return cache, cache.done
