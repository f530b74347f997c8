"""Images: lazy views of voxels with a place in space. Nothing is read until a box is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from zpatch import nifti, store
from zpatch.errors import OptionError, PatchLocationError, SourceError
from zpatch.geometry import Affine, PatchLocation, Triple, spacing_mm
from zpatch.reader import (
    ArraySource,
    DaskSource,
    PaddedBox,
    ShardSource,
    VoxelSource,
    apply_scaling,
    check_padding_mode,
    scaled_dtype,
)
from zpatch.scheduling import Scheduler
from zpatch.schema import ImageRecord, Json, Kind

Voxels = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """What an image needs to know of where its voxels come from."""

    source: VoxelSource
    affine: Affine
    slope: float = 1.0
    inter: float = 0.0
    record: ImageRecord | None = None
    folder: Path | None = None


class Image:
    """Voxels (C, I, J, K) that are read where they are needed.

    ``data`` may be the path of an image in a store, of any OME-Zarr image or Zarr array, or of an
    uncompressed NIfTI file (memory-mapped); or a numpy, dask or Zarr array. Arrays given by hand are
    (I, J, K) or (C, I, J, K); Zarr arrays go by their dimension names or ``axes``, slowest first, as in
    ``"zyx"`` or ``"czyx"``. ``affine`` (4 x 4, voxel to mm) defaults to what the source says.

    >>> image = ScalarImage(np.arange(24).reshape(2, 3, 4))
    >>> image.shape
    (1, 2, 3, 4)
    >>> image.read(PatchLocation((0, 1, 2), (1, 1, 2))).tolist()
    [[[[6, 7]]]]
    """

    kind: ClassVar[Kind] = "scalar"

    def __init__(
        self,
        data: Any,
        *,
        affine: Sequence[Sequence[float]] | Affine | None = None,
        axes: str | None = None,
    ) -> None:
        self._opened = data if isinstance(data, _Opened) else _open(data, axes)
        self._affine = np.array(self._opened.affine if affine is None else affine, dtype=np.float64)
        if self._affine.shape != (4, 4):
            raise OptionError(f"affine must be 4 x 4, not of shape {self._affine.shape}")

    @property
    def record(self) -> ImageRecord | None:
        """What the store's manifest says of the image; None for an image that is in no store."""
        return self._opened.record

    @property
    def folder(self) -> Path | None:
        """The image's folder in its store; None for an image that is in no store."""
        return self._opened.folder

    @property
    def source(self) -> VoxelSource:
        """Where unscaled voxels are read from."""
        return self._opened.source

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K)."""
        return self.source.shape

    @property
    def spatial_shape(self) -> Triple:
        """Extent along I, J, K in voxels."""
        _, i, j, k = self.shape
        return i, j, k

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return self.shape[0]

    @property
    def is_scaled(self) -> bool:
        """Whether a slope or an intercept turns stored voxels into values."""
        return (self._opened.slope, self._opened.inter) != (1.0, 0.0)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of what ``read`` gives."""
        return scaled_dtype(self.source.dtype) if self.is_scaled else self.source.dtype

    @property
    def affine(self) -> Affine:
        """Voxel (I, J, K) to mm, 4 x 4."""
        return self._affine.copy()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along I, J, K in mm."""
        return spacing_mm(self._affine)

    @property
    def statistics(self) -> Json:
        """Statistics of the values, as the store has them; empty for an image that is in no store."""
        return dict(self.record.stats) if self.record else {}

    def read(self, location: PatchLocation, scaled: bool = True) -> Voxels:
        """The voxels of a box (C, I, J, K): only the chunks that cover it are read.

        Float32 where a slope applies (float64 for sources of 32 bits and more), else the stored type; with
        ``scaled=False`` always that. A box that reaches outside is a PatchLocationError.
        """
        return self.read_group([location], scaled=scaled)[0]

    def read_group(
        self,
        locations: Sequence[PatchLocation],
        *,
        scaled: bool = True,
        padding_mode: str | None = None,
        fill: float = 0,
        scheduler: Scheduler = "sync",
    ) -> list[Voxels]:
        """Some boxes of any sizes, read together: chunks that they share are decoded once.

        Boxes may reach over the border where a ``padding_mode`` (as numpy.pad's) says what stands there.
        """
        check_padding_mode(padding_mode)
        inside = [location.lies_within(self.spatial_shape) for location in locations]
        if padding_mode is None and not all(inside):
            self._refuse_outside(locations[inside.index(False)])
        padded = [
            None if is_inside else PaddedBox.of(location, self.spatial_shape, padding_mode or "edge")
            for location, is_inside in zip(locations, inside, strict=True)
        ]
        boxes = [box.inner if box else location for location, box in zip(locations, padded, strict=True)]
        raw = self.source.read(boxes, scheduler)
        values = [self._scaled(voxels) if scaled else voxels for voxels in raw]
        return [
            box.fill_in(voxels, fill) if box else voxels for voxels, box in zip(values, padded, strict=True)
        ]

    def _scaled(self, voxels: Voxels) -> Voxels:
        if not self.is_scaled:
            return voxels
        return apply_scaling(voxels, self._opened.slope, self._opened.inter, self.dtype)

    def _refuse_outside(self, location: PatchLocation) -> None:
        raise PatchLocationError(
            f"the box from {location.index_ini} to {location.index_fin} is not inside {self!r}; "
            f"keep it in 0 .. {self.spatial_shape}, or use a GridSampler with a padding_mode"
        )

    @property
    def dask(self) -> Any:
        """A lazy dask array of the values, (C, I, J, K), with one block for each shard's region."""
        array = self.source.dask()
        if not self.is_scaled:
            return array
        slope, inter, dtype = self._opened.slope, self._opened.inter, self.dtype
        return array.map_blocks(apply_scaling, slope, inter, dtype, dtype=dtype)

    def map(self, fn: Callable[[Any], Any]) -> Self:
        """Lazy preprocessing: the image of ``fn(image.dask)``, computed only where a patch needs it.

        ``fn`` takes and gives a dask array (C, I, J, K); the spatial shape must stay as it is.
        """
        mapped = fn(self.dask)
        if tuple(mapped.shape[1:]) != self.spatial_shape:
            raise OptionError(
                f"the function given to map changed the spatial shape from {self.spatial_shape} to "
                f"{tuple(mapped.shape[1:])}; only values and channels may change"
            )
        return type(self)(mapped, affine=self._affine)

    @property
    def data(self) -> Voxels:
        """The whole image in memory, for small volumes and tests."""
        return self.read(PatchLocation((0, 0, 0), self.spatial_shape))

    def __repr__(self) -> str:
        name = f"{self.record.subject}/{self.record.image}, " if self.record else ""
        return f"{type(self).__name__}({name}shape {self.shape}, {self.dtype})"


class ScalarImage(Image):
    """An image of intensities."""


class LabelMap(Image):
    """An image whose values are classes."""

    kind = "label"


class SamplingMap(Image):
    """An image whose values say how often a voxel is to be the centre of a patch."""

    kind = "sampling"


IMAGE_CLASSES: dict[str, type[Image]] = {cls.kind: cls for cls in (ScalarImage, LabelMap, SamplingMap)}


def stored_image(folder: Path, record: ImageRecord) -> Image:
    """The image of a record: a ScalarImage, LabelMap or SamplingMap. Touches no file."""
    return IMAGE_CLASSES[record.kind](_of_record(folder, record))


def _of_record(folder: Path, record: ImageRecord) -> _Opened:
    folder = folder.absolute()
    source = ShardSource(store.sharded_array(folder, record))
    return _Opened(source, record.affine_array, record.slope, record.inter, record, folder)


def _open(data: Any, axes: str | None) -> _Opened:
    if isinstance(data, str | os.PathLike):
        return _open_path(Path(data), axes)
    if type(data).__module__.startswith("zarr."):
        return _of_zarr(store.describe_zarr_array(data), axes)
    if type(data).__module__.startswith("dask."):
        return _Opened(DaskSource(_with_channels(data)), np.eye(4))
    return _Opened(ArraySource(_with_channels(np.asarray(data))), np.eye(4))


def _open_path(path: Path, axes: str | None) -> _Opened:
    if path.name.endswith(".nii.gz"):
        raise SourceError(
            f"{path}: patches cannot be read from compressed NIfTI; convert it first with "
            f"'zpatch convert {path.parent} STORE'"
        )
    if path.name.endswith(".nii"):
        return _of_nifti(nifti.read_header(path))
    found = store.open_image_folder(path)
    return _of_record(path, found) if isinstance(found, ImageRecord) else _of_zarr(found, axes)


def _of_nifti(file: nifti.NiftiFile) -> _Opened:
    if file.compressed or file.colours > 1:
        raise SourceError(f"{file.path}: only plain, uncompressed voxels can be mapped; convert it first")
    mapped = np.memmap(
        file.voxel_path,
        mode="r",
        dtype=file.dtype,
        offset=file.voxel_offset,
        shape=(1, *file.shape)[-4:],
    )
    return _Opened(ArraySource(mapped.transpose(0, 3, 2, 1)), file.affine, file.slope, file.inter)


def _of_zarr(voxels: store.ZarrVoxels, axes: str | None) -> _Opened:
    import dask.array as da

    names = axes or voxels.axes
    if sorted(names) not in (sorted("zyx"), sorted("czyx"), sorted("tzyx")) or (
        len(names) != voxels.array.ndim
    ):
        raise OptionError(
            f"the axes of a Zarr array of shape {voxels.array.shape} are {names or 'not named'!r}; "
            f"say axes= with one letter for each, of c (or t), z, y and x, as in axes='zyx'"
        )
    order = [names.index(name) for name in "xyz"]
    array = da.from_zarr(voxels.array)
    leading = [n for n in range(len(names)) if n not in order]
    affine = np.eye(4)
    if voxels.scale:
        affine[range(3), range(3)] = [voxels.scale[n] for n in order]
    if voxels.translation:
        affine[:3, 3] = [voxels.translation[n] for n in order]
    return _Opened(DaskSource(_with_channels(array.transpose(leading + order))), affine)


def _with_channels(array: Any) -> Any:
    if array.ndim not in (3, 4):
        raise OptionError(f"an image is (I, J, K) or (C, I, J, K), not of shape {tuple(array.shape)}")
    if array.dtype.kind not in "biufc":
        raise OptionError(f"an image is of numbers, not of {array.dtype}")
    return array if array.ndim == 4 else array[None]
