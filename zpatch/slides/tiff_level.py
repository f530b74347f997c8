"""A level of a series of a TIFF file: which page and which tile of it has a place of the grid."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.errors import DamageError, OptionError, SourceError, one_line
from zpatch.geometry.boxes import Voxels
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.slides.tiff_file import OpenPage, OpenTiff, check_decodes, opened
from zpatch.slides.tiles import Decoder, Four, TiledLevel, damaged_tile

MOST_TILE_BYTES = 2**30
ODD_TILE_PIXELS = 2**24  # in tiles of more, most must lie inside the image: else its size is damaged


@dataclass(frozen=True, slots=True)
class PageAxes:
    """Which page of a series, and which tile of it, has a place of the grid.

    Attributes:
        leading: Letters of the axes along which pages follow each other, of t, c and z.
        counts: The number of pages along each.
        samples: Channels of a page.
        is_planar: Whether a tile has one channel of a page, and not all.
    """

    leading: str
    counts: tuple[int, ...]
    samples: int
    is_planar: bool

    @classmethod
    def of(cls, series: Any, axes: str | None, path: Path) -> Self:
        """The axes of a series; ``axes`` are names for those that pages follow each other along."""
        frame = series.keyframe
        letters = series.axes[: len(series.axes) - len(frame.axes)].lower()
        counts = tuple(series.shape[: len(letters)])
        if axes is not None:
            letters = _chosen_axes(axes, series.axes.lower(), letters, path)
        elif "z" not in letters + frame.axes.lower() and len(set(letters) - set("tc")) == 1:
            letters = "".join(a if a in "tc" else "z" for a in letters)  # a stack whose axis has no name
        if not set(letters) <= set("tcz") or len(set(letters)) < len(letters):
            raise OptionError(
                f"{path}: its axes are {series.axes} {series.shape}; say axes= with one letter for each: y, "
                f"x, perhaps z, and perhaps c or t",
                option="axes",
            )
        samples = frame.samplesperpixel if "S" in frame.axes else 1
        return cls(letters, counts, samples, frame.planarconfig == 2 and samples > 1)

    def count(self, letter: str) -> int:
        """The number of pages along an axis."""
        return dict(zip(self.leading, self.counts, strict=True)).get(letter, 1)

    def page(self, place: dict[str, int]) -> int:
        """The number of the page at a place along t, c and z."""
        number = 0
        for letter, count in zip(self.leading, self.counts, strict=True):
            number = number * count + place[letter]
        return number


def _chosen_axes(axes: str, found: str, leading: str, path: Path) -> str:
    kept = axes.lower().replace("s", "")
    tail = found[len(leading) :].replace("s", "")
    if len(kept) != len(leading) + len(tail) or kept[len(leading) :] != tail:
        raise OptionError(
            f"{path}: axes={axes!r} does not fit its axes {found}; name each of them in the order of the "
            f"file, y and x last",
            option="axes",
        )
    return kept[: len(leading)]


@dataclass(frozen=True, slots=True, eq=False)
class TiffLevel(TiledLevel):
    """A level of a series, as a grid of its tiles or strips; one time point of it, or all as channels."""

    series: int
    number: int
    axes: PageAxes
    time: int | None

    @classmethod
    def of(
        cls, file: OpenTiff, mark: FileMark, series: int, number: int, *, axes: str | None, time: int | None
    ) -> Self:
        """The level of that number, 0 for the finest. Raises SourceError for pixels without a codec."""
        path, level = mark.path, file.series[series].levels[number]
        frame, pages = level.keyframe, PageAxes.of(level, axes, path)
        check_decodes(frame, path)
        _, depth, height, width, _ = frame.shaped
        points = 1 if time is not None else pages.count("t")
        samples = 1 if pages.is_planar else pages.samples
        channels = pages.count("c") * pages.samples * points
        if frame.is_tiled:
            tile = samples, frame.tilewidth, frame.tilelength, frame.tiledepth
        else:
            tile = samples, width, min(frame.rowsperstrip, height), 1
        planes = pages.count("z") if "z" in pages.leading else depth
        dtype = np.dtype(level.dtype).newbyteorder("=")
        tile_bytes = math.prod(tile) * dtype.itemsize
        most_pixels = max(ODD_TILE_PIXELS, 4 * width * height * depth)
        if tile_bytes > MOST_TILE_BYTES or math.prod(tile[1:]) > most_pixels:
            extent = " x ".join(map(str, tile[1:]))
            raise SourceError(
                f"{path}: its tiles of {extent} pixels take {format_bytes(tile_bytes)} each; write it anew "
                f"in smaller ones"
            )
        return cls(path, mark, (channels, width, height, planes), tile, dtype, series, number, pages, time)

    def mapped(self) -> Voxels | None:
        """The pixels (C, I, J, K), memory-mapped, where they lie in the file as they are; else None."""
        level = opened(self.mark).series[self.series].levels[self.number]
        frame, offset = level.keyframe, level.dataoffset
        is_plain = frame.compression == 1 and frame.predictor == 1 and frame.fillorder == 1
        is_plain &= frame.bitspersample == self.dtype.itemsize * 8 and not level.is_multifile
        if offset is None or not is_plain or not frame.is_contiguous:
            return None
        shape, letters = self._memory_axes(frame)
        stored = self.dtype.newbyteorder(level.parent.byteorder)
        if offset + math.prod(shape) * stored.itemsize > os.path.getsize(self.path):
            raise SourceError(f"{self.path}: it ends before its last pixel; copy the file again")
        array: Voxels = np.memmap(self.path, mode="r", dtype=stored, offset=offset, shape=shape)
        if "t" in letters and self.time is not None:
            array = array[(slice(None),) * letters.index("t") + (self.time,)]
            letters = letters.replace("t", "")
        return _as_four(array, letters)

    def _memory_axes(self, frame: Any) -> tuple[tuple[int, ...], str]:
        _, depth, height, width, _ = frame.shaped
        inner = {"z": depth, "y": height, "x": width, "s": self.axes.samples}
        order = "szyx" if self.axes.is_planar else "zyxs"
        kept = [a for a in order if a not in "zs" or inner[a] > 1]
        return (*self.axes.counts, *(inner[a] for a in kept)), self.axes.leading + "".join(kept)

    def decoder(self) -> Decoder:
        """The function that decodes tiles."""
        return partial(self._decode, opened(self.mark))

    def _decode(self, file: OpenTiff, place: Four, memory: Voxels) -> Voxels | None:
        number, segment = self._segment(place)
        try:
            page = file.page(self.series, self.number, number)
            offset, count = page.extent(segment)
        except IndexError:
            raise damaged_tile(self.path, place, "is in no list of tiles") from None
        except Exception as error:
            raise damaged_tile(
                self.path, place, f"is on a page that cannot be read ({one_line(error)})"
            ) from None
        if not count:
            return None
        if offset < 0 or count < 0:
            raise damaged_tile(self.path, place, "is nowhere in the file")
        try:
            data = page.read(offset, count)
        except OSError as error:  # of the disk, and not of this tile
            raise DamageError(f"{self.path}: it cannot be read ({one_line(error)}); try again") from None
        if len(data) < count:
            raise damaged_tile(self.path, place, f"has {len(data)} of its {count} bytes")
        if page.is_cut_short(data):
            raise damaged_tile(self.path, place, "is cut short: it has no end of JPEG")
        return memory if page.decode_into(memory, data) else self._decoded(page, data, segment, place)

    def _segment(self, place: Four) -> tuple[int, int]:
        """The number of the page of a tile, and its number there."""
        c, i, j, k = place
        (_, *shape), (_, *tile) = self.shape, self.tile
        width, height, planes = -(-shape[0] // tile[0]), -(-shape[1] // tile[1]), -(-shape[2] // tile[2])
        of_page = self.axes.samples if self.axes.is_planar else 1
        point, plane = divmod(c, self.axes.count("c") * of_page) if self.time is None else (self.time, c)
        channel, sample = divmod(plane, of_page)
        is_stacked = "z" in self.axes.leading
        page = self.axes.page({"t": point, "c": channel, "z": k if is_stacked else 0})
        depth, within = (1, 0) if is_stacked else (planes, k)
        return page, ((sample * depth + within) * height + j) * width + i

    def _decoded(self, page: OpenPage, data: bytes, segment: int, place: Four) -> Voxels:
        try:
            voxels = page.decode(data, segment)
        except MemoryError:
            raise
        except Exception as error:  # each codec has errors of its own
            raise damaged_tile(self.path, place, f"cannot be decoded ({one_line(error)})") from None
        c, i, j, k = self.tile
        if voxels is None or voxels.shape != (k, j, i, c):
            raise damaged_tile(self.path, place, "has another size than its page states")
        return np.ascontiguousarray(voxels, dtype=self.dtype)


def _as_four(array: Any, letters: str) -> Voxels | None:
    """An array with axes of some letters as a view (C, I, J, K); None where no view is."""
    channels = [a for a in letters if a in "tcs"]
    if len(channels) > 1:
        return None
    order = [letters.index(a) for a in (*channels, "x", "y") if a in letters]
    voxels: Voxels = array.transpose([*order, *([letters.index("z")] if "z" in letters else [])])
    voxels = voxels if "z" in letters else voxels[..., None]
    return voxels if channels else voxels[None]
