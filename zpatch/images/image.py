"""Images: lazy views of voxels with a place in space. Nothing is read until a box is asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.digests import Json, compact_json, digest
from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine, spacing_mm
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.group_read import read_group
from zpatch.images.opened_image import OpenedImage, open_image
from zpatch.images.voxel_source import VoxelSource
from zpatch.images.voxel_sources import DERIVED_BLOCK_VOXELS
from zpatch.runtime.dask_graphs import Scheduler
from zpatch.store.image_record import ImageRecord, Kind

Voxels = NDArray[Any]
T = TypeVar("T")


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
        self._opened = data if isinstance(data, OpenedImage) else open_image(data, axes)
        self._affine = np.array(self._opened.affine if affine is None else affine, dtype=np.float64)
        if self._affine.shape != (4, 4):
            raise OptionError(f"affine must be 4 x 4, not of shape {self._affine.shape}")
        self._remembered: dict[Any, Any] = {}

    @property
    def record(self) -> ImageRecord | None:
        """What the store's manifest says of the image; None for an image that is in no store."""
        return self._opened.record

    @property
    def folder(self) -> Path | None:
        """The image's folder in its store; None for an image that is in no store."""
        return self._opened.path if self.record else None

    def identity(self) -> str:
        """A digest of what the values are, as far as that can be told without reading files.

        Seen are the manifest's checksums, of other files their sizes and times, of arrays in memory all
        voxels; of a Dask expression only where its image came from, if it was made by ``map``.
        """
        return digest(
            compact_json({**self._opened.identity(), "affine": self._affine.tobytes().hex()}).encode()
        )

    @property
    def opened(self) -> OpenedImage:
        """All that is known of where the voxels come from."""
        return self._opened

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
    def scaling(self) -> Scaling:
        """What turns unscaled voxels into values."""
        return self._opened.scaling

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of what ``read`` gives."""
        return self.scaling.dtype_of(self.source.dtype)

    @property
    def affine(self) -> Affine:
        """Voxel (I, J, K) to mm, 4 x 4."""
        return self._affine.copy()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along I, J, K in mm."""
        return spacing_mm(self._affine)

    @property
    def spatial_unit(self) -> str | None:
        """What the affine maps to: millimeter, if the source says nothing else."""
        return self._opened.unit

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
        """A lazy dask array of the values, (C, I, J, K), with one block for each shard's region."""
        return self._dask(None)

    def _dask(self, block_voxels: int | None) -> Any:
        array = self.source.dask(block_voxels)
        if self.scaling == UNSCALED:
            return array
        return array.map_blocks(self.scaling.apply, dtype=self.dtype)

    def map(self, fn: Callable[[Any], Any]) -> Self:
        """Lazy preprocessing: the image of ``fn`` of a dask array, computed only where a patch needs it.

        ``fn`` takes and gives a dask array (C, I, J, K), here in blocks of about 64 voxels a side, so that
        few voxels are computed that no patch wants; the spatial shape must stay as it is.
        """
        mapped = fn(self._dask(DERIVED_BLOCK_VOXELS))
        if tuple(mapped.shape[1:]) != self.spatial_shape:
            raise OptionError(
                f"the function given to map changed the spatial shape from {self.spatial_shape} to "
                f"{tuple(mapped.shape[1:])}; only values and channels may change"
            )
        return type(self)(self._opened.derived(mapped), affine=self._affine)

    def rescaled(self, slope: float, inter: float, low: float = -math.inf, high: float = math.inf) -> Self:
        """The image of ``slope * value + inter``, each value first kept between ``low`` and ``high``.

        As quick to read as the image itself. What comes is float32 (float64 for sources of 32 bits and more).
        """
        scaling = self.scaling.within(low, high).then(slope, inter)
        if scaling == UNSCALED:  # the values that are there, but in the type of scaled ones
            plain = type(self)(dataclasses.replace(self._opened, scaling=UNSCALED), affine=self._affine)
            return plain.map(lambda array: array.astype(Scaling(2.0).dtype_of(array.dtype)))
        return type(self)(dataclasses.replace(self._opened, scaling=scaling), affine=self._affine)

    def with_source(self, source: VoxelSource) -> Self:
        """The same image, its unscaled voxels read from elsewhere."""
        return type(self)(dataclasses.replace(self._opened, source=source), affine=self._affine)

    def remembered(self, key: Any, make: Callable[[], T]) -> T:
        """What was made of this image before under a key, or else is made now."""
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
    return IMAGE_CLASSES[record.kind](OpenedImage.of_record(folder, record))
