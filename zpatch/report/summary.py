"""What a report tells: of a cohort in sums that do not grow with it, of a subject in whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.errors import DamageError
from zpatch.geometry.affines import spacing_mm
from zpatch.report.pictures import Panel, label_names, window_of
from zpatch.report.problems import Problem
from zpatch.store.image_record import ImageRecord
from zpatch.store.names import HISTOGRAM
from zpatch.store.store import read_small_array
from zpatch.store.verification import VerificationReport

BARS = 80

_UNITS = {"millimeter": "mm", "micrometer": "\N{MICRO SIGN}m", "meter": "m"}


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How often values occur in the foreground: ``counts`` of equal steps from ``low`` to ``high``."""

    counts: NDArray[np.float64]
    low: float
    high: float


def histogram_of(folder: Path, record: ImageRecord) -> Histogram:
    """The stored histogram of an image in few bars, over what its pictures show."""
    table = read_small_array(folder, HISTOGRAM, record.files)
    if table.ndim != 2 or len(table) != 2:
        raise DamageError(f"damaged store: {folder / HISTOGRAM} is no table of values and counts")
    low, high = window_of(record.stats)
    bars = BARS
    if np.dtype(record.dtype).kind in "iu":  # bars of whole values: others would differ in how many they hold
        step = abs(record.slope) or 1.0
        step *= max(1, math.ceil((high - low) / (step * BARS)))
        bars = max(1, math.ceil((high - low) / step))
        high = low + bars * step
    counts, _ = np.histogram(table[0], bins=bars, range=(low, high), weights=table[1])
    return Histogram(counts, low, high)


@dataclass(frozen=True, slots=True)
class ImageSection:
    """An image with its pictures; a label map that lies over no image has no histogram."""

    record: ImageRecord
    panels: tuple[Panel, ...]
    histogram: Histogram | None


@dataclass(frozen=True, slots=True)
class SubjectSection:
    """A subject with its images. ``maps`` are its label maps, every second of them drawn dashed."""

    name: str
    split: str | None
    metadata: Json
    images: tuple[ImageSection, ...]
    maps: tuple[ImageRecord, ...]
    problems: tuple[Problem, ...]


@dataclass(slots=True)
class ImageSummary:
    """The images of one name, over all subjects: shapes and voxel sizes from the least to the greatest."""

    kinds: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    labels: Counter[tuple[int, str]] = field(default_factory=Counter)
    shapes: NDArray[np.float64] = field(default_factory=lambda: _no_range(3))
    spacings: NDArray[np.float64] = field(default_factory=lambda: _no_range(3))
    subjects: int = 0
    voxel_bytes: int = 0
    stored_bytes: int = 0

    def add(self, record: ImageRecord) -> None:
        """Take in one image."""
        self.kinds[record.kind] += 1
        self.dtypes[np.dtype(record.dtype).name] += 1
        self.units[unit_text(record.spatial_unit)] += 1
        self.channels[record.shape_czyx[0]] += 1
        if record.kind == "label":
            self.labels.update((value, name) for value, (name, _) in label_names(record).items())
        self.shapes = _widened(self.shapes, record.spatial_shape)
        self.spacings = _widened(self.spacings, spacing_mm(record.affine_array))
        self.subjects += 1
        self.voxel_bytes += record.voxel_bytes
        self.stored_bytes += record.stored_bytes


def _no_range(axes: int) -> NDArray[np.float64]:
    return np.array([[math.inf] * axes, [-math.inf] * axes])


def _widened(ranges: NDArray[np.float64], values: Sequence[float]) -> NDArray[np.float64]:
    return np.stack([np.fmin(ranges[0], values), np.fmax(ranges[1], values)])


@dataclass(frozen=True, slots=True)
class SubjectRow:
    """What the table of all subjects says of one."""

    name: str
    split: str
    images: tuple[str, ...]
    shape: str
    stored_bytes: int


@dataclass(slots=True)
class CohortSummary:
    """A cohort as a whole: ``images`` by their names, and a row for each subject."""

    store: Path
    attributes: Json
    checked: VerificationReport
    images: dict[str, ImageSummary] = field(default_factory=dict)
    splits: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    rows: list[SubjectRow] = field(default_factory=list)

    def add(self, subject: str, split: str | None, records: Sequence[ImageRecord]) -> None:
        """Take in a subject."""
        for record in records:
            self.images.setdefault(record.image, ImageSummary()).add(record)
            self.codecs[record.codec] += 1
        split = str(split) if split else ""
        self.splits[split] += 1
        shapes = list(dict.fromkeys(shape_text(record) for record in records))
        names = tuple(record.image for record in records)
        stored_bytes = sum(record.stored_bytes for record in records)
        self.rows.append(SubjectRow(subject, split, names, ", ".join(shapes), stored_bytes))


def unit_text(unit: str | None) -> str:
    """A unit of length, for people."""
    return _UNITS.get(unit, unit) if isinstance(unit, str) else "?"


def shape_text(record: ImageRecord) -> str:
    """Extent along I, J, K in voxels, for people."""
    return " \N{MULTIPLICATION SIGN} ".join(map(str, record.spatial_shape))
