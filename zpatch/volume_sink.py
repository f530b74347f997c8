"""Where final voxels go: into one tensor, or into an image on disk, each write unit written once."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from zpatch.errors import IncompleteCoverageError
from zpatch.geometry import Affine, Triple
from zpatch.image_writer import ImageWriter, WriteUnits
from zpatch.layout import plan_output_layout
from zpatch.nifti_writer import make_header
from zpatch.schema import ImageRecord, Kind
from zpatch.store_writer import StagedImage


class VolumeSink(Protocol):
    """Takes each voxel of a volume once, in boxes of any order."""

    def put(self, first: Triple, voxels: torch.Tensor) -> None:
        """Take in final voxels (C, I, J, K) that start at ``first``."""


class TensorSink:
    """Gathers final voxels in one tensor (C, I, J, K)."""

    def __init__(self, spatial_shape: Triple) -> None:
        self._spatial_shape = spatial_shape
        self.tensor: torch.Tensor | None = None

    def put(self, first: Triple, voxels: torch.Tensor) -> None:
        """Take in final voxels."""
        if self.tensor is None:
            self.tensor = torch.empty((len(voxels), *self._spatial_shape), dtype=voxels.dtype)
        (i, j, k), (p, q, r) = first, voxels.shape[1:]
        self.tensor[:, i : i + p, j : j + q, k : k + r] = voxels


class ImageSink:
    """Writes final voxels into a staged image, shard by shard.

    ``swept_axis`` (0, 1 or 2 for I, J or K) is the one along which boxes become final; shards are thin
    along it. ``like_header`` is the raw NIfTI header whose geometry the image shares.
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
        swept_axis: int = 0,
        codec: str = "lz4",
        like_header: bytes | None = None,
        like_record: ImageRecord | None = None,
    ) -> None:
        self.stage = stage
        self._subject = subject
        self._name = name
        self._kind = kind
        self._spatial_shape = spatial_shape
        self._affine = affine
        self._swept_axis = swept_axis
        self._codec = codec
        self._like_header = like_header
        self._like_record = like_record
        self._writer: ImageWriter | None = None
        self._units: WriteUnits | None = None

    def put(self, first: Triple, voxels: torch.Tensor) -> None:
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
        header = make_header(
            self._spatial_shape,
            record.shape_czyx[0],
            np.dtype(record.dtype),
            self._affine,
            like=self._like_header,
        )
        return self._writer.finish(header)

    def _describe(self, channels: int, dtype: np.dtype[np.generic]) -> ImageRecord:
        i, j, k = self._spatial_shape
        layout = plan_output_layout((channels, k, j, i), dtype.itemsize, swept_axis=2 - self._swept_axis)
        first = 0 if channels > 1 else 1
        like = self._like_record
        return ImageRecord(
            subject=self._subject,
            image=self._name,
            kind=self._kind if dtype.kind in "iu" else "scalar",
            shape=(channels, k, j, i)[first:],
            dtype=dtype.newbyteorder("<").str,
            axes="czyx"[first:],
            chunks=layout.chunks[first:],
            shards=layout.shards[first:],
            codec=self._codec,
            affine=tuple(map(tuple, self._affine.tolist())),
            affine_source=like.affine_source if like else "none",
            spatial_unit=like.spatial_unit if like else "millimeter",
            split=like.split if like else None,
            meta=like.meta if like else {},
        )
