"""The conversion of one case: slabs of its files -> shards of staged images."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.layout import Layout, chunk_counts
from zpatch.chunks.levels import plan_levels
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.conversion_plan import Failure, PlannedCase, PlannedImage, unexpected
from zpatch.conversion.pyramid import PyramidBuilder, write_levels
from zpatch.conversion.source_files import fingerprint
from zpatch.errors import SamplingError, SourceError, StoreError, VolumeFileError, one_line
from zpatch.geometry.boxes import padded_to_4d
from zpatch.geometry.orientation import Orientation
from zpatch.records.image_record import ImageRecord, codec_for
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.runtime.task_contract import Progress
from zpatch.runtime.tasks import read_ahead
from zpatch.store.image_writer import ImageWriter, Shard
from zpatch.store.lock import writing_to
from zpatch.store.staged_image import StagedImage
from zpatch.volume_files import formats
from zpatch.volume_files.nifti_writer import resampled_header
from zpatch.volume_files.volume_file import Slab, VolumeFile, Warn

INTEGRAL_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8")


@dataclass(frozen=True, slots=True, eq=False)
class CaseTask:
    """One case for a worker, whose images are staged below ``staging``.

    Paths of source files are stored relative to ``folder``.
    """

    case: PlannedCase
    options: ConvertOptions
    folder: Path
    staging: Path


@dataclass(frozen=True, slots=True)
class StagedCase:
    """The result of a worker: the folders of a case's images with their records, or the ``failure``."""

    images: tuple[tuple[Path, ImageRecord], ...] = ()
    failure: Failure | None = None


def stage_case(task: CaseTask, progress: Progress) -> StagedCase:
    """Stage all images of a case. If any of its files is bad, nothing of the case is left."""
    staged: list[tuple[Path, ImageRecord]] = []
    stage = None
    try:
        with writing_to(task.staging.parent):
            for image in task.case.images:
                stage = StagedImage.below(task.staging)
                staged.append((stage.folder, _stage_image(image, task, stage, progress)))
    except BaseException as error:
        for folder in {folder for folder, _ in staged} | ({stage.folder} if stage else set()):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, MemoryError):
            error = SourceError(
                f"{image.file.path}: {format_bytes(image.slab_bytes)} of it at once do not fit in memory; "
                f"use a machine with more"
            )
        if isinstance(error, SourceError | SamplingError):
            return StagedCase(failure=Failure(task.case.case.subject, one_line(error)))
        if isinstance(error, Exception) and not isinstance(error, StoreError):
            return StagedCase(failure=unexpected(task.case.case, error))  # only this case fails
        raise
    return StagedCase(tuple(staged))


def _stage_image(image: PlannedImage, task: CaseTask, stage: StagedImage, progress: Progress) -> ImageRecord:
    file, layout = image.file, image.layout
    dtype = label_dtype(file, layout) if image.source.kind == "label" else image.dtype
    record = _record_of(image, task, dtype)
    writer = ImageWriter(stage, record, str(file.path))
    warnings = list(image.warnings)
    with ThreadPoolExecutor(1, thread_name_prefix="zpatch-fingerprint") as pool:
        source = pool.submit(fingerprint, image.source.path, task.folder)
        _stream(image, record, writer, warnings.append, progress)
        raw_header = formats.read_header(file.path).raw_header  # now: it may be large
        if image.grid is not None:
            raw_header = resampled_header(raw_header, image.grid.grid.shape, dtype, image.affine)
        record = writer.finish(raw_header, warnings, source=source.result())
    if task.options.strict and record.warnings:
        raise SourceError(f"{file.path}: {record.warnings[0]} (strict=True)")
    return record


def _stream(
    image: PlannedImage, record: ImageRecord, writer: ImageWriter, warn: Warn, progress: Progress
) -> None:
    """Write the voxels of the file to shards, a slab at a time."""
    turn = record.orientation
    pyramid = PyramidBuilder(writer.stage, record) if turn.is_identity else None
    for slab in read_ahead(_slabs(image, warn, backwards=turn.flips[2])):
        _write(slab, writer, pyramid)
        progress(round(image.file.voxel_bytes * slab.voxels.size / math.prod(image.shape)))
        del slab  # its memory is that of the slab after the next
    if pyramid is None:
        write_levels(writer.stage, record)


def _write(slab: Slab, writer: ImageWriter, pyramid: PyramidBuilder | None) -> None:
    """Write the shards of a slab, and what it adds to coarser levels."""
    record = writer.record
    voxels = record.orientation.turn(slab.voxels.astype(record.dtype, copy=False))
    for shard, part in _shards_of(record, slab.shard, voxels):
        writer.add_shard(shard, part)
    if pyramid is not None:
        pyramid.feed(voxels, slab.shard[0])


def _slabs(image: PlannedImage, warn: Warn, *, backwards: bool) -> Iterator[Slab]:
    """The voxels to store, with the axes of the file, one row of shards at a time."""
    file, extent, grid = image.file, image.layout.slab_extent, image.grid
    if grid is None:
        return file.slabs(extent, warn, backwards=backwards)
    source = read_ahead(file.slabs(grid.source_extent(extent), warn))
    return grid.slabs(file, extent, source, backwards=backwards)


def _record_of(image: PlannedImage, task: CaseTask, dtype: np.dtype[Any]) -> ImageRecord:
    """The record of an image before its voxels are read."""
    file, turn, case = image.file, image.orientation, task.case.case
    shape, chunks, shards = (
        _turned(extent, turn) for extent in (image.shape, image.layout.chunks, image.layout.shards)
    )
    nz, ny, nx = image.shape[-3:]
    affine = turn.affine(image.affine, (nx, ny, nz))
    is_scaled = image.grid is None or image.source.kind == "label"
    return ImageRecord(
        subject=case.subject,
        image=image.source.name,
        kind=image.source.kind,
        shape=shape,
        dtype=dtype.newbyteorder("<").str,
        axes=file.axes,
        chunks=chunks,
        shards=shards,
        codec=codec_for(task.options.codec, image.source.kind),
        affine=tuple(map(tuple, affine.tolist())),
        affine_source=file.affine_source,
        spatial_unit=file.spatial_unit,
        slope=file.slope if is_scaled else 1.0,
        inter=file.inter if is_scaled else 0.0,
        source_dtype=file.dtype.str if file.colours == 1 and dtype != file.channel_dtype else None,
        colours=file.colours,
        orientation=turn,
        resampled=None if image.grid is None else image.grid.described(file.path),
        levels=plan_levels(shape, chunks, shards) if task.options.pyramid else (),
        split=case.split,
        meta=case.meta,
    )


def _turned(extent: tuple[int, ...], turn: Orientation) -> tuple[int, ...]:
    """A shape ([c,] z, y, x) of the file, after turning."""
    *channels, z, y, x = extent
    return *channels, *turn.permute((x, y, z))[::-1]


def _shards_of(
    record: ImageRecord, row: tuple[int, int], voxels: NDArray[Any]
) -> Iterator[tuple[Shard, NDArray[Any]]]:
    """The shards of a slab and their voxels: several only where a plane has more than one shard.

    The slab is the row ``row[1]`` of shards along the axis that is slowest in the file.
    """
    slowest = record.orientation.slowest
    shards = padded_to_4d(record.shards)[1:]
    for position in itertools.product(*map(range, chunk_counts(voxels.shape[1:], shards))):
        tile = tuple(slice(p * s, (p + 1) * s) for p, s in zip(position, shards, strict=True))
        place = list(position)
        place[slowest] = row[1]
        yield (row[0], place[0], place[1], place[2]), voxels[:, *tile]


def label_dtype(file: VolumeFile, layout: Layout) -> np.dtype[Any]:
    """The type to store a label map in: its own, or for floats the smallest integer type that holds them.

    Files of floats are read twice: first to check that all values are whole, and for their range.
    """
    if file.colours > 1 or file.dtype.kind == "c":
        raise VolumeFileError(
            f"{file.path}: a label map cannot have voxels of type {file.dtype}; save it as integers"
        )
    if not float(file.slope).is_integer() or not float(file.inter).is_integer():
        raise VolumeFileError(
            f"{file.path}: a label map cannot have the slope {file.slope:g}; save it unscaled"
        )
    if file.dtype.kind != "f":
        return file.channel_dtype
    low = high = 0.0
    for slab in file.slabs(layout.slab_extent):
        voxels = slab.voxels
        if not np.isfinite(voxels).all():
            raise VolumeFileError(f"{file.path}: a label map cannot hold NaN or infinity; repair the file")
        odd = voxels[voxels != np.floor(voxels)]
        if odd.size:
            raise VolumeFileError(
                f"{file.path}: label values must be whole numbers, not {odd[0]:g}; "
                f"say label_patterns= if this is no label map"
            )
        low, high = min(low, float(voxels.min())), max(high, float(voxels.max()))
    for code in INTEGRAL_DTYPES:
        limits = np.iinfo(code)
        if limits.min <= low and high <= limits.max:
            return np.dtype(code)
    raise VolumeFileError(
        f"{file.path}: label values from {low:g} to {high:g} fit no integer type; relabel it"
    )
