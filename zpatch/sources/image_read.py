"""How the boxes of one image are read: into which memory, in which type, and padded beyond the border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.errors import OptionError, PatchLocationError
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.geometry.padding import PaddedBox, check_fill
from zpatch.sources.voxel_source import VoxelSource, new_voxels


class ReadableImage(Protocol):
    """The part of an image that is needed to read it; its ``repr`` names it in errors."""

    @property
    def source(self) -> VoxelSource:
        """The source of its unscaled voxels."""

    @property
    def scaling(self) -> Scaling:
        """Slope, intercept and bounds that turn unscaled voxels into values."""


class Target(NamedTuple):
    """A box inside an image, the memory that it is read into, and the padding that follows, if any."""

    box: PatchLocation
    out: Voxels
    pad: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImageRead:
    """The boxes of one image of a group, and how they are read.

    With ``is_scaled`` they are values, not stored voxels. ``fill`` is the value outside the image if the
    padding is constant.
    """

    image: ReadableImage
    boxes: Sequence[PatchLocation]
    is_scaled: bool = True
    padding_mode: str | None = None
    fill: float = 0

    @property
    def scaling(self) -> Scaling:
        """Slope, intercept and bounds that are applied to stored voxels."""
        return self.image.scaling if self.is_scaled else UNSCALED

    def check_inside(self) -> None:
        """Refuse boxes that reach outside the image, unless they are padded."""
        spatial_shape = self.image.source.shape[1:]
        for location in self.boxes if self.padding_mode is None else ():
            if not location.lies_within(spatial_shape):
                raise PatchLocationError(
                    f"the box from {location.index_ini} to {location.index_fin} is not inside "
                    f"{self.image!r}; keep it in 0 .. {spatial_shape}, or use a GridSampler with a "
                    f"padding_mode"
                )

    def new_memory(self, *, contiguous: bool = False) -> list[Voxels]:
        """New memory for each box, (C, I, J, K), of the type of the image's values; see ``new_voxels``."""
        dtype, channels = self._dtype, self.image.source.shape[0]
        return [
            new_voxels((channels, *location.size), dtype, contiguous=contiguous) for location in self.boxes
        ]

    def checked_memory(self, given: Any) -> list[Voxels]:
        """The caller's memory for each box, as arrays (C, I, J, K) of a fitting shape and type."""
        outs = list(map(_as_array, given))
        if len(outs) != len(self.boxes):
            raise OptionError(f"there is memory for {len(outs)} boxes, but {len(self.boxes)} are read")
        channels = self.image.source.shape[0]
        for location, out in zip(self.boxes, outs, strict=True):
            if out.shape != (shape := (channels, *location.size)):
                raise OptionError(f"the memory for a box of {shape} voxels has the shape {out.shape}")
            if not out.flags.writeable:
                raise OptionError("the memory for a box is read-only; give an array that can be written to")
        for dtype in {out.dtype for out in outs}:
            if not can_hold(dtype, self._dtype):
                raise OptionError(
                    f"memory of {dtype} cannot hold all values of {self.image!r}; give memory of "
                    f"{self._dtype} or of floats, or convert the image with "
                    f"image.map(lambda array: array.astype({dtype.name!r}))"
                )
        return outs

    def target(self, location: PatchLocation, out: Voxels) -> Target:
        """The box inside that is read for a box; without a ``padding_mode``, that box itself."""
        if self.padding_mode is None:
            return Target(location, out)
        channels, i, j, k = self.image.source.shape
        if location.lies_within((i, j, k)):
            return Target(location, out)
        if self.padding_mode == "constant":
            check_fill(self.fill, out.dtype, self.image)
        padded = PaddedBox.of(location, (i, j, k), self.padding_mode)
        shape = channels, *padded.inner.size
        inner = new_voxels(shape, out.dtype, contiguous=out.flags.c_contiguous)
        return Target(padded.inner, inner, partial(padded.fill_in, inner, self.fill, out))

    @property
    def _dtype(self) -> np.dtype[Any]:
        return self.scaling.dtype_of(self.image.source.dtype)


def can_hold(memory: np.dtype[Any], values: np.dtype[Any]) -> bool:
    """Whether memory of one type can take values of another: exactly, or rounded to floats.

    int64 also takes uint64, up to 2**63 - 1: it is the widest integer type that torch computes with.

    >>> can_hold(np.dtype("float16"), np.dtype("int32")), can_hold(np.dtype("int16"), np.dtype("uint16"))
    (True, False)
    """
    if memory.kind in "fc":
        return memory.kind == "c" or values.kind != "c"
    if memory == np.dtype(np.int64) and values == np.dtype(np.uint64):
        return True
    return memory.kind in "biu" and np.can_cast(values, memory, "safe")


def _as_array(memory: Any) -> Voxels:
    """An array that shares the caller's memory."""
    if isinstance(memory, np.ndarray):
        return memory
    if type(memory).__module__.split(".")[0] == "torch":
        try:
            return memory.numpy()  # type: ignore[no-any-return]
        except (TypeError, RuntimeError) as error:
            raise OptionError(f"voxels cannot be read into this tensor: {error}") from None
    raise OptionError(
        f"the memory for a box must be a numpy array or a tensor of torch, not {type(memory).__name__}"
    )
