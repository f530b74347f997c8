"""A store -> NIfTI files, byte for byte as they were converted, or OME-TIFF files with their pyramids."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.gather import read_region
from zpatch.chunks.layout import SHARD_BYTES
from zpatch.chunks.scaling import Scaling
from zpatch.errors import OptionError, StoreExistsError, UnknownNameError
from zpatch.geometry.affines import spacing_mm
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import RAW_HEADER, chosen
from zpatch.runtime.task_contract import Progress
from zpatch.slides.tiff_writer import TiffImage, write_ome_tiff
from zpatch.store.lock import writing_to
from zpatch.store.store import Store, open_store, read_small_array, sharded_array
from zpatch.volume_files.nifti_writer import header_of, single_file_header, write_nifti

TIFF_SUFFIXES = (".ome.tif", ".ome.tiff")
SUFFIXES = (".nii", ".nii.gz", *TIFF_SUFFIXES)
MICROMETRES = {"micrometer": 1.0, "millimeter": 1e3, "meter": 1e6}


@dataclass(frozen=True, slots=True)
class ExportedImage:
    """The record of an image, and the path of the file that it is written to."""

    record: ImageRecord
    path: Path


def export(
    store: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    images: Sequence[str] = (),
    suffix: str = ".nii.gz",
    overwrite: bool = False,
    progress: Progress = lambda voxel_bytes: None,
) -> list[Path]:
    """Write images of a store as files, as ``zpatch export`` does, and return their paths.

    Images are written to ``destination/<subject>/<image>.nii.gz``, or to ``destination`` itself if it ends
    in ``.nii``, ``.nii.gz`` or ``.ome.tif``: a tiled OME-TIFF with the levels of the store, for viewers.
    ``include`` and ``exclude`` are patterns for subjects, ``images`` for images. ``progress`` is called with
    the bytes of voxels of each slab that was written. An existing file raises ``StoreExistsError`` unless
    ``overwrite`` is set.

    >>> import tempfile
    >>> import nibabel as nib
    >>> from zpatch.conversion.conversion import convert
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image = nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.eye(4))
    ...     image.to_filename(f"{folder}/ann.nii")
    ...     report = convert(folder, f"{folder}/cohort.zarr")
    ...     files = export(f"{folder}/cohort.zarr", f"{folder}/again", suffix=".nii")
    ...     files[0].read_bytes() == Path(f"{folder}/ann.nii").read_bytes()
    True
    """
    opened = open_store(store)
    planned = plan_export(
        opened, Path(destination), include=include, exclude=exclude, images=images, suffix=suffix
    )
    check_free(planned, overwrite=overwrite)
    for image in planned:
        export_image(opened, image.record, image.path, progress=progress)
    return [image.path for image in planned]


def plan_export(
    store: Store,
    destination: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    images: Sequence[str] = (),
    suffix: str = ".nii.gz",
) -> list[ExportedImage]:
    """Choose the images, and the file that each is written to; nothing is written yet."""
    if suffix not in SUFFIXES:
        raise OptionError(f"suffix must be one of {', '.join(SUFFIXES)}, not {suffix!r}", option="suffix")
    place = f"store {store.path}"
    subjects = set(chosen("subject", sorted({key[0] for key in store.records}), include, exclude, place))
    names = set(chosen("image", sorted({key[1] for key in store.records}), images, (), place))
    wanted = [
        record for (subject, image), record in store.records.items() if subject in subjects and image in names
    ]
    if not wanted:
        raise UnknownNameError(f"no image of {store.path} fits include=, exclude= and images=")
    if not destination.name.endswith(SUFFIXES):
        return [
            ExportedImage(record, destination / record.subject / f"{record.image}{suffix}")
            for record in wanted
        ]
    if len(wanted) > 1:
        raise OptionError(
            f"{destination} is one file, but {len(wanted)} images were chosen; "
            f"choose one with include= and images=, or name a folder",
            option="destination",
        )
    return [ExportedImage(wanted[0], destination)]


def check_free(planned: Sequence[ExportedImage], *, overwrite: bool) -> None:
    """Raise ``StoreExistsError`` for a file that exists, unless ``overwrite`` is set."""
    for image in planned:
        if image.path.exists() and not overwrite:
            raise StoreExistsError(f"{image.path}: it exists already; say overwrite=True to replace it")


def export_image(
    store: Store,
    record: ImageRecord,
    path: Path,
    *,
    progress: Progress = lambda voxel_bytes: None,
) -> None:
    """Write one image slab by slab; the file appears whole or not at all."""
    if path.name.endswith(TIFF_SUFFIXES):
        with writing_to(path):
            _export_tiff(store, record, path, progress)
        return
    folder = store.image_path(record)
    raw_header = read_small_array(folder, RAW_HEADER, record.files).tobytes()
    dtype = np.dtype(np.uint8) if record.colours > 1 else header_of(raw_header).get_data_dtype()
    with writing_to(path):
        write_nifti(
            path, single_file_header(raw_header), _in_file_order(store, record, progress), dtype=dtype
        )


def _export_tiff(store: Store, record: ImageRecord, path: Path, progress: Progress) -> None:
    """Write the values of an image and of its levels, without loss."""
    folder, scaling = store.image_path(record), Scaling(record.slope, record.inter)
    arrays = [sharded_array(folder, record, level) for level in range(len(record.levels) + 1)]
    unit = MICROMETRES.get(record.spatial_unit or "")
    x, y, z = spacing_mm(record.affine_array)
    image = TiffImage(
        levels=[(c, i, j, k) for c, k, j, i in (array.shape for array in arrays)],
        dtype=scaling.dtype_of(np.dtype(record.dtype).newbyteorder("=")),
        mpp=None if unit is None else (x * unit, y * unit),
        plane_step=z * unit if unit and record.spatial_shape[2] > 1 else 0.0,
    )

    bytes_each = image.dtype.itemsize
    if bytes_each > 4 if image.dtype.kind in "biu" else bytes_each < 4:  # of integers; of floats and complex
        raise OptionError(f"OME-TIFF has no voxels of {image.dtype}; export {record.image!r} as NIfTI")

    def read_rows(level: int, channel: int | None, plane: int, first: int, stop: int) -> NDArray[Any]:
        array = arrays[level]
        low, high = (0, array.shape[0]) if channel is None else (channel, channel + 1)
        voxels = read_region(array, (low, plane, first, 0), (high, plane + 1, stop, array.shape[3]))[:, 0]
        progress(0 if level else voxels.nbytes)
        values = scaling.apply(voxels)
        return np.moveaxis(values, 0, -1) if channel is None else values[0]

    write_ome_tiff(path, image, read_rows)


def _in_file_order(store: Store, record: ImageRecord, progress: Progress) -> Iterator[NDArray[Any]]:
    """Slabs of the stored voxels in NIfTI order: x fastest, channels slowest unless they are colours."""
    array = sharded_array(store.image_path(record), record)
    channels = array.shape[0]
    turn, together = record.orientation, record.colours
    axis = 1 + turn.slowest
    planes, plane_bytes = array.shape[axis], array.dtype.itemsize * together
    plane_bytes *= math.prod(array.shape[1:]) // planes
    depth = _slab_depth(array.chunks[axis], plane_bytes)
    for c, start in itertools.product(range(0, channels, together), range(0, planes, depth)):
        first, stop = [c, 0, 0, 0], [c + together, *array.shape[1:]]
        ends = start, min(start + depth, planes)
        first[axis], stop[axis] = (planes - ends[1], planes - ends[0]) if turn.flips[2] else ends
        voxels = turn.turn_back(read_region(array, first, stop))
        yield np.moveaxis(voxels, 0, -1) if together > 1 else voxels
        progress(voxels.nbytes)


def _slab_depth(chunk_depth: int, plane_bytes: int) -> int:
    return max(1, SHARD_BYTES // (plane_bytes * chunk_depth)) * chunk_depth
