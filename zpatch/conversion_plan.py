"""What a conversion will do, before it does anything: which cases, which layout, how much memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zpatch import nifti
from zpatch.discovery import Case, SourceImage, discover
from zpatch.errors import OptionError, SourceError
from zpatch.geometry import max_corner_distance, spacing_mm
from zpatch.layout import CHUNK_VOXELS, Layout, plan_layout
from zpatch.memory import format_bytes, refuse_above
from zpatch.nifti import NiftiFile
from zpatch.schema import Json, check_codec, padded_to_4d

BASE_BYTES = 64 * 2**20
LIVE_SLABS = 2
WARN_AFFINE_VOXELS = 1e-3
MAX_AFFINE_VOXELS = 0.5


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What a user may choose; ``chunk`` is in voxels, ``max_memory`` in bytes."""

    codec: str = "lz4"
    chunk: int = CHUNK_VOXELS
    label_patterns: tuple[str, ...] = ()
    sampling_patterns: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_memory: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PlannedImage:
    """One file to convert: where it is, what its header says, and how it will be stored."""

    subject: str
    source: SourceImage
    file: NiftiFile
    layout: Layout
    warnings: tuple[str, ...] = ()

    @property
    def slab_bytes(self) -> int:
        """Bytes of one slab in memory."""
        _, _, ny, nx = padded_to_4d(self.file.shape)
        together, depth, _, _ = padded_to_4d(self.layout.shards)
        return together * depth * ny * nx * self.file.channel_dtype.itemsize

    @property
    def shard_files(self) -> int:
        """Number of shard files it becomes."""
        return int(np.prod(self.layout.shard_counts(self.file.shape)))


@dataclass(frozen=True, slots=True, eq=False)
class PlannedCase:
    """One subject to convert: a unit that is converted whole or not at all."""

    case: Case
    images: tuple[PlannedImage, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that cannot be converted, and why in one line."""

    subject: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class ConversionPlan:
    """What a conversion will do; printing it says so."""

    source: Path
    cases: tuple[PlannedCase, ...]
    failures: tuple[Failure, ...]
    options: ConvertOptions

    @property
    def images(self) -> list[PlannedImage]:
        """All files to convert."""
        return [image for case in self.cases for image in case.images]

    @property
    def bytes_in(self) -> int:
        """Bytes of the source files."""
        return sum(os.path.getsize(image.source.path) for image in self.images)

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return sum(image.file.voxel_bytes for image in self.images)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory above that of the interpreter and its libraries: two slabs and what works
        on them."""
        return LIVE_SLABS * max((image.slab_bytes for image in self.images), default=0) + BASE_BYTES

    def to_json(self) -> Json:
        """The plan as plain JSON."""
        return {
            "source": str(self.source),
            "bytes_in": self.bytes_in,
            "voxel_bytes": self.voxel_bytes,
            "peak_bytes": self.peak_bytes,
            "images": [
                {
                    "subject": image.subject,
                    "image": image.source.name,
                    "kind": image.source.kind,
                    "file": str(image.source.path),
                    "shape": image.file.dims,
                    "shards": image.shard_files,
                    "warnings": image.warnings,
                }
                for image in self.images
            ],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }

    def __str__(self) -> str:
        shards = sum(image.shard_files for image in self.images)
        return (
            f"{len(self.cases)} subjects, {len(self.images)} images, {format_bytes(self.bytes_in)} in files "
            f"-> {format_bytes(self.voxel_bytes)} of voxels in {shards} shards, "
            f"peak {format_bytes(self.peak_bytes)} above start-up"
        )


def plan_conversion(source: Path, options: ConvertOptions) -> ConversionPlan:
    """Find the cases of a folder and read their headers; nothing is written."""
    check_codec(options.codec)
    if options.chunk < 1:
        raise OptionError(f"chunk must be at least 1 voxel, not {options.chunk}")
    cases = discover(
        source,
        label_patterns=options.label_patterns,
        sampling_patterns=options.sampling_patterns,
        include=options.include,
        exclude=options.exclude,
    )
    planned, failures = [], []
    for case in cases:
        try:
            planned.append(_plan_case(case, options))
        except SourceError as error:
            failures.append(Failure(case.subject, str(error)))
    plan = ConversionPlan(source, tuple(planned), tuple(failures), options)
    if not planned:
        raise nothing_converted(source, failures)
    refuse_above(options.max_memory, plan.peak_bytes, "converting", "choose a smaller --chunk or allow more")
    return plan


def nothing_converted(source: Path, failures: Sequence[Failure]) -> SourceError:
    """The error for a source of which no case is good."""
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return SourceError(f"no case of {source} can be converted: {failures[0].reason}{more}")


def _plan_case(case: Case, options: ConvertOptions) -> PlannedCase:
    images = [_plan_image(case.subject, image, options) for image in case.images]
    _check_labels_fit(case, images)
    return PlannedCase(case, tuple(images))


def _plan_image(subject: str, image: SourceImage, options: ConvertOptions) -> PlannedImage:
    file = nifti.read_header(image.path)
    layout = plan_layout(
        file.shape,
        file.channel_dtype.itemsize,
        spacing=spacing_mm(file.affine)[::-1],
        chunk=options.chunk,
        colours=file.colours,
    )
    return PlannedImage(subject, image, file, layout, file.warnings)


def _check_labels_fit(case: Case, images: list[PlannedImage]) -> None:
    """Refuse a label or sampling map that does not lie on the grid of its subject's first image."""
    scalars = [image for image in images if image.source.kind == "scalar"]
    if not scalars:
        return
    first = scalars[0]
    for position, image in enumerate(images):
        if image.source.kind == "scalar":
            continue
        shape, other = (p.file.shape[-3:][::-1] for p in (image, first))
        if shape != other:
            raise SourceError(
                f"{image.source.path}: its shape {shape} is not that of {first.source.path}, {other}; "
                f"resample one to the grid of the other"
            )
        i, j, k = shape
        apart = max_corner_distance(first.file.affine, image.file.affine, (i, j, k))
        if not apart <= MAX_AFFINE_VOXELS:
            raise SourceError(
                f"{image.source.path}: its affine puts voxels {apart:.2g} voxels away from those of "
                f"{first.source.path}; resample one to the grid of the other"
            )
        if apart > WARN_AFFINE_VOXELS:
            warning = f"its affine differs from that of {first.source.name} by {apart:.2g} voxels"
            images[position] = dataclasses.replace(image, warnings=(*image.warnings, warning))
