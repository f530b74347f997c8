"""The labels of label maps: their names, how many voxels each has, and one colour each for a whole report."""

from __future__ import annotations

import colorsys
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.records.image_record import ImageRecord
from zpatch.report.planes import parts_of

COLOURS = 254  # of an 8-bit palette, without the transparent colour 0

Colour = tuple[int, int, int, int]  # red, green, blue and opacity, 0 to 255


@dataclass(frozen=True, slots=True)
class Label:
    """One label of a label map: its value, its name, and the number of its voxels."""

    value: int
    name: str
    voxels: int


def labels_of(record: ImageRecord) -> list[Label]:
    """The labels of a label map except 0, by value, as far as the manifest's statistics give them.

    If the map shows several channels at once, each channel is a label.
    """
    counts: dict[int, int] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # a manifest may say anything
        counts = {int(value): int(count) for value, count in record.stats["labels"].items()}
    found = [(value, n) for value, n in sorted(counts.items()) if max(abs(value), abs(n)) < 2**63]
    if len(map_channels(record)) > 1:
        return [Label(channel + 1, f"channel {channel + 1}", voxels) for channel, voxels in found]
    return [Label(value, str(value), voxels) for value, voxels in found if value]


def map_channels(record: ImageRecord) -> range:
    """The channels of a label map that are drawn together: all, or the middle volume of a time series."""
    parts = parts_of(record)
    return parts[len(parts) // 2].channels


class LabelColours:
    """A colour for each label value of a cohort, the same in all pictures; value 0 is transparent.

    >>> LabelColours([2, 0, 1, 2]).of(1)
    '#f59e29'
    """

    def __init__(self, values: Iterable[int]) -> None:
        self._values = np.array(sorted({*values} - {0}), dtype=np.int64)

    @cached_property
    def palette(self) -> list[Colour]:
        """The colours by number; number 0 is transparent."""
        count = min(max(len(self._values), 1), COLOURS)
        return [(0, 0, 0, 0), *(_colour(number) for number in range(count))]

    def numbers(self, labels: NDArray[Any]) -> NDArray[np.uint8]:
        """The palette number of each label value. Beyond 254 values, colours repeat."""
        ranks = np.searchsorted(self._values, labels)
        return np.where(labels == 0, 0, 1 + ranks % (len(self.palette) - 1)).astype(np.uint8)

    def of(self, value: int) -> str:
        """The colour of a label value, as CSS writes it."""
        red, green, blue, _ = self.palette[int(self.numbers(np.array(value)))]
        return f"#{red:02x}{green:02x}{blue:02x}"


def _colour(number: int) -> Colour:
    """Hues a golden angle apart: neighbouring numbers differ most, and no hue repeats."""
    hue, lightness = (0.096 + number * 0.381966) % 1, (0.56, 0.68, 0.46)[number // 8 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.91))
    return red, green, blue, 255
