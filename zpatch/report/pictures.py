"""The pictures of a report as PNG: planes in grey or colour, with the outlines of label maps over them."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zpatch.chunks.scaling import Scaling
from zpatch.digests import Json
from zpatch.errors import ZpatchError
from zpatch.geometry.boxes import AXIS_NAMES, Triple, Voxels
from zpatch.records.image_record import ImageRecord
from zpatch.report.labels import Colour, LabelColours, map_channels
from zpatch.report.planes import Plane, View, is_coloured, parts_of, views_of
from zpatch.report.problems import Problem

SIDES = (512, 448, 384, 320, 256, 208, 160, 128, 96)  # longest side of a picture, in pixels
SUBJECT_PIXELS = 360_000  # of all pictures of a subject together: about as many bytes
OUTLINE_SIDE = 600
LINE_PIXELS = 2
DASH_PIXELS = 6
GREYS = 64  # with more, the noise of images would be most of the page's bytes
HUGE = 1e100
COMPRESSION = 9


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of a store: its folder, and its record in the manifest."""

    folder: Path
    record: ImageRecord


@dataclass(frozen=True, slots=True)
class Overlay:
    """A label map whose outlines are drawn over an image, as solid or as dashed lines."""

    image: StoredImage
    is_dashed: bool


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image to draw, and the overlays on its grid, from the lowest to the topmost.

    A label map is drawn as areas of colour, without overlays.
    """

    image: StoredImage
    overlays: tuple[Overlay, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """One plane of a drawing.

    ``layers`` are PNG files of the same extent, from the lowest to the topmost. ``problems`` has one problem
    for each layer that could not be read. ``edges`` are the letters at the left, right, top and bottom edge.
    """

    caption: str
    layers: tuple[bytes, ...]
    problems: tuple[Problem, ...]
    edges: tuple[str, str, str, str]
    height_mm: float
    width_mm: float


@dataclass(frozen=True, slots=True)
class Panel:
    """The pictures of an image, or of the channel or time point that ``title`` names."""

    title: str
    pictures: tuple[Picture, ...]


def longest_side(records: Sequence[ImageRecord]) -> int:
    """The longest side of a subject's pictures in pixels, so that all of them together stay small."""
    return next((side for side in SIDES if _pixels(records, side) <= SUBJECT_PIXELS), SIDES[-1])


def _pixels(records: Sequence[ImageRecord], side: int) -> int:
    return sum(
        math.prod(view.pixels(record, side)) * len(part.channels)
        for record in records
        for view in views_of(record)
        for part in parts_of(record)
    )


def panels_of(drawing: Drawing, middle: Triple, side: int, colours: LabelColours) -> Iterator[Panel]:
    """The pictures of a drawing through the voxel ``middle`` (I, J, K), at most ``side`` pixels long.

    Errors of reading become problems of the pictures.
    """
    record = drawing.image.record
    for part in parts_of(record):
        pictures = [
            _picture(drawing, view, middle[view.normal], part.channels, side, colours)
            for view in views_of(record)
        ]
        yield Panel(part.title, tuple(pictures))


def _picture(
    drawing: Drawing, view: View, at: int, channels: range, side: int, colours: LabelColours
) -> Picture:
    record = drawing.image.record
    plane = Plane(drawing.image.folder, record, view, at, channels)
    if record.kind == "label":
        drawn = [_drawn(_areas, plane, colours)]
    else:
        drawn = [_drawn(_shaded, plane, view.pixels(record, side), Window.of(record))]
    for overlay in drawing.overlays:
        found = overlay.image.record
        plane = Plane(overlay.image.folder, found, view, at, map_channels(found))
        drawn.append(_drawn(_outlines, plane, colours, overlay.is_dashed))
    extent = record.spatial_shape[view.normal]
    height_mm, width_mm = view.size_mm(record)
    return Picture(
        caption="" if extent == 1 else f"{view.name}, {AXIS_NAMES[view.normal]} {at} of {extent}",
        layers=tuple(layer for layer in drawn if isinstance(layer, bytes)),
        problems=tuple(layer for layer in drawn if isinstance(layer, Problem)),
        edges=view.edges,
        height_mm=height_mm,
        width_mm=width_mm,
    )


def _drawn(draw: Callable[..., bytes], plane: Plane, *arguments: Any) -> bytes | Problem:
    """A layer as PNG, or the problem that its plane cannot be read."""
    try:
        return draw(plane, *arguments)
    except (ZpatchError, OSError, MemoryError, ValueError) as error:  # a manifest may say anything
        return Problem.of_reading(plane.record, error)


@dataclass(frozen=True, slots=True)
class Window:
    """The intensity window of an image, as radiology uses the word.

    Stored voxels times ``slope`` plus ``inter`` are values; ``low`` is black and ``high`` is white.
    """

    slope: float
    inter: float
    low: float
    high: float

    @classmethod
    def of(cls, record: ImageRecord) -> Window:
        """From percentile 0.5 to 99.5 of an image's foreground; RGB bytes keep their range."""
        if is_coloured(record) and record.dtype == "|u1":
            return cls(1.0, 0.0, 0.0, 255.0)
        low, high = window_of(record.stats)
        return cls(record.slope, record.inter, low, high)

    def shade(self, voxels: Voxels) -> Voxels:
        """Brightness from 0 to 1 of stored voxels, of the same shape; NaN is 0."""
        values = (np.abs(voxels) if voxels.dtype.kind == "c" else voxels).astype(np.float64)
        with np.errstate(all="ignore"):  # voxels may be any bits
            values = (values * self.slope + self.inter - self.low) / (self.high - self.low)
            return np.nan_to_num(np.clip(values, 0, 1)).astype(np.float32)


def window_of(stats: Json) -> tuple[float, float]:
    """The lowest and highest value to show, from an image's statistics; 0 and 1 where they give none.

    >>> window_of({"min": -5, "max": 7, "foreground": {"percentile_0_5": 1.0, "percentile_99_5": 4.0}})
    (1.0, 4.0)
    """
    foreground = stats.get("foreground")
    for table in (foreground if isinstance(foreground, dict) else {}, stats):
        for names in (("percentile_0_5", "percentile_99_5"), ("min", "max")):
            low, high = (_number(table.get(name)) for name in names)
            if low < high:
                return low, high
    return 0.0, 1.0


def _number(value: object) -> float:
    """A number of a manifest; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < HUGE else math.nan


def _shaded(plane: Plane, size: tuple[int, int], window: Window) -> bytes:
    brightness = np.clip(plane.means(size, window.shade), 0, 1)
    greys = np.rint(np.rint(brightness * (GREYS - 1)) * (255 / (GREYS - 1))).astype(np.uint8)
    return png(greys[0] if len(greys) == 1 else np.moveaxis(greys, 0, -1))


def _areas(plane: Plane, colours: LabelColours) -> bytes:
    return png(_colour_numbers(plane, colours), colours.palette)


def _outlines(plane: Plane, colours: LabelColours, is_dashed: bool) -> bytes:
    """The borders between labels, on a transparent ground."""
    labels = _colour_numbers(plane, colours)
    padded = np.pad(labels, LINE_PIXELS, mode="edge")
    height, width = labels.shape
    on_border = np.zeros(labels.shape, dtype=bool)
    for shift in range(2 * LINE_PIXELS + 1):
        on_border |= padded[shift : shift + height, LINE_PIXELS : LINE_PIXELS + width] != labels
        on_border |= padded[LINE_PIXELS : LINE_PIXELS + height, shift : shift + width] != labels
    if is_dashed:
        places = np.add.outer(np.arange(height), np.arange(width))
        on_border &= places // DASH_PIXELS % 2 == 0
    return png(np.where(on_border, labels, 0).astype(np.uint8), colours.palette)


def _colour_numbers(plane: Plane, colours: LabelColours) -> NDArray[np.uint8]:
    """The palette number of each pixel (height, width) of a label map."""
    record, view = plane.record, plane.view
    size = view.pixels(record, OUTLINE_SIDE)
    labels = np.zeros(size, dtype=np.int64)
    if len(plane.channels) == 1:
        labels[...] = np.rint(Scaling(record.slope, record.inter).apply(plane.nearest(size)[0]))
    else:  # channel by channel; where channels overlap, the last one is drawn
        for number in plane.channels:
            channel = dataclasses.replace(plane, channels=range(number, number + 1))
            labels[channel.nearest(size)[0] != 0] = number + 1
    extents_mm = view.size_mm(record)
    for axis, extent in enumerate(extents_mm):
        pixels, number = math.ceil(OUTLINE_SIDE * extent / max(extents_mm)), labels.shape[axis]
        labels = labels.take(np.arange(pixels) * number // pixels, axis)
    return colours.numbers(labels)


def png(pixels: NDArray[np.uint8], palette: Sequence[Colour] = ()) -> bytes:
    """A PNG file of pixels (rows, columns) of grey, or (rows, columns, 3) of red, green and blue.

    With a ``palette``, pixels (rows, columns) are indices into it.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    options: dict[str, Any] = {}
    if palette:
        image.putpalette([part for colour in palette for part in colour[:3]])
        options["transparency"] = bytes(opacity for *_, opacity in palette)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=COMPRESSION, **options)
    return stream.getvalue()
