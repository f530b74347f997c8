"""NIfTI files -> a store, one slab in hand at a time."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch import nifti
from zpatch.conversion_plan import (
    ConversionPlan,
    ConvertOptions,
    Failure,
    PlannedCase,
    PlannedImage,
    nothing_converted,
    plan_conversion,
)
from zpatch.discovery import Case
from zpatch.errors import NiftiError, SamplingError, SourceError
from zpatch.image_writer import ImageWriter, Shard
from zpatch.layout import CHUNK_VOXELS, Layout
from zpatch.memory import parse_bytes
from zpatch.nifti import NiftiFile, Slab
from zpatch.scheduling import read_ahead
from zpatch.schema import ImageRecord, Json, padded_to_4d
from zpatch.store_writer import StagedImage, StoreWriter, check_can_create

INTEGRAL_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8")

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class ConversionReport:
    """What a conversion did."""

    store: Path
    records: tuple[ImageRecord, ...]
    failures: tuple[Failure, ...]

    def to_json(self) -> Json:
        """The report as plain JSON."""
        return {
            "store": str(self.store),
            "subjects": len({record.subject for record in self.records}),
            "images": [
                {
                    "subject": record.subject,
                    "image": record.image,
                    "kind": record.kind,
                    "shape": record.shape,
                    "dtype": record.dtype,
                    "voxel_bytes": record.voxel_bytes,
                    "stored_bytes": record.stored_bytes,
                    "warnings": record.warnings,
                }
                for record in self.records
            ],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }


def convert(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    codec: str = "lz4",
    chunk: int = CHUNK_VOXELS,
    label_patterns: Sequence[str] = (),
    sampling_patterns: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_memory: int | str | None = None,
) -> ConversionReport:
    """Convert a folder of NIfTI files into a store, as ``zpatch convert`` does.

    A case whose files are bad is left out and listed in the report; a SourceError says that none is
    good, a StoreExistsError that the store is there already.
    """
    options = ConvertOptions(
        codec=codec,
        chunk=chunk,
        label_patterns=tuple(label_patterns),
        sampling_patterns=tuple(sampling_patterns),
        include=tuple(include),
        exclude=tuple(exclude),
        max_memory=None if max_memory is None else parse_bytes(max_memory),
    )
    check_can_create(Path(store), overwrite=overwrite)
    return run_conversion(plan_conversion(Path(source), options), Path(store), overwrite=overwrite)


def run_conversion(
    plan: ConversionPlan,
    store: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda voxel_bytes: None,
) -> ConversionReport:
    """Do what a plan says. ``progress`` is told the bytes of voxels as they are done."""
    records: list[ImageRecord] = []
    failures = list(plan.failures)
    attributes = {"tool": f"zpatch {version('zpatch')}", "source": str(plan.source)}
    with StoreWriter.create(store, attributes, overwrite=overwrite) as writer:
        for case in plan.cases:
            try:
                records += _convert_case(case, plan, writer, progress)
            except (SourceError, SamplingError) as error:
                failures.append(Failure(case.case.subject, str(error)))
        if not records:
            writer.abandon()
    if not records:
        raise nothing_converted(plan.source, failures)
    return ConversionReport(store, tuple(records), tuple(failures))


def _convert_case(
    case: PlannedCase, plan: ConversionPlan, writer: StoreWriter, progress: Progress
) -> list[ImageRecord]:
    """Stage all images of a case, then commit them: a bad last file leaves nothing of the case."""
    staged: list[tuple[StagedImage, ImageRecord]] = []
    try:
        for image in case.images:
            stage = writer.stage()
            staged.append((stage, _stage_image(image, case.case, plan, stage, progress)))
        return writer.commit(staged)
    finally:
        for stage, _ in staged:
            stage.discard()


def _stage_image(
    image: PlannedImage,
    case: Case,
    plan: ConversionPlan,
    stage: StagedImage,
    progress: Progress,
) -> ImageRecord:
    file, layout = image.file, image.layout
    kind = image.source.kind
    dtype = label_dtype(file, layout) if kind == "label" else file.channel_dtype
    record = ImageRecord(
        subject=case.subject,
        image=image.source.name,
        kind=kind,
        shape=file.shape,
        dtype=dtype.newbyteorder("<").str,
        axes=file.axes,
        chunks=layout.chunks,
        shards=layout.shards,
        codec=plan.options.codec,
        affine=tuple(map(tuple, file.affine.tolist())),
        affine_source=file.affine_source,
        spatial_unit=file.spatial_unit,
        slope=file.slope,
        inter=file.inter,
        source_dtype=file.dtype.str if file.colours == 1 and dtype != file.channel_dtype else None,
        colours=file.colours,
        split=case.split,
        meta=case.meta,
        source=nifti.fingerprint(image.source.path, plan.source),
    )
    writer = ImageWriter(stage, record, str(file.path))
    warnings = list(image.warnings)
    for slab in read_ahead(file.slabs(layout, warnings.append)):
        for shard, part in _shards_of(record, slab):
            writer.write_shard(shard, part.astype(dtype, copy=False))
        progress(slab.voxels.nbytes)
    return writer.finish(file.raw_header, warnings)


def _shards_of(record: ImageRecord, slab: Slab) -> Iterator[tuple[Shard, NDArray[Any]]]:
    """The shards of a slab, which are several only where its plane is tiled."""
    _, _, tile_y, tile_x = padded_to_4d(record.shards)
    _, _, ny, nx = slab.voxels.shape
    for y, x in itertools.product(range(-(-ny // tile_y)), range(-(-nx // tile_x))):
        tile = (slice(y * tile_y, (y + 1) * tile_y), slice(x * tile_x, (x + 1) * tile_x))
        yield (*slab.shard, y, x), slab.voxels[:, :, *tile]


def label_dtype(file: NiftiFile, layout: Layout) -> np.dtype[Any]:
    """The type to store a label map in: its own, or for floats the smallest integer that holds them.

    Floats are read twice: once to see that all are integral and how large, once to store them.
    """
    if file.colours > 1 or file.dtype.kind == "c":
        raise NiftiError(f"{file.path}: a label map cannot have voxels of type {file.dtype}")
    if not float(file.slope).is_integer() or not float(file.inter).is_integer():
        raise NiftiError(f"{file.path}: a label map cannot have the slope {file.slope:g}")
    if file.dtype.kind != "f":
        return file.channel_dtype
    low = high = 0.0
    for slab in file.slabs(layout):
        voxels = slab.voxels
        if not np.isfinite(voxels).all():
            raise NiftiError(f"{file.path}: a label map cannot hold NaN or infinity; repair the file")
        odd = voxels[voxels != np.floor(voxels)]
        if odd.size:
            raise NiftiError(
                f"{file.path}: label values must be whole numbers, not {odd[0]:g}; "
                f"say --label-pattern if this is no label map"
            )
        low, high = min(low, float(voxels.min())), max(high, float(voxels.max()))
    for code in INTEGRAL_DTYPES:
        limits = np.iinfo(code)
        if limits.min <= low and high <= limits.max:
            return np.dtype(code)
    raise NiftiError(f"{file.path}: label values from {low:g} to {high:g} fit no integer type")
