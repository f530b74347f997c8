"""Planes of an image, tile by tile -> a tiled, pyramidal OME-TIFF, which is never in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.geometry.boxes import Voxels
from zpatch.runtime.whole_file import whole_file
from zpatch.slides.slide_levels import Pair
from zpatch.slides.tiff_file import tifffile_module
from zpatch.slides.tiles import Four

TILE = 512
COLOURS = (3, 4)  # channels that are written as one RGB or RGBA page
BIG_BYTES = 2**31  # of pixels: offsets of a classic TIFF end at 4 GiB

# (level, channel or None for all, plane, first row, stop) -> pixels (rows, width), or (rows, width, channels)
ReadRows = Callable[[int, int | None, int, int, int], Voxels]


@dataclass(frozen=True, slots=True)
class TiffImage:
    """What is written: the shape (C, I, J, K) of each level, finest first, and how large a pixel is.

    ``mpp`` are micrometres per pixel along x and y, ``plane_step`` those between planes; None and 0 for
    unknown.
    """

    levels: Sequence[Four]
    dtype: np.dtype[Any]
    mpp: Pair | None = None
    plane_step: float = 0.0

    @property
    def is_colour(self) -> bool:
        """Whether channels are the colours of one page."""
        return self.dtype == np.uint8 and self.levels[0][0] in COLOURS

    @property
    def metadata(self) -> dict[str, Any]:
        """That of OME, as tifffile takes it."""
        metadata: dict[str, Any] = {"axes": "ZYXS" if self.is_colour else "CZYX"}
        if self.mpp is not None:
            for axis, size in zip("XY", self.mpp, strict=True):
                metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "µm"}
        if self.plane_step:
            metadata |= {"PhysicalSizeZ": self.plane_step, "PhysicalSizeZUnit": "µm"}
        return metadata

    def stored_shape(self, level: int) -> tuple[int, ...]:
        """The shape of a level along the axes of its metadata."""
        c, i, j, k = self.levels[level]
        return (k, j, i, c) if self.is_colour else (c, k, j, i)


def write_ome_tiff(path: Path, image: TiffImage, read_rows: ReadRows) -> None:
    """Write an image, deflated without loss; rows of tiles are read one after the other.

    The file appears whole or not at all. Coarser levels are in SubIFDs, as OME-TIFF has them.
    """
    size = math.prod(image.levels[0]) * image.dtype.itemsize
    with whole_file(path) as partial:
        module = tifffile_module()
        with module.TiffWriter(partial, bigtiff=size > BIG_BYTES, ome=True) as file:
            for level in range(len(image.levels)):
                file.write(
                    _tiles(image, level, read_rows),
                    shape=image.stored_shape(level),
                    dtype=image.dtype,
                    tile=(TILE, TILE),
                    compression="zlib",
                    photometric="rgb" if image.is_colour else "minisblack",
                    subifds=len(image.levels) - 1 if level == 0 else None,
                    subfiletype=1 if level else 0,
                    metadata=None if level else image.metadata,
                    **_resolution(image, level),
                )


def _resolution(image: TiffImage, level: int) -> dict[str, Any]:
    if image.mpp is None:
        return {}
    (_, width, height, _), (_, i, j, _) = image.levels[0], image.levels[level]
    x, y = (1e4 / (mpp * n / m) for mpp, n, m in zip(image.mpp, (width, height), (i, j), strict=True))
    return {"resolution": (x, y), "resolutionunit": "CENTIMETER"}


def _tiles(image: TiffImage, level: int, read_rows: ReadRows) -> Iterator[Voxels]:
    """The tiles of a level in the order of the file, all of one size."""
    channels, width, height, planes = image.levels[level]
    pages = [(None, z) for z in range(planes)]
    if not image.is_colour:
        pages = [(c, z) for c in range(channels) for z in range(planes)]  # type: ignore[misc]
    extent = (TILE, TILE, channels) if image.is_colour else (TILE, TILE)
    for channel, plane in pages:
        for first in range(0, height, TILE):
            rows = read_rows(level, channel, plane, first, min(first + TILE, height))
            for start in range(0, width, TILE):
                tile = np.zeros(extent, image.dtype)
                part = rows[:, start : start + TILE]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile
