"""What a cohort mixes: images of one name that differ in spacing, orientation, shape or intensity range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import spacing_mm
from zpatch.geometry.orientation import axis_codes
from zpatch.geometry.voxel_grid import format_spacing
from zpatch.records.image_record import ImageRecord

MOST_NAMED = 3
OTHER_SCALE = 10.0  # ranges of intensity that differ by this factor are of other units


def mixtures(records: Iterable[ImageRecord], *, shapes: bool = True) -> list[tuple[str, str]]:
    """What images of one name differ in, as (name of the image, text): a line for each, by name.

    ``shapes`` are mostly different, and no fault; False leaves them out.

    Intensities are of another range where their 0.5th and 99.5th percentiles are ten times as large as in
    most subjects, or a tenth, or where only they, or all but they, go far below 0, as Hounsfield units do.
    """
    of_name: dict[str, list[ImageRecord]] = {}
    for record in records:
        of_name.setdefault(record.image, []).append(record)
    return [
        (name, text)
        for name, images in sorted(of_name.items())
        for text in _of_image(images, with_shapes=shapes)
    ]


def orientation_of(record: ImageRecord) -> str:
    """Where the axes of an image point, as ``RAS``; ``?`` if its affine is singular."""
    try:
        return axis_codes(record.affine_array)
    except OptionError:
        return "?"


def _of_image(images: Sequence[ImageRecord], *, with_shapes: bool) -> Iterator[str]:
    yield from _mixed("spacings", images, [_spacing(record) for record in images], "mm")
    yield from _mixed("orientations", images, [orientation_of(record) for record in images])
    shapes = {record.spatial_shape for record in images}
    if with_shapes and len(shapes) > 1:
        least, most = (" x ".join(map(str, bound)) for bound in (np.min([*shapes], 0), np.max([*shapes], 0)))
        yield f"{len(shapes)} shapes, from {least} to {most} voxels (I x J x K)"
    yield from _other_ranges([record for record in images if record.kind == "scalar"])


def _spacing(record: ImageRecord) -> str:
    return format_spacing([float(f"{size:.3g}") for size in spacing_mm(record.affine_array)])


def _mixed(what: str, images: Sequence[ImageRecord], values: Sequence[str], unit: str = "") -> Iterator[str]:
    """A line where images have different values, the most frequent one first."""
    subjects: dict[str, list[str]] = {}
    for record, value in zip(images, values, strict=True):
        subjects.setdefault(value, []).append(record.subject)
    if len(subjects) > 1:
        (first, of_first), *others = sorted(subjects.items(), key=lambda item: -len(item[1]))
        listed = [f"{value} ({_named(names)})" for value, names in others[:MOST_NAMED]]
        more = [f"{len(others) - MOST_NAMED} others"] * (len(others) > MOST_NAMED)
        shown = ", ".join([f"{first} ({len(of_first)} subjects)", *listed, *more])
        yield f"{len(subjects)} {what}{f' in {unit}' if unit else ''}: {shown}"


def _other_ranges(images: Sequence[ImageRecord]) -> Iterator[str]:
    """A line where the intensities of some images are on another scale, or go below 0 and others do not."""
    ranges = {record.subject: found for record in images if (found := _range(record.stats)) is not None}
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
