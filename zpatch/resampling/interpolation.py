"""How values between voxels are found: nearest, linear or cubic, and the smoothing before voxels grow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from zpatch.errors import OptionError

MODES = ("nearest", "linear", "cubic")


@dataclass(frozen=True, slots=True)
class Interpolation:
    """``nearest``, ``linear``, or ``cubic``: a B-spline of order 3 through the voxels.

    Beyond the border the edge voxel is repeated. With ``antialias``, axes whose voxels grow are smoothed
    first. ``of_labels`` are the voxels of a label map: ``linear`` then interpolates the indicator of each
    class, and gives the class with the largest value, the lowest of equal ones.
    """

    mode: str = "linear"
    antialias: bool = False
    of_labels: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OptionError(
                f"interpolation must be one of {', '.join(MODES)}, not {self.mode!r}", option="interpolation"
            )
        if self.of_labels and self.mode == "cubic":
            raise OptionError(
                "a label map cannot be interpolated with 'cubic', which makes values that are no classes; "
                "use 'nearest', or 'linear' for smooth borders",
                option="interpolation",
            )
        if self.antialias and (self.of_labels or self.mode == "nearest"):
            what = "a label map" if self.of_labels else "interpolation='nearest'"
            raise OptionError(f"antialias smooths intensities, and is not for {what}", option="antialias")

    @property
    def keeps_values(self) -> bool:
        """Whether all results are values of voxels, so that their type stays."""
        return self.of_labels or self.mode == "nearest"

    def dtype_of(self, source: np.dtype[Any]) -> np.dtype[Any]:
        """The type of results: that of the source, or float32, or float64 for 32 bits and more."""
        if self.keeps_values:
            return source
        if source.kind == "c":
            raise OptionError(
                f"complex voxels ({source}) are resampled with interpolation='nearest' only; resample their "
                f"magnitude, as in image.map(abs)"
            )
        return sum_dtype(source)

    def smoothing(self, factor: float) -> float:
        """Standard deviation, in voxels of the source, of the Gaussian that smooths an axis; 0 for none.

        ``factor`` is the new voxel size over that of the source. The variance is (t**2 - s**2) / (8 ln 2)
        in mm**2, for voxels of s and t mm: Cardoso et al., "Scale factor point spread function matching",
        MICCAI 2015.
        """
        if not self.antialias or factor <= 1:
            return 0.0
        return math.sqrt((factor**2 - 1) / (8 * math.log(2)))


def sum_dtype(source: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which voxels of a type are summed: float32, or float64 for 32 bits and more."""
    return np.dtype(np.float64 if source.itemsize >= 4 and source != np.float32 else np.float32)
