"""Coarser levels of an image for viewers.

They are built from each slab as it is converted, so that nothing is read back; of a volume that was turned,
whose slabs are not in the order of the store, they are made from the shards on disk.
"""

from __future__ import annotations

import itertools

import numpy as np

from zpatch.chunks.levels import halve, halved_shard
from zpatch.chunks.mapped_shards import close_shards
from zpatch.geometry.boxes import Voxels, padded_to_4d
from zpatch.store.image_record import ImageRecord
from zpatch.store.staged_image import StagedImage
from zpatch.store.store import sharded_array


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


def write_levels(stage: StagedImage, record: ImageRecord) -> None:
    """Write the coarser levels of a staged image whose shards are all written."""
    for level in range(1, len(record.levels) + 1):
        fine, coarse = (sharded_array(stage.folder, record, number) for number in (level - 1, level))
        try:
            for shard in np.ndindex(coarse.shard_grid):
                voxels = halved_shard(fine, coarse, shard, majority=record.kind == "label")
                stage.write_shard(record, shard, voxels, level=level)
        finally:
            close_shards(fine.path)
