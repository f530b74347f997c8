"""Where final voxels go: into one tensor, or into an image on disk, each write unit written once."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from zpatch.chunks.layout import Layout, plan_output_layout
from zpatch.errors import IncompleteCoverageError
from zpatch.geometry.boxes import Affine, Triple
from zpatch.nifti.writer import make_header
from zpatch.store.image_record import ImageRecord, Kind
from zpatch.store.image_writer import ImageWriter, WriteUnits
from zpatch.store.store_writer import StagedImage


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
        self._units: WriteUnits | None = None

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0) -> None:
        """Take in final voxels."""
        stored = voxels.permute(0, 3, 2, 1).numpy()
        if self._units is None:
            self._writer = ImageWriter(
                self.stage, self._describe(len(stored), stored.dtype), f"{self._subject}/{self._name}"
            )
            self._units = WriteUnits(self._writer)
        self._units.put(first[::-1], stored)

    def finish(self) -> ImageRecord:
        """The record of the image, once every voxel has come."""
        if self._writer is None or self._units is None or not self._units.complete:
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
