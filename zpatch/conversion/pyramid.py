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
from zpatch.records.image_record import ImageRecord
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
    """One level: halves the planes of the finer level as they arrive, and writes each row of shards.

    Of the finer level no more than one plane is held, whose neighbour has not arrived yet.
    """

    def __init__(
        self, stage: StagedImage, record: ImageRecord, number: int, below: _LevelWriter | None
    ) -> None:
        self._stage = stage
        self._record = record
        self._number = number
        self._below = below
        above = record.shape if number == 1 else record.levels[number - 2].shape
        self._planes_above = padded_to_4d(above)[1]
        _, self._depth, self._tile_y, self._tile_x = padded_to_4d(record.levels[number - 1].shards)
        self._ends_alone = (self._planes_above - 1) // 2 % self._depth == 0
        self._odd: list[Voxels] = []  # one plane of the finer level, or none
        self._halved: list[Voxels] = []
        self._seen = self._row = 0

    def feed(self, voxels: Voxels, channel_row: int) -> None:
        self._seen += voxels.shape[1]
        last = self._seen == self._planes_above
        if self._odd:
            self._halve(np.concatenate([*self._odd, voxels[:, :1]], axis=1))
            voxels, self._odd = voxels[:, 1:], []
        even = voxels.shape[1] // 2 * 2
        if even:
            self._halve(voxels[:, :even])
        if even < voxels.shape[1]:
            plane = voxels[:, even:]
            if last:  # it counts twice, or alone if it is the only one of its row of shards
                self._halve(plane if self._ends_alone else np.concatenate([plane, plane], axis=1))
            else:
                self._odd = [plane.copy()]
        while (ready := sum(part.shape[1] for part in self._halved)) >= self._depth or (last and ready):
            waiting = self._halved[0] if len(self._halved) == 1 else np.concatenate(self._halved, axis=1)
            row, rest = waiting[:, : self._depth], waiting[:, self._depth :]
            self._halved = [rest] if rest.size else []
            self._write_row(row, channel_row)
            if self._below is not None:
                self._below.feed(row, channel_row)
        if last:
            self._seen = self._row = 0

    def _halve(self, voxels: Voxels) -> None:
        self._halved.append(halve(voxels, majority=self._record.kind == "label"))

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
