"""The plan of a conversion: its cases, the layout of each image, and the memory it takes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.layout import Layout, plan_layout
from zpatch.conversion.cases import Case, CaseImage
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.discovery import discover
from zpatch.conversion.slab_resampler import SlabResampler, is_resampled_as
from zpatch.conversion.source_files import has_fingerprint
from zpatch.digests import Json
from zpatch.errors import OptionError, SourceError, one_line
from zpatch.geometry.affines import Affine, max_corner_distance, spacing_mm
from zpatch.geometry.boxes import Triple, padded_to_4d
from zpatch.geometry.orientation import AS_STORED, Orientation, orientation_to
from zpatch.records.manifest import Manifest
from zpatch.runtime.byte_sizes import format_bytes, refuse_above
from zpatch.volume_files import formats
from zpatch.volume_files.volume_file import VolumeFile

WARN_AFFINE_VOXELS = 1e-3
MAX_AFFINE_VOXELS = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class PlannedImage:
    """One image to convert: its ``source``, the ``file`` header, and the ``layout`` of the stored array.

    ``grid`` says how it is resampled; None keeps its voxels. The layout has the axes of the file.
    """

    subject: str
    source: CaseImage
    file: VolumeFile
    layout: Layout
    grid: SlabResampler | None = None
    orientation: Orientation = AS_STORED
    warnings: tuple[str, ...] = ()

    @property
    def slab_bytes(self) -> int:
        """Bytes of one slab in memory; of one that is resampled, with those of the file under it."""
        _, _, ny, nx = padded_to_4d(self.shape)
        together, depth, _, _ = padded_to_4d(self.layout.shards)
        stored = together * depth * ny * nx * self.dtype.itemsize
        if self.grid is None:
            return stored
        return stored + together * self.grid.source_bytes(depth, self.file.channel_dtype.itemsize)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored array, with the axes of the file."""
        return self.file.shape if self.grid is None else self.grid.stored_shape(self.file.shape)

    @property
    def dims(self) -> tuple[int, ...]:
        """Extent of the image along the axes of the file, those of time and channels included."""
        return self.file.dims if self.grid is None else (*self.grid.grid.shape, *self.file.dims[3:])

    @property
    def affine(self) -> Affine:
        """The affine of the stored array, with the axes of the file."""
        return self.file.affine if self.grid is None else self.grid.grid.affine

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored voxels; of a label map of floats, that of the file."""
        return self.file.channel_dtype if self.grid is None else self.grid.dtype_of(self.file)

    @property
    def shard_files(self) -> int:
        """Number of shard files of the stored image."""
        return int(np.prod(self.layout.shard_counts(self.shape)))


@dataclass(frozen=True, slots=True, eq=False)
class PlannedCase:
    """One subject to convert, with all its images or not at all."""

    case: Case
    images: tuple[PlannedImage, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that cannot be converted, and the reason in one line."""

    subject: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class ConversionPlan:
    """What a conversion will do; print it for a summary.

    ``format`` is the convention that was found. Paths of sources are stored relative to ``folder``.
    ``failures`` are cases that cannot be converted, ``done`` the subjects that are already converted;
    ``notes`` say what else is in the source and is left out.
    """

    source: Path
    folder: Path
    format: str
    options: ConvertOptions
    cases: tuple[PlannedCase, ...]
    failures: tuple[Failure, ...]
    done: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> list[PlannedImage]:
        """All files to convert."""
        return [image for case in self.cases for image in case.images]

    @property
    def bytes_in(self) -> int:
        """Bytes of the source files."""
        return sum(os.path.getsize(file) for image in self.images for file in image.file.files)

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return sum(image.file.voxel_bytes for image in self.images)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory, without the interpreter and its libraries: slabs, and a fixed part."""
        largest = max((image.slab_bytes for image in self.images), default=0)
        return self.options.live_slabs * largest + self.options.base_bytes

    def to_json(self) -> Json:
        """The plan as plain JSON."""
        return {
            "source": str(self.source),
            "format": self.format,
            "already_there": list(self.done),
            "notes": list(self.notes),
            "bytes_in": self.bytes_in,
            "voxel_bytes": self.voxel_bytes,
            "peak_bytes": self.peak_bytes,
            "images": [
                {
                    "subject": image.subject,
                    "image": image.source.name,
                    "kind": image.source.kind,
                    "file": str(image.source.path),
                    "shape": image.dims,
                    "shape_axes": "IJKTC"[: len(image.dims)],
                    "shards": image.shard_files,
                    "warnings": image.warnings,
                }
                for image in self.images
            ],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }

    def __str__(self) -> str:
        shards = sum(image.shard_files for image in self.images)
        done = f"{len(self.done)} subjects are already converted; " if self.done else ""
        return (
            f"{self.format}: {done}"
            f"{len(self.cases)} subjects, {len(self.images)} images, {format_bytes(self.bytes_in)} in files "
            f"-> {format_bytes(self.voxel_bytes)} of voxels in {shards} shards, "
            f"peak {format_bytes(self.peak_bytes)} above start-up"
        )


def plan_conversion(source: Path, options: ConvertOptions, *, done: Manifest | None = None) -> ConversionPlan:
    """Find the cases of a source and read their headers; nothing is written.

    ``done`` are the images in the store: a case whose files have not changed since then is not planned.
    """
    found = discover(source, options)
    planned, unchanged = [], []
    failures = [Failure(subject, one_line(SourceError(reason))) for subject, reason in found.refused]
    for case in found.cases:
        if done is not None and _is_unchanged(case, done, found.folder, options):
            unchanged.append(case.subject)
            continue
        try:
            planned.append(_plan_case(case, options))
        except SourceError as error:
            failures.append(Failure(case.subject, one_line(error)))
        except Exception as error:  # a header may be odd in a way that nobody foresaw: only this case fails
            failures.append(unexpected(case, error))
    plan = ConversionPlan(
        source=source,
        folder=found.folder,
        format=found.format,
        options=options,
        cases=tuple(planned),
        failures=tuple(failures),
        done=tuple(unchanged),
        notes=found.notes,
    )
    if failures and not (planned or unchanged):
        raise nothing_converted(source, failures)
    refuse_above(
        options.max_memory_bytes,
        plan.peak_bytes,
        "converting",
        "choose a smaller chunk=, fewer jobs=, or allow more",
    )
    return plan


def _is_unchanged(case: Case, done: Manifest, folder: Path, options: ConvertOptions) -> bool:
    """Whether all images of a case are in the store, with their kind, split, metadata and unchanged files.

    An image that was resampled in another way, or is to be resampled now, is not unchanged. The table of the
    manifest answers for most images; a record is parsed where a file has another time.
    """
    meta = json.loads(json.dumps(case.meta))
    for image in case.images:
        row = done.table.row_of(case.subject, image.name)
        if row is None or (facts := done.table.facts_of(row)) is None or facts.kind != image.kind:
            return False
        if done.table.split_of(row) != case.split or done.table.meta_of(row) != meta:
            return False
        may_differ = facts.is_resampled or options.spacing is not None
        if may_differ and not is_resampled_as(done.records.at(row), options):
            return False
        source, checksum = done.table.source_of(row), partial(_source_checksum, done, row)
        if source is None or not has_fingerprint(image.path, source, checksum, folder):
            return False
    return True


def _source_checksum(done: Manifest, row: int) -> str:
    """The checksum of the file that an image was converted from."""
    source = done.records.at(row).source
    return "" if source is None else source.checksum


def unexpected(case: Case, error: Exception) -> Failure:
    """The failure of a case by an error that is not one of zpatch."""
    files = ", ".join(str(image.path) for image in case.images)
    what = f"unexpected {type(error).__name__}: {one_line(error)}"
    return Failure(case.subject, f"{files}: {what}; leave the case out with exclude=, and report it")


def nothing_converted(source: Path, failures: Sequence[Failure]) -> SourceError:
    """The error for a source without any case that can be converted."""
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return SourceError(f"no case of {source} can be converted: {failures[0].reason}{more}")


def _plan_case(case: Case, options: ConvertOptions) -> PlannedCase:
    images = [_plan_image(case.subject, image, options) for image in case.images]
    _check_labels_fit(case, images)
    for image in images:
        if options.strict and image.warnings:
            raise SourceError(f"{image.source.path}: {image.warnings[0]} (strict=True)")
    return PlannedCase(case, tuple(images))


def _plan_image(subject: str, image: CaseImage, options: ConvertOptions) -> PlannedImage:
    file = formats.read_header(image.path, affine=options.affine)
    try:
        turn = AS_STORED if options.orient is None else orientation_to(file.affine, options.orient)
        grid = SlabResampler.of(file, turn, image.kind, options)
    except OptionError as error:  # of this file: its affine is singular, or its voxels are complex
        raise SourceError(f"{file.path}: {error}") from None
    shape = file.shape if grid is None else grid.stored_shape(file.shape)
    layout = plan_layout(
        shape,
        (file.channel_dtype if grid is None else grid.dtype_of(file)).itemsize,
        spacing=spacing_mm(file.affine if grid is None else grid.grid.affine)[::-1],
        chunk=options.chunk,
        shard_bytes=options.shard_bytes,
        interleaved=file.interleaved,
    )
    file = dataclasses.replace(file, raw_header=b"")  # up to 64 MiB each; read again when it is converted
    return PlannedImage(subject, image, file, layout, grid, turn, file.warnings)


def _check_labels_fit(case: Case, images: list[PlannedImage]) -> None:
    """Raise ``SourceError`` for a label or sampling map that is on the grid of no image of its subject."""
    scalars = [image for image in images if image.source.kind == "scalar"]
    for position, image in enumerate(images):
        if image.source.kind != "scalar" and scalars:
            apart, nearest = min(((_voxels_apart(image, other), other) for other in scalars), key=_first)
            if not apart <= MAX_AFFINE_VOXELS:
                raise SourceError(_misfit(image, nearest, apart))
            if apart > WARN_AFFINE_VOXELS:
                warning = f"its affine differs from that of {nearest.source.name} by {apart:.2g} voxels"
                images[position] = dataclasses.replace(image, warnings=(*image.warnings, warning))


def _first(pair: tuple[float, PlannedImage]) -> float:
    return pair[0]


def _voxels_apart(image: PlannedImage, other: PlannedImage) -> float:
    """The largest distance between voxels of a map and an image, in voxels; infinity if shapes differ."""
    (shape, affine), (other_shape, other_affine) = _turned_grid(image), _turned_grid(other)
    if other_shape != shape:
        return math.inf
    apart = max_corner_distance(other_affine, affine, shape)
    return math.inf if math.isnan(apart) else apart


def _turned_grid(image: PlannedImage) -> tuple[Triple, Affine]:
    """Shape (I, J, K) and affine of the file, as it is turned."""
    k, j, i = image.file.shape[-3:]
    return image.orientation.shape((i, j, k)), image.orientation.affine(image.file.affine, (i, j, k))


def _misfit(image: PlannedImage, nearest: PlannedImage, apart: float) -> str:
    shape, other = (_turned_grid(planned)[0] for planned in (image, nearest))
    what = (
        f"its shape {shape} is not that of {nearest.source.path}, {other}"
        if shape != other
        else f"its affine puts voxels {apart:.2g} voxels away from those of {nearest.source.path}"
    )
    return f"{image.source.path}: {what}; resample one to the grid of the other"
