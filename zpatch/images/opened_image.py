"""The origin of an image's voxels: a store, an OME-Zarr image, a Zarr array, a NIfTI file, or an array."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.digests import Json, new_digest, parsed_json
from zpatch.errors import DamageError, OptionError, SourceError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Voxels, reversed_axes
from zpatch.nifti import header
from zpatch.runtime.guarded_files import read_document
from zpatch.sources import zarr_images
from zpatch.sources.input_files import map_of, offset_in_file
from zpatch.sources.lazy_array import ZARR_ERRORS, is_lazy
from zpatch.sources.voxel_source import VoxelSource
from zpatch.sources.voxel_sources import ArraySource, DaskSource, LazySource, ShardSource, selected
from zpatch.store import store
from zpatch.store.image_record import ImageRecord

_TO_OME_ZARR = "make OME-Zarr of it with 'bioformats2raw FILE FOLDER', and name FOLDER/0"
_IN_PYTHON = "open it in Python and give the array to zpatch.ScalarImage, or save it as NIfTI or Zarr"
OTHER_FORMATS = (  # endings of files, what they are, and what to do
    ((".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vsi", ".czi", ".lif", ".nd2"), "a slide", _TO_OME_ZARR),
    ((".tif", ".tiff"), "a TIFF image", _TO_OME_ZARR),
    ((".h5", ".hdf5", ".he5", ".mat"), "an HDF5 file", _IN_PYTHON),
    ((".npy", ".npz"), "an array of numpy", _IN_PYTHON),
    ((".ozx", ".zip"), "a zipped Zarr", "unzip it, and name the folder"),
    ((".dcm", ".ima"), "a DICOM file", "make NIfTI of its folder with 'dcm2niix FOLDER', and convert that"),
)


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """The voxels that an image is made of: how to read them, their affine, and their path.

    ``path`` is their file or folder, in a store or not; None for an array in memory. ``record`` is the
    image's line of the manifest; None for an image that is in no store. ``channel_axis`` says what C counts:
    c for channels, t for time points. ``part`` is the part of a larger image that was chosen, in words.
    """

    source: VoxelSource
    affine: Affine
    scaling: Scaling = UNSCALED
    record: ImageRecord | None = None
    path: Path | None = None
    unit: str | None = "millimeter"
    channel_axis: str = "c"
    part: str = ""

    @classmethod
    def of_record(cls, folder: Path, record: ImageRecord) -> Self:
        """An image in a store. Reads no file."""
        folder = folder.absolute()
        source = ShardSource(store.sharded_array(folder, record))
        scaling = Scaling(record.slope, record.inter)
        axis = "t" if record.axes.startswith("t") else "c"
        return cls(source, record.affine_array, scaling, record, folder, record.spatial_unit, axis)

    def derived(self, array: Any) -> Self:
        """The image of a dask array (C, I, J, K) of values that was computed from these voxels."""
        source = DaskSource.of(_with_channels(array))
        is_as_before = self.record is None and source.shape[0] == self.source.shape[0]
        axis = self.channel_axis if is_as_before else "c"  # time points of a store are channels
        return dataclasses.replace(self, source=source, scaling=UNSCALED, record=None, channel_axis=axis)

    def selected(self, time: int | None = None, channels: Sequence[int] | None = None) -> Self:
        """One time point, or some channels; of an image of time points, ``channels`` are some of these."""
        count, is_time = self.source.shape[0], self.channel_axis == "t"
        if time is not None and not is_time:
            zarr_images.check_chosen("time", [time], 1, "time points")
            return self if channels is None else self.selected(None, channels)
        if time is not None:
            zarr_images.check_chosen("time", [time], count, "time points")
            point = self._picked([time], f"time point {time} of {count}") if count > 1 else self
            return point if channels is None else point.selected(None, channels)
        if channels is None:
            return self
        if not channels:
            raise OptionError("channels= names none; leave it out to read all", option="channels")
        what = "time points" if is_time else "channels"
        zarr_images.check_chosen("channels", channels, count, what)
        named = f"{what if len(channels) > 1 else what[:-1]} {', '.join(map(str, channels))} of {count}"
        return self._picked(channels, named + " as channels" * (is_time and len(channels) > 1))

    def _picked(self, numbers: Sequence[int], named: str) -> Self:
        return dataclasses.replace(
            self,
            source=selected(self.source, numbers),
            record=None,
            channel_axis="c",
            part=f"{self.part}, {named}".removeprefix(", "),
        )

    @property
    def in_words(self) -> str:
        """The part that was chosen, or what C counts if that is not channels; else nothing."""
        count = self.source.shape[0]
        return f"{count} time points as channels" if self.channel_axis == "t" and count > 1 else self.part

    @property
    def places(self) -> set[Path]:
        """The files and folders that voxels are read from, as far as they are known."""
        if self.path is not None:
            return {self.path}
        return {mark.path for mark in self.source.marks()}

    @property
    def is_in_files(self) -> bool:
        """Whether the voxels are read from files, as far as that is known."""
        return self.path is not None or bool(self.source.marks())

    def identity(self) -> Json:
        """What identifies the values, as far as it is known without reading voxels from files."""
        known: Json = {"shape": self.source.shape, "dtype": self.source.dtype.str}
        if self.record is not None:
            known |= dataclasses.replace(self.record, provenance=None).to_json()
        if self.path is not None and not (self.record and self.record.files):
            known["files"] = _identity_of_files(self.path)
        elif isinstance(self.source, LazySource):
            lazy = self.source.array
            known["files"] = lazy.file and f"{_identity_of_files(lazy.file)} at {lazy.place}"
        elif isinstance(self.source, ArraySource):
            known["voxels"] = _identity_of_array(self.source.array)
        if self.part:
            known["part"] = self.part
        return {**known, "scaling": repr(self.scaling)}


def open_image(
    data: Any, axes: str | None = None, time: int | None = None, channels: Sequence[int] | None = None
) -> OpenedImage:
    """Open any ``data`` that ``Image`` takes."""
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
        return OpenedImage(DaskSource.of(_with_channels(data)), np.eye(4))
    if is_lazy(data):
        return OpenedImage(_lazy_source(data), np.eye(4))
    return OpenedImage(ArraySource.of(_with_channels(np.asarray(data))), np.eye(4))


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
    _check_dtype(source.dtype)
    return source


def _open_path(path: Path) -> OpenedImage | zarr_images.ZarrImage:
    name = path.name.lower()
    if name.endswith(".nii.gz"):
        raise SourceError(
            f"{path}: patches cannot be read from compressed NIfTI; convert it first with "
            f"'zpatch convert {path.parent} STORE'"
        )
    if name.endswith(".nii"):
        return _of_nifti(header.read_header(path))
    refuse_other_format(path)
    if path.is_file():
        raise SourceError(
            f"{path}: images are read from .nii files and from folders of Zarr arrays; save it as NIfTI"
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


def _of_nifti(file: header.NiftiFile) -> OpenedImage:
    if file.compressed or file.colours > 1:
        raise SourceError(f"{file.path}: only plain, uncompressed voxels can be mapped; convert it first")
    mapped = np.memmap(
        file.voxel_path,
        mode="r",
        dtype=file.dtype,
        offset=file.voxel_offset,
        shape=(1, *file.shape)[-4:],
    )
    return OpenedImage(
        ArraySource.of(reversed_axes(mapped)),
        file.affine,
        Scaling(file.slope, file.inter),
        path=file.voxel_path,
        unit=file.spatial_unit,
        channel_axis="t" if file.axes.startswith("t") else "c",
    )


def _of_zarr(image: zarr_images.ZarrImage, axes: str | None, time: int | None) -> OpenedImage:
    _check_dtype(image.array.dtype)
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


def _with_channels(array: Any) -> Any:
    if array.ndim not in (3, 4):
        raise OptionError(f"an image is (I, J, K) or (C, I, J, K), not of shape {tuple(array.shape)}")
    _check_dtype(array.dtype)
    return array if array.ndim == 4 else array[None]


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biufc":
        raise OptionError(f"an image is of numbers, not of {dtype}")


def _identity_of_files(path: Path) -> str:
    """A digest of names, sizes and modification times of a file, or of all files below a folder."""
    state = new_digest()
    for file in sorted(_files_below(path)):
        try:
            status = os.stat(file)
        except OSError as error:
            raise DamageError(
                f"{file}: it is not there ({error.strerror}): the input was moved, unmounted or changed; put "
                f"it back as it was, and run the same command again"
            ) from None
        state.update(f"{os.path.relpath(file, path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return state.hexdigest()


def _files_below(path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield str(path)
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in names)


def _identity_of_array(array: Voxels) -> str:
    """A digest of an array's voxels; of the file and the offset in it, if the array is mapped from a file."""
    if (mapped := map_of(array)) is not None:
        at = offset_in_file(array, mapped)
        return f"{_identity_of_files(Path(mapped.filename))} at {at}, strides {array.strides}"
    state = new_digest()
    strides = [abs(step) if n > 1 else 0 for step, n in zip(array.strides, array.shape, strict=True)]
    slowest_first = np.argsort(strides, kind="stable")[::-1]
    ordered = array.transpose(slowest_first)
    for place in np.ndindex(ordered.shape[:2]):  # plane by plane, because tobytes copies
        state.update(ordered[place].tobytes())
    return f"{state.hexdigest()}, axes {slowest_first.tolist()}"
