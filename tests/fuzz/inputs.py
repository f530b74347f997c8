"""Inputs of the fuzzers in c/, for Python: the same bytes give the same arrays; and plain decoders."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Voxels = NDArray[Any]


class DamagedError(ValueError):
    """Bytes that a plain decoder refuses, or does not know."""


class Input:
    """Bytes, from which numbers are taken; past their end all numbers are zero."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def take(self, count: int) -> int:
        """A little-endian number of so many bytes."""
        return int.from_bytes(self.bytes(count), "little")

    def bytes(self, count: int) -> bytes:
        """The next bytes."""
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def float32(self) -> np.float32:
        """A float of any bits."""
        return np.frombuffer(struct.pack("<I", self.take(4)), "<f4")[0]

    def signed(self) -> int:
        """A number of eight bytes, with its sign."""
        return (self.take(8) + 2**63) % 2**64 - 2**63

    def layout(self, shape: Sequence[int], item: int) -> Layout:
        """How an array is laid out in memory, as ``take_layout`` in c/input.h."""
        order, axes, shift, constant = (self.take(1) for _ in range(4))
        left, strides, order = [0, 1, 2, 3], [0] * 4, order % 24
        step, low, high, overlaps = item + (shift >> 3 & 7), 0, item, False
        for many in (4, 3, 2, 1):
            order, at = divmod(order, many)
            axis = left.pop(at)
            stride = step * (2 if axes >> 4 >> axis & 1 else 1)
            step = stride * max(shape[axis], 1)
            stride = 0 if constant >> axis & 1 else -stride if axes >> axis & 1 else stride
            overlaps |= not stride and shape[axis] > 1
            if shape[axis] == 1 and shift & 64:
                stride = self.signed()
            elif shape[axis]:
                low += min(stride, 0) * (shape[axis] - 1)
                high += max(stride, 0) * (shape[axis] - 1)
            strides[axis] = stride
        shift &= 7
        return Layout(tuple(shape), tuple(strides), shift - low, high - low + shift, overlaps)


@dataclass(frozen=True)
class Layout:
    """Where the voxels of an array are in memory of ``nbytes``; whether they overlap."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    nbytes: int
    overlaps: bool

    def filled(self, dtype: Any, seed: int, style: int = 1) -> Voxels:
        """An array of the numbers that ``fill`` in c/input.h gives."""
        count = self.nbytes
        powers = np.multiply.accumulate(np.full(count, 1664525, np.uint32), dtype=np.uint32)
        sums = np.add.accumulate(np.append(np.uint32(1), powers[:-1])[:count], dtype=np.uint32)
        with np.errstate(over="ignore"):
            memory = ((powers * np.uint32(seed) + sums * np.uint32(1013904223)) >> 24).astype(np.uint8)
        if style == 0:
            floats = memory[count % 4 :].reshape(-1, 4)
            floats[:] = (floats[:, :1] % 7 - np.float32(3)).astype("<f4").view(np.uint8).reshape(-1, 4)
        return self.of(memory, dtype)

    def of(self, memory: Voxels, dtype: Any) -> Voxels:
        """The array in some memory."""
        return np.ndarray(self.shape, dtype, memory, self.offset, self.strides)


def plain_lz4(stream: bytes, capacity: int, wanted: int) -> bytes:
    """The first bytes of a stream, ``wanted`` or more."""
    made, at = bytearray(), 0

    def long_length(length: int) -> int:
        nonlocal at
        while True:
            length, more, at = length + stream[at], stream[at], at + 1
            if more != 255:
                return length

    try:
        while True:
            token, at = stream[at], at + 1
            literals = token >> 4
            literals = long_length(literals) if literals == 15 else literals
            if literals > min(len(stream) - at, capacity - len(made)):
                raise DamagedError
            made, at = made + stream[at : at + literals], at + literals
            if len(made) >= wanted:
                return bytes(made)
            distance, at = stream[at] | stream[at + 1] << 8, at + 2
            match = (token & 15) + 4
            match = long_length(match) if match == 19 else match
            if not 0 < distance <= len(made) or match > capacity - len(made):
                raise DamagedError
            start = len(made) - distance
            made += (made[start:] * (match // distance + 1))[:match]
            if len(made) >= wanted:
                return bytes(made)
    except IndexError:
        raise DamagedError from None


def plain_blosc(frame: bytes, item: int, nbytes: int, first: int, stop: int) -> Voxels:
    """A chunk of ``nbytes``, of which the voxels ``first`` up to ``stop`` are decoded."""
    if len(frame) < 16:
        raise DamagedError
    version, _, flags, kind, size, block_bytes, length = struct.unpack("<4B3I", frame[:16])
    if size != nbytes or not 16 <= length <= len(frame):
        raise DamagedError
    frame = frame[:length]
    if version != 2:
        raise DamagedError
    if flags & 2:
        if length != 16 + nbytes:
            raise DamagedError
        return np.frombuffer(frame, np.uint8, offset=16)
    is_shuffled = flags & 1 and kind > 1
    if flags >> 5 != 1 or flags & 4 or (is_shuffled and kind != item) or not kind:
        raise DamagedError
    if not 0 < block_bytes <= nbytes or block_bytes % item or -(-nbytes // block_bytes) > (length - 16) // 4:
        raise DamagedError
    out = np.zeros(nbytes, np.uint8)
    for block in range(first * item // block_bytes, -(-stop * item // block_bytes)):
        start = block * block_bytes
        block_size = min(block_bytes, nbytes - start)
        is_whole = flags & 16 or kind > 16 or block_bytes // kind < 128 or block_size < block_bytes
        streams = 1 if is_whole else kind
        at = int.from_bytes(frame[16 + 4 * block :][:4], "little")
        if not 16 <= at <= length or block_size % streams:
            raise DamagedError
        part, wanted, decoded = block_size // streams, min(stop * item - start, block_size), b""
        needed = wanted // streams if streams == (item if is_shuffled else 1) else part
        for _ in range(streams):
            packed, at = int.from_bytes(frame[at : at + 4], "little"), at + 4
            if packed > length - at:
                raise DamagedError
            stream, at = frame[at : at + packed], at + packed
            decoded += (stream if packed == part else plain_lz4(stream, part, needed)).ljust(part, b"\0")[
                :part
            ]
        planes = np.frombuffer(decoded, np.uint8)
        out[start : start + block_size] = planes.reshape(item, -1).T.reshape(-1) if is_shuffled else planes
    return out
