"""Coarser levels of an array for viewers: their shapes, and their voxels.

Each level halves every axis longer than one voxel. A coarse voxel of an image is the mean of its eight fine
voxels; in a label map it is the most frequent of their labels, and the smallest of equally frequent ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.chunks.gather import read_region
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.geometry.boxes import Voxels

try:
    from zpatch.chunks._halve import halve as _compiled
except ImportError:  # zpatch was installed without a compiler
    _compiled = None  # type: ignore[assignment]

SMALLEST_SIDE_VOXELS = 64
VOXELS_AT_ONCE = 2**14  # of a level: so many groups of fine voxels stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Level:
    """A coarser level of a pyramid: shape, chunks and shards in stored axis order."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]


def plan_levels(shape: Sequence[int], chunks: Sequence[int], shards: Sequence[int]) -> tuple[Level, ...]:
    """Levels 1, 2, ... of an array, until no side is over 64 voxels; all in stored axis order.

    >>> [level.shape for level in plan_levels((3, 200, 100), (3, 32, 32), (3, 224, 128))]
    [(2, 100, 50), (1, 50, 25)]
    """
    levels: list[Level] = []
    leading = len(shape) - 3
    while max(shape[leading:]) > SMALLEST_SIDE_VOXELS:
        shape = (*shape[:leading], *(-(-n // 2) for n in shape[leading:]))
        level_chunks = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))
        shards = (
            *shards[:leading],
            *(
                max(c, -(-min(-(-s // 2), n) // c) * c)
                for s, c, n in zip(shards[leading:], level_chunks[leading:], shape[leading:], strict=True)
            ),
        )
        levels.append(Level(tuple(shape), level_chunks, tuple(shards)))
    return tuple(levels)


def halve(voxels: Voxels, *, majority: bool) -> Voxels:
    """Halve voxels (c, z, y, x) along each spatial axis longer than 1; an odd last plane counts twice."""
    if not majority and _is_halved_at_once(voxels):
        coarse = np.empty([len(voxels), *(-(-n // 2) for n in voxels.shape[1:])], voxels.dtype)
        _compiled(voxels, coarse, voxels.dtype.kind == "i")
        return coarse
    padding = [(0, 0), *((0, n % 2 if n > 1 else 0) for n in voxels.shape[1:])]
    even = np.pad(voxels, padding, mode="edge") if any(p != (0, 0) for p in padding) else voxels
    steps = [2 if n > 1 else 1 for n in even.shape[1:]]
    out = np.empty([len(even), *(n // s for n, s in zip(even.shape[1:], steps, strict=True))], even.dtype)
    corners = list(itertools.product(*map(range, steps)))
    planes = max(1, VOXELS_AT_ONCE // (out.size // out.shape[1]))
    for first in range(0, out.shape[1], planes):
        fine = even[:, first * steps[0] : (first + planes) * steps[0]]
        parts = np.stack([fine[:, z :: steps[0], y :: steps[1], x :: steps[2]] for z, y, x in corners])
        out[:, first : first + planes] = _most_frequent(parts) if majority else _mean(parts)
    return out


def _is_halved_at_once(voxels: Voxels) -> bool:
    """Whether the compiled loop halves such voxels."""
    dtype = voxels.dtype
    is_small = dtype.kind in "iu" and dtype.itemsize <= 2 and dtype.isnative
    return _compiled is not None and is_small and voxels.strides[-1] == dtype.itemsize


def _mean(parts: Voxels) -> Voxels:
    if parts.dtype.kind in "iu":
        return np.asarray(np.rint(parts.mean(axis=0, dtype=np.float64)))
    return np.asarray(parts.mean(axis=0))


def _most_frequent(parts: Voxels) -> Voxels:
    """The most frequent value of each column, the smallest of equally frequent ones.

    Most columns of a label map have one value: only the others are sorted.
    """
    found: Voxels = parts[0].copy()
    differ = (parts[1:] != found).any(axis=0)
    found[differ] = _longest_run(parts[:, differ])
    return found


def _longest_run(parts: Voxels) -> Voxels:
    """The value of the longest run of each sorted column (parts, n), the first of equally long ones."""
    ordered = np.sort(parts, axis=0)
    best, run = ordered[0].copy(), np.ones(ordered[0].shape, dtype=np.int8)
    longest = run.copy()
    for before, value in itertools.pairwise(ordered):
        run = np.where(value == before, run + 1, 1).astype(np.int8)
        best = np.where(run > longest, value, best)
        longest = np.maximum(longest, run)
    return np.asarray(best)


def halved_shard(
    fine: ShardedArray, coarse: ShardedArray, shard: tuple[int, ...], *, majority: bool
) -> Voxels:
    """The voxels (c, z, y, x) of one shard of a level, from those of the finer level on disk.

    They are read chunk by chunk of the level, so that little more than the shard is in memory.
    """
    first = [n * s for n, s in zip(shard, coarse.shards, strict=True)]
    stop = [min(a + s, n) for a, s, n in zip(first, coarse.shards, coarse.shape, strict=True)]
    steps = [-(-f // c) for f, c in zip(fine.shape, coarse.shape, strict=True)]
    found = np.empty([b - a for a, b in zip(first, stop, strict=True)], coarse.dtype)
    for place in itertools.product(*map(range, first, stop, coarse.chunks)):
        ends = [min(a + c, b) for a, c, b in zip(place, coarse.chunks, stop, strict=True)]
        low = [a * s for a, s in zip(place, steps, strict=True)]
        high = [min(b * s, n) for b, s, n in zip(ends, steps, fine.shape, strict=True)]
        box = tuple(slice(a - o, b - o) for a, b, o in zip(place, ends, first, strict=True))
        found[box] = halve(read_region(fine, low, high), majority=majority)
    return found
