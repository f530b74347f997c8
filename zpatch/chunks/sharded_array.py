"""An array on disk, as data: shapes, codec, and how its files are named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.codec import ChunkCodec
from zpatch.chunks.file_mark import FileMark
from zpatch.chunks.layout import chunk_counts
from zpatch.geometry.boxes import PatchLocation, stored_corners

Index = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ChunkFiles:
    """How the files of an array are named, and where their index is.

    ``axes`` has, for each number in a file's name, the axis (0 to 3) along which it counts; None for an axis
    that the array's metadata have besides these four, of which the chunk ``place`` is read. Numbers follow
    ``prefix``, with ``separator`` between them. ``index`` is the end of a shard where its index is ("start"
    or "end"), or None if each file is one chunk.
    """

    axes: tuple[int | None, ...]
    prefix: str = "c"
    separator: str = "/"
    index: str | None = "end"
    index_checksum: bool = True
    place: int = 0


@dataclass(frozen=True, slots=True)
class ShardedArray:
    """Where the voxels of one array are stored and how they are encoded; shapes have its 4 stored axes.

    In an array without shards, a shard is one chunk. ``fill`` is the value of chunks that are missing; None
    if a missing chunk is damage, as in stores of zpatch. ``name`` and ``remedy`` are for errors. ``contents``
    differs between arrays that are written to the same path one after the other, so that an open map of one
    is not used for the other. ``metadata`` is the mark of the array's metadata file, which is looked at again
    before a chunk without a file is read as ``fill``; None if the array had no such file.
    """

    path: Path
    shape: Index
    dtype: np.dtype[Any]
    chunks: Index
    shards: Index
    codec: ChunkCodec
    files: ChunkFiles
    name: str = ""
    remedy: str = "restore the file from a copy"
    fill: Any = None
    contents: str = ""
    metadata: FileMark | None = None

    @property
    def chunk_grid(self) -> tuple[int, ...]:
        """Number of chunks that cover the array along each axis."""
        return chunk_counts(self.shape, self.chunks)

    @property
    def shard_grid(self) -> tuple[int, ...]:
        """Number of shards that cover the array along each axis."""
        return chunk_counts(self.shape, self.shards)

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Number of chunks of a shard along each axis."""
        return tuple(s // c for s, c in zip(self.shards, self.chunks, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def box(self, location: PatchLocation, channels: range | None = None) -> tuple[Index, Index]:
        """First voxel and stop, in stored axis order, of a box (I, J, K) with some channels, or with all.

        For arrays whose stored axes are (c, z, y, x).
        """
        corners = stored_corners([location], channels or range(self.shape[0]))
        (a, b, c, d), (e, f, g, h) = (corner[0].tolist() for corner in corners)
        return (a, b, c, d), (e, f, g, h)

    def shard_file(self, shard: tuple[int, ...]) -> Path:
        """The file of a shard."""
        numbers = [str(self.files.place if axis is None else shard[axis]) for axis in self.files.axes]
        named = [self.files.prefix, *numbers] if self.files.prefix else numbers
        return self.path / self.files.separator.join(named)

    def __str__(self) -> str:
        return self.name or str(self.path)
