"""Each input that the fuzzers of the compiled loops found is tried with the extensions, against numpy."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from inputs import DamagedError, Input, Voxels, plain_blosc, plain_lz4
from numcodecs import blosc
from record import Some
from seeds import SEEDS

loops = pytest.importorskip("zpatch.chunks._gather")
blend = pytest.importorskip("zpatch.blending._blend")
counting = pytest.importorskip("zpatch.store._count")

CORPUS = Path(__file__).parent / "corpus"
WRITERS = [(1, ""), (2, ""), (4, ""), (8, ""), (1, "u1"), (1, "i1"), (2, "u2"), (2, "i2")]
UNSCALED = (1.0, 0.0, -math.inf, math.inf)


def read_line(frame: bytes, item: int, voxels: int, first: int, stop: int) -> Voxels | None:
    """Voxels of a chunk in one line; None where it is not decoded."""
    row = np.array([[0, 0, len(frame), 0, *(0, 1, 0) * 3, first, stop - first, 0]])
    out = np.empty((1, 1, 1, stop - first), f"u{item}")
    where, how = ([frame], b"", [out], False), ((1, 1, 1, voxels), item, "blosc", "", *UNSCALED)
    stopped, *_ = loops.gather(row, b"", 0, *where, *how)
    return out.reshape(-1) if stopped else None


def try_lz4(data: bytes) -> None:
    given = Input(data)
    capacity = given.take(2) + 1
    wanted, stream = given.take(2) % capacity + 1, given.left
    if len(stream) == capacity:
        return  # blosc takes it as bytes that are not compressed
    sizes = capacity, capacity, 24 + len(stream), 20, len(stream)
    found = read_line(bytes([2, 1, 0x30, 1]) + struct.pack("<5I", *sizes) + stream, 1, capacity, 0, wanted)
    try:
        expected = plain_lz4(stream, capacity, wanted)[:wanted]
    except DamagedError:
        assert found is None
    else:
        assert found is not None
        assert found.tobytes() == expected


def try_blosc(data: bytes) -> None:
    given = Input(data)
    item, voxels = 2 ** (given.take(1) & 3), given.take(2) + 1
    first = given.take(2) % voxels
    stop = first + given.take(2) % (voxels - first) + 1
    frame, nbytes = given.left, item * voxels
    whole, part = read_line(frame, item, voxels, 0, voxels), read_line(frame, item, voxels, first, stop)
    if whole is None:
        return
    assert part is not None
    np.testing.assert_array_equal(part, whole[first:stop])
    with contextlib.suppress(RuntimeError):  # a frame that c-blosc calls damaged
        assert blosc.decompress(frame, np.empty(nbytes, np.uint8)).tobytes() == whole.tobytes()


def scaled(voxels: Voxels, scaled_from: str, scaling: list[np.float32]) -> Voxels:
    if not scaled_from:
        return voxels
    slope, inter, low, high = scaling
    with np.errstate(all="ignore"):
        values = voxels.view(f"<{scaled_from}").astype(np.float32) * slope + inter
        values = np.where(values < low, low, values)
        return np.where(values > high, high, values).astype(np.float32)


def try_gather(data: bytes) -> None:
    given = Input(data)
    mode = given.take(1)
    (item, scaled_from), raw = WRITERS[mode >> 1 & 7], mode >> 4 & 1
    scaling = [given.float32() for _ in range(4)]
    if mode & 32:
        try_scale(given, item, scaled_from, scaling)
        return
    if mode & 64:
        try_copy(given, item, mode >> 7)
        return
    limits = (2, 20, 6, 80)
    chunk = [given.signed() if raw else given.take(1) % limit + 1 for limit in limits]
    if min(chunk) > 0 and 2**16 <= math.prod(chunk) * item < 2**60:
        return
    boxes, maps, files, rows, checks, start, streams = take_boxes_maps_and_rows(
        given, chunk, item, scaled_from, raw
    )
    before = [layout.filled(dtype_of(item, scaled_from), n) for n, layout in boxes]
    after = [layout.filled(dtype_of(item, scaled_from), n) for n, layout in boxes]
    codec = "blosc" if mode & 1 else "none"
    try:
        stopped, *_ = loops.gather(
            rows, checks, start, [b""] * len(maps) if files else maps, np.array(files, np.int64), after,
            streams, tuple(chunk), item, codec, scaled_from, *map(float, scaling),
        )  # fmt: skip
    except (ValueError, MemoryError):
        return
    finally:
        for file in files:
            os.close(file)
    if any(layout.overlaps for _, layout in boxes):
        return
    for key, group in itertools.groupby(rows[start:stopped].tolist(), lambda row: row[:2]):
        parts = list(group)
        voxels = decoded(maps[key[0]][key[1] : key[1] + parts[0][2]], parts, chunk, item, codec)
        for row in parts:
            axes = [row[n : n + 3] for n in range(4, 16, 3)]
            source = tuple(slice(first, first + extent) for first, extent, _ in axes)
            target = tuple(slice(to, to + extent) for _, extent, to in axes)
            before[row[3]][target] = scaled(voxels[source], scaled_from, scaling)
    for expected, found in zip(before, after, strict=True):
        np.testing.assert_array_equal(found, expected)
        if not scaled_from:
            np.testing.assert_array_equal(found.base, expected.base)


def dtype_of(item: int, scaled_from: str) -> str:
    return "<f4" if scaled_from else f"<u{item}"


def take_boxes_maps_and_rows(given: Input, chunk: list[int], item: int, scaled_from: str, raw: int) -> Any:
    box_count, map_mode = given.take(1) % 3 + 1, given.take(1)
    boxes = []
    for number in range(box_count):
        shape = [given.take(1) % limit + 1 for limit in (2, 20, 6, 80)]
        boxes.append((number, given.layout(shape, 4 if scaled_from else item)))
    first_map, count, start = given.take(2), given.take(1) % 16, given.take(1) % 16
    table, bodies = Input(given.bytes(count * (128 if raw else 18))), given.left
    split = first_map if map_mode & 1 and first_map < len(bodies) else len(bodies)
    maps = [bytearray(bodies[:split]), bytearray(bodies[split:])][: 1 + (map_mode & 1)]
    shapes = [box.shape for _, box in boxes]
    taken = [take_row(table, raw, chunk, shapes, maps) for _ in range(count)]
    checks = b"" if raw else bytes(check for _, check in taken)
    files = [file_of(content) for content in maps] if map_mode & 2 and hasattr(os, "memfd_create") else []
    return (
        boxes,
        maps,
        files,
        np.array([row for row, _ in taken], np.int64).reshape(-1, 16),
        checks,
        start,
        bool(map_mode & 4),
    )


def file_of(content: bytearray) -> int:
    file = os.memfd_create("map")
    os.write(file, content)
    return file


def take_row(
    table: Input, raw: int, chunk: list[int], boxes: list[tuple[int, ...]], maps: list[bytearray]
) -> tuple[list[int], int]:
    """A row, and whether its chunk is compared with its checksum, which may be written first."""
    if raw:
        return [table.signed() for _ in range(16)], 0
    mode, offset, length, box = table.take(1), table.take(2), table.take(2), table.take(1)
    number, offset, box = mode % len(maps), -1 if offset == 0xFFFF else offset, box % len(boxes)
    row = [number, offset, len(maps[number]) - offset if length == 0xFFFF else length, box]
    for in_chunk, in_box in zip(chunk, boxes[box], strict=True):
        extent = table.take(1) % min(in_chunk, in_box) + 1
        first, target = table.take(1) % (in_chunk - extent + 1), table.take(1) % (in_box - extent + 1)
        row += [first, extent, target]
    end = offset + row[2]
    if mode & 4 and offset >= 0 and row[2] >= 0 and end + 4 <= len(maps[number]):
        sealed = google_crc32c.value(bytes(maps[number][offset:end]))
        maps[number][end : end + 4] = sealed.to_bytes(4, "little")
    return row, mode >> 1 & 1


def decoded(data: bytes, parts: list[list[int]], chunk: list[int], item: int, codec: str) -> Voxels:
    """The voxels of a chunk, as far as its rows need them."""
    if codec == "none":
        return np.frombuffer(data, f"<u{item}").reshape(chunk)
    low = [np.ravel_multi_index(row[4::3], chunk) for row in parts]
    high = [
        np.ravel_multi_index([a + n - 1 for a, n in zip(row[4::3], row[5::3], strict=True)], chunk)
        for row in parts
    ]
    voxels = plain_blosc(data, item, math.prod(chunk) * item, int(min(low)), int(max(high)) + 1)
    return voxels.view(f"<u{item}").reshape(chunk)


def try_scale(given: Input, item: int, scaled_from: str, scaling: list[np.float32]) -> None:
    count = len(given.left) // item
    voxels, out = np.frombuffer(given.left, f"<u{item}", count), np.empty(count, np.float32)
    if not scaled_from:
        with pytest.raises(ValueError, match="not supported"):
            loops.scale(voxels, out, scaled_from, *map(float, scaling))
        return
    loops.scale(voxels, out, scaled_from, *map(float, scaling))
    np.testing.assert_array_equal(out, scaled(voxels, scaled_from, scaling))


def try_copy(given: Input, item: int, differs: int) -> None:
    shape = [given.take(1) % limit for limit in (3, 20, 6, 60)]
    one = given.layout(shape, item)
    two = given.layout([*shape[:3], shape[3] + differs], item)
    source, out = one.filled(f"<u{item}", 0), two.filled(f"<u{item}", 1)
    if differs:
        with pytest.raises(ValueError, match="the same shape"):
            loops.copy(source, out)
        return
    assert loops.copy(source, out)
    if not two.overlaps:
        np.testing.assert_array_equal(out, source)


def try_blend(data: bytes) -> None:
    given = Input(data)
    mode, style = given.take(1), given.take(1)
    function, limits, shape, voxels = (mode & 3) % 3, [5, 9, 9, 1200], [], 1
    if function == 1 and mode & 64:
        limits[0] = 300
    for limit in limits:
        side = given.take(2 if limit > 255 else 1) % limit
        shape.append(1 if voxels * max(side, 1) > 5000 else side)
        voxels *= max(shape[-1], 1)
    other = list(shape)
    if function == 1:
        other[0] = shape[0] if mode & 32 else 1
    if mode & 8:
        other[mode >> 4 & 3] += 1
    one, two = given.layout(shape, 4), given.layout(other, 1 if function == 1 else 4)
    first = one.filled("<f4", style, style & 1)
    second = two.filled("u1" if function == 1 else "<f4", style + 1, style & 1)
    if style >> 1 & 1 and voxels and 0 not in shape:
        bits = 0x7F800000 if style >> 2 & 1 else given.take(4)
        first[tuple(given.take(2) % side for side in shape)] = np.frombuffer(struct.pack("<I", bits), "<f4")[
            0
        ]
    if function == 0:
        try_add(given, first, second, one.overlaps, bool(mode >> 2 & 1))
    elif function == 2:
        assert blend.is_finite(first) == bool(np.isfinite(first).all())
    elif shape[1:] != other[1:] or other[0] != 1 or not 1 <= shape[0] <= 256:
        with pytest.raises(ValueError, match="do not fit"):
            blend.classify(first, second)
    else:
        assert blend.classify(first, second) == bool(np.isfinite(first).all())
        if not two.overlaps and first.size:
            np.testing.assert_array_equal(second[0], first.argmax(axis=0))


def try_add(given: Input, sums: Voxels, part: Voxels, overlaps: bool, any_bits: bool) -> None:
    weights = []
    for side in sums.shape[1:]:
        some = [given.float32() if any_bits else power(given.take(1)) for _ in range(side)]
        weights.append(np.array(some, np.float32))
    is_first = bool(given.take(1) & 1)
    if sums.shape != part.shape:
        with pytest.raises(ValueError, match="do not fit"):
            blend.add([(sums, part, *weights, is_first)])
        return
    i, j, k = weights
    with np.errstate(all="ignore"):
        product = i[:, None, None] * j[:, None] * k * part
        expected = product if is_first else sums + product
    blend.add([(sums, part, *weights, is_first)])
    if not any_bits and not overlaps:
        np.testing.assert_array_equal(sums, expected)


def power(byte: int) -> float:
    return math.ldexp(1 if byte & 1 else -1, byte % 17 - 8) if byte else 0.0


def try_count(data: bytes) -> None:
    given = Input(data)
    item, shift = given.take(1) % 5 + 1, given.take(1) & 3
    values = 256 if item == 1 else 65536
    counts = np.zeros(values - (given.take(1) & 1), np.int64)
    memory = np.frombuffer(bytes(shift) + given.left, np.uint8).copy()
    voxels = memory[shift : shift + len(given.left) // item * item].view(
        f"u{item}" if item in (1, 2, 4) else f"V{item}"
    )
    is_aligned = not voxels.ctypes.data % item
    if item in (1, 2, 4) and len(counts) == values and is_aligned:
        counting.count(voxels, counts)
        leading = voxels >> 16 if item == 4 else voxels
        np.testing.assert_array_equal(counts, np.bincount(leading, minlength=values))
    else:
        with pytest.raises(ValueError, match="are counted"):
            counting.count(voxels, counts)
    if item == 1 and voxels.size:
        pieces = np.zeros((-(-len(voxels) // 5), 256), np.int64)
        counting.count_pieces(voxels, 5, pieces)
        np.testing.assert_array_equal(pieces.sum(axis=0), np.bincount(voxels, minlength=256))
    if item == 4 and is_aligned:
        floats = voxels.view(np.float32)
        finite = floats[np.isfinite(floats)].astype(np.float64)
        found = counting.moments(floats)
        assert found[:4] == (
            finite.size,
            np.sum(voxels == 0),
            np.sum(voxels == 2**31),
            np.isinf(floats).sum(),
        )
        largest = np.abs(finite).max(initial=0)
        assert abs(found[4] - (finite.mean() if finite.size else 0)) <= 1e-9 * largest
        nonzero = finite[finite != 0]
        assert found[6:] == (nonzero.min(initial=math.inf), nonzero.max(initial=-math.inf))


TRIES: Mapping[str, Callable[[bytes], None]] = {
    "lz4": try_lz4,
    "blosc": try_blosc,
    "gather": try_gather,
    "blend": try_blend,
    "count": try_count,
}


@pytest.mark.parametrize("name", TRIES)
def test_the_loops_are_those_of_numpy_on_each_input_that_was_found(name: str, some: Some) -> None:
    inputs = {file.name: file.read_bytes() for file in sorted((CORPUS / name).iterdir())}
    assert inputs
    inputs |= {f"seed {number}": data for number, data in enumerate(SEEDS[name]())}
    for place in some(list(inputs), quick=len(inputs)):
        try:
            TRIES[name](inputs[place])
        except Exception as error:
            error.add_note(place)
            raise
