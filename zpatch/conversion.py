"""NIfTI files -> a store: plan a conversion, then run it, one slab in hand at a time."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch import nifti
from zpatch.discovery import Case, SourceImage, discover
from zpatch.errors import NiftiError, SourceError
from zpatch.geometry import max_corner_distance, spacing_mm
from zpatch.image_writer import ImageWriter, Shard
from zpatch.layout import CHUNK_VOXELS, Layout, plan_layout
from zpatch.memory import format_bytes, parse_bytes, refuse_above
from zpatch.nifti import NiftiFile, Slab
from zpatch.scheduling import read_ahead
from zpatch.schema import ImageRecord, Json, Source, check_codec, padded_to_4d
from zpatch.store import StagedImage, StoreWriter, check_can_create

BASE_BYTES = 64 * 2**20
LIVE_SLABS = 2
WARN_AFFINE_VOXELS = 1e-3
MAX_AFFINE_VOXELS = 0.5
INTEGRAL_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8")

Progress = Callable[[int], None]


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


def plan_conversion(source: Path, options: ConvertOptions) -> ConversionPlan:
    """Find the cases of a folder and read their headers; nothing is written."""
    check_codec(options.codec)
    if options.chunk < 1:
        raise SourceError(f"chunk must be at least 1 voxel, not {options.chunk}")
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
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise SourceError(f"no case of {source} can be converted: {failures[0].reason}{more}")
    refuse_above(options.max_memory, plan.peak_bytes, "converting", "choose a smaller --chunk or allow more")
    return plan


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
        interleaved=file.rgb,
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
    attributes = {"tool": _tool_version(), "source": str(plan.source)}
    with StoreWriter.create(store, attributes, overwrite=overwrite) as writer:
        for case in plan.cases:
            try:
                records += _convert_case(case, plan, writer, progress)
            except SourceError as error:
                failures.append(Failure(case.case.subject, str(error)))
    return ConversionReport(store, tuple(records), tuple(failures))


def _tool_version() -> str:
    from importlib.metadata import version

    return f"zpatch {version('zpatch')}"


def _convert_case(
    case: PlannedCase, plan: ConversionPlan, writer: StoreWriter, progress: Progress
) -> list[ImageRecord]:
    """Stage all images of a case, then commit them: a bad last file leaves nothing of the case."""
    staged: list[tuple[StagedImage, ImageRecord]] = []
    try:
        for image in case.images:
            stage = writer.stage()
            staged.append((stage, _stage_image(image, case.case, plan, stage, progress)))
        return [writer.commit(stage, record) for stage, record in staged]
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
        source_dtype=file.dtype.str if not file.rgb and dtype != file.channel_dtype else None,
        rgb=file.rgb,
        split=case.split,
        meta=case.meta,
        source=_fingerprint(image.source.path, plan.source),
    )
    writer = ImageWriter(stage, record, str(file.path))
    for slab in read_ahead(file.slabs(layout)):
        for shard, part in _shards_of(record, slab):
            writer.write_shard(shard, part.astype(dtype, copy=False))
        progress(slab.voxels.nbytes)
    return writer.finish(file.raw_header, image.warnings)


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
    if file.rgb or file.dtype.kind == "c":
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


def _fingerprint(path: Path, source: Path) -> Source:
    status = path.stat()
    return Source(
        path=path.relative_to(source).as_posix(),
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        checksum=nifti.source_checksum(path),
    )
