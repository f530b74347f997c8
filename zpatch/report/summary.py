"""A cohort in sums: ranges and counts over the images of each name, and one row for each subject."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.geometry.affines import spacing_mm
from zpatch.records.image_record import ImageRecord, common_folder
from zpatch.report.labels import labels_of
from zpatch.report.planes import is_placed
from zpatch.report.texts import shape_text, unit_text
from zpatch.store.verification import VerificationReport


@dataclass(slots=True)
class ImageSummary:
    """All images of one name, over all subjects.

    Counters count images: by kind, type, unit of length, number of channels, and (value, name) of each label.
    ``shapes`` and ``spacings`` are (2, 3) arrays, the least and the greatest along I, J, K.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    labels: Counter[tuple[int, str]] = field(default_factory=Counter)
    shapes: NDArray[np.float64] = field(default_factory=lambda: _no_range())
    spacings: NDArray[np.float64] = field(default_factory=lambda: _no_range())
    subjects: int = 0
    voxel_bytes: int = 0
    stored_bytes: int = 0

    def add(self, record: ImageRecord) -> None:
        """Count one image."""
        self.kinds[record.kind] += 1
        self.dtypes[np.dtype(record.dtype).name] += 1
        self.units[unit_text(record.spatial_unit)] += 1
        self.channels[record.shape_czyx[0]] += 1
        if record.kind == "label":
            self.labels.update((label.value, label.name) for label in labels_of(record))
        self.shapes = _widened(self.shapes, record.spatial_shape)
        self.spacings = _widened(self.spacings, spacing_mm(record.affine_array))
        self.subjects += 1
        self.voxel_bytes += record.voxel_bytes
        self.stored_bytes += record.stored_bytes

    @property
    def ratio(self) -> float:
        """Bytes of voxels for each stored byte."""
        return self.voxel_bytes / max(self.stored_bytes, 1)


def _no_range() -> NDArray[np.float64]:
    return np.array([[math.inf] * 3, [-math.inf] * 3])


def _widened(ranges: NDArray[np.float64], values: Sequence[float]) -> NDArray[np.float64]:
    return np.stack([np.fmin(ranges[0], values), np.fmax(ranges[1], values)])


@dataclass(frozen=True, slots=True)
class SubjectRow:
    """One subject in the table of all subjects: texts, and the bytes of its files."""

    name: str
    split: str
    images: tuple[str, ...]
    shape: str
    stored_bytes: int


@dataclass(slots=True)
class CohortSummary:
    """A cohort: ``images`` by name, how many subjects are in each split, and a row for each subject.

    ``store`` and ``attributes`` are the store's path and its own attributes, ``checked`` the verification of
    its files, ``codecs`` how many images each codec packs. ``models`` are the networks of predictions, as
    (name, path, version of zpatch), and how many images each made; ``inputs`` is the folder that all their
    inputs are in, ``not_finite`` how many voxels they gave that are NaN or infinite. ``is_placed`` is whether
    any affine is a patient's.
    """

    store: Path
    attributes: Json
    checked: VerificationReport
    images: dict[str, ImageSummary] = field(default_factory=dict)
    splits: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    rows: list[SubjectRow] = field(default_factory=list)
    models: Counter[tuple[str, str | None, str]] = field(default_factory=Counter)
    inputs: str | None = None
    not_finite: int = 0
    is_placed: bool = False

    def add(self, subject: str, split: str | None, records: Sequence[ImageRecord]) -> None:
        """Count one subject with its images."""
        for record in records:
            self.images.setdefault(record.image, ImageSummary()).add(record)
            self.codecs[record.codec] += 1
            self.is_placed = self.is_placed or is_placed(record)
            if (made := record.provenance) is not None:
                self.models[made.model, made.model_path, made.version] += 1
                found = record.stats.get("not_finite")
                self.not_finite += max(0, found) if isinstance(found, int) else 0
                self.inputs = common_folder([self.inputs, *made.inputs.values()])
        split = str(split) if split else ""
        self.splits[split] += 1
        shapes = list(dict.fromkeys(shape_text(record) for record in records))
        names = tuple(record.image for record in records)
        stored_bytes = sum(record.stored_bytes for record in records)
        self.rows.append(SubjectRow(subject, split, names, ", ".join(shapes), stored_bytes))

    @property
    def num_images(self) -> int:
        """How many images all subjects have together."""
        return sum(image.subjects for image in self.images.values())

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels, unpacked."""
        return sum(image.voxel_bytes for image in self.images.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files."""
        return sum(image.stored_bytes for image in self.images.values())

    @property
    def ratio(self) -> float:
        """Bytes of voxels for each stored byte."""
        return self.voxel_bytes / max(self.stored_bytes, 1)
