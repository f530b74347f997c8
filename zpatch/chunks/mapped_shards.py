"""Chunks in memory-mapped files: which file holds a chunk, at which offset, and whether its bytes are intact.

A shard file has the chunks of one shard, one after the other, and an index: for each chunk, in C order, its
offset and length as little-endian uint64, both 2**64 - 1 for a chunk that is missing; then the index's crc32c
(Zarr v3, sharding_indexed). In stores of zpatch the index is at the end of the file, and each chunk is
followed by its crc32c. In an array without shards each file is one chunk.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.codec import CRC_BYTES, Bytes, crc32c
from zpatch.chunks.mapped_memory import copy_mapped
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.errors import DamageError
from zpatch.geometry.boxes import Integers, Voxels
from zpatch.runtime.guarded_files import is_behind_link, open_regular
from zpatch.runtime.recent import Recent

NO_CHUNK = 2**64 - 1
OPEN_MAPS = 128


class MappedShard:
    """One file of chunks, memory-mapped, its index parsed and checked once.

    ``extents`` (chunks, 2) has the offset and length of each chunk's encoded bytes, without their checksum;
    both are -1 for a chunk that is missing.
    """

    def __init__(self, array: ShardedArray, shard: tuple[int, ...]) -> None:
        self._array = array
        self._shard = shard
        self.file = array.shard_file(shard)
        if array.fill is None and is_behind_link(array.path.parent, self.file.parent):
            raise self._damage("it is behind a link to another folder")
        self._identity = _identity(self.file) if array.fill is not None else None
        self._map, self.bytes = self._mapped()
        self.extents = self._read_index()
        self._checked = np.zeros(len(self.extents), dtype=bool)

    @property
    def is_missing(self) -> bool:
        """Whether the array has no file for the shard, so that all its chunks have the fill value."""
        return self._map is None

    def is_current(self) -> bool:
        """Whether the file is still the one that was mapped; stores of zpatch never change a file."""
        return self._array.fill is None or self._identity == _identity(self.file)

    def _mapped(self) -> tuple[mmap.mmap | None, Bytes]:
        try:  # files of other Zarr arrays may be links, as in git-annex
            handle = open_regular(self.file, follow=self._array.fill is not None)
        except FileNotFoundError:
            if self._array.fill is not None:
                return None, np.zeros(0, np.uint8)
            raise self._damage("it is missing") from None
        except OSError as error:
            raise self._damage(f"it cannot be opened ({error.strerror})") from None
        try:
            if os.fstat(handle).st_size == 0:
                raise self._damage("it is empty")
            view = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)
        return view, np.frombuffer(view, np.uint8)

    def _read_index(self) -> Integers:
        array, files = self._array, self._array.files
        chunks = math.prod(array.chunks_per_shard)
        if self._map is None:
            return np.broadcast_to(np.int64(-1), (chunks, 2))
        if files.index is None:
            offsets, lengths = np.zeros(1, np.uint64), np.full(1, len(self.bytes), np.uint64)
            first, stop = 0, len(self.bytes)
        else:
            index_bytes = 16 * chunks + files.index_checksum * CRC_BYTES
            if len(self.bytes) < index_bytes:
                raise self._damage(f"it has {len(self.bytes)} bytes, fewer than its index")
            at_end = files.index == "end"
            start = len(self.bytes) - index_bytes if at_end else 0
            index = self._read(start, start + index_bytes)
            if files.index_checksum and crc32c(index[:-CRC_BYTES]) != index[-CRC_BYTES:].tobytes():
                raise self._damage("its index does not match its checksum")
            offsets, lengths = index[: 16 * chunks].view("<u8").reshape(chunks, 2).T.astype(np.uint64)
            first, stop = (0, len(self.bytes) - index_bytes) if at_end else (index_bytes, len(self.bytes))
        present = offsets != NO_CHUNK
        longest = np.uint64(2**62)
        ends = np.minimum(offsets, longest) + np.minimum(lengths, longest)
        outside = (ends > stop) | (offsets < first) | (lengths <= array.codec.crc_bytes)
        if np.any(outside & present):
            raise self._damage("its index points outside the file")
        extents = np.stack([offsets, lengths - np.uint64(array.codec.crc_bytes)], axis=1)
        extents[~present] = NO_CHUNK
        return extents.astype(np.int64)

    def unchecked(self, numbers: Integers) -> Integers:
        """The chunks, of some numbers, whose checksums were not compared yet."""
        fresh = numbers[~self._checked[numbers]]
        return np.unique(fresh) if fresh.size else fresh

    def fetch(self, numbers: Integers) -> None:
        """Ask the system to read some chunks ahead, instead of page by page as they are touched."""
        if self._map is None or not hasattr(self._map, "madvise"):
            return
        for offset, length in self.extents[numbers].tolist():
            if offset >= 0:
                start = offset // mmap.PAGESIZE * mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, start, offset + length - start)

    def check(self, numbers: Integers) -> None:
        """Compare chunks with their checksums; a missing one is damage if the array has no fill value."""
        for number, (offset, length) in zip(numbers.tolist(), self.extents[numbers].tolist(), strict=True):
            if offset < 0:
                if self._array.fill is None:
                    raise self.damaged(number, "is missing")
            elif self._array.codec.checksum:
                data = self._read(offset, offset + length + CRC_BYTES)
                if crc32c(data[:length]) != data[length:].tobytes():
                    raise self.damaged(number, "does not match its checksum")
        self._checked[numbers] = True

    def decode(self, number: int, scratch: Voxels) -> Voxels:
        """The voxels of a chunk, decoded into ``scratch``, C-contiguous and of exactly the chunk's shape.

        Those of a missing chunk are one fill value, and take no memory.
        """
        if not self._checked[number]:
            self.check(np.array([number]))
        offset, length = self.extents[number].tolist()
        if offset < 0:
            return np.broadcast_to(np.asarray(self._array.fill, scratch.dtype), scratch.shape)
        try:
            self._array.codec.decode(self._read(offset, offset + length), scratch)
        except ValueError as error:
            raise self.damaged(number, str(error)) from error
        return scratch

    def undecodable(self, number: int) -> DamageError:
        """The error for a chunk that the compiled loop found damaged, also if numcodecs would decode it."""
        try:
            self.decode(number, np.zeros(self._array.chunks, self._array.dtype))
        except DamageError as error:
            return error
        return self.damaged(number, "cannot be decoded")

    def _read(self, start: int, stop: int) -> Bytes:
        """Some bytes of the file, copied: another program may write to it at the same time."""
        data = np.empty(stop - start, np.uint8)
        if not copy_mapped(self.bytes[start:stop], data):
            raise self.cut_short()
        return data

    def cut_short(self) -> DamageError:
        """The error for a file that has become shorter than its map; the map is not used again."""
        _open_shards.forget(lambda key: key == (self._array.path, self._array.contents, self._shard))
        return self._damage("it was cut short, replaced or unmounted while it was read")

    def damaged(self, number: int, problem: str) -> DamageError:
        """The error for a chunk, by its number in the shard."""
        within = np.unravel_index(number, self._array.chunks_per_shard)
        per_shard = self._array.chunks_per_shard
        place = [int(s * n + w) for s, n, w in zip(self._shard, per_shard, within, strict=True)]
        named = "/".join(str(place[axis]) for axis in self._array.files.axes if axis is not None)
        return self._damage(f"chunk {number} of the file ({named} of the array) {problem}")

    def _damage(self, problem: str) -> DamageError:
        return DamageError(f"damaged: {self._array}: {self.file}: {problem}; {self._array.remedy}")


def _identity(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


# A dropped map is unmapped when the last array that views it is released.
_open_shards: Recent[tuple[Path, str, tuple[int, ...]], MappedShard] = Recent(OPEN_MAPS)


def open_shard(array: ShardedArray, shard: tuple[int, ...]) -> MappedShard:
    """The mapped shard, from the cache of open maps if it is there and its file has not changed."""
    key = array.path, array.contents, shard
    return _open_shards.get(key, lambda: MappedShard(array, shard), MappedShard.is_current)


def close_shards(folder: Path) -> None:
    """Drop all maps below a folder, before it is replaced."""
    absolute = folder.absolute()
    _open_shards.forget(lambda key: key[0].is_relative_to(absolute))


def release_pages(mapped: np.memmap[Any, Any]) -> None:
    """Take what was read of a file out of this process's memory: the system reads it again when needed."""
    view: Any = mapped._mmap  # type: ignore[attr-defined]
    if mapped.mode == "r" and hasattr(view, "madvise"):  # changes that are not in the file would be lost
        view.madvise(mmap.MADV_DONTNEED)
