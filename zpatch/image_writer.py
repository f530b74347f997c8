"""Writing one image shard by shard: statistics and index are gathered from the shards as they pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.grid import chunk_counts, covering_chunks
from zpatch.schema import ImageRecord, Json, Source, padded_to_4d
from zpatch.store_writer import StagedImage
from zpatch.voxel_index import index_builder
from zpatch.voxel_statistics import VoxelStatistics

Shard = tuple[int, int, int, int]


class ImageWriter:
    """Writes the shards of a staged image, each once, in any order.

    ``where`` names the image in errors.
    """

    def __init__(self, stage: StagedImage, record: ImageRecord, where: str) -> None:
        self.stage = stage
        self.record = record
        self._shards = padded_to_4d(record.shards)
        self._statistics = VoxelStatistics(np.dtype(record.dtype))
        self._index = index_builder(record, where)
        self._counter = ThreadPoolExecutor(1, thread_name_prefix="zpatch-statistics")

    def write_shard(self, shard: Shard, voxels: NDArray[Any]) -> None:
        """Write one shard, whole: ``voxels`` is (c, z, y, x), clipped to the image."""
        # Counting and compressing each leave the interpreter free for much of their time.
        counted = self._counter.submit(self._count, shard, voxels)
        try:
            self.stage.write_shard(self.record, shard, voxels)
        finally:
            counted.result()

    def _count(self, shard: Shard, voxels: NDArray[Any]) -> None:
        c, z, y, x = (n * s for n, s in zip(shard, self._shards, strict=True))
        self._statistics.update(voxels, (z, y, x))
        self._index.update(voxels, (c, z, y, x))

    def finish(
        self, raw_header: bytes, warnings: Sequence[str] = (), source: Source | None = None
    ) -> ImageRecord:
        """Write all but the voxels, and return the record with statistics and seals."""
        self._counter.shutdown()
        stats = self._statistics.result(self.record.slope, self.record.inter)
        stats |= self._index.statistics()
        self.stage.write_raw_header(raw_header)
        self.stage.write_index(self._index.tables())
        if self.record.kind != "label":
            self.stage.write_histogram(self._statistics.histogram(self.record.slope, self.record.inter))
        warned = (*warnings, *_voxel_warnings(stats))
        self.record = self.stage.finish(
            dataclasses.replace(self.record, stats=stats, warnings=warned, source=source)
        )
        return self.record


def _voxel_warnings(stats: Json) -> list[str]:
    words = {"nan": "NaN", "inf": "infinite"}
    return [f"{stats[key]} voxels are {word}" for key, word in words.items() if stats[key]]


class WriteUnits:
    """Collects boxes of final voxels into shards, and writes each shard when its last voxel has come.

    The boxes come in any order and must not overlap; memory is that of the shards begun and not complete.
    """

    def __init__(self, writer: ImageWriter) -> None:
        self._writer = writer
        record = writer.record
        self._shape = record.shape_czyx
        self._shards = padded_to_4d(record.shards)
        self._dtype = np.dtype(record.dtype)
        self._open: dict[Shard, tuple[NDArray[Any], int]] = {}

    def put(self, first: tuple[int, int, int], voxels: NDArray[Any]) -> None:
        """Take in final voxels (c, z, y, x), all channels, that start at ``first`` (z, y, x)."""
        low = np.array([(0, *first)], dtype=np.int64)
        high = low + np.array(voxels.shape)
        numbers, _ = covering_chunks(low, high, self._shape, self._shards)
        grid = chunk_counts(self._shape, self._shards)
        for number in numbers.tolist():
            c, z, y, x = (int(n) for n in np.unravel_index(number, grid))
            self._fill((c, z, y, x), low[0], high[0], voxels)

    def _fill(
        self, shard: Shard, low: NDArray[np.int64], high: NDArray[np.int64], voxels: NDArray[Any]
    ) -> None:
        origin = np.multiply(shard, self._shards)
        extent = np.minimum(origin + self._shards, self._shape) - origin
        if shard not in self._open:
            self._open[shard] = np.empty(extent, dtype=self._dtype), math.prod(extent.tolist())
        unit, awaited = self._open[shard]
        a, b = np.maximum(low, origin), np.minimum(high, origin + extent)
        unit[_slices(a - origin, b - origin)] = voxels[_slices(a - low, b - low)]
        awaited -= math.prod((b - a).tolist())
        self._open[shard] = unit, awaited
        if awaited == 0:
            self._writer.write_shard(shard, unit)
            del self._open[shard]

    @property
    def complete(self) -> bool:
        """Whether no shard is left begun."""
        return not self._open


def _slices(low: NDArray[np.int64], high: NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(map(slice, low.tolist(), high.tolist()))
