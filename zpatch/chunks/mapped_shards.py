"""Chunks in shard files: which file holds a chunk, at which offset, and whether its bytes are intact.

A shard file has the chunks of one shard, one after the other, and an index: for each chunk, in C order, its
offset and length as little-endian uint64, both 2**64 - 1 for a chunk that is missing; then the index's crc32c
(Zarr v3, sharding_indexed). In stores of zpatch the index is at the end of the file, and each chunk is
followed by its crc32c. In an array without shards each file is one chunk.

Chunks are read from the open file at first, which takes less time than mapping their pages, and through a
memory map once some of them are read again. Each chunk is compared with its checksum when it is read for the
first time in a process.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.codec import CRC_BYTES, Bytes, crc32c
from zpatch.chunks.mapped_memory import copy_mapped
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.errors import DamageError
from zpatch.geometry.boxes import Bools, Integers, Voxels
from zpatch.runtime.guarded_files import OpenFile, is_behind_link, open_regular
from zpatch.runtime.recent import Recent
from zpatch.work_counts import Work, count, during

NO_CHUNK = 2**64 - 1  # -1 as a signed integer
OPEN_MAPS = 128
MOST_COPIED = 2**20  # as in _encoded.h: larger chunks are always read through a map
REMEMBERED = 4096  # shards
MOST_REMEMBERED_CHUNKS = 4096  # of a shard
SETTLED_S = 2  # before that, a file may change again within the time stamp that it was first seen with


class MappedShard:
    """One file of chunks, open or memory-mapped, its index parsed and checked once.

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
        self._map: Bytes | None = None
        self._open = self._opened()
        status = None if self._open is None else os.fstat(self._open.number)
        self._bytes = 0 if status is None else status.st_size
        if status is not None and not self._bytes:
            raise self._damage("it is empty")
        self.extents = self._read_index()
        self._is_large = int(self.extents[:, 1].max(initial=0)) > MOST_COPIED
        self._read = np.zeros(len(self.extents), dtype=bool)
        self._checked = _checked_before(self.file, status, len(self.extents))

    @property
    def is_missing(self) -> bool:
        """Whether the array has no file for the shard, so that all its chunks have the fill value."""
        return not self._bytes

    def is_current(self) -> bool:
        """Whether the file is still the one that was opened; stores of zpatch never change a file."""
        return self._array.fill is None or self._identity == _identity(self.file)

    def _opened(self) -> OpenFile | None:
        try:  # files of other Zarr arrays may be links, as in git-annex
            return OpenFile(open_regular(self.file, follow=self._array.fill is not None))
        except FileNotFoundError:
            if self._array.fill is not None:
                return None
            raise self._damage("it is missing") from None
        except OSError as error:
            raise self._damage(f"it cannot be opened ({error.strerror})") from None

    def _read_index(self) -> Integers:
        array, files = self._array, self._array.files
        chunks = math.prod(array.chunks_per_shard)
        if self._open is None:
            return np.broadcast_to(np.int64(-1), (chunks, 2))
        if files.index is None:
            extents = np.array([[0, self._bytes]], np.int64)
            first, stop = 0, self._bytes
        else:
            index_bytes = 16 * chunks + files.index_checksum * CRC_BYTES
            if self._bytes < index_bytes:
                raise self._damage(f"it has {self._bytes} bytes, fewer than its index")
            at_end = files.index == "end"
            start = self._bytes - index_bytes if at_end else 0
            index = self._copy(start, start + index_bytes)
            if files.index_checksum and crc32c(index[:-CRC_BYTES]) != index[-CRC_BYTES:].tobytes():
                raise self._damage("its index does not match its checksum")
            extents = index[: 16 * chunks].view("<i8").reshape(chunks, 2).astype(np.int64)
            first, stop = (0, start) if at_end else (index_bytes, self._bytes)
        offsets, lengths = extents[:, 0], extents[:, 1]  # from 2**63 on they are negative
        present = offsets != -1
        outside = (lengths > stop - offsets) | (offsets < first) | (lengths <= array.codec.crc_bytes)
        if np.count_nonzero(outside & present):
            raise self._damage("its index points outside the file")
        lengths -= array.codec.crc_bytes
        extents[~present] = -1
        return extents

    def unchecked(self, numbers: Integers) -> Bools:
        """Of some chunks, which are to be compared with their checksums when they are read."""
        return ~self._checked[numbers] & self._array.codec.checksum

    def place(self, numbers: Integers) -> Bytes | OpenFile:
        """Where to read some chunks: the map if one of them is read again or is large, else the file."""
        opened = self._open
        if opened is None:
            return np.zeros(0, np.uint8) if self._map is None else self._map
        if not self._is_large and not self._read[numbers].any():
            return opened
        try:
            mapped = mmap.mmap(opened.number, self._bytes, access=mmap.ACCESS_READ)
        except ValueError:  # its file is shorter by now
            raise self.cut_short() from None
        self._map = np.frombuffer(mapped, np.uint8)
        self._open = None  # the map has a descriptor of its own
        return self._map

    def mark_read(self, numbers: Integers) -> None:
        """Note that chunks were read, and were compared with their checksums before."""
        self._read[numbers] = True
        self._checked[numbers] = True

    def check(self, number: int) -> None:
        """Compare a chunk with its checksum; a missing one is damage if the array has no fill value."""
        offset, length = self.extents[number].tolist()
        if offset < 0:
            if self._array.fill is None:
                raise self.damaged(number, "is missing")
        elif self._array.codec.checksum:
            data = self._copy(offset, offset + length + CRC_BYTES)
            if crc32c(data[:length]) != data[length:].tobytes():
                raise self.unequal(number)
        self._checked[number] = True

    def decode(self, number: int, scratch: Voxels) -> Voxels:
        """The voxels of a chunk, decoded into ``scratch``, C-contiguous and of exactly the chunk's shape.

        Those of a missing chunk are one fill value, and take no memory.
        """
        offset, length = self.extents[number].tolist()
        if self._checked[number]:
            count(Work.KNOWN_CHUNKS)
        else:
            with during(Work.FETCHING):
                self.check(number)
            count(Work.NEW_CHUNKS)
            count(Work.FETCHED_BYTES, max(length, 0))
        if offset < 0:
            return np.broadcast_to(np.asarray(self._array.fill, scratch.dtype), scratch.shape)
        try:
            self._array.codec.decode(self._copy(offset, offset + length), scratch)
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

    def unequal(self, number: int) -> DamageError:
        """The error for a chunk that differs from its checksum."""
        return self.damaged(number, "does not match its checksum")

    def _copy(self, start: int, stop: int) -> Bytes:
        """Some bytes of the file, copied: another program may write to it at the same time."""
        opened, data = self._open, np.empty(stop - start, np.uint8)
        if opened is None:
            assert self._map is not None
            is_whole = copy_mapped(self._map[start:stop], data)
        else:
            is_whole = _read_into(opened, start, data)
        if not is_whole:
            raise self.cut_short()
        return data

    def cut_short(self) -> DamageError:
        """The error for a file that has become shorter than it was; it is opened again for the next read."""
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


def _read_into(opened: OpenFile, start: int, data: Bytes) -> bool:
    """Fill an array with the bytes of a file from ``start`` on; False if it does not have as many."""
    left = data.data
    while left:
        try:
            done = os.preadv(opened.number, [left], start)
        except OSError:  # unmounted
            return False
        if not done:
            return False
        left, start = left[done:], start + done
    return True


def _checked_before(file: Path, status: os.stat_result | None, chunks: int) -> Bools:
    """For each chunk, whether it was compared with its checksum when the same file was open before."""
    if status is None or chunks > MOST_REMEMBERED_CHUNKS:
        return np.zeros(chunks, bool)
    now_s = time.monotonic()
    seen = str(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    first_s, checked = _checked_chunks.get(seen, lambda: (now_s, np.zeros(chunks, bool)))
    return checked if now_s - first_s >= SETTLED_S else np.zeros(chunks, bool)


def _identity(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


# For each file, as it was when it was opened: when it was first seen so, and which chunks matched their
# checksums after it had been so for a while.
_checked_chunks: Recent[tuple[str, int, int, int, int, int], tuple[float, Bools]] = Recent(REMEMBERED)

# A dropped map is unmapped when the last array that views it is released.
_open_shards: Recent[tuple[Path, str, tuple[int, ...]], MappedShard] = Recent(OPEN_MAPS)


def open_shard(array: ShardedArray, shard: tuple[int, ...]) -> MappedShard:
    """The mapped shard, from the cache of open maps if it is there and its file has not changed."""
    key = array.path, array.contents, shard
    with during(Work.FETCHING):
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
