"""Voxels -> a shard file: its encoded chunks, one after the other, then their index.

The chunks of a line along x are cut out at once, as their voxels are beside each other in memory. While one
line is cut and compressed, a thread hashes the line before it and writes it to the file.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.codec import crc32c, encode_chunk
from zpatch.chunks.mapped_shards import NO_CHUNK
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.digests import FileSeal, new_digest
from zpatch.geometry.boxes import Voxels

LINE_BYTES = 2**20  # of the chunks that are cut out at once: they stay in the processor's cache


def write_shard(
    array: ShardedArray, shard: tuple[int, ...], voxels: Voxels, preset: str, *, is_synced: bool = True
) -> FileSeal:
    """Write one shard file, and give its seal. With ``is_synced`` its bytes are on the disk afterwards.

    ``voxels`` is the part of the array that the shard covers, (c, z, y, x), little-endian; at the array's end
    it may be smaller than the shard. Chunks wholly outside the array are not written.
    """
    file = array.shard_file(shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    index = np.full((math.prod(array.chunks_per_shard), 2), NO_CHUNK, dtype="<u8")
    offset = 0
    with file.open("wb") as stream:
        with _SealedStream(stream) as sealed:
            for first, chunks in _lines(array, voxels):
                parts: list[bytes] = []
                for number, chunk in enumerate(chunks, first):
                    encoded = encode_chunk(chunk, preset)
                    length = sum(map(len, encoded))
                    index[number] = offset, length
                    offset += length
                    parts += encoded
                sealed.write(b"".join(parts))
            tail = index.tobytes()
            tail += crc32c(tail)
            sealed.write(tail)
        if is_synced:
            stream.flush()
            os.fsync(stream.fileno())
    return FileSeal(offset + len(tail), sealed.checksum)


class _SealedStream:
    """Hashes and writes bytes in a thread: those of one call while the caller makes those of the next."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = new_digest()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zpatch-seal")
        self._last: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Start to write, once the bytes of the call before are written; an error of those is raised."""
        self._wait()
        self._last = self._pool.submit(self._write, data)

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    @property
    def checksum(self) -> str:
        """The digest of all bytes."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self._wait()


def _lines(array: ShardedArray, voxels: Voxels) -> Iterator[tuple[int, Voxels]]:
    """The chunks of a shard in order: the number of the first of some, and these chunks (n, c, z, y, x).

    Where a chunk extends beyond the voxels it is 0. Chunks are valid until the next iteration.
    """
    *across, along = array.chunks_per_shard
    *sides, length = array.chunks
    together = max(1, min(along, LINE_BYTES // array.chunk_bytes))
    memory = np.empty((together, *array.chunks), dtype=array.dtype)
    for line, position in enumerate(itertools.product(*map(range, across))):
        part = voxels[*(slice(p * n, (p + 1) * n) for p, n in zip(position, sides, strict=True))]
        for first in range(0, along, together):
            some = part[..., first * length : (first + together) * length]
            if some.size:
                yield line * along + first, _cut(some, memory)


def _cut(part: Voxels, memory: NDArray[Any]) -> Voxels:
    """The chunks (n, c, z, y, x) in a row of voxels (c, z, y, n * x), copied to ``memory``."""
    c, z, y, x = part.shape
    length = memory.shape[-1]
    whole, rest = divmod(x, length)
    chunks = memory[: whole + bool(rest)]
    if rest or (c, z, y) != memory.shape[1:-1]:
        chunks.fill(0)
    inside = chunks[:, :c, :z, :y]
    if rest:
        inside[whole, ..., :rest] = part[..., whole * length :]
    if whole and part.strides[-1] == part.itemsize:  # then lines are copied as if each were one voxel
        line = np.dtype((np.void, length * part.itemsize))
        lines = part[..., : whole * length].view(line)
        inside[:whole].view(line)[..., 0] = np.moveaxis(lines, -1, 0)
    elif whole:
        lines = part[..., : whole * length].reshape(c, z, y, whole, length)
        inside[:whole] = np.moveaxis(lines, -2, 0)
    return chunks
