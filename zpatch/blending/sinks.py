"""Where final voxels go: into one tensor, or into an image on disk, each shard written once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.chunks.layout import Layout, plan_output_layout
from zpatch.errors import IncompleteCoverageError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple, padded_to_4d
from zpatch.nifti.writer import make_header
from zpatch.runtime import buffer_pool
from zpatch.store.image_record import ImageRecord, Kind
from zpatch.store.image_writer import ImageWriter, Shard
from zpatch.store.staged_image import StagedImage


class VolumeSink(Protocol):
    """Takes each voxel of a volume once, in boxes of any order."""

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0) -> None:
        """Take in final voxels (C, I, J, K) that start at ``first``; no patch was run for ``skipped``."""


class TensorSink:
    """Gathers final voxels in one tensor (C, I, J, K)."""

    def __init__(self, spatial_shape: Triple) -> None:
        self._spatial_shape = spatial_shape
        self.tensor: torch.Tensor | None = None

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0) -> None:
        """Take in final voxels."""
        if self.tensor is None:
            self.tensor = torch.empty((len(voxels), *self._spatial_shape), dtype=voxels.dtype)
        (i, j, k), (p, q, r) = first, voxels.shape[1:]
        self.tensor[:, i : i + p, j : j + q, k : k + r] = voxels


class ImageSink:
    """Writes final voxels into a staged image, shard by shard.

    Shards are thin along the first axis, along which boxes are expected to come.
    """

    def __init__(
        self,
        stage: StagedImage,
        *,
        subject: str,
        name: str,
        kind: Kind,
        spatial_shape: Triple,
        affine: Affine,
    ) -> None:
        self.stage = stage
        self._subject = subject
        self._name = name
        self._kind = kind
        self._spatial_shape = spatial_shape
        self._affine = affine
        self._writer: ImageWriter | None = None
        self._shards: ShardAssembler | None = None

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0) -> None:
        """Take in final voxels."""
        stored = voxels.permute(0, 3, 2, 1).numpy()
        if self._shards is None:
            self._writer = ImageWriter(
                self.stage, self._describe(len(stored), stored.dtype), f"{self._subject}/{self._name}"
            )
            self._shards = ShardAssembler(self._writer)
        self._shards.put(first[::-1], stored)

    def finish(self) -> ImageRecord:
        """The record of the image, once every voxel has come."""
        if self._writer is None or self._shards is None or not self._shards.complete:
            raise IncompleteCoverageError(f"image {self._name!r} has shards that were never completed")
        record = self._writer.record
        return self._writer.finish(
            make_header(self._spatial_shape, record.shape_czyx[0], np.dtype(record.dtype), self._affine)
        )

    def _describe(self, channels: int, dtype: np.dtype[np.generic]) -> ImageRecord:
        i, j, k = self._spatial_shape
        layout = plan_output_layout((channels, k, j, i), dtype.itemsize, swept_axis=2)
        shape = channels, i, j, k
        return output_record(self._subject, self._name, self._kind, dtype, layout, shape, self._affine)


def output_record(
    subject: str,
    name: str,
    kind: Kind,
    dtype: np.dtype[np.generic],
    layout: Layout,
    shape: tuple[int, int, int, int],
    affine: Affine,
    *,
    spatial_unit: str | None = "millimeter",
    like: ImageRecord | None = None,
) -> ImageRecord:
    """The record of an image (C, I, J, K) to be written; ``like`` is that of what it was made from."""
    channels, i, j, k = shape
    first = 0 if channels > 1 else 1
    return ImageRecord(
        subject=subject,
        image=name,
        kind=kind if dtype.kind in "iu" else "scalar",
        shape=(channels, k, j, i)[first:],
        dtype=dtype.newbyteorder("<").str,
        axes="czyx"[first:],
        chunks=layout.chunks[first:],
        shards=layout.shards[first:],
        codec="lz4",
        affine=tuple(map(tuple, affine.tolist())),
        affine_source=like.affine_source if like else "none",
        spatial_unit=spatial_unit,
        split=like.split if like else None,
        meta=like.meta if like else {},
    )


class ShardWriter(Protocol):
    """Writes whole shards of an image."""

    @property
    def record(self) -> ImageRecord:
        """What is written."""

    def write_shard(self, shard: Shard, voxels: NDArray[Any], *, skipped: int = 0) -> None:
        """Write one shard, whole: ``voxels`` is (c, z, y, x), ``skipped`` of them not predicted."""


class ShardAssembler:
    """Collects boxes of final voxels into shards, and writes each shard when its last voxel has come.

    The boxes come in any order and must not overlap; memory is that of the shards begun and not complete.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        record = writer.record
        self._shape = record.shape_czyx
        self._shards = padded_to_4d(record.shards)
        self._dtype = np.dtype(record.dtype)
        self._open: dict[Shard, _OpenShard] = {}

    def put(self, first: tuple[int, int, int], voxels: NDArray[Any], *, skipped: int = 0) -> None:
        """Take in final voxels (c, z, y, x), all channels, that start at ``first`` (z, y, x).

        ``skipped`` of them were filled and not predicted; such boxes lie in one shard.
        """
        low, ends = (0, *first), [a + n for a, n in zip((0, *first), voxels.shape, strict=True)]
        touched = (range(a // s, (b - 1) // s + 1) for a, b, s in zip(low, ends, self._shards, strict=True))
        for c, z, y, x in itertools.product(*touched):
            self._fill((c, z, y, x), low, ends, voxels, skipped)

    def _fill(
        self, shard: Shard, low: Sequence[int], ends: Sequence[int], voxels: NDArray[Any], skipped: int
    ) -> None:
        origin = [n * s for n, s in zip(shard, self._shards, strict=True)]
        if shard not in self._open:
            limits = zip(origin, self._shards, self._shape, strict=True)
            extent = [min(o + s, n) - o for o, s, n in limits]
            self._open[shard] = _OpenShard(buffer_pool.empty(extent, self._dtype), math.prod(extent))
        opened = self._open[shard]
        first = [max(a, o) for a, o in zip(low, origin, strict=True)]
        stop = [min(b, o + s) for b, o, s in zip(ends, origin, self._shards, strict=True)]
        opened.voxels[_slices(first, stop, origin)] = voxels[_slices(first, stop, low)]
        opened.awaited -= math.prod(b - a for a, b in zip(first, stop, strict=True))
        opened.skipped += skipped
        if opened.awaited == 0:
            del self._open[shard]
            self._writer.write_shard(shard, opened.voxels, skipped=opened.skipped)

    @property
    def complete(self) -> bool:
        """Whether no shard is left begun."""
        return not self._open


@dataclass(slots=True)
class _OpenShard:
    """A shard that awaits so many voxels."""

    voxels: NDArray[Any]
    awaited: int
    skipped: int = 0


def _slices(first: Sequence[int], stop: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, stop, origin, strict=True))
