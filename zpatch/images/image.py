"""Images: lazy views of voxels with an affine. Nothing is read before a box is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.digests import Json, compact_json, digest
from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine, level_factors, resized_affine
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.images.open_image import open_image
from zpatch.images.opened_image import OpenedImage
from zpatch.images.placed_image import PlacedImage
from zpatch.images.slide_image import SlideOptions
from zpatch.records.image_record import ImageRecord
from zpatch.runtime.dask_graphs import Scheduler
from zpatch.slides.slide_levels import SlideLevel
from zpatch.sources.group_read import read_group
from zpatch.sources.voxel_source import VoxelSource
from zpatch.sources.voxel_sources import DERIVED_BLOCK_VOXELS

T = TypeVar("T")


class Image(PlacedImage):
    """Voxels (C, I, J, K) that are read box by box.

    ``data`` may be the path of an image in a store, of an OME-Zarr image or Zarr array, of an uncompressed
    NIfTI, NRRD or MetaImage file (memory-mapped), or of a slide or TIFF file (I = x, J = y); or a numpy, dask
    or Zarr array; or an array of another library that reads what is sliced, as a dataset of h5py, which is
    never loaded whole. Other arrays than those of Zarr are (I, J, K) or (C, I, J, K). Axes of Zarr arrays are
    named by the array's dimension names or by ``axes``, slowest first, as in ``"zyx"`` or ``"czyx"``.
    ``affine`` (4 x 4, voxel to mm) defaults to the affine of the source. ``time`` is the number of the time
    point and ``channels`` are those of the channels that are read, from 0. An image of several time points
    and no channels has them as C, unless ``time`` is given.

    Of a slide, the level is read that has ``mpp`` micrometres per pixel (one number, or two along x and y);
    where none is within 5 % of it, the next finer one is resampled (labels are picked). Or say its ``level``,
    0 for the finest, which is what is read without either. ``slide_mpp`` are the micrometres per pixel of the
    finest level where the file states none. Affine and spacing are in micrometres then.

    Reading a Zarr array that was moved, unmounted or replaced since it was opened is a DamageError, also
    through a dask array of ``from_zarr``. One whose tasks open files themselves (``inline_array=True``,
    ``delayed``) has what dask finds.

    >>> image = ScalarImage(np.arange(24).reshape(2, 3, 4))
    >>> image.shape
    (1, 2, 3, 4)
    >>> image.read(PatchLocation((0, 1, 2), (1, 1, 2))).tolist()
    [[[[6, 7]]]]
    """

    def __init__(
        self,
        data: Any,
        *,
        affine: Sequence[Sequence[float]] | Affine | None = None,
        axes: str | None = None,
        time: int | None = None,
        channels: Sequence[int] | None = None,
        mpp: float | Sequence[float] | None = None,
        level: int | None = None,
        slide_mpp: float | Sequence[float] | None = None,
    ) -> None:
        slide, of_labels = SlideOptions(mpp, level, slide_mpp), self.kind == "label"
        is_open = isinstance(data, OpenedImage)
        opened = data if is_open else open_image(data, axes, time, channels, slide, of_labels=of_labels)
        super().__init__(
            opened, affine=np.array(opened.affine if affine is None else affine, dtype=np.float64)
        )
        if self._affine.shape != (4, 4):
            raise OptionError(f"affine must be 4 x 4, not of shape {self._affine.shape}")
        self._remembered: dict[Any, Any] = {}

    @property
    def record(self) -> ImageRecord | None:
        """The image's line of the store's manifest; None for an image that is in no store."""
        return self._opened.record

    @property
    def folder(self) -> Path | None:
        """The image's folder in its store; None for an image that is in no store."""
        return self._opened.path if self.record else None

    def identity(self) -> str:
        """A digest that identifies the values, as far as possible without reading voxels from files.

        It covers the checksums in the manifest, or the sizes and modification times of other files, or all
        voxels of an array in memory; for an image made by ``map``, only the image that it was made from.
        """
        return digest(
            compact_json({**self._opened.identity(), "affine": self._affine.tobytes().hex()}).encode()
        )

    @property
    def opened(self) -> OpenedImage:
        """The origin of the voxels: source, scaling, record and path."""
        return self._opened

    @property
    def source(self) -> VoxelSource:
        """The source that unscaled voxels are read from."""
        return self._opened.source

    @property
    def scaling(self) -> Scaling:
        """Slope, intercept and bounds that turn unscaled voxels into values."""
        return self._opened.scaling

    @property
    def levels(self) -> list[SlideLevel]:
        """The levels of the slide that it is read from, finest first: (width, height, mpp); else none."""
        return [] if self._opened.slide is None else self._opened.slide.levels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values that ``read`` gives."""
        return self.scaling.dtype_of(self.source.dtype)

    @property
    def statistics(self) -> Json:
        """Statistics of the values, from the store; empty for an image that is in no store, or rescaled.

        A resampled image has those of the image that it was made of.
        """
        return self._opened.statistics

    def read(self, location: PatchLocation, scaled: bool = True) -> Voxels:
        """The values of a box, (C, I, J, K): only the chunks that cover it are read.

        They are float32 if a slope applies (float64 for stored types of 32 bits and more), otherwise of the
        stored type, as they always are with ``scaled=False``. Raises PatchLocationError for a box that
        reaches outside.
        """
        return self.read_group([location], scaled=scaled)[0]

    @overload
    def read_group(
        self,
        locations: Sequence[PatchLocation],
        out: None = None,
        *,
        scaled: bool = True,
        padding_mode: str | None = None,
        fill: float = 0,
        scheduler: Scheduler = "sync",
    ) -> list[Voxels]: ...
    @overload
    def read_group(
        self,
        locations: Sequence[PatchLocation],
        out: T,
        *,
        scaled: bool = True,
        padding_mode: str | None = None,
        fill: float = 0,
        scheduler: Scheduler = "sync",
    ) -> T: ...
    def read_group(
        self,
        locations: Sequence[PatchLocation],
        out: Any = None,
        *,
        scaled: bool = True,
        padding_mode: str | None = None,
        fill: float = 0,
        scheduler: Scheduler = "sync",
    ) -> Any:
        """Read boxes of any sizes as one group: each chunk that they touch is decoded once.

        Gives an array (C, I, J, K) for each location, or ``out`` where it is given: one array
        (N, C, I, J, K) or N arrays (C, I, J, K) to read into, of any strides. Options and errors are those of
        ``zpatch.read_group``, which reads several images.

        >>> image = ScalarImage(np.arange(1000, dtype=np.int16).reshape(10, 10, 10))
        >>> locations = [PatchLocation((0, 0, 0), (4, 4, 4)), PatchLocation((5, 6, 6), (4, 4, 4))]
        >>> batch = np.empty((2, 1, 4, 4, 4), np.float32)
        >>> image.read_group(locations, batch)[1, 0, 0, 0].tolist()
        [566.0, 567.0, 568.0, 569.0]
        """
        [found] = read_group(
            [self],
            locations,
            None if out is None else [out],
            scaled=scaled,
            padding_mode=padding_mode,
            fill=fill,
            scheduler=scheduler,
        )
        return found

    @property
    def dask(self) -> Any:
        """A lazy dask array of the values, (C, I, J, K), with one block for each shard."""
        return self._dask(None)

    def _dask(self, block_voxels: int | None) -> Any:
        array = self.source.dask(block_voxels)
        if self.scaling == UNSCALED:
            return array
        return array.map_blocks(self.scaling.apply, dtype=self.dtype)

    def map(self, fn: Callable[[Any], Any]) -> Self:
        """Lazy preprocessing: the image of ``fn(array)``, computed only for the boxes that are read.

        ``fn`` takes and gives a dask array (C, I, J, K). Its blocks have about 64 voxels a side, so that few
        voxels are computed outside the boxes. Raises OptionError if ``fn`` changes the spatial shape.
        """
        mapped = fn(self._dask(DERIVED_BLOCK_VOXELS))
        if tuple(mapped.shape[1:]) != self.spatial_shape:
            raise OptionError(
                f"the function given to map changed the spatial shape from {self.spatial_shape} to "
                f"{tuple(mapped.shape[1:])}; only values and channels may change"
            )
        return type(self)(self._opened.derived(mapped), affine=self._affine)

    def voxelwise(self, fn: Callable[..., Voxels], *others: Image) -> Self:
        """Lazy: the image of ``fn(voxels, ...)``, a function of each voxel by itself.

        ``fn`` gets the values of a box as an array (C, I, J, K), and those of ``others``, which have the same
        spatial shape; it gives an array of any channels and type, the same for any box. It is called for the
        boxes that are read, and once with one voxel of zeros. For such functions it is faster than ``map``.
        Raises OptionError for images of other shapes.

        >>> image = ScalarImage(np.arange(4).reshape(4, 1, 1))
        >>> image.voxelwise(lambda voxels: voxels > 1).data.ravel().tolist()
        [False, False, True, True]
        """
        for other in others:
            if other.spatial_shape != self.spatial_shape:
                raise OptionError(
                    f"the images have {self.spatial_shape} and {other.spatial_shape} voxels; bring them to "
                    f"one grid, as by on_grid_of"
                )
        return type(self)(self._opened.voxelwise(fn, [one.opened for one in others]), affine=self._affine)

    def rescaled(self, slope: float, inter: float, low: float = -math.inf, high: float = math.inf) -> Self:
        """The image of ``slope * value + inter``, each value first clipped to ``low`` and ``high``.

        It is read as fast as the image itself. Values are float32 (float64 for stored types of 32 bits and
        more).
        """
        scaling = self.scaling.within(low, high).then(slope, inter)
        if scaling == UNSCALED:  # the same values, in the type of scaled values
            plain = type(self)(dataclasses.replace(self._opened, scaling=UNSCALED), affine=self._affine)
            return plain.map(lambda array: array.astype(Scaling(2.0).dtype_of(array.dtype)))
        return type(self)(dataclasses.replace(self._opened, scaling=scaling), affine=self._affine)

    def select(self, *, time: int | None = None, channels: Sequence[int] | None = None) -> Self:
        """The image of one time point, or of some channels in this order; chunks of no others are read.

        Raises OptionError for numbers that are not there. Where C counts time points, ``channels`` are time
        points that are to be read as channels.

        >>> image = ScalarImage(np.arange(24).reshape(4, 1, 2, 3))
        >>> image.select(channels=[3, 0]).data[:, 0, 0].tolist()
        [[18, 19, 20], [0, 1, 2]]
        """
        return type(self)(self._opened.selected(time, channels), affine=self._affine)

    def level(self, number: int) -> Self:
        """A coarser level of the image, as `zpatch convert --pyramid` stores it; lazy.

        Voxels are 2**number times as wide along each axis that has more than one: the mean of the finer ones,
        or in a label map their most frequent label. Raises OptionError if it is not stored.
        """
        if number == 0:
            return self
        affine = resized_affine(self._affine, level_factors(self.spatial_shape, number), (1, 1, 1))
        return type(self)(dataclasses.replace(self._opened.level(number), affine=affine))

    def with_source(self, source: VoxelSource) -> Self:
        """The same image, its unscaled voxels read from another source."""
        return type(self)(dataclasses.replace(self._opened, source=source), affine=self._affine)

    def remembered(self, key: Any, make: Callable[[], T]) -> T:
        """The value of ``make()``, computed once for a key and kept with the image."""
        if key not in self._remembered:
            self._remembered[key] = make()
        found: T = self._remembered[key]
        return found

    @property
    def data(self) -> Voxels:
        """The whole image in memory, for small volumes and tests."""
        return self.read(PatchLocation((0, 0, 0), self.spatial_shape))

    def __repr__(self) -> str:
        name = f"{self.record.subject}/{self.record.image}, " if self.record else ""
        return f"{type(self).__name__}({name}shape {self.shape}, {self.dtype})"


class ScalarImage(Image):
    """An image of intensities: from a file, a Zarr array, or an array in memory; see ``Image``.

    >>> ct = ScalarImage(np.full((8, 8, 4), -1000, np.int16), affine=np.diag([1.0, 1.0, 2.5, 1.0]))
    >>> ct.shape, ct.spacing
    ((1, 8, 8, 4), (1.0, 1.0, 2.5))
    """


class LabelMap(Image):
    """An image whose values are classes; resampled, it takes the nearest voxel.

    >>> LabelMap(np.eye(4, dtype=np.uint8).reshape(4, 4, 1)).resampled(2.0).dtype
    dtype('uint8')
    """

    kind = "label"


class SamplingMap(Image):
    """An image whose values are the relative probability of each voxel to be the centre of a patch.

    Values are finite and at least 0, and need not sum to one; see ``WeightedSampler``.

    >>> SamplingMap(np.ones((4, 4, 4), np.float32)).kind
    'sampling'
    """

    kind = "sampling"


IMAGE_CLASSES: dict[str, type[Image]] = {cls.kind: cls for cls in (ScalarImage, LabelMap, SamplingMap)}


def stored_image(folder: Path, record: ImageRecord) -> Image:
    """The image of a record: a ScalarImage, LabelMap or SamplingMap. Reads no file."""
    return IMAGE_CLASSES[record.kind](OpenedImage.of_record(folder, record))
