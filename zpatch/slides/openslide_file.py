"""The door to openslide: slides in formats that tifffile does not read, tile by tile."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.errors import SourceError, one_line
from zpatch.geometry.boxes import Voxels
from zpatch.runtime.recent import Recent
from zpatch.slides.slide_levels import Pair
from zpatch.slides.tiles import Decoder, Four, TiledLevel, damaged_tile

KEPT_OPEN = 16  # slides, each with a cache of its own
FALLBACK_TILE = 512
LARGEST_TILE = 4096  # along an axis; any box can be read, so a larger one is not taken as a tile
WHITE = "FFFFFF"
_INSTALL = "install 'zpatch[openslide]'"


def openslide_module() -> Any:
    """openslide, imported when it is needed. Raises SourceError where it is missing."""
    try:
        import openslide
    except (ImportError, OSError) as error:
        raise SourceError(f"OpenSlide is missing ({one_line(error)}); {_INSTALL}") from None
    return openslide


_open: Recent[tuple[int, FileMark], Any] = Recent(KEPT_OPEN)


def opened(mark: FileMark) -> Any:
    """The open slide of a mark, one for each process. Raises SourceError for a file that is no slide."""

    def make() -> Any:
        mark.check(str(mark.path))
        module = openslide_module()
        try:
            return module.OpenSlide(mark.path)
        except module.OpenSlideUnsupportedFormatError:
            raise SourceError(
                f"{mark.path}: OpenSlide knows no such format; save it as TIFF or OME-Zarr"
            ) from None
        except module.OpenSlideError as error:
            raise SourceError(
                f"{mark.path}: OpenSlide cannot open it ({one_line(error)}); copy the slide again, with all "
                f"files that belong to it"
            ) from None

    return _open.get((os.getpid(), mark), make)


@dataclass(frozen=True, slots=True, eq=False)
class OpenSlideLevel(TiledLevel):
    """A level of a slide, RGB, as a grid of its tiles; pixels that were not scanned have its background."""

    number: int
    downsample: float
    background: tuple[int, int, int]

    def decoder(self) -> Decoder:
        """The function that decodes tiles (1, j, i, 3) at places (0, i, j, 0) of the grid."""
        opened(self.mark)
        return self._decode

    def _decode(self, place: Four, memory: Voxels) -> Voxels:
        _, i, j, _ = place
        _, width, height, _ = self.tile
        corner = round(i * width * self.downsample), round(j * height * self.downsample)
        slide, module = opened(self.mark), openslide_module()
        try:
            region = np.asarray(slide.read_region(corner, self.number, (width, height)))
        except module.OpenSlideError as error:
            _open.forget(lambda key: key[1] == self.mark)  # it stays in error once it was
            raise damaged_tile(self.path, place, f"cannot be read ({one_line(error)})") from None
        pixels, alpha = region[..., :3], region[..., 3:]
        if alpha.min() < 255:
            opacity = alpha.astype(np.float32) / 255
            blended = pixels * opacity + np.array(self.background, np.float32) * (1 - opacity)
            pixels = np.round(blended).astype(np.uint8)
        return np.ascontiguousarray(pixels[None])


def levels_of(mark: FileMark) -> tuple[OpenSlideLevel, ...]:
    """The levels of a slide, finest first."""
    slide = opened(mark)
    properties = slide.properties
    colour = bytes.fromhex(properties.get("openslide.background-color", WHITE))
    levels = []
    for number, (width, height) in enumerate(slide.level_dimensions):
        stated = [
            int(properties.get(f"openslide.level[{number}].tile-{side}", 0)) for side in ("width", "height")
        ]
        tile = [n if 0 < n <= LARGEST_TILE else FALLBACK_TILE for n in stated]
        levels.append(
            OpenSlideLevel(
                path=mark.path,
                mark=mark,
                number=number,
                shape=(3, width, height, 1),
                tile=(3, tile[0], tile[1], 1),
                downsample=float(slide.level_downsamples[number]),
                dtype=np.dtype(np.uint8),
                background=(colour[0], colour[1], colour[2]),
            )
        )
    return tuple(levels)


def mpp_of(mark: FileMark) -> Pair | None:
    """Micrometres per pixel of the finest level along x and y; None where they are not known."""
    properties = opened(mark).properties
    try:
        x, y = (float(properties[f"openslide.mpp-{axis}"]) for axis in "xy")
    except (KeyError, ValueError):
        return None
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def associated_of(mark: FileMark) -> tuple[tuple[str, int, int], ...]:
    """Name, width and height of the images beside the slide: label, macro, thumbnail."""
    return tuple((name, *image.size) for name, image in opened(mark).associated_images.items())


def vendor_of(mark: FileMark) -> str:
    """The format, as openslide calls it."""
    return str(opened(mark).properties.get("openslide.vendor", "unknown"))
