"""Where final voxels are written: into one tensor, or into an image on disk, each shard written once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.blending.reduction import Finaliser
from zpatch.chunks.layout import Layout, plan_output_layout
from zpatch.chunks.mapped_memory import copy_between_orders
from zpatch.errors import IncompleteCoverageError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple, padded_to_4d
from zpatch.images.image import Image, stored_image
from zpatch.records.image_record import ImageRecord, Kind
from zpatch.runtime import buffer_pool
from zpatch.store.image_writer import ImageWriter, Shard
from zpatch.store.staged_image import StagedImage
from zpatch.volume_files.nifti_writer import make_header

Output = torch.Tensor | Image


class VolumeSink(Protocol):
    """Takes each voxel of a volume once, in boxes of any order."""

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0) -> None:
        """Take in final voxels (C, I, J, K) from ``first`` on.

        No patch was run for ``skipped`` of them; ``not_finite`` were NaN or infinite before their reduction.
        """


class BlendedSink(Protocol):
    """Takes each voxel of a blended volume once, in boxes of any order."""

    def put(self, first: Triple, voxels: torch.Tensor, *, empty: torch.Tensor | None = None) -> None:
        """Take in blended voxels (C, I, J, K) from ``first`` on; no patch covers those that are ``empty``.

        ``empty`` is (I, J, K). The memory of the voxels may be used again afterwards.
        """


class FinalisingSink:
    """Makes final voxels of blended ones, and hands them on; those that are empty get the value ``fill``."""

    def __init__(self, finalise: Finaliser, sink: VolumeSink, fill: float = 0) -> None:
        self._finalise = finalise
        self._sink = sink
        self._fill = fill

    def put(self, first: Triple, voxels: torch.Tensor, *, empty: torch.Tensor | None = None) -> None:
        """Take in blended voxels."""
        final, count = self._finalise(voxels)
        skipped = 0
        if empty is not None:
            final = torch.where(
                empty, torch.full((), self._fill, dtype=final.dtype, device=final.device), final
            )
            skipped = int(empty.sum())
        self._sink.put(first, final.cpu(), skipped=skipped, not_finite=count)


class OutputSink(VolumeSink, Protocol):
    """A sink that gives the whole volume at the end."""

    not_finite: int  # voxels so far

    def finish(self) -> Output:
        """The volume, once it has every voxel."""


class TensorSink:
    """Gathers final voxels in one tensor (C, I, J, K), and counts those that were skipped or not finite."""

    def __init__(self, spatial_shape: Triple) -> None:
        self._spatial_shape = spatial_shape
        self.tensor: torch.Tensor | None = None
        self.skipped = self.not_finite = 0

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0) -> None:
        """Take in final voxels."""
        if self.tensor is None:
            self.tensor = torch.empty((len(voxels), *self._spatial_shape), dtype=voxels.dtype)
        (i, j, k), (p, q, r) = first, voxels.shape[1:]
        self.tensor[:, i : i + p, j : j + q, k : k + r] = voxels
        self.skipped += skipped
        self.not_finite += not_finite

    def finish(self) -> torch.Tensor:
        """The tensor."""
        if self.tensor is None:
            raise IncompleteCoverageError("no voxel was written to the tensor")
        return self.tensor


class ImageSink:
    """Writes final voxels into a staged image, shard by shard; ``folder`` is where the image will be.

    Shards are thin along I, and boxes are expected in ascending order along it.
    """

    def __init__(
        self,
        stage: StagedImage,
        folder: Path,
        *,
        subject: str,
        name: str,
        kind: Kind,
        spatial_shape: Triple,
        affine: Affine,
    ) -> None:
        self.stage = stage
        self._folder = folder
        self._subject = subject
        self._name = name
        self._kind = kind
        self._spatial_shape = spatial_shape
        self._affine = affine
        self.not_finite = 0
        self._writer: ImageWriter | None = None
        self._shards: ShardAssembler | None = None

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0) -> None:
        """Take in final voxels, and write each shard that they complete."""
        if self._writer is None or self._shards is None:
            record = self._describe(len(voxels), voxels.numpy().dtype)
            self._writer = ImageWriter(self.stage, record, f"{self._subject}/{self._name}")
            self._shards = ShardAssembler(record)
        self.not_finite += not_finite
        for shard in self._shards.put(first, voxels, skipped=skipped, not_finite=not_finite):
            self._writer.add_shard(
                shard.number, shard.voxels, skipped=shard.skipped, not_finite=shard.not_finite
            )

    def finish(self) -> Image:
        """The image in its folder, once the stage is moved there."""
        if self._writer is None or self._shards is None or not self._shards.complete:
            raise IncompleteCoverageError(f"image {self._name!r} has shards that were never completed")
        record = self._writer.record
        header = make_header(self._spatial_shape, record.shape_czyx[0], np.dtype(record.dtype), self._affine)
        return stored_image(self._folder, self._writer.finish(header))

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
    """The record of an image (C, I, J, K) to be written; ``like`` is the record of its input image."""
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


class CompleteShard(NamedTuple):
    """A shard with all its voxels (c, z, y, x), clipped to the image, and the counts of its boxes."""

    number: Shard
    voxels: NDArray[Any]
    skipped: int
    not_finite: int


class ShardAssembler:
    """Collects boxes of final voxels into shards of an image.

    The boxes may arrive in any order and must not overlap. Only incomplete shards are in memory. ``expected``
    says for each shard how many voxels of a channel arrive, if not all do; the others are skipped, and get
    the value ``fill``.
    """

    def __init__(
        self, record: ImageRecord, *, expected: Mapping[Shard, int] | None = None, fill: float = 0
    ) -> None:
        self._expected = expected
        self._fill = fill
        self._shape = record.shape_czyx
        self._shard_shape = padded_to_4d(record.shards)
        self._dtype = np.dtype(record.dtype)
        self._open: dict[Shard, _OpenShard] = {}

    def put(
        self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0
    ) -> Iterator[CompleteShard]:
        """Take in final voxels (C, I, J, K), all channels, that start at ``first`` (I, J, K).

        Yields each shard that they complete; the voxels are taken in while the result is iterated over.
        ``skipped`` and ``not_finite`` are counted for the first shard that they touch.
        """
        stored = voxels.permute(0, 3, 2, 1).numpy()
        low = (0, *first[::-1])
        ends = [a + n for a, n in zip(low, stored.shape, strict=True)]
        touched = (
            range(a // s, (b - 1) // s + 1) for a, b, s in zip(low, ends, self._shard_shape, strict=True)
        )
        for c, z, y, x in itertools.product(*touched):
            number = (c, z, y, x)
            shard = self._open.get(number)
            if shard is None:
                shard = self._open[number] = self._new_shard(number)
            shard.fill(low, ends, stored, skipped, not_finite)
            skipped = not_finite = 0
            if not shard.missing:
                del self._open[number]
                yield CompleteShard(number, shard.voxels, shard.skipped, shard.not_finite)

    def _new_shard(self, number: Shard) -> _OpenShard:
        origin = [n * s for n, s in zip(number, self._shard_shape, strict=True)]
        limits = zip(origin, self._shard_shape, self._shape, strict=True)
        extent = [min(o + s, n) - o for o, s, n in limits]
        voxels, total = buffer_pool.empty(extent, self._dtype), math.prod(extent)
        expected = total if self._expected is None else extent[0] * self._expected[number]
        if expected < total:
            voxels.fill(self._fill)
        return _OpenShard(origin, voxels, expected, skipped=(total - expected) // extent[0])

    def filled(self, number: Shard) -> CompleteShard:
        """A shard of which no voxel arrives."""
        shard = self._new_shard(number)
        assert not shard.missing
        return CompleteShard(number, shard.voxels, shard.skipped, 0)

    @property
    def complete(self) -> bool:
        """Whether no shard is incomplete."""
        return not self._open


@dataclass(slots=True)
class _OpenShard:
    """A shard that begins at ``origin`` (c, z, y, x) and lacks ``missing`` voxels."""

    origin: Sequence[int]
    voxels: NDArray[Any]
    missing: int
    skipped: int = 0
    not_finite: int = 0

    def fill(
        self, low: Sequence[int], ends: Sequence[int], box: NDArray[Any], skipped: int, not_finite: int
    ) -> None:
        """Copy the part of a box of voxels, from ``low`` up to ``ends``, that is in the shard."""
        first = [max(a, o) for a, o in zip(low, self.origin, strict=True)]
        stop = [min(b, o + n) for b, o, n in zip(ends, self.origin, self.voxels.shape, strict=True)]
        copy_between_orders(box[_slices(first, stop, low)], self.voxels[_slices(first, stop, self.origin)])
        self.missing -= math.prod(b - a for a, b in zip(first, stop, strict=True))
        self.skipped += skipped
        self.not_finite += not_finite


def _slices(first: Sequence[int], stop: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, stop, origin, strict=True))
