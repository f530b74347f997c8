"""What a cohort mixes: images of one name that differ in spacing, orientation, shape or intensity range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import spacing_mm
from zpatch.geometry.boxes import Triple
from zpatch.geometry.orientation import axis_codes
from zpatch.geometry.voxel_grid import format_spacing
from zpatch.records.image_record import ImageRecord, Kind
from zpatch.records.manifest import Manifest

MOST_NAMED = 3
OTHER_SCALE = 10.0  # ranges of intensity that differ by this factor are of other units


@dataclass(frozen=True, slots=True)
class ComparedImage:
    """An image of a subject, by what images of one name may differ in; ``range`` is of its intensities."""

    subject: str
    image: str
    kind: Kind
    spatial_shape: Triple
    spacing: tuple[float, ...]
    orientation: str
    range: tuple[float, float] | None

    @classmethod
    def of(cls, record: ImageRecord) -> Self:
        """An image of a record."""
        return cls(
            record.subject,
            record.image,
            record.kind,
            record.spatial_shape,
            spacing_mm(record.affine_array),
            orientation_of(record),
            _range(record.stats),
        )


def compared_images(manifest: Manifest) -> Iterator[ComparedImage]:
    """The images of a manifest, by its table; those whose lines are no records are left out."""
    table = manifest.table
    spacings, ranges = (table.arrays[name].tolist() for name in ("spacing", "range"))
    for row, (spacing, (low, high)) in enumerate(zip(spacings, ranges, strict=True)):
        if (facts := table.facts_of(row)) is not None:
            found = None if math.isnan(low) or math.isnan(high) else (low, high)
            shape, orientation = facts.spatial_shape, facts.orientation
            yield ComparedImage(*table.key(row), facts.kind, shape, tuple(spacing), orientation, found)


def mixtures(images: Iterable[ComparedImage], *, shapes: bool = True) -> list[tuple[str, str]]:
    """What images of one name differ in, as (name of the image, text): a line for each, by name.

    ``shapes`` are mostly different, and no fault; False leaves them out.

    Intensities are of another range where their 0.5th and 99.5th percentiles are ten times as large as in
    most subjects, or a tenth, or where only they, or all but they, go far below 0, as Hounsfield units do.
    """
    of_name: dict[str, list[ComparedImage]] = {}
    for image in images:
        of_name.setdefault(image.image, []).append(image)
    return [
        (name, text)
        for name, alike in sorted(of_name.items())
        for text in _of_image(alike, with_shapes=shapes)
    ]


def orientation_of(record: ImageRecord) -> str:
    """Where the axes of an image point, as ``RAS``; ``?`` if its affine is singular."""
    try:
        return axis_codes(record.affine_array)
    except OptionError:
        return "?"


def _of_image(images: Sequence[ComparedImage], *, with_shapes: bool) -> Iterator[str]:
    yield from _mixed("spacings", images, [_spacing(image.spacing) for image in images], "mm")
    yield from _mixed("orientations", images, [image.orientation for image in images])
    shapes = {image.spatial_shape for image in images}
    if with_shapes and len(shapes) > 1:
        least, most = (" x ".join(map(str, bound)) for bound in (np.min([*shapes], 0), np.max([*shapes], 0)))
        yield f"{len(shapes)} shapes, from {least} to {most} voxels (I x J x K)"
    yield from _other_ranges([image for image in images if image.kind == "scalar"])


def _spacing(spacing: Sequence[float]) -> str:
    return format_spacing([float(f"{size:.3g}") for size in spacing])


def _mixed(
    what: str, images: Sequence[ComparedImage], values: Sequence[str], unit: str = ""
) -> Iterator[str]:
    """A line where images have different values, the most frequent one first."""
    subjects: dict[str, list[str]] = {}
    for image, value in zip(images, values, strict=True):
        subjects.setdefault(value, []).append(image.subject)
    if len(subjects) > 1:
        (first, of_first), *others = sorted(subjects.items(), key=lambda item: -len(item[1]))
        listed = [f"{value} ({_named(names)})" for value, names in others[:MOST_NAMED]]
        more = [f"{len(others) - MOST_NAMED} others"] * (len(others) > MOST_NAMED)
        shown = ", ".join([f"{first} ({len(of_first)} subjects)", *listed, *more])
        yield f"{len(subjects)} {what}{f' in {unit}' if unit else ''}: {shown}"


def _other_ranges(images: Sequence[ComparedImage]) -> Iterator[str]:
    """A line where the intensities of some images are on another scale, or go below 0 and others do not."""
    ranges = {image.subject: image.range for image in images if image.range is not None}
    if len(ranges) < 2:
        return
    scale = {subject: max(abs(low), abs(high)) for subject, (low, high) in ranges.items()}
    usual = float(np.median(list(scale.values())))
    is_other = {s: not usual / OTHER_SCALE < value < usual * OTHER_SCALE for s, value in scale.items()}
    goes_below = {s: low < -scale[s] / OTHER_SCALE for s, (low, _) in ranges.items()}
    most_go_below = 2 * sum(goes_below.values()) > len(ranges)
    odd = [s for s in ranges if usual and (is_other[s] or goes_below[s] != most_go_below)]
    if odd:
        low, high = np.median([found for s, found in ranges.items() if s not in odd] or [*ranges.values()], 0)
        shown = ranges[odd[0]]
        yield (
            f"other intensities in {_named(odd)}, as {shown[0]:.4g} to {shown[1]:.4g}, than in most, "
            f"{low:.4g} to {high:.4g}; are they of one unit?"
        )


def _range(stats: Mapping[str, object]) -> tuple[float, float] | None:
    low, high = stats.get("percentile_0_5"), stats.get("percentile_99_5")
    return (
        (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None
    )


def _named(subjects: Sequence[str]) -> str:
    more = f" and {len(subjects) - MOST_NAMED} more" if len(subjects) > MOST_NAMED else ""
    return ", ".join(subjects[:MOST_NAMED]) + more
