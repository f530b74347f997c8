"""Whatever ``Image`` takes -> an opened image: paths of stores, OME-Zarr, Zarr and files, and arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.scaling import Scaling
from zpatch.digests import parsed_json
from zpatch.errors import OptionError, SourceError
from zpatch.geometry.boxes import reversed_axes
from zpatch.images.opened_image import OpenedImage, check_dtype, with_channels
from zpatch.images.slide_image import SlideOptions, opened_slide
from zpatch.records.image_record import ImageRecord
from zpatch.runtime.guarded_files import read_document
from zpatch.slides.slide_file import is_slide_file
from zpatch.sources import zarr_images
from zpatch.sources.lazy_array import ZARR_ERRORS, is_lazy
from zpatch.sources.voxel_source import VoxelSource
from zpatch.sources.voxel_sources import ArraySource, DaskSource, LazySource, ShardSource
from zpatch.volume_files import formats
from zpatch.volume_files.volume_file import VolumeFile

_TO_OME_ZARR = "make OME-Zarr of it with 'bioformats2raw FILE FOLDER', and name FOLDER/0"
_IN_PYTHON = "open it in Python and give the array to zpatch.ScalarImage, or save it as NIfTI or Zarr"
ANY_SLIDE = SlideOptions()
OTHER_FORMATS = (  # endings of files, what they are, and what to do
    ((".vsi", ".lif", ".nd2"), "a slide in a format of its maker", _TO_OME_ZARR),
    ((".h5", ".hdf5", ".he5", ".mat"), "an HDF5 file", _IN_PYTHON),
    ((".npy", ".npz"), "an array of numpy", _IN_PYTHON),
    ((".ozx", ".zip"), "a zipped Zarr", "unzip it, and name the folder"),
    ((".ima",), "a DICOM file", "make NIfTI of its folder with 'dcm2niix FOLDER', and convert that"),
)


def open_image(
    data: Any,
    axes: str | None = None,
    time: int | None = None,
    channels: Sequence[int] | None = None,
    slide: SlideOptions = ANY_SLIDE,
    *,
    of_labels: bool = False,
) -> OpenedImage:
    """Open any ``data`` that ``Image`` takes."""
    if isinstance(data, str | os.PathLike) and is_slide_file(Path(data)):
        opened = opened_slide(Path(data), axes, time, slide, of_labels=of_labels)
        return opened.selected(time if opened.channel_axis == "t" else None, channels)
    slide.refuse_any(data if isinstance(data, str | os.PathLike) else type(data).__name__)
    if isinstance(data, str | os.PathLike):
        found = _open_path(Path(data))
    elif type(data).__module__.startswith("zarr."):
        found = zarr_images.zarr_image(data)
    else:
        found = _of_array(data)
    if isinstance(found, OpenedImage):
        return found.selected(time, channels)
    return _of_zarr(found, axes, time).selected(None, channels)


def _of_array(data: Any) -> OpenedImage:
    if type(data).__module__.startswith("dask."):
        return OpenedImage(DaskSource.of(with_channels(data)), np.eye(4))
    if is_lazy(data):
        return OpenedImage(_lazy_source(data), np.eye(4))
    return OpenedImage(ArraySource.of(with_channels(np.asarray(data))), np.eye(4))


def _lazy_source(data: Any) -> LazySource:
    name = f"{type(data).__module__}.{type(data).__qualname__}"
    if len(data.shape) not in (3, 4):
        raise OptionError(f"an image is (I, J, K) or (C, I, J, K), not {name} of shape {tuple(data.shape)}")
    try:
        source = LazySource.of(data)
    except TypeError as error:
        raise OptionError(
            f"the dtype of {name} is none of numpy's ({error}); give an array of numpy"
        ) from None
    check_dtype(source.dtype)
    return source


def _open_path(path: Path) -> OpenedImage | zarr_images.ZarrImage:
    name = path.name.lower()
    if name.endswith(".nii.gz"):
        raise SourceError(
            f"{path}: patches cannot be read from compressed NIfTI; convert it first with "
            f"'zpatch convert {path.parent} STORE'"
        )
    if name.endswith(formats.MAPPED_SUFFIXES):
        return _of_volume_file(formats.read_header(path))
    refuse_other_format(path)
    if path.is_file():
        raise SourceError(
            f"{path}: images are read from {', '.join(formats.MAPPED_SUFFIXES)} files and from "
            f"folders of Zarr arrays; save it as NIfTI"
        )
    found = zarr_images.open_image_folder(path)
    return OpenedImage.of_record(path, found) if isinstance(found, ImageRecord) else found


def refuse_other_format(path: Path) -> None:
    """Refuse what is known to be no Zarr, NIfTI or store, and say how to make one of it."""
    name = path.name.lower()
    for suffixes, what, todo in OTHER_FORMATS:
        if name.endswith(suffixes) and path.is_file():
            raise SourceError(f"{path}: it is {what}; {todo}")
    if name.endswith(".n5") or (path / "attributes.json").is_file():
        raise SourceError(f"{path}: it is N5; copy it into a Zarr array, and name its folder")
    if numbers := _images_of_series(path):
        named = ", ".join(str(path / number) for number in numbers[:4])
        more = f" ... ({len(numbers)} in all)" if len(numbers) > 4 else ""
        raise SourceError(f"{path}: it holds a series of images (bioformats2raw); name one: {named}{more}")


def _images_of_series(path: Path) -> list[str]:
    """The names of the images in a folder that bioformats2raw wrote; none for any other folder."""
    for document in ("zarr.json", ".zattrs"):
        with contextlib.suppress(*ZARR_ERRORS):
            attributes = parsed_json(read_document(path / document, follow=True))
            attributes = attributes.get("attributes", attributes)
            if "bioformats2raw.layout" in attributes.get("ome", attributes):
                numbers = [entry.name for entry in path.iterdir() if entry.name.isdecimal()]
                return sorted(numbers, key=int)
    return []


def _of_volume_file(file: VolumeFile) -> OpenedImage:
    return OpenedImage(
        ArraySource.of(reversed_axes(file.mapped())),
        file.affine,
        Scaling(file.slope, file.inter),
        path=file.parts[0].path,
        unit=file.spatial_unit,
        channel_axis="t" if file.axes.startswith("t") else "c",
    )


def _of_zarr(image: zarr_images.ZarrImage, axes: str | None, time: int | None) -> OpenedImage:
    check_dtype(image.array.dtype)
    axes = axes or image.axes
    stored = zarr_images.StoredAxes.of(image.array, axes, time)
    affine = np.eye(4)
    for row, name in enumerate("xyz"):
        number = stored.kept[stored.names.index(name)]
        if number is not None and image.scale:
            affine[row, row] = image.scale[number]
        if number is not None and image.translation:
            affine[row, 3] = image.translation[number]
    array = zarr_images.sharded_array_of(image.array, stored)
    source: VoxelSource
    if array is not None:
        source = ShardSource(array, stored.names)
    else:
        source = DaskSource.of(zarr_images.dask_array_of(image.array, stored))
    unit = image.unit if image.scale else "millimeter"
    folder = zarr_images.folder_of(image.array)
    opened = OpenedImage(source, affine, path=folder, unit=unit, channel_axis=stored.channel)
    if time is None or (points := image.array.shape[axes.index("t")] if "t" in axes else 1) == 1:
        return opened
    if stored.channel == "t":
        return opened.selected(time)
    return dataclasses.replace(opened, part=f"time point {time} of {points}")
