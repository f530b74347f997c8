"""One subject of a report: its images with pictures and histograms, its label maps, and its problems."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.errors import DamageError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.subject import Subject
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import HISTOGRAM
from zpatch.report.labels import LabelColours
from zpatch.report.pictures import (
    Drawing,
    Overlay,
    Panel,
    StoredImage,
    longest_side,
    panels_of,
    window_of,
)
from zpatch.report.problems import Problem, share_a_grid
from zpatch.store.store import read_small_array

BARS = 80


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Foreground voxels by value: ``counts`` (bars,) of bars of equal width, from ``low`` to ``high``."""

    counts: NDArray[np.float64]
    low: float
    high: float


def histogram_of(folder: Path, record: ImageRecord) -> Histogram:
    """The stored histogram of an image, in at most 80 bars over the range of values that its pictures show.

    Raises DamageError where the file of the histogram is missing or damaged.
    """
    table = read_small_array(folder, HISTOGRAM, record.files)
    if table.ndim != 2 or len(table) != 2:
        raise DamageError(f"damaged store: {folder / HISTOGRAM} is no table of values and counts")
    low, high = window_of(record.stats)
    bars = BARS
    if np.dtype(record.dtype).kind in "iu":  # else bars would hold different numbers of integers
        step = abs(record.slope) or 1.0
        step *= max(1, math.ceil((high - low) / (step * BARS)))
        bars = max(1, math.ceil((high - low) / step))
        high = low + bars * step
    counts, _ = np.histogram(table[0], bins=bars, range=(low, high), weights=table[1])
    return Histogram(counts, low, high)


@dataclass(frozen=True, slots=True)
class ImageSection:
    """One image with its pictures. Label maps have no histogram.

    ``problems`` are the errors of reading its planes, its overlays and its histogram.
    """

    record: ImageRecord
    panels: tuple[Panel, ...]
    histogram: Histogram | None
    problems: tuple[Problem, ...]

    @classmethod
    def of(cls, drawing: Drawing, side: int, colours: LabelColours) -> Self:
        """The section of a drawing, with pictures of at most ``side`` pixels."""
        folder, record = drawing.image.folder, drawing.image.record
        panels = tuple(panels_of(drawing, _middle_of(drawing), side, colours))
        problems = [problem for panel in panels for picture in panel.pictures for problem in picture.problems]
        histogram = None
        if record.kind != "label":
            try:
                histogram = histogram_of(folder, record)
            except DamageError as error:
                problems.append(Problem.of_reading(record, error))
        return cls(record, panels, histogram, tuple(problems))


@dataclass(frozen=True, slots=True)
class SubjectSection:
    """One subject.

    ``images`` are its drawn images and ``maps`` all its label maps. ``known`` are the problems that were
    known before its images were read.
    """

    name: str
    split: str | None
    metadata: Json
    images: tuple[ImageSection, ...]
    maps: tuple[Overlay, ...]
    known: tuple[Problem, ...]

    @classmethod
    def of(cls, subject: Subject, colours: LabelColours, problems: Sequence[Problem]) -> Self:
        """Draw the images of a subject; ``problems`` are the known problems of all subjects."""
        stored = stored_images(subject)
        maps = overlays_of(stored)
        side = longest_side([image.record for image in stored if image.record.kind != "label"])
        drawings = drawings_of(stored, maps)
        return cls(
            name=subject.name,
            split=subject.split,
            metadata=subject.metadata,
            images=tuple(ImageSection.of(drawing, side, colours) for drawing in drawings),
            maps=maps,
            known=tuple(problem for problem in problems if problem.subject == subject.name),
        )

    @property
    def unread(self) -> tuple[Problem, ...]:
        """The first problem of each image that could not be read; its other planes may name other chunks."""
        found: dict[str | None, Problem] = {}
        for problem in itertools.chain(*(image.problems for image in self.images)):
            found.setdefault(problem.image, problem)
        return tuple(found.values())


def stored_images(subject: Subject) -> list[StoredImage]:
    """The images of a subject of a store."""
    images = subject.images.values()
    return [StoredImage(image.folder, image.record) for image in images if image.folder and image.record]


def overlays_of(images: Sequence[StoredImage]) -> tuple[Overlay, ...]:
    """The label maps of a subject; the outlines of every second one are dashed."""
    maps = [image for image in images if image.record.kind == "label"]
    return tuple(Overlay(image, is_dashed=number % 2 == 1) for number, image in enumerate(maps))


def drawings_of(images: Sequence[StoredImage], maps: Sequence[Overlay]) -> list[Drawing]:
    """The drawings of a subject: each image under the label maps on its grid, then other label maps."""
    drawings = [
        Drawing(image, tuple(over for over in maps if share_a_grid(image.record, over.image.record)))
        for image in images
        if image.record.kind != "label"
    ]
    drawn = {overlay.image.record.image for drawing in drawings for overlay in drawing.overlays}
    return drawings + [Drawing(over.image) for over in maps if over.image.record.image not in drawn]


def _middle_of(drawing: Drawing) -> Triple:
    """The middle voxel of the first foreground box that is known: of the overlays, then of the image."""
    shape = drawing.image.record.spatial_shape
    for image in [*(overlay.image for overlay in drawing.overlays), drawing.image]:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            corners = np.array(image.record.stats["foreground_box"], dtype=np.int64).reshape(2, 3)
            i, j, k = (corners.sum(axis=0) // 2).tolist()
            if PatchLocation((i, j, k), (1, 1, 1)).lies_within(shape):
                return i, j, k
    i, j, k = (n // 2 for n in shape)
    return i, j, k
