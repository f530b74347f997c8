"""The origin of an image's voxels: a store, an OME-Zarr image, a Zarr array, a file, or an array."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.digests import Json, new_digest
from zpatch.errors import DamageError, OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple, Voxels
from zpatch.records.image_record import ImageRecord
from zpatch.resampling.interpolation import Interpolation
from zpatch.slides.slide_file import SlideFile
from zpatch.slides.slide_levels import Pair, SlideLevel
from zpatch.sources import zarr_images
from zpatch.sources.input_files import map_of, offset_in_file
from zpatch.sources.resampled_source import ResampledSource
from zpatch.sources.voxel_source import VoxelSource, WrappedSource
from zpatch.sources.voxel_sources import ArraySource, DaskSource, LazySource, ShardSource
from zpatch.sources.voxelwise_source import VoxelInput, VoxelwiseSource
from zpatch.sources.window_source import WindowSource
from zpatch.store import store


@dataclass(frozen=True, slots=True, eq=False)
class OpenedSlide:
    """The slide that an image is read from, and micrometres per pixel of its finest level, if known."""

    file: SlideFile
    mpp: Pair | None

    @property
    def levels(self) -> list[SlideLevel]:
        """All levels, finest first."""
        return self.file.described(self.mpp)


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """The voxels that an image is made of: how to read them, their affine, and their path.

    ``path`` is their file or folder, in a store or not; None for an array in memory. ``record`` is the
    image's line of the manifest; None for an image that is in no store. ``channel_axis`` says what C counts:
    c for channels, t for time points. ``part`` is the part of a larger image that was chosen, in words.
    ``base`` is the image whose voxels are resampled to make these; None for one that is not resampled.
    ``slide`` is the slide or TIFF file that they are read from, if they are.
    """

    source: VoxelSource
    affine: Affine
    scaling: Scaling = UNSCALED
    record: ImageRecord | None = None
    path: Path | None = None
    unit: str | None = "millimeter"
    channel_axis: str = "c"
    part: str = ""
    base: OpenedImage | None = None
    slide: OpenedSlide | None = None

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
        source = DaskSource.of(with_channels(array))
        is_as_before = self.record is None and source.shape[0] == self.source.shape[0]
        axis = self.channel_axis if is_as_before else "c"  # time points of a store are channels
        return dataclasses.replace(
            self, source=source, scaling=UNSCALED, record=None, channel_axis=axis, base=None
        )

    def level(self, number: int) -> Self:
        """The coarser level of that number of an image in a store; its voxels are 2**number times as wide.

        Raises OptionError if there is none.
        """
        if self.record is None or self.path is None:
            raise OptionError(
                "it has no coarser levels, as it is in no store, or was mapped or resampled since; use an "
                "image of a store made by 'zpatch convert --pyramid', with --spacing where that is wanted"
            )
        levels = self.record.levels
        if number > len(levels):
            raise OptionError(
                f"it has {len(levels)} coarser levels, and level {number} is wanted; make the store by "
                f"'zpatch convert --pyramid'" + ", where levels end once no side is over 64" * bool(levels)
            )
        source = ShardSource(store.sharded_array(self.path, self.record, number))
        return dataclasses.replace(self, source=source, record=None, part=f"level {number}")

    def resampled(self, spatial_shape: Triple, matrix: Affine, interpolation: Interpolation) -> Self:
        """These voxels on another grid; ``matrix`` is voxel of it to voxel of these, 4 x 4.

        Slope and intercept are applied before values are interpolated; where they are picked, the resampled
        voxels keep them.
        """
        keeps = interpolation.keeps_values
        scaling, left = (UNSCALED, self.scaling) if keeps else (self.scaling, UNSCALED)
        source = ResampledSource(self.source, spatial_shape, matrix, interpolation, scaling)
        source.dtype  # noqa: B018  # raises OptionError for voxels that cannot be interpolated
        axis = "c" if self.record is not None else self.channel_axis
        return dataclasses.replace(
            self, source=source, scaling=left, record=None, channel_axis=axis, base=self
        )

    def window(self, first: Triple, spatial_shape: Triple, padding_mode: str, fill: float) -> Self:
        """The box of these voxels from ``first`` on, padded beyond the border."""
        source = WindowSource(self.source, first, spatial_shape, padding_mode, fill, self.scaling)
        part = f"{self.part}, window at {first}".removeprefix(", ")
        return dataclasses.replace(self, source=source, scaling=UNSCALED, record=None, part=part, base=None)

    def voxelwise(self, fn: Callable[..., Voxels], others: Sequence[OpenedImage]) -> Self:
        """The values of ``fn`` of each voxel of these, and of others at the same place."""
        together: list[OpenedImage] = [self, *others]
        inputs = tuple(VoxelInput(opened.source, opened.scaling) for opened in together)
        probe = fn(*(np.zeros((one.source.shape[0], 1, 1, 1), one.dtype) for one in inputs))
        check_dtype(probe.dtype)
        source = VoxelwiseSource(inputs, fn, len(probe), probe.dtype)
        axis = self.channel_axis if self.record is None and len(probe) == self.source.shape[0] else "c"
        return dataclasses.replace(
            self, source=source, scaling=UNSCALED, record=None, channel_axis=axis, base=None
        )

    @property
    def is_rescaled(self) -> bool:
        """Whether values were given another scale since they were resampled."""
        before = self.source.scaling if isinstance(self.source, ResampledSource) else UNSCALED
        return self.base is not None and before.followed_by(self.scaling) != self.base.scaling

    @property
    def statistics(self) -> Json:
        """Statistics of the values, from the store; those of the base for an image that is resampled."""
        if self.base is not None:
            return {} if self.is_rescaled else self.base.statistics
        if self.record is None or self.scaling != Scaling(self.record.slope, self.record.inter):
            return {}
        return dict(self.record.stats)

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
            source=self.source.selected(numbers),
            record=None,
            channel_axis="c",
            base=None if self.base is None else self.base._picked(numbers, named),
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
        if self.base is not None and isinstance(self.source, ResampledSource):
            known |= {"base": self.base.identity(), "resampled": self.source.described()}
            return {**known, "scaling": repr(self.scaling)}
        if self.record is not None:
            known |= dataclasses.replace(self.record, provenance=None).to_json()
        if self.path is not None and not (self.record and self.record.files):
            known["files"] = _identity_of_files(self.path)
        else:
            known |= _identity_of_source(self.source)
        if self.part:
            known["part"] = self.part
        return {**known, "scaling": repr(self.scaling)}


def with_channels(array: Any) -> Any:
    """An array (I, J, K) or (C, I, J, K) as (C, I, J, K). Raises OptionError for any other."""
    if array.ndim not in (3, 4):
        raise OptionError(f"an image is (I, J, K) or (C, I, J, K), not of shape {tuple(array.shape)}")
    check_dtype(array.dtype)
    return array if array.ndim == 4 else array[None]


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Refuse voxels that are no numbers."""
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


def _identity_of_source(source: VoxelSource) -> Json:
    """A digest of the voxels of an array in memory or in a file, also where another source reads from it."""
    if isinstance(source, LazySource):
        lazy = source.array
        return {"files": lazy.file and f"{_identity_of_files(lazy.file)} at {lazy.place}"}
    if isinstance(source, ArraySource):
        return {"voxels": _identity_of_array(source.array)}
    if isinstance(source, VoxelwiseSource):
        return {"inputs": [_identity_of_source(one.source) for one in source.inputs]}
    return {"source": _identity_of_source(source.source)} if isinstance(source, WrappedSource) else {}


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
