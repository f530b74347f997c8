"""The pictures of a report: planes of an image, with the outlines of label maps over them."""

from __future__ import annotations

import colorsys
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.scaling import Scaling
from zpatch.digests import Json
from zpatch.errors import ZpatchError
from zpatch.geometry.boxes import AXIS_NAMES, Triple, Voxels
from zpatch.report.planes import Plane, View, views_of
from zpatch.report.png import Colour, png
from zpatch.store.image_record import ImageRecord

SIDES = (512, 448, 384, 320, 256, 208, 160, 128, 96)  # longest side of a picture, in pixels
SUBJECT_PIXELS = 360_000  # of all pictures of a subject together: about as many bytes
OUTLINE_SIDE = 600
LINE_PIXELS = 2
DASH_PIXELS = 6
GREYS = 64  # noise in finer steps would be most of a page
CHANNELS_SHOWN = 3
HUGE = 1e100
COLOURS = 254

Stored = tuple[Path, ImageRecord]  # an image's folder, and what the manifest says of it
Overlay = tuple[Stored, bool]  # a label map, and whether its outlines are dashed
Failed = Callable[[ImageRecord, BaseException], None]


@dataclass(frozen=True, slots=True)
class Picture:
    """One plane: a PNG, and one of the same extent for the outlines of each label map over it.

    ``edges`` is what stands at its left, right, top and bottom; extents are in mm.
    """

    caption: str
    png: bytes | None
    outlines: tuple[bytes, ...]
    edges: tuple[str, str, str, str]
    height_mm: float
    width_mm: float


@dataclass(frozen=True, slots=True)
class Panel:
    """The planes of an image, or of one channel or time point of it, which the title names."""

    title: str
    pictures: tuple[Picture, ...]


class LabelColours:
    """A colour for each value of the label maps of a cohort, the same in all pictures; 0 has none.

    >>> LabelColours([2, 0, 1, 2]).of(1)
    '#f59e29'
    """

    def __init__(self, values: Iterable[int]) -> None:
        self._values = np.array(sorted({*values} - {0}), dtype=np.int64)

    @cached_property
    def palette(self) -> list[Colour]:
        """The colours by number, from 0, which is transparent."""
        count = min(max(len(self._values), 1), COLOURS)
        return [(0, 0, 0, 0), *(_colour(number) for number in range(count))]

    def numbers(self, labels: Voxels) -> NDArray[np.uint8]:
        """The number of the colour of each label; where colours run out they come again."""
        ranks = np.searchsorted(self._values, labels)
        return np.where(labels == 0, 0, 1 + ranks % (len(self.palette) - 1)).astype(np.uint8)

    def of(self, value: int) -> str:
        """The colour of a value, as CSS has it."""
        red, green, blue, _ = self.palette[int(self.numbers(np.array(value)))]
        return f"#{red:02x}{green:02x}{blue:02x}"


def _colour(number: int) -> Colour:
    """Hues a golden angle apart: neighbours differ most, and none comes twice."""
    hue, lightness = (0.096 + number * 0.381966) % 1, (0.56, 0.68, 0.46)[number // 8 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.91))
    return red, green, blue, 255


def longest_side(records: Sequence[ImageRecord]) -> int:
    """How long the pictures of a subject may be, so that all together stay small."""
    return next((side for side in SIDES if _pixels(records, side) <= SUBJECT_PIXELS), SIDES[-1])


def _pixels(records: Sequence[ImageRecord], side: int) -> int:
    shown = [
        (record, view, part) for record in records for view in views_of(record) for part in parts_of(record)
    ]
    return sum(math.prod(view.pixels(record, side)) * len(part[1]) for record, view, part in shown)


def parts_of(record: ImageRecord) -> list[tuple[str, range]]:
    """Which channels are shown, each with what to call it: colours are one picture, of a series in time the
    first, the middle and the last volume, of other channels the first three; of label maps all at once."""
    channels = record.shape_czyx[0]
    if channels == 1:
        return [("", range(1))]
    if record.axes[0] == "t":
        names = sorted({0, channels // 2, channels - 1})
        return [(f"time point {n + 1} of {channels}", range(n, n + 1)) for n in names]
    if record.kind == "label":
        return [("", range(channels))]
    if _is_coloured(record):
        count = channels // record.colours
        return [("" if count == 1 else f"colours 1 of {count}", range(3))]
    shown = range(min(channels, CHANNELS_SHOWN))
    return [(f"channel {n + 1} of {channels}", range(n, n + 1)) for n in shown]


def _is_coloured(record: ImageRecord) -> bool:
    channels = record.shape_czyx[0]
    return channels >= 3 and (record.colours in (3, 4) or (channels == 3 and record.dtype == "|u1"))


def panels_of(
    image: Stored, maps: Sequence[Overlay], middle: Triple, side: int, colours: LabelColours, failed: Failed
) -> Iterator[Panel]:
    """The pictures of an image through a voxel (I, J, K), with outlines of ``maps``, which lie on its grid.

    A label map is shown by itself as areas of colour. ``failed`` is told what cannot be read.
    """
    folder, record = image
    window = Window.of(record)
    for title, channels in parts_of(record):
        pictures = []
        for view in views_of(record):
            at = middle[view.normal]
            base, over = None, []
            if record.kind == "label":
                over = [_layer(record, failed, _areas, Plane(folder, record, view, at, channels), colours)]
            else:
                size, plane = view.pixels(record, side), Plane(folder, record, view, at, channels)
                base = _layer(record, failed, _shaded, plane, size, window)
                for (path, found), dashed in maps:
                    plane = Plane(path, found, view, at, channels_of_map(found))
                    over.append(_layer(found, failed, _outlines, plane, colours, dashed))
            layers = tuple(layer for layer in over if layer is not None)
            pictures.append(
                Picture(_caption(view, record, at), base, layers, view.edges, *view.size_mm(record))
            )
        yield Panel(title, tuple(pictures))


def _layer(record: ImageRecord, failed: Failed, make: Callable[..., bytes], *arguments: Any) -> bytes | None:
    try:
        return make(*arguments)
    except (ZpatchError, OSError, MemoryError, ValueError) as error:  # a manifest may say anything
        failed(record, error)
    return None


def channels_of_map(record: ImageRecord) -> range:
    """The channels of a label map that are shown at once: all, or the middle one in time."""
    parts = parts_of(record)
    return parts[len(parts) // 2][1]


def _caption(view: View, record: ImageRecord, at: int) -> str:
    extent = record.spatial_shape[view.normal]
    return "" if extent == 1 else f"{view.name}, {AXIS_NAMES[view.normal]} {at} of {extent}"


@dataclass(frozen=True, slots=True)
class Window:
    """What turns stored voxels into brightness: from ``low`` (0) to ``high`` (1), in values."""

    slope: float
    inter: float
    low: float
    high: float

    @classmethod
    def of(cls, record: ImageRecord) -> Window:
        """From percentile 0.5 of an image's foreground to 99.5; colours of bytes as they are."""
        if _is_coloured(record) and record.dtype == "|u1":
            return cls(1.0, 0.0, 0.0, 255.0)
        low, high = window_of(record.stats)
        return cls(record.slope, record.inter, low, high)

    def shade(self, voxels: Voxels) -> Voxels:
        """Brightness, 0 to 1; 0 where there is none."""
        values = (np.abs(voxels) if voxels.dtype.kind == "c" else voxels).astype(np.float64)
        with np.errstate(all="ignore"):  # voxels may be any bits
            values = (values * self.slope + self.inter - self.low) / (self.high - self.low)
            return np.nan_to_num(np.clip(values, 0, 1)).astype(np.float32)


def window_of(stats: Json) -> tuple[float, float]:
    """The values between which an image has what is worth seeing, as far as its statistics say."""
    foreground = stats.get("foreground")
    for table in (foreground if isinstance(foreground, dict) else {}, stats):
        for names in (("percentile_0_5", "percentile_99_5"), ("min", "max")):
            low, high = (_number(table.get(name)) for name in names)
            if low < high:
                return low, high
    return 0.0, 1.0


def _number(value: object) -> float:
    """A number of a manifest; NaN where it is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < HUGE else math.nan


def _shaded(plane: Plane, size: tuple[int, int], window: Window) -> bytes:
    brightness = np.clip(plane.means(size, window.shade), 0, 1)
    greys = np.rint(np.rint(brightness * (GREYS - 1)) * (255 / (GREYS - 1))).astype(np.uint8)
    return png(greys[0] if len(greys) == 1 else np.moveaxis(greys, 0, -1))


def _numbers(plane: Plane, colours: LabelColours) -> NDArray[np.uint8]:
    """The number of the colour of each pixel (height, width) of a label map."""
    record, view = plane.record, plane.view
    size = view.pixels(record, OUTLINE_SIDE)
    labels = np.zeros(size, dtype=np.int64)
    if len(plane.channels) == 1:
        labels[...] = np.rint(Scaling(record.slope, record.inter).apply(plane.nearest(size)[0]))
    else:  # one after the other; where they overlap, the last one
        for number in plane.channels:
            channel = dataclasses.replace(plane, channels=range(number, number + 1))
            labels[channel.nearest(size)[0] != 0] = number + 1
    extents_mm = view.size_mm(record)
    for axis, extent in enumerate(extents_mm):
        pixels, number = math.ceil(OUTLINE_SIDE * extent / max(extents_mm)), labels.shape[axis]
        labels = labels.take(np.arange(pixels) * number // pixels, axis)
    return colours.numbers(labels)


def label_names(record: ImageRecord) -> dict[int, tuple[str, int]]:
    """The labels of a map but 0, each with its name and how many voxels it has; a channel is a label."""
    named: dict[int, int] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # a manifest may say anything
        named = {int(value): int(count) for value, count in record.stats["labels"].items()}
    named = {value: count for value, count in named.items() if max(abs(value), abs(count)) < 2**63}
    if len(channels_of_map(record)) > 1:
        return {number + 1: (f"channel {number + 1}", count) for number, count in sorted(named.items())}
    return {value: (str(value), count) for value, count in sorted(named.items()) if value}


def _outlines(plane: Plane, colours: LabelColours, dashed: bool) -> bytes:
    """A picture of the borders of labels."""
    labels = _numbers(plane, colours)
    padded = np.pad(labels, LINE_PIXELS, mode="edge")
    height, width = labels.shape
    on_border = np.zeros(labels.shape, dtype=bool)
    for shift in range(2 * LINE_PIXELS + 1):
        on_border |= padded[shift : shift + height, LINE_PIXELS : LINE_PIXELS + width] != labels
        on_border |= padded[LINE_PIXELS : LINE_PIXELS + height, shift : shift + width] != labels
    if dashed:
        places = np.add.outer(np.arange(height), np.arange(width))
        on_border &= places // DASH_PIXELS % 2 == 0
    return png(np.where(on_border, labels, 0).astype(np.uint8), colours.palette)


def _areas(plane: Plane, colours: LabelColours) -> bytes:
    return png(_numbers(plane, colours), colours.palette)
