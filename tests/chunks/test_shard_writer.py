"""Shard files hold each chunk as it is encoded alone; hashing and writing happen beside compression."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.chunks import shard_writer
from zpatch.chunks.codec import codec_of, crc32c, encode_chunk
from zpatch.chunks.shard_writer import write_shard
from zpatch.chunks.sharded_array import ChunkFiles, Index, ShardedArray
from zpatch.digests import FileSeal, digest

CHUNKS, SHARDS = (1, 4, 5, 6), (2, 8, 10, 24)
WHOLE = (0, 0, 0, 0)


def array_in(folder: Path, shape: Index, dtype: str = "<i2") -> ShardedArray:
    files = ChunkFiles((0, 1, 2, 3))
    return ShardedArray(folder, shape, np.dtype(dtype), CHUNKS, SHARDS, codec_of("lz4"), files)


def chunk_by_chunk(array: ShardedArray, voxels: NDArray[Any], preset: str) -> bytes:
    """A shard, each of whose chunks is cut out and encoded alone."""
    index, chunks = [], b""
    for position in itertools.product(*map(range, array.chunks_per_shard)):
        part = voxels[tuple(slice(p * n, (p + 1) * n) for p, n in zip(position, CHUNKS, strict=True))]
        chunk = np.zeros(CHUNKS, array.dtype)
        chunk[tuple(map(slice, part.shape))] = part
        data = b"".join(encode_chunk(chunk, preset)) if part.size else b""
        index += [len(chunks), len(data)] if data else [2**64 - 1, 2**64 - 1]
        chunks += data
    table = np.array(index, "<u8").tobytes()
    return chunks + table + crc32c(table)


@given(
    st.tuples(*(st.integers(1, n) for n in SHARDS)),
    st.permutations(range(4)),
    st.booleans(),
    st.sampled_from(["u1", "<i2", "<f4", "<c16"]),
    st.sampled_from([("lz4", 1), ("lz4", 500), ("none", 2**20), ("zstd", 2**20)]),
)
def test_a_shard_has_the_bytes_of_its_chunks_encoded_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    shape: Index,
    order: list[int],
    reversed_x: bool,
    dtype: str,
    how: tuple[str, int],
) -> None:
    array = array_in(tmp_path_factory.mktemp("shard"), shape, dtype)
    numbers = np.arange(np.prod(shape)).reshape([shape[axis] for axis in order]) % 251
    voxels = numbers.astype(dtype).transpose(np.argsort(order))[..., :: -1 if reversed_x else 1]
    preset, line_bytes = how
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "LINE_BYTES", line_bytes)
        seal = write_shard(array, WHOLE, voxels, preset)
    content = array.shard_file(WHOLE).read_bytes()
    assert content == chunk_by_chunk(array, voxels, preset)
    assert seal == FileSeal(len(content), digest(content))


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_is_an_error_of_the_shard(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)
    write = shard_writer._SealedStream._write

    def full(stream: Any, data: bytes) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, data)

    monkeypatch.setattr(shard_writer._SealedStream, "_write", full)
    monkeypatch.setattr(shard_writer, "LINE_BYTES", 1)
    array = array_in(tmp_path, (1, 4, 5, 12))  # two chunks and the index
    with pytest.raises(OSError, match="No space left"):
        write_shard(array, WHOLE, np.ones(array.shape, "<i2"), "lz4")


def test_a_shard_is_on_the_disk_unless_the_caller_syncs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    array = array_in(tmp_path, (1, 4, 5, 12))
    write_shard(array, WHOLE, np.ones(array.shape, "<i2"), "lz4", is_synced=False)
    assert synced == []
    seal = write_shard(array, WHOLE, np.ones(array.shape, "<i2"), "lz4")
    assert synced == [seal.bytes]
