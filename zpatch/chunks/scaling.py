"""Stored voxels -> values: slope, intercept and bounds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import numpy as np

from zpatch.errors import DamageError
from zpatch.geometry.boxes import Voxels

try:
    from zpatch.chunks import _gather as _compiled
except ImportError:  # installed without a compiler
    _compiled = None  # type: ignore[assignment]


MAX_AXES = 4  # of compiled copies
COMPILED_TYPES = ("u1", "i1", "u2", "i2")  # scaled to float32 by compiled loops


class Scaling(NamedTuple):
    """Values are ``slope * voxel + inter``, clipped to ``low`` and ``high``."""

    slope: float = 1.0
    inter: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_bounded(self) -> bool:
        """Whether any value may be clipped."""
        return self.low > -math.inf or self.high < math.inf

    def then(self, slope: float, inter: float) -> Self:
        """The same scaling, followed by another slope and intercept."""
        slope, inter = float(slope), float(inter)  # a numpy scalar would widen float32
        low, high = sorted((self.low * slope + inter, self.high * slope + inter)) if slope else (inter, inter)
        return type(self)(self.slope * slope, self.inter * slope + inter, low, high)

    def within(self, low: float, high: float) -> Self:
        """The same scaling, followed by clipping to two bounds."""
        low, high = float(low), float(high)
        return self._replace(low=min(max(self.low, low), high), high=max(min(self.high, high), low))

    def followed_by(self, other: Scaling) -> Self:
        """The same scaling, followed by another one."""
        return self.then(other.slope, other.inter).within(other.low, other.high)

    def dtype_of(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """The type of values: the stored type; if scaled, float32, or float64 for 32 bits and more."""
        if self == UNSCALED:
            return stored
        if stored.kind == "c":
            return np.dtype(np.complex64 if stored.itemsize <= 8 else np.complex128)
        return np.dtype(np.float32 if stored.itemsize < 4 else np.float64)

    def apply(self, voxels: Voxels) -> Voxels:
        """The values of some voxels, in a new array of the same memory order."""
        values = voxels.astype(self.dtype_of(voxels.dtype.newbyteorder("=")), order="K", copy=True)
        if self != UNSCALED:
            values *= self.slope
            values += self.inter
            if self.is_bounded:
                np.clip(values, self.low, self.high, out=values)
        return values

    def write(self, voxels: Voxels, out: Voxels) -> None:
        """The values of some voxels, cast to the type of ``out`` and written there, in any order of axes.

        Raises DamageError for a view of a memory map whose file was cut short.
        """
        if _compiled is not None and _is_compiled(voxels, out):
            _compiled.scale(voxels, out, voxels.dtype.str[1:], *self)
            return
        values = voxels if self == UNSCALED else self.apply(voxels)
        if _compiled is not None and values.dtype == out.dtype and values.ndim <= MAX_AXES:
            if not _compiled.copy(values, out):
                raise DamageError("a file was cut short or unmounted while it was read; open it again")
        else:
            np.copyto(out, values, casting="unsafe")


def _is_compiled(voxels: Voxels, out: Voxels) -> bool:
    return (
        out.dtype == np.float32
        and voxels.dtype.isnative
        and voxels.dtype.str[1:] in COMPILED_TYPES
        and voxels.flags.c_contiguous
        and out.flags.c_contiguous
    )


UNSCALED = Scaling()
