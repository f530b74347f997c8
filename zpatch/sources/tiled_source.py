"""The voxels of a level of a slide: each tile under a group of boxes is decoded once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.chunks.gather import copy_chunks
from zpatch.chunks.gather_plan import GatherPlan, memory_order
from zpatch.chunks.mapped_memory import copy_mapped
from zpatch.chunks.scaling import Scaling
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels, reversed_axes, stored_corners
from zpatch.runtime import buffer_pool
from zpatch.slides.tiles import DamagedTileError, TiledLevel
from zpatch.sources.voxel_source import ReadTasks, Shape, VoxelSource
from zpatch.sources.voxel_sources import dask_view, runs_of

HELD_TILES = 16  # decoded before they are copied
DASK_TILES = 4  # along x and y, in a block of a dask array
_PLANES = [
    0,
    2,
    1,
    3,
]  # axes (c, z, y, x) as (c, y, z, x): tiles of one plane are turned along their two axes


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
        self.level.mark.check(str(self.level.path))
        for part in plan.split(math.ceil(len(plan.shards) / HELD_TILES)):
            copy_chunks({number: self._tile(number) for number in part.shards.tolist()}, part, outs, scaling)

    def _tile(self, number: int) -> Voxels:
        """A tile (c, y, z, x) by its number in the grid."""
        c, z, y, x = self._grid
        at_c, at_y, at_z, at_x = map(int, np.unravel_index(number, (c, y, z, x)))
        samples, i, j, k = self.level.tile
        try:
            pixels = self.level.decode((at_c, at_x, at_y, at_z))
        except DamagedTileError as error:
            if not self.fills:
                raise
            self.found[number] = str(error)
            pixels = None
        memory = buffer_pool.empty((samples, j, k, i), self.dtype)
        if pixels is None:
            memory[...] = 0
        else:
            copy_mapped(pixels.transpose(3, 1, 0, 2), memory)
        return memory

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
        """The tiles that are decoded before they are copied, twice: as they are decoded, and as planes."""
        return (HELD_TILES + 1) * math.prod(self.level.tile) * self.dtype.itemsize

    def sampled_files(self) -> list[Path]:
        """None: its file has a mark."""
        return []

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array in blocks of a few tiles, or of about ``block_voxels`` a side."""
        blocks = [DASK_TILES * n for n in self.chunk_shape[:2]] + [self.chunk_shape[2]]
        if block_voxels is not None:
            blocks = [max(1, block_voxels // n) * n for n in self.chunk_shape]
        return dask_view(self, [self.shape[0], *blocks])
