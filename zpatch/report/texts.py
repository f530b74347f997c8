"""The values of a report as text."""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from zpatch.geometry.affines import spacing_mm
from zpatch.records.image_record import ImageRecord

NAMES_SHOWN = 8

TIMES, DASH, MINUS = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MINUS SIGN}"

_UNITS = {"millimeter": "mm", "micrometer": "\N{MICRO SIGN}m", "meter": "m"}


def visible(value: object) -> object:
    r"""A value as text that shows all its characters, also control characters and changes of direction.

    >>> print(visible("a\u202eb"))
    a\u202eb
    """
    if hasattr(value, "__html__"):
        return value
    text = str(value)
    return text if text.isprintable() else "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def count_text(value: int) -> str:
    """An integer with its digits in groups of three, by narrow no-break spaces."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def number_text(value: object) -> str:
    """A number in four digits, or all digits of an integer; a dash for anything else.

    >>> number_text(0.123456), number_text(12), number_text(45678.9) == count_text(45679)
    ('0.1235', '12', True)
    """
    if not isinstance(value, int | float):
        return DASH
    is_long = isinstance(value, int) or 1e4 <= abs(value) < 1e9
    text = count_text(round(value)) if is_long else f"{value:.4g}"
    return text.replace("-", MINUS)


def plain_text(value: object) -> str:
    """A value of JSON as text.

    >>> plain_text([1, True, {"a": 2}])
    '1, yes, {"a": 2}'
    """
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(plain_text, value))
    if value is None or isinstance(value, bool):
        return {None: DASH, True: "yes", False: "no"}[value]
    return str(value)


def few_text(names: Sequence[str]) -> str:
    """The first eight of some names, and how many more there are.

    >>> few_text("abcdefghij")
    'a, b, c, d, e, f, g, h and 2 more'
    """
    more = f" and {count_text(len(names) - NAMES_SHOWN)} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def names_text(names: Iterable[str]) -> str:
    """Names in alphabetical order."""
    return ", ".join(sorted(names))


def ranges_text(ranges: NDArray[np.float64]) -> str:
    """The least and the greatest value along each axis, from an array (2, axes); equal values once.

    >>> ranges_text(np.array([[1.0, 2.0], [1.0, 2.5]])) == f"1 {TIMES} 2{DASH}2.5"
    True
    """
    return f" {TIMES} ".join(
        DASH.join(dict.fromkeys((number_text(low), number_text(high)))) for low, high in ranges.T.tolist()
    )


def channels_text(counts: Iterable[int]) -> str:
    """What follows the shapes of images with these numbers of channels; nothing for one channel.

    >>> channels_text([1, 3, 5]) == f" {TIMES} 3{DASH}5"
    True
    """
    several = sorted(n for n in counts if n > 1)
    return f" {TIMES} {DASH.join(map(str, dict.fromkeys((several[0], several[-1]))))}" if several else ""


def unit_text(unit: str | None) -> str:
    """A unit of length as its symbol, or as the record has it.

    >>> unit_text("micrometer"), unit_text("inch"), unit_text(None)
    ('µm', 'inch', '?')
    """
    return _UNITS.get(unit, unit) if isinstance(unit, str) else "?"


def shape_text(record: ImageRecord) -> str:
    """Extent along I, J, K in voxels, as text."""
    return f" {TIMES} ".join(map(str, record.spatial_shape))


def image_text(record: ImageRecord) -> str:
    """Kind, shape, voxel size, type, coarser levels and source file of an image."""
    channels, levels = record.shape_czyx[0], len(record.levels)
    word = "time points" if record.axes[0] == "t" else "channels"
    spacing = f" {TIMES} ".join(map(number_text, spacing_mm(record.affine_array)))
    described = [
        record.kind,
        shape_text(record) + (f" {TIMES} {channels} {word}" if channels > 1 else ""),
        f"{spacing} {unit_text(record.spatial_unit)}",
        np.dtype(record.dtype).name,
        *([f"{levels} coarser {'level' if levels == 1 else 'levels'}"] if levels else []),
        *([str(record.source.path)] if record.source else []),
    ]
    return " \N{MIDDLE DOT} ".join(described)


def bars_path(counts: NDArray[np.float64]) -> str:
    """The bars of a histogram as an SVG path: each is 1 wide, the tallest is 100 high.

    >>> bars_path(np.array([4.0, 1.0]))
    'M0 100V0.0H1V50.0H2V100Z'
    """
    heights = np.sqrt(counts)  # else the noise of air would dwarf all other bars
    heights *= 100 / max(float(heights.max(initial=0)), 1e-9)
    bars = "".join(f"V{100 - height:.1f}H{n + 1}" for n, height in enumerate(heights.tolist()))
    return f"M0 100{bars}V100Z"


def data_uri(png: bytes) -> str:
    """A PNG file as the URI of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def amount_text(record: ImageRecord, voxels: int) -> str:
    """The number of voxels, or their volume if the voxel size is in mm."""
    volume_ml = voxels * math.prod(spacing_mm(record.affine_array)) / 1000
    if record.spatial_unit != "millimeter" or not math.isfinite(volume_ml):
        return f"{count_text(voxels)} voxels"
    return f"{volume_ml:.3g} ml" if volume_ml < 1000 else f"{volume_ml:.0f} ml"


def skipped_text(record: ImageRecord) -> str:
    """How many voxels a prediction skipped, and their share; empty for none."""
    skipped, voxels = record.stats.get("skipped"), math.prod(record.spatial_shape)
    if not isinstance(skipped, int) or not 0 < skipped <= voxels:
        return ""
    return f"{count_text(skipped)} voxels ({skipped / voxels:.0%})"


def provenance_text(record: ImageRecord) -> str:
    """The network that made a prediction and the images that it was made from; empty for others."""
    if (made := record.provenance) is None:
        return ""
    inputs = ", ".join(f"{name} ({path or 'in memory'})" for name, path in made.inputs.items())
    return f"by {made.model}, from {inputs}"
