"""How a stored array is cut into chunks, and how these are packed into shards.

A chunk is decoded as a whole; a shard is a file, and is written as a whole. Shards are slabs of full planes
of the slowest spatial axis: a NIfTI file is read in that order, so a conversion needs memory for two slabs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zpatch.geometry.boxes import Integers, padded_to_4d

CHUNK_VOXELS = 32
SHARD_BYTES = 32 * 2**20
MAX_SHARD_BYTES = 128 * 2**20
ANISOTROPIC_RATIO = 3.0
MAX_CHUNKS_IN_SHARD = 2**18
MOST_CHUNKS_READ = 2**20  # in a shard: arrays of others have more than those that are written here
MOST_CHUNK_BYTES = 2**40  # an uncompressed chunk may be a whole file


@dataclass(frozen=True, slots=True)
class Layout:
    """Chunk and shard shape of an array, in stored axis order; a shard is a whole number of chunks."""

    chunks: tuple[int, ...]
    shards: tuple[int, ...]

    @property
    def slab_extent(self) -> tuple[int, int]:
        """Channels and planes of a shard: those that must be in memory to write a row of shards."""
        channels, planes, _, _ = padded_to_4d(self.shards)
        return channels, planes

    def shard_counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Number of shards that cover an array of that shape along each axis."""
        return chunk_counts(shape, self.shards)


def unreadable(
    shape: Sequence[int], chunks: Sequence[int], shards: Sequence[int], itemsize: int
) -> str | None:
    """Why an array cannot be read, whose sides are positive; None if it can be.

    The bytes of a chunk and the index of a shard are held in memory, and offsets are 64-bit integers.

    >>> unreadable((8, 8, 8), (1, 1, 1), (2048, 2048, 8), 2)
    'its shards have 33554432 chunks each, more than 1048576'
    """
    if any(s % c for s, c in zip(shards, chunks, strict=True)):
        return f"its shards {shards} are not whole chunks {chunks}"
    per_shard = math.prod(s // c for s, c in zip(shards, chunks, strict=True))
    if per_shard > MOST_CHUNKS_READ:
        return f"its shards have {per_shard} chunks each, more than {MOST_CHUNKS_READ}"
    if (chunk_bytes := math.prod(chunks) * itemsize) > MOST_CHUNK_BYTES:
        return f"its chunks have {chunk_bytes} bytes each, more than {MOST_CHUNK_BYTES}"
    padded = [-(-n // s) * s for n, s in zip(shape, shards, strict=True)]
    if math.prod(padded) * itemsize >= 2**62:
        return f"its shape {tuple(shape)} is larger than any disk"
    return None


def plan_layout(
    shape: tuple[int, ...],
    itemsize: int,
    *,
    spacing: Sequence[float] = (1, 1, 1),
    chunk: int = CHUNK_VOXELS,
    shard_bytes: int = SHARD_BYTES,
    interleaved: int = 1,
) -> Layout:
    """Chunks and shards of a stored array ``(z, y, x)`` or ``(c, z, y, x)``.

    ``spacing`` is (z, y, x). If one axis is over three times as coarse as the finest, chunks are a quarter as
    long on it and twice as long on the others: as many voxels, closer to a cube in mm. ``interleaved``
    is the number of channels that are stored together in the file (3 for RGB).

    >>> plan_layout((189, 233, 197), 1)
    Layout(chunks=(32, 32, 32), shards=(192, 256, 224))
    """
    *channels, nz, ny, nx = shape
    cz, cy, cx = _chunk_shape((nz, ny, nx), spacing, chunk)
    plane_bytes = interleaved * _round_up(ny, cy) * _round_up(nx, cx) * itemsize
    while cz > 1 and cz * plane_bytes > MAX_SHARD_BYTES:
        cz = -(-cz // 2)
    width_y, width_x = _tile_plane((ny, nx), (cy, cx), cz * interleaved * itemsize, interleaved)
    layer = _Layer(cz, cz * plane_bytes, interleaved * (width_y // cy) * (width_x // cx))
    depth = _shard_depth(nz, layer, shard_bytes)
    if not channels:
        return Layout((cz, cy, cx), (depth, width_y, width_x))
    together = interleaved
    if interleaved == 1 and depth >= nz:
        layers = depth // cz
        most = min(shard_bytes // (layers * layer.bytes), MAX_CHUNKS_IN_SHARD // (layers * layer.chunks))
        together = max(1, min(channels[0], most))
    return Layout((1, cz, cy, cx), (together, depth, width_y, width_x))


class _Layer(NamedTuple):
    """One layer of chunks over a plane: its planes, its bytes, and the number of its chunks in one shard."""

    planes: int
    bytes: int
    chunks: int


def _chunk_shape(shape: tuple[int, int, int], spacing: Sequence[float], chunk: int) -> tuple[int, int, int]:
    finest = min(spacing)
    coarse = [finest > 0 and s > ANISOTROPIC_RATIO * finest for s in spacing]
    sizes = [chunk] * 3
    if sum(coarse) == 1:
        sizes = [max(1, chunk // 4) if c else chunk * 2 for c in coarse]
    z, y, x = (min(size, n) for size, n in zip(sizes, shape, strict=True))
    return z, y, x


def _shard_depth(planes: int, layer: _Layer, shard_bytes: int) -> int:
    """Planes of a shard: about ``shard_bytes``, and about the same for all shards."""
    layers = -(-planes // layer.planes)
    per_shard = max(1, min(shard_bytes // layer.bytes, MAX_CHUNKS_IN_SHARD // layer.chunks))
    shards = -(-layers // per_shard)
    return -(-layers // shards) * layer.planes


def _tile_plane(
    plane: tuple[int, int], chunk: tuple[int, int], bytes_per_column: int, interleaved: int
) -> tuple[int, int]:
    """Extent of a shard in the plane: the whole plane, or a tile if one layer of chunks is too large."""
    (ny, nx), (cy, cx) = plane, chunk
    wide_y, wide_x = _round_up(ny, cy), _round_up(nx, cx)

    def too_large() -> bool:
        many_chunks = interleaved * (wide_y // cy) * (wide_x // cx) > MAX_CHUNKS_IN_SHARD
        return wide_y * wide_x * bytes_per_column > MAX_SHARD_BYTES or many_chunks

    while too_large() and max(wide_y // cy, wide_x // cx) > 1:
        if wide_y // cy >= wide_x // cx:
            wide_y = _round_up(-(-wide_y // 2), cy)
        else:
            wide_x = _round_up(-(-wide_x // 2), cx)
    return wide_y, wide_x


def plan_output_layout(
    shape: tuple[int, ...],
    itemsize: int,
    *,
    swept_axis: int,
    chunk: int = CHUNK_VOXELS,
    shard_bytes: int = SHARD_BYTES,
) -> Layout:
    """Chunks and shards of an image that is written in a sweep along one spatial axis.

    ``shape`` is ``(c, z, y, x)``, ``swept_axis`` 0, 1 or 2 for z, y or x. A shard is one chunk long along it,
    so that it is complete as early as possible. Chunks of a volume that is thin on an axis are longer on the
    others, so that they have as many voxels.

    >>> plan_output_layout((1, 1, 30000, 40000), 1, swept_axis=2).chunks
    (1, 1, 256, 256)
    """
    channels, *spatial = shape
    size = [min(chunk, n) for n in spatial]
    while math.prod(size) < chunk**3 and any(map(int.__lt__, size, spatial)):
        size = [min(2 * s, n) for s, n in zip(size, spatial, strict=True)]
    shard = [
        c if axis == swept_axis else _round_up(n, c)
        for axis, (n, c) in enumerate(zip(spatial, size, strict=True))
    ]
    while channels * math.prod(shard) * itemsize > shard_bytes:
        widest = max(range(3), key=lambda axis: shard[axis] // size[axis])
        if shard[widest] == size[widest]:
            break
        shard[widest] = _round_up(-(-shard[widest] // 2), size[widest])
    return Layout((1, *size), (channels, *shard))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def chunk_counts(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Number of chunks that cover an array along each axis."""
    return tuple(-(-n // c) for n, c in zip(shape, chunks, strict=True))


def covering_chunks(
    first: Integers,
    stop: Integers,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
) -> tuple[Integers, Integers]:
    """The chunks that some boxes touch: pairs (chunk number, box number), ordered by chunk.

    ``first`` and ``stop`` are ``(number of boxes, ndim)``; chunks are numbered in C order.

    >>> covering_chunks(np.array([[0], [3]]), np.array([[2], [9]]), (10,), (4,))
    (array([0, 0, 1, 2]), array([0, 1, 1, 1]))
    """
    counts = chunk_counts(shape, chunks)
    low, high = first // chunks, (stop - 1) // chunks + 1
    numbers = []
    for a, b in zip(low.tolist(), high.tolist(), strict=True):
        number = np.zeros(1, dtype=np.int64)
        for start, end, count in zip(a, b, counts, strict=True):
            number = (number[:, None] * count + np.arange(start, end)).ravel()
        numbers.append(number)
    boxes = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
    chunk = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
    order = np.argsort(chunk, kind="stable")
    return chunk[order], boxes[order]
