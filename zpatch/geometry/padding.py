"""Boxes that reach over the border of their volume, filled by the rules of numpy.pad."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.boxes import Integers, PatchLocation, Triple, Voxels

PADDING_MODES = ("constant", "edge", "reflect", "symmetric", "wrap")


def check_padding_mode(mode: str | None) -> None:
    """Refuse an unknown padding mode."""
    if mode is not None and mode not in PADDING_MODES:
        raise OptionError(
            f"padding_mode must be one of {', '.join(PADDING_MODES)}, not {mode!r}", option="padding_mode"
        )


def check_fill(fill: float, dtype: np.dtype[Any], described_as: object) -> None:
    """Refuse a fill that voxels of a type cannot hold; ``described_as`` is the image in the error."""
    held: Any = None
    with contextlib.suppress(OverflowError, ValueError), np.errstate(all="ignore"):
        held = dtype.type(fill)
    is_whole = dtype.kind in "biu"
    if held is None or (held != fill if is_whole else np.isfinite(held) != np.isfinite(fill)):
        raise OptionError(
            f"{described_as} cannot be padded with fill={fill}, which is no value of {dtype}; choose another "
            f"fill, or convert the image to float with image.map(lambda array: array.astype('float32'))"
        )


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBox:
    """A box that reaches over the border, as a box inside the volume and the positions of its voxels.

    ``take[axis]`` gives, for each voxel of the box along that axis, its position in ``inner``; -1 for a voxel
    that is filled with a constant.
    """

    inner: PatchLocation
    take: tuple[Integers, Integers, Integers]

    @classmethod
    def of(cls, box: PatchLocation, spatial_shape: Triple, mode: str) -> PaddedBox:
        """Split a box by numpy.pad's rules for ``mode``."""
        firsts, stops, takes = [], [], []
        for start, stop, n in zip(box.index, box.index_fin, spatial_shape, strict=True):
            source = _padded_axis(start, stop, n, mode)
            used = source[source >= 0]
            low, high = (int(used.min()), int(used.max()) + 1) if used.size else (0, 1)
            firsts.append(low)
            stops.append(high)
            takes.append(np.where(source >= 0, source - low, -1))
        x, y, z = takes
        return cls(PatchLocation.between(firsts, stops), (x, y, z))

    def fill_in(self, inner: Voxels, fill: float, out: Voxels) -> None:
        """Write the voxels (C, I, J, K) of the box into ``out``, from the voxels of its inner box."""
        i, j, k = self.take
        out[...] = inner[:, :, :, k][:, :, j][:, i]
        for axis, positions in enumerate(self.take, start=1):
            if (positions < 0).any():
                np.moveaxis(out, axis, 0)[positions < 0] = fill


def _padded_axis(start: int, stop: int, length: int, mode: str) -> Integers:
    """The voxel of an axis at each position from ``start`` to ``stop``; -1 for the fill value."""
    before, after = max(-start, 0), max(stop - length, 0)
    axis = np.arange(length)
    if mode == "constant":
        padded = np.pad(axis, (before, after), constant_values=-1)
    else:
        padded = np.pad(axis, (before, after), mode=mode)  # type: ignore[call-overload]
    return np.asarray(padded[start + before : stop + before])
