"""Coarser levels of an image for viewers, built from each slab as it is converted: nothing is read back.

Each level halves every axis longer than one voxel. A coarse voxel of an image is the mean of its eight fine
voxels; in a label map it is the most frequent of their labels, and the smallest of equally frequent ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from zpatch.geometry.boxes import Voxels, padded_to_4d
from zpatch.store.image_record import ImageRecord, Level
from zpatch.store.staged_image import StagedImage

SMALLEST_SIDE_VOXELS = 64


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


class PyramidBuilder:
    """Writes the coarser levels of a staged image from its slabs, which must be fed in file order."""

    def __init__(self, stage: StagedImage, record: ImageRecord) -> None:
        self._first: _LevelWriter | None = None
        for number in range(len(record.levels), 0, -1):
            self._first = _LevelWriter(stage, record, number, self._first)

    def feed(self, voxels: Voxels, channel_row: int) -> None:
        """Add a slab (c, z, y, x) of the row of shards ``channel_row`` along the channels."""
        if self._first is not None:
            self._first.feed(voxels, channel_row)


class _LevelWriter:
    """One level: collects the planes of a row of shards from the finer level, halves and writes them."""

    def __init__(
        self, stage: StagedImage, record: ImageRecord, number: int, below: _LevelWriter | None
    ) -> None:
        self._stage = stage
        self._record = record
        self._number = number
        self._below = below
        above = record.shape if number == 1 else record.levels[number - 2].shape
        self._planes_above = padded_to_4d(above)[1]
        _, depth, self._tile_y, self._tile_x = padded_to_4d(record.levels[number - 1].shards)
        self._needed = depth * (2 if self._planes_above > 1 else 1)
        self._gathered: list[Voxels] = []
        self._seen = self._row = 0

    def feed(self, voxels: Voxels, channel_row: int) -> None:
        self._gathered.append(voxels)
        self._seen += voxels.shape[1]
        waiting = np.concatenate(self._gathered, axis=1)
        last = self._seen == self._planes_above
        while waiting.shape[1] >= self._needed or (last and waiting.shape[1]):
            halved = halve(waiting[:, : self._needed], majority=self._record.kind == "label")
            waiting = waiting[:, self._needed :]
            self._write_row(halved, channel_row)
            if self._below is not None:
                self._below.feed(halved, channel_row)
        self._gathered = [waiting.copy()] if waiting.size else []
        if last:
            self._seen = self._row = 0

    def _write_row(self, voxels: Voxels, channel_row: int) -> None:
        _, _, ny, nx = voxels.shape
        for y, x in itertools.product(range(-(-ny // self._tile_y)), range(-(-nx // self._tile_x))):
            tile = voxels[
                :,
                :,
                y * self._tile_y : (y + 1) * self._tile_y,
                x * self._tile_x : (x + 1) * self._tile_x,
            ]
            shard = (channel_row, self._row, y, x)
            self._stage.write_shard(self._record, shard, tile, level=self._number)
        self._row += 1


def halve(voxels: Voxels, *, majority: bool) -> Voxels:
    """Halve voxels (c, z, y, x) along each spatial axis longer than 1; an odd last plane counts twice."""
    padding = [(0, 0), *((0, n % 2 if n > 1 else 0) for n in voxels.shape[1:])]
    even = np.pad(voxels, padding, mode="edge") if any(p != (0, 0) for p in padding) else voxels
    steps = [2 if n > 1 else 1 for n in even.shape[1:]]
    out = np.empty([len(even), *(n // s for n, s in zip(even.shape[1:], steps, strict=True))], even.dtype)
    corners = list(itertools.product(*map(range, steps)))
    for plane in range(out.shape[1]):
        parts = np.stack([even[:, plane * steps[0] + z, y :: steps[1], x :: steps[2]] for z, y, x in corners])
        out[:, plane] = _most_frequent(parts) if majority else _mean(parts)
    return out


def _mean(parts: Voxels) -> Voxels:
    if parts.dtype.kind in "iu":
        return np.asarray(np.rint(parts.mean(axis=0, dtype=np.float64)))
    return np.asarray(parts.mean(axis=0))


def _most_frequent(parts: Voxels) -> Voxels:
    """The most frequent value of each column (the longest run after sorting), the smallest of equal ones."""
    ordered = np.sort(parts, axis=0)
    best, run = ordered[0].copy(), np.ones(ordered[0].shape, dtype=np.int8)
    longest = run.copy()
    for before, value in itertools.pairwise(ordered):
        run = np.where(value == before, run + 1, 1).astype(np.int8)
        best = np.where(run > longest, value, best)
        longest = np.maximum(longest, run)
    return np.asarray(best)
