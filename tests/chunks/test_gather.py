"""The inner loop of reading: it gives the voxels of numcodecs and numpy, and is safe on bad bytes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import mmap
import os
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numcodecs import blosc, lz4
from numpy.typing import NDArray
from reading import (
    DTYPES,
    assert_same_bytes,
    both_loops,
    draw_box,
    many_examples,
    needs_compiled_loop,
    random_voxels,
    stored,
)
from reading import loop as loop

from zpatch.chunks import gather as gathering
from zpatch.chunks.codec import CODECS, CRC_BYTES, ChunkCodec
from zpatch.chunks.gather import GONE, UNEQUAL, gather, read_region
from zpatch.chunks.gather_plan import GatherPlan, memory_order
from zpatch.chunks.mapped_shards import MappedShard, close_shards
from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.chunks.sharded_array import ChunkFiles, ShardedArray
from zpatch.geometry.boxes import Voxels
from zpatch.images.image import Image
from zpatch.sources.voxel_sources import ShardSource

SPLIT_FLAG = 16  # flag of a frame: each block is one stream
STORED_FLAG = 2
GUARD = 0xA5

Draw = st.DataObject
Box = tuple[tuple[int, int], ...]  # start and stop along each axis


# One chunk, passed directly to the compiled loop


def row_of(
    box: Box,
    at: Sequence[int] = (0, 0, 0, 0),
    *,
    offset: int = 0,
    length: int = 0,
    map_: int = 0,
    out: int = 0,
) -> list[int]:
    """A row that copies a box of a chunk to a position in an output box."""
    parts = [(start, stop - start, target) for (start, stop), target in zip(box, at, strict=True)]
    return [map_, offset, length, out, *(number for part in parts for number in part)]


def run_loop(
    rows: Any,
    frames: Sequence[bytes],
    outs: Sequence[Voxels],
    chunk: Sequence[int],
    dtype: Any,
    *,
    start: int = 0,
    codec: str = "blosc",
    scaled_from: str = "",
    scaling: Scaling = UNSCALED,
    checks: Any = b"",
    files: Any = b"",
    streams: bool = False,
) -> tuple[int, int]:
    """The row at which the compiled loop stopped, and what is wrong with its chunk."""
    assert gathering._compiled is not None
    itemsize = np.dtype(dtype).itemsize
    rows = np.array(rows, np.int64) if isinstance(rows, list) else rows
    where = frames, files, outs, streams
    stopped, problem, *_ = gathering._compiled(
        rows, checks, start, *where, tuple(chunk), itemsize, codec, scaled_from, *scaling
    )
    return stopped, problem


def decoded_by_loop(frame: bytes, box: Box, chunk: Sequence[int], dtype: Any) -> Voxels:
    """A box of the chunk in a frame."""
    out = np.zeros([stop - start for start, stop in box], dtype)
    assert run_loop([row_of(box, length=len(frame))], [frame], [out], chunk, dtype) == (1, False)
    return out


def decoded_by_numcodecs(frame: bytes, chunk: Sequence[int], dtype: Any) -> Voxels:
    out = np.zeros(chunk, dtype)
    ChunkCodec("blosc").decode(np.frombuffer(frame, np.uint8), out)
    return out


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, n) for n in shape)


def draw_part(data: Draw, shape: Sequence[int]) -> Box:
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return tuple((a, b) if a < b else (0, n) for (a, b), n in zip(ends, shape, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in box)


def frame_of(
    voxels: Voxels, compressor: str = "lz4", level: int = 5, shuffle: int = 1, block: int = 0
) -> bytes:
    frame: bytes = blosc.compress(voxels, compressor.encode(), level, shuffle, block)
    return frame


def frame_by_hand(
    voxels: Voxels, block: int, *, split: bool, shuffled: bool, level: int = 1, stored: int = 0
) -> bytes:
    """A frame with blocks of ``block`` voxels, a size that blosc itself would not choose.

    Each block is one stream, or ``split`` one for each byte of a voxel; of the bits of ``stored`` each says
    for some streams whether they are kept as they are.
    """
    item, data = voxels.itemsize, voxels.reshape(-1).view(np.uint8)
    starts, streams, number = [], b"", 0
    table = 16 + 4 * -(-len(data) // (block * item))
    for first in range(0, len(data), block * item):
        part = data[first : first + block * item]
        content = part.reshape(-1, item).T.tobytes() if shuffled else part.tobytes()
        # As in blosc: a short block at the end, and blocks of fewer than 128 voxels, are never split.
        count = item if split and len(part) == block * item and block >= 128 else 1
        starts.append(table + len(streams))
        for n in range(count):
            stream = content[n * len(content) // count : (n + 1) * len(content) // count]
            packed = lz4.compress(stream, level)[4:]  # numcodecs puts the length in front
            kept = len(packed) >= len(stream) or stored >> number % 8 & 1
            streams += struct.pack("<I", len(stream if kept else packed)) + (stream if kept else packed)
            number += 1
    flags = 1 << 5 | shuffled | (0 if split and block >= 128 else SPLIT_FLAG)
    header = struct.pack("<BBBBIII", 2, 1, flags, item, len(data), block * item, table + len(streams))
    return header + struct.pack(f"<{len(starts)}I", *starts) + streams


def block_count(frame: bytes) -> int:
    size, block = struct.unpack("<II", frame[4:12])
    return -(-size // block)


def repetition(size: int, distance: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes that repeat after a distance."""
    pattern = np.random.default_rng(seed).permutation(256)[:distance].astype(np.uint8)
    return np.resize(pattern, size)


def runs(size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Runs of equal bytes, as label maps have them."""
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(0.02, size)
    return np.repeat(rng.integers(0, 5, size).astype(np.uint8), lengths)[:size]


def mixture(size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise, repetitions of all distances and runs, alternating."""
    rng = np.random.default_rng(seed)
    data = bytearray()
    while len(data) < size:
        length = int(rng.integers(1, 400))
        data += rng.bytes(length)
        data += repetition(length, int(rng.integers(1, 40)), int(rng.integers(99))).tobytes()
        data += data[len(data) // 2 :][:length]  # a match of a large distance
        if len(data) > 2**16:
            data *= 2
    return np.frombuffer(bytes(data[:size]), np.uint8)


CONTENTS: dict[str, Callable[[int, int], NDArray[np.uint8]]] = {
    "zeros": lambda size, seed: np.zeros(size, np.uint8),
    "noise": lambda size, seed: np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8),
    "low noise": lambda size, seed: np.random.default_rng(seed).integers(0, 3, size).astype(np.uint8),
    "runs": runs,
    "mixture": mixture,
    "ramp": lambda size, seed: (np.arange(size) // (seed % 7 + 1)).astype(np.uint8),
    **{f"every {d}": lambda size, seed, d=d: repetition(size, d, seed) for d in (1, 2, 3, 5, 8, 13, 16, 20)},
}


@many_examples
@needs_compiled_loop
@given(
    data=st.data(),
    content=st.sampled_from(list(CONTENTS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 30), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES[:-1]),
    compressor=st.sampled_from(["lz4", "lz4hc"]),
    level=st.integers(0, 9),
    shuffle=st.sampled_from([blosc.NOSHUFFLE, blosc.SHUFFLE]),
    block=st.one_of(st.just(0), st.integers(1, 9000)),
    seed=st.integers(0, 99),
)
def test_a_frame_is_decoded_as_numcodecs_decodes_it(
    data: Draw, content: str, shape: tuple[int, ...], dtype: str, compressor: str, level: int, shuffle: int,
    block: int, seed: int,
) -> None:  # fmt: skip
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = CONTENTS[content](size, seed)
    voxels = (raw % 2 == 1 if dtype == "|b1" else raw.view(dtype)).reshape(shape)
    frame = frame_of(voxels, compressor, level, shuffle, block)
    box = draw_part(data, shape)
    expected = decoded_by_numcodecs(frame, shape, dtype)
    assert expected.tobytes() == voxels.tobytes()
    assert_same_bytes(decoded_by_loop(frame, box, shape, dtype), expected[slices(box)])


@many_examples
@needs_compiled_loop
@given(
    data=st.data(),
    content=st.sampled_from(list(CONTENTS)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 20), st.integers(1, 40)),
    dtype=st.sampled_from(["|u1", "<i2", "<f4", "<f8"]),
    split=st.booleans(),
    shuffled=st.booleans(),
    stored=st.integers(0, 255),
    seed=st.integers(0, 99),
)
def test_blocks_of_any_size_split_or_whole_are_decoded_as_numcodecs_decodes_them(
    data: Draw, content: str, shape: tuple[int, ...], dtype: str, split: bool, shuffled: bool, stored: int,
    seed: int,
) -> None:  # fmt: skip
    count = math.prod(shape)
    voxels = CONTENTS[content](count * np.dtype(dtype).itemsize, seed).view(dtype).reshape(shape)
    block = data.draw(st.one_of(st.integers(1, count), st.integers(min(128, count), count)))
    frame = frame_by_hand(voxels, block, split=split, shuffled=shuffled, stored=stored)
    assert decoded_by_numcodecs(frame, shape, dtype).tobytes() == voxels.tobytes()
    box = draw_part(data, shape)
    assert_same_bytes(decoded_by_loop(frame, box, shape, dtype), voxels[slices(box)])


@needs_compiled_loop
@pytest.mark.parametrize(
    ("dtype", "shape", "compressor", "level", "block"),
    [
        ("<i2", (1, 64, 64, 64), "lz4", 5, 0),
        ("<i2", (1, 72, 80, 65), "lz4", 5, 0),
        ("<i2", (2, 64, 64, 64), "lz4", 1, 0),
        ("<i2", (1, 64, 64, 64), "lz4hc", 9, 0),
        ("<i2", (1, 96, 96, 96), "lz4hc", 5, 32**3 * 2),
        ("<i2", (1, 64, 64, 64), "lz4", 5, 10_000),
        ("|u1", (1, 96, 96, 96), "lz4", 5, 0),
        ("<f4", (1, 64, 64, 65), "lz4", 5, 0),
        ("<f4", (1, 50, 64, 64), "lz4", 9, 4 * 12_345),
        ("<f8", (1, 33, 64, 64), "lz4", 5, 0),
        ("<f8", (1, 33, 64, 64), "lz4hc", 9, 8 * 999),
    ],
)
@pytest.mark.parametrize(("shuffle", "content"), [(1, "smooth"), (0, "mixture")])
def test_frames_of_several_blocks_are_decoded_as_numcodecs_decodes_them(
    dtype: str, shape: tuple[int, ...], compressor: str, level: int, block: int, shuffle: int, content: str
) -> None:
    rng = np.random.default_rng(0)
    if content == "smooth":  # as scans are: some planes are compressed, others stored
        smooth = 500 * np.sin(np.linspace(0, 20, math.prod(shape))) + rng.normal(0, 5, math.prod(shape))
        voxels = smooth.astype(dtype).reshape(shape)
    else:
        voxels = mixture(math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
    frame = frame_of(voxels, compressor, level, shuffle, block)
    whole_frame = decoded_by_numcodecs(frame, shape, dtype)
    assert whole_frame.tobytes() == voxels.tobytes()
    c, z, y, x = shape
    for box in (
        whole(shape),
        ((0, 1), (0, 1), (0, 1), (0, 1)),
        ((c - 1, c), (z - 1, z), (y - 1, y), (x - 1, x)),
        ((0, c), (z // 3, z - 3), (5, y - 1), (7, x - 5)),
        ((0, c), (z // 2, z), (0, y), (0, x)),
        ((0, 1), (0, z), (3, 4), (0, x)),
    ):
        assert_same_bytes(decoded_by_loop(frame, box, shape, dtype), voxels[slices(box)])


def test_the_frames_of_these_tests_are_of_every_kind() -> None:
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 50, (72, 80, 65), dtype=np.int16)
    split, unsplit = (frame_by_hand(voxels, 999, split=split, shuffled=True) for split in (True, False))
    assert block_count(frame_of(voxels, block=10_000)) > 10
    assert voxels.size % 999
    assert not split[2] & SPLIT_FLAG
    assert unsplit[2] & SPLIT_FLAG
    assert not frame_of(voxels)[2] & SPLIT_FLAG
    assert frame_of(voxels[0, 0])[2] & SPLIT_FLAG
    assert frame_of(np.frombuffer(rng.bytes(1000), "<i2"))[2] & STORED_FLAG


# Streams written by hand, with sequences of any kind


def lz4_stream(sequences: Sequence[tuple[bytes, int, int]], last: bytes) -> bytes:
    """An LZ4 block: for each sequence its literals, then a match of a distance and a length (4 and more)."""

    def more(length: int) -> bytes:
        return b"" if length < 15 else b"\xff" * ((length - 15) // 255) + bytes([(length - 15) % 255])

    stream = b""
    for literals, distance, length in [*sequences, (last, 0, 4)]:
        stream += bytes([min(len(literals), 15) << 4 | min(length - 4, 15)]) + more(len(literals)) + literals
        stream += struct.pack("<H", distance) + more(length - 4) if distance else b""
    return stream


def expanded(sequences: Sequence[tuple[bytes, int, int]], last: bytes) -> bytes:
    """The contents of such a block, byte by byte."""
    out = bytearray()
    for literals, distance, length in sequences:
        out += literals
        for _ in range(length):
            out.append(out[-distance])
    return bytes(out + last)


def lz4_frame(stream: bytes, size: int) -> bytes:
    """A blosc frame of one block in one stream, not shuffled."""
    header = struct.pack("<BBBBIII", 2, 1, 1 << 5 | SPLIT_FLAG, 1, size, size, 24 + len(stream))
    return header + struct.pack("<II", 20, len(stream)) + stream


def check_stream(sequences: Sequence[tuple[bytes, int, int]], stops: Sequence[int] = ()) -> None:
    """A stream is decoded to its contents, as a whole and up to some bytes of it."""
    last = bytes(range(16))  # LZ4 ends in literals
    content = expanded(sequences, last)
    chunk = (1, 1, 1, len(content))
    stream = lz4_stream(sequences, last)
    if len(stream) == len(content):
        return  # a stream as long as its contents counts as stored
    frame = lz4_frame(stream, len(content))
    assert decoded_by_numcodecs(frame, chunk, "|u1").tobytes() == content
    for stop in (len(content), *stops):
        stop = min(stop, len(content))
        box = (*whole((1, 1, 1)), (0, stop))
        assert decoded_by_loop(frame, box, chunk, "|u1").tobytes() == content[:stop]


@needs_compiled_loop
@pytest.mark.parametrize("length", [*range(4, 40, 5), 63, 64, 65, 127, 128, 129, 273, 274, 275, 1000])
def test_matches_of_every_distance_and_length_are_decoded(length: int) -> None:
    for distance in range(1, 41):
        for longer in range(5 if length < 63 else 1):
            match = (np.random.default_rng(distance).bytes(distance), distance, length + longer)
            check_stream([match])
            check_stream([match, (b"xyz", 3, 4), (b"", distance + 2, 5)])


@needs_compiled_loop
def test_a_stream_is_decoded_up_to_any_byte() -> None:
    for distance in range(1, 34):
        literals = np.random.default_rng(distance).bytes(distance)
        check_stream([(literals, distance, 70), (b"abcdefghijklmnopq", 9, 30), (b"", 40, 45)], range(1, 200))


@many_examples
@needs_compiled_loop
@given(
    sequences=st.lists(
        st.tuples(st.binary(max_size=60), st.integers(1, 90), st.integers(4, 90)), min_size=1, max_size=20
    ),
    stop=st.integers(1, 1000),
)
@example(sequences=[(b"a" * 15, 1, 19), (b"", 1, 18), (b"b" * 270, 270, 274)], stop=600)
@example(sequences=[(bytes(range(256)) * 256, 65535, 70_000), (b"", 65535, 19)], stop=70_000)
def test_streams_of_any_sequences_are_decoded(sequences: list[tuple[bytes, int, int]], stop: int) -> None:
    done, sound = 0, []
    for literals, distance, length in sequences:
        literals = literals or (b"!" if not done else b"")
        done += len(literals)
        sound.append((literals, min(distance, done), length))
        done += length
    check_stream(sound, [stop])


@needs_compiled_loop
@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\x10",
        b"\xf0",
        b"\xf0\xff\xff",
        b"\x10a\x00\x00",  # a distance of 0
        b"\x10a\x02\x00",  # a distance before the beginning
        b"\x1fa\x01\x00\xff\xff\xff\xff",  # a match without an end
        b"\x1fa\x01\x00" + b"\xff" * 300 + b"\x00",  # a match longer than the chunk
        b"\x10a\x01",  # half a distance
        b"\x50abcde",  # an end before the end
        b"\xf0\x20" + b"x" * 47,
    ],
)
def test_a_stream_shorter_than_its_chunk_is_damage(stream: bytes) -> None:
    out = np.zeros((1, 1, 1, 64), np.uint8)
    frame = lz4_frame(stream, 64)
    assert run_loop([row_of(whole(out.shape), length=len(frame))], [frame], [out], out.shape, "|u1") == (
        0,
        True,
    )


@needs_compiled_loop
def test_a_match_that_points_before_its_stream_is_damage() -> None:
    for size in (40, 400):
        for begun in (0, 1, 5, 16, 30):
            literals, last = bytes(range(begun)), bytes(size - begun - 8)
            for distance in range(1, begun + 12):
                frame = lz4_frame(lz4_stream([(literals, distance, 8)], last), size)
                out = np.zeros((1, 1, 1, size), np.uint8)
                row = row_of(whole(out.shape), length=len(frame))
                sound = distance <= begun
                assert run_loop([row], [frame], [out], out.shape, "|u1") == (int(sound), not sound)


# Encodings that are not supported, and damage


@needs_compiled_loop
@pytest.mark.parametrize(
    ("compressor", "shuffle"),
    [(c, blosc.SHUFFLE) for c in ("blosclz", "zlib", "zstd")] + [("lz4", blosc.BITSHUFFLE)],
)
def test_frames_of_other_compressors_are_left_to_numcodecs(compressor: str, shuffle: int) -> None:
    voxels = np.arange(4000, dtype=np.int16).reshape(1, 10, 20, 20) % 37
    frames = [frame_of(voxels), frame_of(voxels, compressor, shuffle=shuffle)]
    outs = [np.zeros_like(voxels), np.zeros_like(voxels)]
    rows = [row_of(whole(voxels.shape), length=len(f), map_=n, out=n) for n, f in enumerate(frames)]
    assert run_loop(rows, frames, outs, voxels.shape, "<i2") == (1, False)
    assert_same_bytes(outs[0], voxels)
    assert not outs[1].any()


@needs_compiled_loop
@pytest.mark.parametrize(
    ("position", "value"),
    [
        (4, 2**31 + 5),
        (4, 7999),
        (12, 2**32 - 1),
        (12, 9000),
        (12, 15),
        (8, 4),  # more blocks than the frame has room for
        (16, 0),  # a block that begins in the header
        (16, 2**32 - 1),
        (16, 8000),
        (20, 2**32 - 1),  # a stream without an end
        (20, 2**31 - 1),
    ],
)
def test_a_frame_with_wrong_sizes_is_damage(position: int, value: int) -> None:
    voxels = np.arange(4000, dtype=np.int16).reshape(1, 10, 20, 20) % 37
    frame = bytearray(frame_of(voxels, "lz4hc"))
    frame[position : position + 4] = struct.pack("<I", value)
    out = np.zeros_like(voxels)
    found = run_loop([row_of(whole(out.shape), length=len(frame))], [bytes(frame)], [out], out.shape, "<i2")
    assert found == (0, True)


def corrupted(frame: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A frame with some bytes changed, swapped, zeroed or cut off."""
    data = bytearray(frame)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(data))) if rng.random() < 0.7 else int(rng.integers(min(len(data), 40)))
        stop = place + int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place:stop] = rng.bytes(len(data[place:stop]))
            case 2:
                data[place:stop] = b"\xff" * len(data[place:stop])
            case 3:
                data[place:stop] = bytes(len(data[place:stop]))
            case 4 if place > 0:
                del data[place:]
            case _:
                data[place:stop] = other[place:stop]
        if not data:
            break
    return bytes(data)


def hostile_frames(seed: int, count: int) -> list[tuple[bytes, tuple[int, ...], str]]:
    """Intact frames, with the shape and type of their chunks."""
    rng = np.random.default_rng(seed)
    sound = []
    for dtype, shape, block in (
        ("<i2", (1, 9, 16, 17), 500), ("<f4", (2, 5, 16, 16), 130), ("|u1", (1, 20, 20, 20), 777),
        ("<f8", (1, 4, 12, 11), 128), ("<i2", (1, 16, 16, 16), 90),
    ):  # fmt: skip
        voxels = mixture(math.prod(shape) * np.dtype(dtype).itemsize, seed).view(dtype).reshape(shape)
        frames = [frame_of(voxels), frame_of(voxels, "lz4hc"), frame_of(voxels, shuffle=0)]
        frames += [frame_by_hand(voxels, block, split=split, shuffled=True) for split in (True, False)]
        sound += [(frame, shape, dtype) for frame in frames]
    hostile = []
    for number in range(count):
        frame, shape, dtype = sound[number % len(sound)]
        hostile.append((corrupted(frame, sound[(number + 1) % len(sound)][0], rng), shape, dtype))
    return hostile


@needs_compiled_loop
@pytest.mark.parametrize("seed", range(5))
def test_a_corrupted_frame_is_refused_or_decoded_as_numcodecs_does_and_nothing_else_is_written(
    seed: int, full: bool
) -> None:
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    for frame, shape, dtype in hostile_frames(seed, 40_000 if full else 3000):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        margin = 256
        memory = np.full(size + 2 * margin, GUARD, np.uint8)
        out = memory[margin : margin + size].view(dtype).reshape(shape)
        box = whole(shape)
        if rng.random() < 0.3:
            box = tuple(
                (int(a), int(rng.integers(a + 1, n + 1)))
                for a, n in zip(rng.integers(shape), shape, strict=True)
            )
        at, damaged = run_loop([row_of(box, length=len(frame))], [frame], [out], shape, dtype)
        assert (memory[:margin] == GUARD).all()
        assert (memory[margin + size :] == GUARD).all()
        if at == 1 and box == whole(shape):
            try:
                expected = decoded_by_numcodecs(frame, shape, dtype)
            except ValueError:
                outcomes["decoded here alone"] += 1
            else:
                assert out.tobytes() == expected.tobytes()
                outcomes["decoded alike"] += 1
        outcomes["damaged" if damaged else "unknown" if at == 0 else "done"] += 1
    assert min(outcomes[what] for what in ("damaged", "unknown", "done", "decoded alike")) > 10


@needs_compiled_loop
def test_a_corrupted_frame_at_the_end_of_a_map_is_not_read_past_its_end() -> None:
    flags = 1 << 5 | SPLIT_FLAG | blosc.SHUFFLE
    headers = [struct.pack("<BBBBIII", 2, 1, flags, 2, 2 * 64**3, 1024, said) for said in range(20)]
    frames = [(header, (1, 64, 64, 64), "<i2") for header in headers] + hostile_frames(9, 1000)
    child = os.fork()  # reading beyond the map would kill it
    if child == 0:
        with contextlib.suppress(BaseException):
            page = mmap.PAGESIZE
            memory = mmap.mmap(-1, 32 * page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 31 * page), page, 0):
                os._exit(1)
            view = np.frombuffer(memory, np.uint8)
            for frame, shape, dtype in frames:
                view[31 * page - len(frame) : 31 * page] = np.frombuffer(frame, np.uint8)
                rows = [row_of(whole(shape), offset=31 * page - len(frame), length=len(frame))]
                run_loop(rows, [view], [np.zeros(shape, dtype)], shape, dtype)  # type: ignore[list-item]
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@needs_compiled_loop
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 19, 20, 23, 24, 40])
def test_a_frame_cut_short_is_damage(length: int) -> None:
    voxels = np.arange(4000, dtype=np.int16).reshape(1, 10, 20, 20) % 37
    frame = frame_of(voxels)[:length]
    out = np.zeros_like(voxels)
    found = run_loop([row_of(whole(out.shape), length=length)], [frame], [out], out.shape, "<i2")
    assert found == (0, True)


# Rows and arguments


@needs_compiled_loop
@pytest.mark.parametrize("field", range(16))
def test_a_row_outside_its_map_its_chunk_or_its_box_is_refused(field: int) -> None:
    chunk = (1, 2, 3, 4)
    good = row_of(whole(chunk), length=24)
    map_, offset, length, out, extent, other = 0, 1, 2, 3, 5, 4
    wrong = {
        map_: [-1, 1],
        offset: [1, 25],
        length: [-1, 25],
        out: [-1, 1],
        extent: [-1, 0, 5],
        other: [-1, 1, 4],
    }
    kind = field if field < 4 else extent if field % 3 == 2 else other
    for value in [*wrong[kind], 2**62, 2**63 - 1, *([] if kind == offset else [-(2**63)])]:
        bad = list(good)
        bad[field] = value
        for rows in ([bad], [good, bad]):
            memory = np.full((3, *chunk), GUARD, np.uint8)
            with pytest.raises(ValueError, match="reaches outside its map, its chunk or its box"):
                run_loop(rows, [bytes(24)], [memory[1]], chunk, "|u1", codec="none")
            assert (memory[::2] == GUARD).all()


@needs_compiled_loop
@pytest.mark.parametrize(
    "changes",
    [
        {"start": -1},
        {"chunk": (0, 2, 3, 4)},
        {"chunk": (1, 2, 3, -4)},
        {"chunk": (2**20, 2**20, 2**20, 2**20)},
        {"chunk": (2**62, 2**62, 2**62, 2**62)},
        {"dtype": "V3"},
        {"dtype": "<c16"},
        {"dtype": "<f4", "scaled_from": "f4"},
        {"dtype": "<i2", "scaled_from": "i2"},  # the box is too narrow for float32
        {"dtype": "<i4"},
        {"rows": np.zeros(15, np.int64)},
        {"rows": np.zeros((1, 16), np.int64)[:, ::2]},
        {"rows": np.zeros((4, 16), np.int64)[::2]},
        {"outs": [np.zeros((2, 3, 4), np.int16)]},
        {"outs": [np.zeros((1, 1, 2, 3, 4), np.int16)]},
        {"outs": [np.zeros((1, 2, 3, 4), np.int32)]},
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(changes: dict[str, Any]) -> None:
    shape = (1, 2, 3, 4)
    arguments: dict[str, Any] = {
        "rows": [row_of(whole(shape), length=48)], "frames": [bytes(48)], "outs": [np.zeros(shape, np.int16)],
        "chunk": shape, "dtype": "<i2", "codec": "none",
    }  # fmt: skip
    assert run_loop(**arguments) == (1, False)
    with pytest.raises((ValueError, BufferError)):
        run_loop(**(arguments | changes))


@needs_compiled_loop
@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 3},
        {"frames": [3]},
        {"outs": [3]},
        {"outs": None},
        {"rows": None},
        {"chunk": (1, 2, 3)},
        {"outs": [memoryview(bytes(48)).cast("B")]},
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(changes: dict[str, Any]) -> None:
    shape = (1, 2, 3, 4)
    arguments: dict[str, Any] = {
        "rows": np.array([row_of(whole(shape), length=48)]), "frames": [bytes(48)],
        "outs": [np.zeros(shape, np.int16)], "chunk": shape, "dtype": "<i2", "codec": "none",
    }  # fmt: skip
    with pytest.raises((TypeError, BufferError)):
        run_loop(**(arguments | changes))


@needs_compiled_loop
def test_read_only_memory_is_refused() -> None:
    out = np.zeros((1, 2, 3, 4), np.int16)
    out.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        run_loop([row_of(whole(out.shape), length=48)], [b"\x01" * 48], [out], out.shape, "<i2", codec="none")
    assert not out.any()


@needs_compiled_loop
def test_a_plan_without_rows_copies_nothing() -> None:
    rows = np.zeros((0, 16), np.int64)
    assert run_loop(rows, [], [], (1, 1, 1, 1), "|u1") == (0, False)
    assert run_loop(rows, [], [], (1, 1, 1, 1), "|u1", start=2**40)[0] >= 0


@needs_compiled_loop
@pytest.mark.parametrize("length", [0, 47, 49])
def test_the_loop_reports_an_uncompressed_chunk_of_another_size_as_damage(length: int) -> None:
    out = np.zeros((1, 2, 3, 4), np.int16)
    row = row_of(whole(out.shape), length=length)
    assert run_loop([row], [bytes(60)], [out], out.shape, "<i2", codec="none") == (0, True)


# Chunks compared with their checksums, in memory and in files


@contextlib.contextmanager
def as_file(content: bytes) -> Iterator[int]:
    """The descriptor of a file that holds some bytes."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.fileno()


def run_checked(codec: str, data: bytes, voxels: Voxels, where: str) -> tuple[tuple[int, int], Voxels]:
    """Read a chunk that its checksum follows, from memory or from a file."""
    length = len(data) - CRC_BYTES
    out, rows = np.zeros_like(voxels), [row_of(whole(voxels.shape), length=length)]
    with as_file(data) as file:
        frames, files = ([data], b"") if where == "memory" else ([b""], np.array([file]))
        found = run_loop(
            rows, frames, [out], voxels.shape, voxels.dtype, codec=codec, checks=b"\1", files=files
        )
    return found, out


@needs_compiled_loop
@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("codec", ["none", "blosc"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, n) for n in (1, 2, 7, 8, 9, 255, 767, 768, 12287, 12288, 12289)] + [(1, 65, 65, 65)]
)
def test_a_chunk_is_read_only_if_its_checksum_is_that_of_google_crc32c(
    shape: tuple[int, ...], codec: str, where: str, rng: np.random.Generator
) -> None:
    voxels = random_voxels(shape, "|u1", seed=shape[-1])
    encoded = voxels.tobytes() if codec == "none" else frame_of(voxels)
    data = encoded + google_crc32c.value(encoded).to_bytes(4, "little")
    found, out = run_checked(codec, data, voxels, where)
    assert found == (1, 0)
    assert_same_bytes(out, voxels)
    for position in {0, len(data) - 5, len(data) - 1, *rng.integers(len(data), size=20).tolist()}:
        wrong = bytearray(data)
        wrong[position] ^= 1 << int(rng.integers(8))
        found, out = run_checked(codec, bytes(wrong), voxels, where)
        assert found == (0, UNEQUAL)
        assert not out.any()


@needs_compiled_loop
def test_chunks_without_a_check_are_not_compared_with_the_bytes_behind_them() -> None:
    voxels = random_voxels((1, 2, 3, 4), "<i2")
    rows = [row_of(whole(voxels.shape), length=48, map_=n, out=n) for n in range(3)]
    for checks, found in ((b"\0\0\0", (3, 0)), (b"\0\1\0", (1, UNEQUAL)), (b"", (3, 0))):
        outs = [np.zeros_like(voxels) for _ in range(3)]
        frames = [voxels.tobytes() + b"1234"] * 3
        assert run_loop(rows, frames, outs, voxels.shape, "<i2", codec="none", checks=checks) == found
        for out in outs[: found[0]]:
            assert_same_bytes(out, voxels)


@needs_compiled_loop
def test_a_chunk_whose_checksum_reaches_past_its_map_is_refused_and_past_its_file_is_gone() -> None:
    out, row = np.zeros((1, 2, 3, 4), np.int16), row_of(whole((1, 2, 3, 4)), length=48)
    with pytest.raises(ValueError, match="reaches outside its map"):
        run_loop([row], [bytes(51)], [out], out.shape, "<i2", codec="none", checks=b"\1")
    with as_file(bytes(51)) as file:
        files = np.array([file])
        arguments = ([row], [b""], [out], out.shape, "<i2")
        assert run_loop(*arguments, codec="none", checks=b"\1", files=files) == (0, GONE)
        assert run_loop(*arguments, codec="none", files=files) == (1, 0)
    assert run_loop(*arguments, codec="none", files=np.array([2**20])) == (0, GONE)  # it is not open


@needs_compiled_loop
@pytest.mark.parametrize("offset", [2**62, 2**63 - 1])
def test_a_chunk_anywhere_past_the_end_of_a_file_is_gone_or_refused(offset: int) -> None:
    out, row = np.zeros((1, 2, 3, 4), np.int16), row_of(whole((1, 2, 3, 4)), offset=offset, length=48)
    with as_file(bytes(99)) as file, contextlib.suppress(ValueError):
        found = run_loop([row], [b""], [out], out.shape, "<i2", codec="none", files=np.array([file]))
        assert found == (0, GONE)


@needs_compiled_loop
def test_a_chunk_in_a_file_may_have_a_mebibyte() -> None:
    for size in (2**20, 2**20 + 1):
        out, row = np.zeros((1, 1, 1, size), np.uint8), row_of(whole((1, 1, 1, size)), length=size)
        refused = pytest.raises(ValueError, match="reaches outside its map")
        with as_file(b"x" * size) as file, refused if size > 2**20 else contextlib.nullcontext():
            run_loop([row], [b""], [out], out.shape, "|u1", codec="none", files=np.array([file]))
            assert (out == ord("x")).all()


@needs_compiled_loop
@pytest.mark.parametrize("changes", [{"checks": b"\1\1"}, {"files": np.zeros(2, np.int64)}, {"files": b"12"}])
def test_checks_and_files_of_another_number_are_refused(changes: dict[str, Any]) -> None:
    out, row = np.zeros((1, 2, 3, 4), np.int16), row_of(whole((1, 2, 3, 4)), length=48)
    with pytest.raises(ValueError, match=r"one (byte|int64) for each"):
        run_loop([row], [bytes(99)], [out], out.shape, "<i2", codec="none", **changes)


# Plans: each chunk once, each voxel once


@given(
    data=st.data(),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    chunk=st.tuples(*[st.integers(1, 4)] * 3),
    shard=st.integers(1, 3),
    parts=st.integers(1, 9),
)
def test_the_parts_of_a_plan_decode_each_chunk_once_and_write_every_voxel(
    data: Draw, shape: tuple[int, ...], chunk: tuple[int, ...], shard: int, parts: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("plan") / "image"
    voxels = np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)
    array = array_of(stored(folder, voxels, chunk=chunk, shard=shard, codec="none"))
    boxes = [draw_box(data, shape) for _ in range(data.draw(st.integers(0, 4)))]
    first = np.array([(0, *box.index) for box in boxes], np.int64).reshape(-1, 4)
    stop = np.array([(1, *box.index_fin) for box in boxes], np.int64).reshape(-1, 4)
    outs = [np.zeros((1, *box.size), np.int32) for box in boxes]
    decoded: Counter[tuple[Path, int]] = Counter()
    decode = MappedShard.decode

    def counting(mapped: MappedShard, number: int, scratch: Voxels) -> Voxels:
        decoded[mapped.file, number] += 1
        return decode(mapped, number, scratch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "_compiled", None)
        patch.setattr(MappedShard, "decode", counting)
        plans = GatherPlan.of(array, first, stop).split(parts)
        assert len(plans) <= parts
        for plan in plans:
            gather(array, plan, outs)
    for box, out in zip(boxes, outs, strict=True):
        np.testing.assert_array_equal(out[0], voxels[box.to_slices()])
    assert set(decoded.values()) <= {1}
    touched = {tuple(n // c for n, c in zip(voxel, chunk, strict=True)) for box in boxes
               for voxel in np.argwhere(np.isin(voxels, voxels[box.to_slices()])).tolist()}  # fmt: skip
    assert len(decoded) == len(touched)
    close_shards(folder)


def test_the_parts_of_a_plan_are_about_equal(tmp_path: Path) -> None:
    voxels = np.zeros((12, 12, 12), np.uint8)
    array = array_of(stored(tmp_path / "image", voxels, chunk=(2, 2, 2), shard=6))
    plan = GatherPlan.of(array, np.array([[0, 0, 0, 0]]), np.array([[1, 12, 12, 12]]))
    decoded = [Counter[str]() for _ in range(4)]
    for part, counter in zip(plan.split(4), decoded, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gathering, "_compiled", None)
            patch.setattr(MappedShard, "decode", lambda *args, c=counter: c.update(["chunk"]) or args[-1])
            gather(array, part, [np.zeros((1, 12, 12, 12), np.uint8)])
    assert [counter["chunk"] for counter in decoded] == [54] * 4


def array_of(image: Image) -> ShardedArray:
    assert isinstance(image.source, ShardSource)
    return image.source.array


@both_loops
@pytest.mark.parametrize("codec", list(CODECS))
def test_a_region_has_the_voxels_of_the_array(tmp_path: Path, codec: str) -> None:
    voxels = random_voxels((3, 9, 10, 11), "<i2")
    array = array_of(stored(tmp_path / "image", voxels, chunk=4, shard=2, codec=codec))
    assert_same_bytes(read_region(array, (1, 2, 3, 4), (3, 9, 4, 11)), voxels[1:3, 2:9, 3:4, 4:11])


# Boxes in memory of any layout and type

LAYOUTS: dict[str, Callable[[Voxels], Voxels]] = {
    "C order": lambda memory: memory,
    "backwards": lambda memory: memory[:, ::-1, ::-1, ::-1],
    "transposed": lambda memory: memory.transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0),
    "every second": lambda memory: np.repeat(memory, 2, axis=3)[..., ::2],
    "rows backwards": lambda memory: memory[:, :, ::-1],
    "in a wider box": lambda memory: np.pad(memory, [(1, 1)] * 4)[1:-1, 1:-1, 1:-1, 1:-1],
    "unaligned": lambda memory: (
        np.frombuffer(bytearray(memory.nbytes + 1), np.uint8)[1:].view(memory.dtype).reshape(memory.shape)
    ),
}


@both_loops
@pytest.mark.parametrize("dtype", ["|u1", "<i2", "<f4", "<f8", "<c16"])
@pytest.mark.parametrize("codec", ["lz4", "none"])
def test_voxels_are_written_to_memory_of_any_layout(tmp_path: Path, dtype: str, codec: str) -> None:
    voxels = mixture(2 * 20 * 20 * 40 * np.dtype(dtype).itemsize).view(dtype).reshape(2, 20, 20, 40)
    array = array_of(stored(tmp_path / "image", voxels, chunk=(8, 9, 25), shard=2, codec=codec))
    plan = GatherPlan.of(array, np.array([[0, 3, 2, 5]]), np.array([[2, 18, 18, 38]]))
    for layout in LAYOUTS.values():
        out = layout(np.zeros((2, 15, 16, 33), dtype))
        gather(array, plan, [out])
        assert_same_bytes(np.ascontiguousarray(out), np.ascontiguousarray(voxels[:, 3:18, 2:18, 5:38]))


@needs_compiled_loop
@pytest.mark.parametrize("dtype", ["|u1", "|i1", "<u2", "<i2", "<f4", "<f8"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("codec", ["lz4", "none"])
def test_large_chunks_are_turned_in_slabs_of_any_shape(
    tmp_path: Path, dtype: str, scaled: bool, codec: str, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "STREAMED_BYTES", 0 if streams else 2**40)
    if scaled and dtype[1] == "f":
        pytest.skip("floats are scaled by numpy")
    voxels = random_voxels((70, 75, 140), dtype)
    array = array_of(stored(tmp_path / "image", voxels, chunk=(70, 75, 140), shard=1, codec=codec))
    scaling = Scaling(0.5, -3.0, -20.0, 90.0) if scaled else UNSCALED
    expected = scaling.apply(voxels[None])
    for first, stop in (((0, 0, 0), (70, 75, 140)), ((3, 1, 5), (68, 74, 138)), ((31, 5, 7), (34, 69, 72))):
        box = (slice(None), *map(slice, first, stop))
        plan = GatherPlan.of(array, np.array([[0, *first]]), np.array([[1, *stop]]), (0, 3, 2, 1))
        out = np.zeros(expected[box].shape[::-1], expected.dtype).T
        gather(array, plan, [out], scaling)
        assert_same_bytes(np.ascontiguousarray(out), np.ascontiguousarray(expected[box]))


@needs_compiled_loop
@given(
    data=st.data(),
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    chunk=st.tuples(*[st.integers(1, 30)] * 3),
    dtype=st.sampled_from(["|u1", "<i2", "<f4", "<f8"]),
    codec=st.sampled_from(["lz4", "none"]),
    scaled=st.booleans(),
    axes=st.permutations([0, 1, 2, 3]),
    gap=st.integers(0, 3),
)
def test_strips_written_past_the_cache_have_the_voxels_of_numpy(
    data: Draw, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, codec: str, scaled: bool,
    axes: list[int], gap: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("strips") / "image"
    chunk = tuple(min(c, n) for c, n in zip(chunk, shape, strict=True))
    voxels = random_voxels(shape, dtype)
    array = array_of(stored(folder, voxels, chunk=chunk, shard=2, codec=codec))
    scaling = Scaling(0.5, -3.0, -20.0, 90.0) if scaled and dtype[1] != "f" else UNSCALED
    values = scaling.apply(voxels[None])
    boxes = [draw_box(data, shape) for _ in range(data.draw(st.integers(1, 3)))]
    first = np.array([(0, *box.index) for box in boxes])
    stop = np.array([(1, *box.index_fin) for box in boxes])
    outs = []
    for box in boxes:  # in memory of any order of axes, with gaps
        sides = [((1, *box.size)[axis]) for axis in axes]
        memory = np.zeros([n + gap for n in sides], values.dtype)[tuple(map(slice, sides))]
        outs.append(memory.transpose(np.argsort(axes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "STREAMED_BYTES", 0)
        gather(array, GatherPlan.of(array, first, stop, memory_order(outs)), outs, scaling)
    for box, out in zip(boxes, outs, strict=True):
        assert_same_bytes(np.ascontiguousarray(out[0]), np.ascontiguousarray(values[0][box.to_slices()]))
        assert out.base is not None
        assert np.count_nonzero(out.base.view(np.uint8)) == np.count_nonzero(
            np.ascontiguousarray(out).view(np.uint8)
        )
    close_shards(folder)


@needs_compiled_loop
def test_a_damaged_chunk_in_a_strip_is_named_and_those_before_it_are_written() -> None:
    voxels = random_voxels((1, 2, 3, 40), "<i2")
    data = voxels.tobytes()
    sealed = data + google_crc32c.value(data).to_bytes(4, "little")
    rows = [
        row_of(whole(voxels.shape), (0, 0, 0, 40 * n), offset=n * len(sealed), length=len(data))
        for n in range(4)
    ]
    out = np.zeros((1, 2, 3, 160), np.int16)
    frame = bytearray(4 * sealed)
    frame[2 * len(sealed) + 9] ^= 4
    found = run_loop(
        rows, [bytes(frame)], [out], voxels.shape, "<i2", codec="none", checks=b"\1" * 4, streams=True
    )
    assert found == (2, UNEQUAL)
    assert_same_bytes(out[..., :80], np.concatenate([voxels, voxels], axis=3))
    assert not out[..., 80:].any()


@given(data=st.data(), axes=st.permutations([0, 1, 2, 3]))
def test_chunks_of_a_shard_follow_each_other_in_the_order_of_the_axes(data: Draw, axes: list[int]) -> None:
    def draw(least: int, most: int) -> NDArray[np.int64]:
        return np.array(data.draw(st.tuples(*[st.integers(least, most)] * 4)))

    chunk, grid, per_shard = draw(1, 4), draw(1, 3), draw(1, 3)
    shape = chunk * grid * per_shard
    first = np.array([[data.draw(st.integers(0, n - 1)) for n in shape]])
    stop = np.array([[data.draw(st.integers(a + 1, n)) for a, n in zip(first[0], shape, strict=True)]])
    plan = GatherPlan.over(chunk.tolist(), grid.tolist(), first, stop, per_shard.tolist(), axes)
    usual = GatherPlan.over(chunk.tolist(), grid.tolist(), first, stop, per_shard.tolist())
    parts, usual_parts = (np.delete(p.rows, 2, axis=1).tolist() for p in (plan, usual))  # 2 has no meaning
    assert sorted(parts) == sorted(usual_parts)
    within = np.stack(np.unravel_index(plan.rows[:, 1], per_shard), axis=1)
    places = [(row[0], *place[axes]) for row, place in zip(plan.rows.tolist(), within, strict=True)]
    assert places == sorted(places)


SCALINGS = [
    UNSCALED,
    Scaling(0.1, -3.7),
    Scaling(-1 / 3, 1e5),
    Scaling(2.5e-5, 0.3, -0.25, 0.4),
    Scaling(1.0, 0.0, 3.3, 100.1),
    Scaling(0.0, 7.7),
    Scaling(1e30, 1.0),
    Scaling(1e-40, 1e-42),
    Scaling(1.0, 0.0, -np.inf, 12.1),
    Scaling(1.0, 0.0, 12.1, np.inf),
    Scaling(3.0, 1.0, 50.0, 20.0),  # low above high, as numpy.clip allows
]


@both_loops
@pytest.mark.parametrize("source", ["|u1", "|i1", "<u2", "<i2"])
def test_every_value_is_scaled_to_float32_as_numpy_scales_it(tmp_path: Path, source: str) -> None:
    dtype = np.dtype(source)
    values = np.arange(256**dtype.itemsize).astype(f"<u{dtype.itemsize}").view(dtype)
    voxels = values.reshape(1, -1, 16 ** (dtype.itemsize - 1) * 2)
    array = array_of(stored(tmp_path / "image", voxels, chunk=(1, 30, 40), shard=8))
    for scaling in SCALINGS:
        out = np.zeros((1, *voxels.shape), np.float32)
        gather(array, GatherPlan.of(array, np.zeros((1, 4), np.int64), np.array([out.shape])), [out], scaling)
        slope, inter, low, high = np.array(scaling, np.float32)
        expected = voxels.astype(np.float32)
        if scaling != UNSCALED:
            expected = np.clip(expected * slope + inter, low, high)
        assert_same_bytes(out[0], expected)


@many_examples
@needs_compiled_loop
@given(
    slope=st.floats(-1e6, 1e6, width=32),
    inter=st.floats(-1e6, 1e6),
    bounds=st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)),
    source=st.sampled_from(["|u1", "|i1", "<u2", "<i2"]),
    codec=st.sampled_from(["none", "blosc"]),
)
def test_any_scaling_rounds_as_numpy_does(
    slope: float, inter: float, bounds: tuple[float, float], source: str, codec: str
) -> None:
    scaling = Scaling(slope, inter, *bounds)
    voxels = mixture(2 * 7 * 11 * 23 * np.dtype(source).itemsize).view(source).reshape(2, 7, 11, 23)
    frame = frame_of(voxels) if codec == "blosc" else voxels.tobytes()
    out = np.zeros(voxels.shape, np.float32)
    rows = [row_of(whole(voxels.shape), length=len(frame))]
    name = np.dtype(source).str[1:]
    assert run_loop(
        rows, [frame], [out], voxels.shape, source, codec=codec, scaled_from=name, scaling=scaling
    ) == (1, False)
    assert_same_bytes(out, scaling.apply(voxels))


@both_loops
def test_chunks_that_only_numcodecs_decodes_may_be_among_others(tmp_path: Path) -> None:
    voxels = random_voxels((6, 8, 10), "<i2") % 50
    array = ShardedArray(
        tmp_path, (1, 6, 8, 10), np.dtype("<i2"), (1, 2, 4, 10), (1, 2, 4, 10), ChunkCodec("blosc", False),
        ChunkFiles((1, 2, 3), index=None), fill=0,
    )  # fmt: skip
    packings = [("lz4", 1), ("zstd", 1), ("lz4", 2), ("lz4hc", 0), ("blosclz", 1)]
    for number, (z, y) in enumerate(np.ndindex(3, 2)):
        file = array.shard_file((0, z, y, 0))
        file.parent.mkdir(parents=True, exist_ok=True)
        if number == 4:  # a missing chunk
            voxels[2 * z : 2 * z + 2, 4 * y : 4 * y + 4] = 0
            continue
        compressor, shuffle = packings[number % len(packings)]
        part = np.ascontiguousarray(voxels[2 * z : 2 * z + 2, 4 * y : 4 * y + 4])
        file.write_bytes(frame_of(part, compressor, shuffle=shuffle))
    for dtype in ("<i2", "<f4"):
        boxes = [((0, 0, 0), (6, 8, 10)), ((1, 1, 1), (6, 7, 9)), ((0, 0, 0), (6, 8, 10))]
        first, stop = (np.array([(n, *box[n]) for box in boxes]) for n in (0, 1))
        outs = [np.full(high - low, 99, dtype) for low, high in zip(first, stop, strict=True)]
        gather(array, GatherPlan.of(array, first, stop), outs)
        for (low, high), out in zip(boxes, outs, strict=True):
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            np.testing.assert_array_equal(out[0], voxels[box])


@both_loops
def test_frames_of_an_old_blosc_without_the_flag_for_split_blocks_are_read(tmp_path: Path) -> None:
    # Before 1.14 blosc split blocks of 128 voxels and more, without a flag.
    voxels = np.arange(100, dtype="<i2").reshape(4, 5, 5) % 7
    frame = bytearray(frame_of(voxels))
    assert frame[2] & SPLIT_FLAG
    frame[2] &= ~SPLIT_FLAG
    assert_same_bytes(decoded_by_numcodecs(bytes(frame), voxels.shape, "<i2"), voxels)
    array = ShardedArray(
        tmp_path, (1, 4, 5, 5), np.dtype("<i2"), (1, 4, 5, 5), (1, 4, 5, 5), ChunkCodec("blosc", False),
        ChunkFiles((1, 2, 3), index=None), fill=0,
    )  # fmt: skip
    file = array.shard_file((0, 0, 0, 0))
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(frame))
    assert_same_bytes(read_region(array, (0, 0, 0, 0), (1, 4, 5, 5))[0], voxels)


@needs_compiled_loop  # the plain loop copies the whole chunk, and would fill the memory
def test_an_uncompressed_chunk_may_be_larger_than_a_blosc_frame_can_be(tmp_path: Path) -> None:
    shape = (1, 1100, 1024, 2048)  # more than 2 GiB of bytes, in a sparse file
    array = ShardedArray(
        tmp_path, shape, np.dtype("|u1"), shape, shape, ChunkCodec("none", False),
        ChunkFiles((1, 2, 3), index=None), fill=0,
    )  # fmt: skip
    file = array.shard_file((0, 0, 0, 0))
    file.parent.mkdir(parents=True)
    with file.open("wb") as stream:
        stream.truncate(math.prod(shape))
        stream.seek(math.prod(shape) - 3)
        stream.write(b"abc")
    found = read_region(array, (0, 1099, 1023, 2040), (1, 1100, 1024, 2048))
    assert found.tobytes() == bytes(5) + b"abc"


@both_loops
def test_threads_gather_at_the_same_time(tmp_path: Path) -> None:
    voxels = mixture(2 * 40**3).view("<i2").reshape(40, 40, 40)
    array = array_of(stored(tmp_path / "image", voxels, chunk=(8, 8, 8), shard=2))
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            first = rng.integers(0, 20, 3)
            found = read_region(array, (0, *first), (1, *(first + 20)))
            if not np.array_equal(found[0], voxels[tuple(slice(a, a + 20) for a in first)]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@both_loops
def test_big_endian_arrays_are_read_in_native_byte_order(tmp_path: Path) -> None:
    voxels = random_voxels((6, 7, 8), "<i4")
    array = array_of(stored(tmp_path / "image", voxels, chunk=4, shard=1, codec="none"))
    swapped = dataclasses.replace(array, dtype=np.dtype(">i4"))
    out = np.zeros((1, 6, 7, 8), np.int32)
    gather(swapped, GatherPlan.of(swapped, np.zeros((1, 4), np.int64), np.array([out.shape])), [out])
    assert_same_bytes(out[0], voxels.byteswap())
