"""What the table of a manifest says of an image, so that samplers and queues need not parse its record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np

from zpatch.digests import Json
from zpatch.errors import OptionError
from zpatch.geometry.boxes import Triple, padded_to_4d
from zpatch.geometry.orientation import axis_codes
from zpatch.records.image_record import Kind

Directions = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image as far as many images of a cohort are alike.

    ``shape`` is (C, I, J, K). ``slope`` and ``inter`` turn stored voxels into values. ``levels`` is the
    number of coarser levels. ``labels`` are the values of a label map, in order; None where they are not
    known. ``orientation`` is where its axes point, as ``RAS``; ``?`` if its affine is singular.
    ``is_resampled`` says whether it was resampled as it was converted.
    """

    kind: Kind
    shape: tuple[int, int, int, int]
    dtype: str
    codec: str
    slope: float
    inter: float
    levels: int
    labels: tuple[int, ...] | None
    orientation: str
    is_resampled: bool

    @classmethod
    def of_line(cls, value: Json) -> Self:
        """The facts of a manifest line; one that is no record raises TypeError, KeyError or ValueError."""
        channels, nz, ny, nx = padded_to_4d(value["shape"])
        labels = value["stats"].get("labels") if channels == 1 else None
        return cls(
            kind=value["kind"],
            shape=(channels, nx, ny, nz),
            dtype=value["dtype"],
            codec=value["codec"],
            slope=value["slope"],
            inter=value["inter"],
            levels=len(value["levels"]),
            labels=None if labels is None else tuple(sorted(map(int, labels))),
            orientation=_orientation(cls.directions(value)),
            is_resampled=bool(value.get("resampled")),
        )

    @staticmethod
    def directions(value: Json) -> Directions:
        """The columns of the affine of a manifest line, as rows of three."""
        return tuple(tuple(row[:3]) for row in value["affine"][:3])

    @classmethod
    def of_json(cls, values: list[Any]) -> Self:
        """The facts that ``to_json`` wrote."""
        kind, shape, *others, labels, orientation, is_resampled = values
        some_labels = None if labels is None else tuple(labels)
        return cls(kind, tuple(shape), *others, some_labels, orientation, is_resampled)  # type: ignore[call-arg]

    def to_json(self) -> list[Any]:
        """The facts in the order of the fields."""
        return [getattr(self, name) for name in self.__slots__]

    @property
    def spatial_shape(self) -> Triple:
        """Extent along I, J, K in voxels."""
        return self.shape[1:]


@lru_cache(maxsize=1024)
def _orientation(directions: Directions) -> str:
    try:
        with np.errstate(all="ignore"):
            return axis_codes(np.array(directions))
    except OptionError:
        return "?"
