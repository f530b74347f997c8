"""Bytes of a chunk -> voxels, and back: the only place that compresses or decompresses voxels.

A shard file is the chunks of one write unit, one after the other, then an index: for each chunk, in C
order, its offset and length as little-endian uint64, both 2**64 - 1 for none; then the index's crc32c.
Each chunk ends in a crc32c of its own (Zarr v3, sharding_indexed with the index at the end).
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from zpatch.errors import DamageError
from zpatch.grid import chunk_counts
from zpatch.schema import CODECS, FileSeal, new_digest

CRC_BYTES = 4
NO_CHUNK = 2**64 - 1
OPEN_MAPS = 128

Index = tuple[int, int, int, int]
Voxels = NDArray[Any]

# Decoding and encoding run in our own threads and processes; blosc's pool is neither fork-safe nor free
# of the GIL. zarr-python sets the same.
blosc.use_threads = False


@dataclass(frozen=True, slots=True)
class ShardedArray:
    """Where the voxels of one array lie and how they are packed; shapes are (c, z, y, x).

    ``contents`` tells arrays apart that stood at the same place one after the other, so that an open map
    of the one is never taken for the other.
    """

    path: Path
    shape: Index
    dtype: np.dtype[Any]
    chunks: Index
    shards: Index
    codec: str
    ndim: int
    contents: str = ""

    @property
    def chunk_grid(self) -> tuple[int, ...]:
        """How many chunks cover the array along each axis."""
        return chunk_counts(self.shape, self.chunks)

    @property
    def shard_grid(self) -> tuple[int, ...]:
        """How many shards cover the array along each axis."""
        return chunk_counts(self.shape, self.shards)

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """How many chunks a shard packs along each axis."""
        return tuple(s // c for s, c in zip(self.shards, self.chunks, strict=True))

    def shard_file(self, shard: tuple[int, ...]) -> Path:
        """The file of a shard."""
        return self.path.joinpath("c", *map(str, shard[4 - self.ndim :]))

    def __str__(self) -> str:
        return "/".join(self.path.parts[-3:])


def encode_chunk(voxels: Voxels, codec: str) -> tuple[bytes, bytes]:
    """A C-contiguous chunk, compressed, and its crc32c."""
    preset = CODECS[codec]
    if preset is None:
        data = voxels.tobytes()
    else:
        shuffle = blosc.SHUFFLE if preset.shuffle else blosc.NOSHUFFLE
        data = blosc.compress(voxels, preset.compressor.encode(), preset.level, shuffle)
    return data, google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def write_shard(array: ShardedArray, shard: tuple[int, ...], voxels: Voxels) -> FileSeal:
    """Write one shard file, whole, and say what was written.

    ``voxels`` is the part of the array that the shard covers, (c, z, y, x), little-endian; at the
    array's end it may be smaller than the shard. Chunks that lie wholly outside the array are left out.
    """
    file = array.shard_file(shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    index = np.full((math.prod(array.chunks_per_shard), 2), NO_CHUNK, dtype="<u8")
    scratch = np.zeros(array.chunks, dtype=array.dtype)
    seal = new_digest()
    offset = 0
    with file.open("wb") as stream:
        for number, position in enumerate(itertools.product(*map(range, array.chunks_per_shard))):
            box = tuple(slice(p * c, (p + 1) * c) for p, c in zip(position, array.chunks, strict=True))
            part = voxels[box]
            if part.size == 0:
                continue
            if part.shape != scratch.shape:
                scratch[...] = 0
            scratch[tuple(map(slice, part.shape))] = part
            length = 0
            for data in encode_chunk(scratch, array.codec):
                stream.write(data)
                seal.update(data)
                length += len(data)
            index[number] = offset, length
            offset += length
        tail = index.tobytes()
        tail += google_crc32c.value(tail).to_bytes(CRC_BYTES, "little")
        stream.write(tail)
        seal.update(tail)
        stream.flush()
        os.fsync(stream.fileno())
    return FileSeal(offset + len(tail), seal.hexdigest())


class MappedShard:
    """One shard file, memory-mapped, its index parsed and checked once."""

    def __init__(self, array: ShardedArray, shard: tuple[int, ...]) -> None:
        self.file = array.shard_file(shard)
        folder = self.file.parent
        if folder.resolve() != array.path.resolve() / folder.relative_to(array.path):
            raise self._damage("it lies behind a link to elsewhere")
        chunks = math.prod(array.chunks_per_shard)
        index_bytes = 16 * chunks + CRC_BYTES
        self.bytes = self._map()
        if len(self.bytes) < index_bytes:
            raise self._damage(f"it has {len(self.bytes)} bytes, less than its own index")
        tail = self.bytes[-index_bytes:]
        if google_crc32c.value(tail[:-CRC_BYTES]) != _stored_crc(tail):
            raise self._damage("its index does not match its checksum")
        index = tail[:-CRC_BYTES].view("<u8").reshape(chunks, 2)
        present = index[:, 0] != NO_CHUNK
        longest = np.iinfo(np.uint64).max // 2
        used = index[present]
        end = np.minimum(used[:, 0], longest) + np.minimum(used[:, 1], longest)
        if np.any(end > len(self.bytes) - index_bytes) or np.any(used[:, 1] <= CRC_BYTES):
            raise self._damage("its index points outside the file")
        # Looked up one by one in the inner loop, where buffers give integers faster than arrays do.
        self._offsets = index[:, 0].copy().data
        self._lengths = index[:, 1].copy().data
        self._checked = bytearray(chunks)

    def _map(self) -> NDArray[np.uint8]:
        try:
            # A store is data from anywhere: no links, and no waiting for a pipe that stands for a file.
            handle = os.open(self.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise self._damage("it is missing") from None
        except OSError as error:
            raise self._damage(f"it cannot be opened ({error.strerror})") from None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                raise self._damage("it is empty or no regular file")
            view = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)
        return np.frombuffer(view, np.uint8)

    def _damage(self, what: str) -> DamageError:
        return DamageError(
            f"damaged store: {self.file}: {what}; run 'zpatch verify' on the store, "
            f"then convert the image again"
        )

    def decode(self, number: int, codec: str, out: Voxels) -> None:
        """Decode a chunk into ``out``, C-contiguous and of exactly the chunk's shape."""
        offset = self._offsets[number]
        if offset == NO_CHUNK:
            raise self._damage(f"chunk {number} is missing")
        data = self.bytes[offset : offset + self._lengths[number] - CRC_BYTES]
        if not self._checked[number]:
            self._check_chunk(number, codec, data, out.nbytes)
        if CODECS[codec] is None:
            out.reshape(-1).view(np.uint8)[:] = data
            return
        try:
            blosc.decompress(data, out)
        except (RuntimeError, ValueError) as error:
            raise self._damage(f"chunk {number} cannot be decoded ({error})") from error

    def _check_chunk(self, number: int, codec: str, data: NDArray[np.uint8], chunk_bytes: int) -> None:
        """On first touch: the checksum, and how much the chunk says that it decodes to."""
        end = self._offsets[number] + self._lengths[number]
        stored = int.from_bytes(self.bytes[end - CRC_BYTES : end].tobytes(), "little")
        if google_crc32c.value(data) != stored:
            raise self._damage(f"chunk {number} does not match its checksum")
        if CODECS[codec] is None:
            if len(data) != chunk_bytes:
                raise self._damage(f"chunk {number} has {len(data)} bytes instead of {chunk_bytes}")
        # The first 16 bytes of a blosc frame say how many bytes it decodes to.
        elif len(data) < 16 or int.from_bytes(data[4:8].tobytes(), "little") != chunk_bytes:
            raise self._damage(f"chunk {number} does not decode to the {chunk_bytes} bytes of a chunk")
        self._checked[number] = 1


def _stored_crc(data: NDArray[np.uint8]) -> int:
    return int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")


class _OpenMaps:
    """The most recently used shards of this process.

    Maps survive a fork and may be read by any thread; the lock is only held to look one up. A dropped
    map is unmapped when the last array that views it goes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._maps: OrderedDict[tuple[Path, str, tuple[int, ...]], MappedShard] = OrderedDict()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def get(self, array: ShardedArray, shard: tuple[int, ...]) -> MappedShard:
        key = (array.path, array.contents, shard)
        with self._lock:
            mapped = self._maps.get(key)
            if mapped is not None:
                self._maps.move_to_end(key)
                return mapped
        mapped = MappedShard(array, shard)
        with self._lock:
            self._maps[key] = mapped
            while len(self._maps) > self._limit:
                self._maps.popitem(last=False)
        return mapped

    def forget(self, folder: Path) -> None:
        with self._lock:
            for key in [key for key in self._maps if key[0].is_relative_to(folder)]:
                del self._maps[key]


_open_maps = _OpenMaps(OPEN_MAPS)


def open_shard(array: ShardedArray, shard: tuple[int, ...]) -> MappedShard:
    """The mapped shard, from the cache of open maps where it is there."""
    return _open_maps.get(array, shard)


def close_shards(folder: Path) -> None:
    """Let go of all maps below a folder, before it is replaced."""
    _open_maps.forget(folder.absolute())
