"""The voxels of a level of a slide: each tile under a group of boxes is decoded once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.chunks.gather import copy_chunks, part_slices
from zpatch.chunks.gather_plan import BOX, SHARD, GatherPlan, memory_order
from zpatch.chunks.mapped_memory import copy_between_orders
from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels, reversed_axes, stored_corners
from zpatch.runtime import buffer_pool
from zpatch.slides.tiles import DamagedTileError, Decoder, TiledLevel
from zpatch.sources.voxel_source import ReadTasks, Shape, VoxelSource
from zpatch.sources.voxel_sources import dask_view, runs_of
from zpatch.work_counts import Work, during

HELD_TILES = 16  # decoded before they are copied
HALF_VECTOR = 16  # bytes: half of what libjpeg-turbo writes at once
DASK_TILES = 4  # along x and y, in a block of a dask array
_PLANES = [0, 2, 1, 3]  # axes (c, z, y, x) as (c, y, z, x): a tile is one plane, turned along its two axes


@dataclass(frozen=True, eq=False)
class TiledSource(VoxelSource):
    """The pixels of a level as voxels (C, I, J, K).

    ``channels`` are the numbers of those that are read; None for all. With ``fills`` tiles that cannot be
    decoded are read as 0 and noted in ``damaged``, as errors that name them; without, their error is raised.
    """

    level: TiledLevel
    channels: tuple[int, ...] | None = None
    fills: bool = False
    found: dict[int, str] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        c, i, j, k = self.level.shape
        return c if self.channels is None else len(self.channels), i, j, k

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self.level.dtype

    @property
    def chunk_shape(self) -> Triple:
        """Extent of a tile."""
        _, i, j, k = self.level.tile
        return i, j, k

    @property
    def _grid(self) -> tuple[int, int, int, int]:
        """Number of tiles along (c, z, y, x)."""
        c, i, j, k = (-(-n // t) for n, t in zip(self.level.shape, self.level.tile, strict=True))
        return c, k, j, i

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """One task for each of about equal parts of the tiles; no tile is in two of them."""
        runs = list(runs_of(self.channels or range(self.level.shape[0])))
        corners = [stored_corners(boxes, channels) for channels, _ in runs]
        first, stop = (np.concatenate(corner)[:, _PLANES] for corner in zip(*corners, strict=True))
        views = [reversed_axes(out[at]).transpose(_PLANES) for _, at in runs for out in outs]
        c, i, j, k = self.level.tile
        grid = [self._grid[axis] for axis in _PLANES]
        plan = GatherPlan.over((c, j, k, i), grid, first, stop, axes=memory_order(views))
        return ReadTasks([(partial(self._read, part, views, scaling),) for part in plan.split(parts)])

    def _read(self, plan: GatherPlan, outs: Sequence[Voxels], scaling: Scaling) -> None:
        """Decode each tile into the same memory, and write its parts from there.

        Boxes that are dense along x, as new ones are, take pixels of the tile as it is decoded. For others
        and for scaled values, some tiles are turned into planes, as the compiled loop takes them.
        """
        self.level.mark.check(str(self.level.path))
        samples, i, j, k = self.level.tile
        memory = _cached_memory((k, j, i, samples), self.dtype)
        tiles = ((n, list(rows)) for n, rows in itertools.groupby(plan.rows.tolist(), itemgetter(SHARD)))
        read = partial(self._tile, self._grid, self.level.decoder(), memory)
        if scaling == UNSCALED and all(_is_dense(out, self.dtype) for out in outs):
            for number, rows in tiles:
                tile = read(number)
                for row in rows:
                    source, target = part_slices(row)
                    copy_between_orders(tile[source], outs[row[BOX]][target])
            return
        held = buffer_pool.empty((min(HELD_TILES, len(plan.shards)), samples, j, k, i), self.dtype)
        while some := list(itertools.islice(tiles, HELD_TILES)):
            planes = {number: tile for (number, _), tile in zip(some, held, strict=False)}
            for number, tile in planes.items():
                copy_between_orders(read(number), tile)
            part = GatherPlan(np.array([row for _, rows in some for row in rows], np.int64))
            copy_chunks(planes, part, outs, scaling)

    def _tile(self, grid: Shape, decode: Decoder, memory: Voxels, number: int) -> Voxels:
        """A tile by its number in the grid, as a view (c, y, z, x) that is valid until the next one.

        ``memory`` (k, j, i, c) is decoded into where the codec can.
        """
        _, z, y, x = grid
        rest, at_x = divmod(number, x)
        rest, at_z = divmod(rest, z)
        at_c, at_y = divmod(rest, y)
        try:
            with during(Work.FETCHING):
                pixels = decode((at_c, at_x, at_y, at_z), memory)
        except DamagedTileError as error:
            if not self.fills:
                raise
            self.found[number] = str(error)
            pixels = None
        if pixels is None:
            pixels = memory
            pixels[...] = 0
        return pixels.transpose(3, 1, 0, 2)

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """The source of some channels, in this order."""
        known = range(self.shape[0]) if self.channels is None else self.channels
        return dataclasses.replace(self, channels=tuple(known[number] for number in channels))

    def filling(self) -> VoxelSource:
        """The same source, which reads tiles that cannot be decoded as 0."""
        return dataclasses.replace(self, fills=True, found={})

    def damaged(self) -> dict[str, str]:
        """The tiles that were read as 0 in this process: a name for each, and its error."""
        return {f"{self.level.path} {self.level.shape} {number}": text for number, text in self.found.items()}

    def marks(self) -> tuple[FileMark, ...]:
        """The mark of the file."""
        return (self.level.mark,)

    def bytes_below(self, size: Triple) -> int:
        """The tiles that are turned into planes before they are copied, and one as it is decoded, twice."""
        return (HELD_TILES + 2) * math.prod(self.level.tile) * self.dtype.itemsize

    def sampled_files(self) -> list[Path]:
        """None: its file has a mark."""
        return []

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array in blocks of a few tiles, or of about ``block_voxels`` a side."""
        blocks = [DASK_TILES * n for n in self.chunk_shape[:2]] + [self.chunk_shape[2]]
        if block_voxels is not None:
            blocks = [max(1, block_voxels // n) * n for n in self.chunk_shape]
        return dask_view(self, [self.shape[0], *blocks])


def _is_dense(out: Voxels, dtype: np.dtype[Any]) -> bool:
    """Whether pixels of this type follow each other along x in a box (c, y, z, x)."""
    return out.dtype == dtype and out.strides[3] == dtype.itemsize


def _cached_memory(shape: Shape, dtype: np.dtype[Any]) -> Voxels:
    """Memory for a tile that begins at no multiple of 32 bytes.

    libjpeg-turbo writes rows that are aligned to 32 bytes past the processor's cache, although they are read
    next: decoding then takes a quarter more time.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory: Voxels = buffer_pool.empty((nbytes + 3 * HALF_VECTOR,), np.uint8)
    skipped = (HALF_VECTOR - memory.ctypes.data) % (2 * HALF_VECTOR)
    return memory[skipped : skipped + nbytes].view(dtype).reshape(shape)
