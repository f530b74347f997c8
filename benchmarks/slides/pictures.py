"""Slides as Aperio's scanners write them, of tiles of a real histology picture.

Some hundred different tiles are encoded once, and their bytes are written again and again at random: so a
slide of any size is made in seconds, and to read it is the work of a real one.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE, FACTOR, LEVELS = 256, 4, 3
TILES, QUALITY = 300, 80
NOISE = 3.0  # of a camera, so that no two tiles compress alike
MPP = 0.25
NAME = "slide.svs"

Size = tuple[int, int]


def slide(folder: Path, size: Size) -> Path:
    """A slide of that width and height, with three levels and a thumbnail; made once."""
    path = folder / f"slide-{size[0]}-{size[1]}" / NAME
    if not path.exists():
        partial = path.parent.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial / NAME, size)
        partial.rename(path.parent)
    return path


def _write(path: Path, size: Size) -> None:
    import tifffile

    tiles, thumbnail = _tiles(), _picture()[:384]
    options: Any = {"compression": "jpeg", "metadata": None, "software": None}
    about = f"Aperio Image Library v12.0.15\n{size[0]}x{size[1]}"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(LEVELS):
            width, height = (n // FACTOR**level for n in size)
            text = (
                f"{about} [0,0 {size[0]}x{size[1]}] ({TILE}x{TILE}) -> {width}x{height} JPEG/RGB Q={QUALITY}"
            )
            file.write(
                _chosen(tiles, (width, height), seed=level),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                description=f"{text}|AppMag = 40|MPP = {MPP}",
                **options,
            )
            if not level:
                text = f"{about} -> {thumbnail.shape[1]}x{thumbnail.shape[0]}"
                file.write(thumbnail, photometric="rgb", rowsperstrip=16, description=text, **options)


def _chosen(tiles: list[bytes], size: Size, seed: int) -> Iterator[bytes]:
    count = -(-size[0] // TILE) * -(-size[1] // TILE)
    for number in np.random.default_rng(seed).integers(0, len(tiles), count):
        yield tiles[number]


def _picture() -> NDArray[np.uint8]:
    """A stained tissue section, (512, 512, 3), which scikit-image ships."""
    data: Any = importlib.import_module("skimage.data")
    picture: NDArray[np.uint8] = data.immunohistochemistry()
    return picture


def _tiles() -> list[bytes]:
    """Encoded tiles of the picture: windows of it, turned and mirrored, with noise."""
    import imagecodecs

    picture, rng = _picture(), np.random.default_rng(0)
    tiles = []
    for number in range(TILES):
        y, x = rng.integers(0, np.subtract(picture.shape[:2], TILE) + 1)
        window = np.rot90(picture[y : y + TILE, x : x + TILE], number % 4)[:, :: 1 - 2 * (number // 4 % 2)]
        noisy = np.clip(window + rng.normal(0, NOISE, window.shape), 0, 255).astype(np.uint8)
        tiles.append(
            bytes(
                imagecodecs.jpeg8_encode(
                    noisy, level=QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
                )
            )
        )
    return tiles
