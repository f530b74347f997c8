"""Transforms that mean the whole volume, of libraries that are not taken apart: warned of by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

OF_TORCHIO_2 = (
    "Standardize",
    "Normalize",
    "HistogramStandardization",
    "Resize",
    "Reorient",
    "CropOrPad",
    "Crop",
    "Pad",
    "EnsureShapeMultiple",
    "Resample",
    "Motion",
    "Ghosting",
    "Spike",
    "Swap",
    "KeepLargestComponent",
    "PCA",
    "ToReferenceSpace",
)


def warn_of_volume_transforms(parts: Iterable[object], names: Sequence[str]) -> None:
    """Warn, once, of those of some objects whose class is one of ``names``, as they are given patches."""
    known = {type(part).__name__ for part in parts}
    if meant := [name for name in names if name in known]:
        warnings.warn(
            f"{', '.join(meant)} would act on each patch by itself, not on the volume as in its library: use "
            f"zpatch.Normalize and subject.resampled, oriented and window on the subjects instead, or say "
            f"on='patch' if patches are meant",
            stacklevel=3,
        )
