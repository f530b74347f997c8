"""Encoded chunks: all are decoded to the same bytes, and a damaged one is an error that describes it."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc, zstd
from numpy.typing import NDArray
from reading import DTYPES, assert_same_bytes, many_examples, random_voxels

from zpatch.chunks.codec import CODECS, ChunkCodec, Compressor, codec_of, crc32c, encode_chunk

MIB = 2**20
BLOSC = [(c, s) for c in ("blosclz", "lz4", "lz4hc", "zlib", "zstd") for s in (0, 1, 2)]
COMPRESSORS: tuple[Compressor, ...] = ("none", "blosc", "zstd", "gzip", "zlib")

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS)


def packed(voxels: NDArray[Any], compressor: Compressor) -> bytes:
    data = np.ascontiguousarray(voxels)
    match compressor:
        case "none":
            return data.tobytes()
        case "blosc":
            return bytes(blosc.compress(data, b"lz4", 5, 1))
        case "zstd":
            return bytes(zstd.compress(data, 1))
        case "gzip":
            return gzip.compress(data.tobytes(), 1)
        case "zlib":
            return zlib.compress(data.tobytes(), 1)


def unpacked(data: bytes, compressor: Compressor, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    out = np.zeros(shape, dtype)
    ChunkCodec(compressor).decode(np.frombuffer(data, np.uint8), out)
    return out


@pytest.fixture
def voxels() -> NDArray[np.int16]:
    return np.arange(2 * 5 * 6 * 7, dtype=np.int16).reshape(2, 5, 6, 7) % 23


@pytest.mark.parametrize("preset", list(CODECS))
def test_a_chunk_of_any_preset_is_decoded_to_the_same_bytes(preset: str) -> None:
    for dtype in DTYPES:
        voxels = random_voxels((1, 7, 11, 13), dtype)
        data, checksum = encode_chunk(voxels, preset)
        out = np.zeros_like(voxels)
        codec_of(preset).decode(np.frombuffer(data, np.uint8), out)
        assert_same_bytes(out, voxels)
        assert checksum == crc32c(data)
        assert codec_of(preset).crc_bytes == len(checksum) == 4


@every_compressor
def test_a_chunk_of_any_compressor_is_decoded_to_the_same_bytes(compressor: Compressor) -> None:
    for dtype in DTYPES:
        voxels = random_voxels((1, 7, 11, 13), dtype)
        assert_same_bytes(unpacked(packed(voxels, compressor), compressor, voxels.shape, dtype), voxels)


@pytest.mark.parametrize(("name", "shuffle"), BLOSC)
def test_a_blosc_frame_of_any_kind_is_decoded_to_the_same_bytes(name: str, shuffle: int) -> None:
    for size, level in itertools.product([1, 15, 16, 127, 128, 1000, 70_000], [0, 1, 9]):
        voxels = np.arange(size, dtype=np.int32) // 3
        data = bytes(blosc.compress(voxels, name.encode(), level, shuffle))
        assert_same_bytes(unpacked(data, "blosc", (1, 1, 1, size), "<i4"), voxels[None, None, None])


def test_a_zstd_frame_need_not_have_its_decoded_size() -> None:
    voxels = np.arange(3000, dtype=np.int16) % 100
    data = bytes(zstd.compress(voxels, 3))
    descriptor = data[4]
    assert descriptor & 0x20  # one segment: no window is described
    size_bytes = (1, 2, 4, 8)[descriptor >> 6]
    window = bytes([10 << 3])  # of 1 MiB
    unsaid = data[:4] + bytes([descriptor & 0x04]) + window + data[5 + size_bytes :]
    assert_same_bytes(unpacked(unsaid, "zstd", (1, 1, 1, 3000), "<i2").ravel(), voxels)
    with pytest.raises(ValueError, match=r"cannot be decoded|does not decode"):
        unpacked(unsaid, "zstd", (1, 1, 1, 2999), "<i2")


@every_compressor
def test_a_chunk_of_another_size_is_an_error(compressor: Compressor, voxels: NDArray[np.int16]) -> None:
    for size in (419, 421, 1, 840):
        with pytest.raises(ValueError, match=r"instead of|does not decode to the \d+ bytes of a chunk"):
            unpacked(packed(voxels, compressor), compressor, (1, 1, 1, size), "<i2")


@every_compressor
def test_a_chunk_cut_short_anywhere_is_an_error(compressor: Compressor, voxels: NDArray[np.int16]) -> None:
    data = packed(voxels, compressor)
    for length in {0, 1, 4, 15, 16, 17, len(data) // 2, len(data) - 1}:
        with pytest.raises(ValueError, match=r"bytes|cannot be decoded"):
            unpacked(data[:length], compressor, voxels.shape, "<i2")


def test_a_blosc_frame_is_not_read_past_its_end() -> None:
    voxels = np.random.default_rng(0).integers(0, 30, 3000).astype(np.int16)
    whole = np.frombuffer(
        packed(voxels, "blosc"), np.uint8
    )  # the bytes that are cut off are still in memory after the end
    for missing in (1, 2, 10, 1000):
        with pytest.raises(ValueError, match="cannot be decoded"):
            ChunkCodec("blosc").decode(whole[:-missing], np.zeros_like(voxels))


@every_compressor
def test_bytes_of_no_format_are_an_error(compressor: Compressor, rng: np.random.Generator) -> None:
    for length in (0, 3, 16, 18, 40, 500):
        with pytest.raises(ValueError, match=r"bytes|cannot be decoded"):
            unpacked(rng.bytes(length), compressor, (2, 5, 6, 7), "<i2")


@many_examples
@given(
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
    compressor=st.sampled_from(["blosc", "zstd", "gzip", "zlib"]),
)
def test_a_changed_byte_gives_an_error_or_other_voxels(
    position: int, value: int, compressor: Compressor
) -> None:
    voxels = np.arange(420, dtype=np.int16).reshape(2, 5, 6, 7) % 23
    data = bytearray(packed(voxels, compressor))
    data[position % len(data)] = value
    memory = np.full(840 + 200, 0xA5, np.uint8)
    out = memory[100:-100].view(np.int16).reshape(voxels.shape)
    with contextlib.suppress(ValueError):
        ChunkCodec(compressor).decode(np.frombuffer(bytes(data), np.uint8), out)
    assert (memory[:100] == 0xA5).all()
    assert (memory[-100:] == 0xA5).all()


@pytest.mark.parametrize("compressor", ["blosc", "zstd", "gzip", "zlib"])
def test_a_few_bytes_cannot_fill_the_memory(compressor: Compressor) -> None:
    bomb = packed(np.zeros(64 * MIB, np.uint8), compressor)
    assert len(bomb) < MIB
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="does not decode to the 64 bytes of a chunk"):
            unpacked(bomb, compressor, (1, 4, 4, 4), "|u1")
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_the_checksum_is_a_little_endian_crc32c() -> None:
    assert crc32c(b"123456789") == (0xE3069283).to_bytes(4, "little")
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == crc32c(b"123456789")
    assert ChunkCodec("blosc").crc_bytes == 4
    assert ChunkCodec("blosc", checksum=False).crc_bytes == 0


@pytest.mark.parametrize("preset", list(CODECS))
def test_a_preset_is_encoded_with_its_settings(preset: str) -> None:
    data, _ = encode_chunk(np.zeros((1, 8, 8, 8), np.int16), preset)
    settings = CODECS[preset]
    if settings is None:
        assert data == bytes(1024)
        assert codec_of(preset).compressor == "none"
    else:
        assert codec_of(preset).compressor == "blosc"
        formats = {"lz4": 1, "lz4hc": 1, "zstd": 4}
        assert data[2] >> 5 == formats[settings.compressor]
        assert bool(data[2] & 1) == settings.shuffle
