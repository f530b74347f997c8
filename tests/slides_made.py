"""Slides and TIFF files as scanners and other programs write them, of a real histology picture."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import skimage.data
import tifffile
from numpy.typing import NDArray

Pixels = NDArray[Any]

WIDTH, HEIGHT = 1900, 1300
SMALL = 301, 207  # for files of which every pixel is read many times
NDPI_FORMAT, NDPI_LENS, NDPI_FOCUS, NDPI_STARTS = 65420, 65421, 65424, 65426
APERIO = "Aperio Image Library v12.0.15\r\n{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=90"
SCN = """<?xml version="1.0"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c"><image name="slide">
<pixels sizeX="{width}" sizeY="{height}">{levels}</pixels></image></collection></scn>"""


@functools.cache
def picture(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """Stained tissue (height, width, 3), tiled by mirroring."""
    one = skimage.data.immunohistochemistry()
    down, right = (-(-n // m) for n, m in zip((height, width), one.shape, strict=False))
    rows = [one if n % 2 == 0 else one[:, ::-1] for n in range(right)]
    row = np.concatenate(rows, axis=1)
    whole = np.concatenate([row if n % 2 == 0 else row[::-1] for n in range(down)])
    cut: NDArray[np.uint8] = np.ascontiguousarray(whole[:height, :width])
    cut.flags.writeable = False
    return cut


def small() -> NDArray[np.uint8]:
    """A small part of the picture."""
    return picture(*SMALL)


def halved(pixels: Pixels, factor: int = 2) -> Pixels:
    """Every other pixel: a coarser level, without its border where it is odd."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    mean = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, -1)
    return mean.mean(axis=(1, 3)).round().astype(pixels.dtype).reshape(height, width, *pixels.shape[2:])


def write_svs(
    path: Path,
    pixels: Pixels,
    *,
    mpp: float | None = 0.5,
    levels: Sequence[int] = (2, 8),
    tile: int = 128,
    compression: str = "jpeg",
    associated: bool = True,
) -> Path:
    """A slide as Aperio writes it: the finest level, a thumbnail in strips, coarser levels, label, macro."""
    height, width = pixels.shape[:2]
    noted = "" if mpp is None else f"|AppMag = 20|MPP = {mpp}"
    text = APERIO.format(width=width, height=height) + noted
    tiled: dict[str, Any] = {"tile": (tile, tile), "compression": compression, "photometric": "rgb"}
    beside: dict[str, Any] = {"compression": "jpeg", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, description=text, metadata=None, **tiled)
        if levels or associated:
            file.write(halved(pixels, 8), description=text, rowsperstrip=16, **beside)
        for factor in levels:
            file.write(halved(pixels, factor), description=text, metadata=None, **tiled)
        if associated:
            label = np.full((60, 50, 3), 200, np.uint8)
            for name, kind in (("label", 1), ("macro", 9)):
                file.write(label, description=f"Aperio {name} 50x60", subfiletype=kind, **beside)
    return path


def write_ndpi(path: Path, pixels: Pixels, *, mpp: float = 0.5, restart: int = 4) -> Path:
    """As Hamamatsu writes it: each level one JPEG stream with restart markers, offsets of 64 bits, a macro.

    ``restart`` is how many blocks of 8 x 8 pixels are between two markers; its size is cut to whole tiles.
    """
    size = 1e4 / mpp
    height, width = pixels.shape[:2]
    pixels = pixels[: height // 32 * 32, : width // (32 * restart) * 32 * restart]
    with tifffile.TiffWriter(path) as file:
        for number, factor in enumerate((1, 4)):
            level = halved(pixels, factor) if number else pixels
            _write_ndpi_page(file, level, 20.0 / factor, size / factor, restart)
        _write_ndpi_page(file, pixels[:40, : 16 * restart], -1.0, size, restart)
    _as_ndpi(path)
    return path


def _write_ndpi_page(file: Any, pixels: Pixels, lens: float, size: float, restart: int) -> None:
    pyvips = pytest.importorskip("pyvips")
    image = pyvips.Image.new_from_array(np.ascontiguousarray(pixels), interpretation="srgb")
    data = image.jpegsave_buffer(Q=90, subsample_mode="off", restart_interval=restart, keep="none")
    starts = [n + 2 for n in range(len(data) - 1) if data[n] == 0xFF and 0xD0 <= data[n + 1] <= 0xD7]
    scan = data.index(b"\xff\xda")
    starts = [scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big"), *starts]
    tags = [
        (271, 2, None, "Hamamatsu", True),
        (NDPI_FORMAT, 4, 1, 1, True),
        (NDPI_LENS, 11, 1, lens, True),
        (NDPI_FOCUS, 9, 1, 0, True),
        (NDPI_STARTS, 4, len(starts), starts, True),
    ]
    file.write(
        iter([data]),
        shape=pixels.shape,
        dtype=np.uint8,
        compression="jpeg",
        photometric="ycbcr",
        subsampling=(1, 1),
        rowsperstrip=len(pixels),
        resolution=(size, size),
        resolutionunit="CENTIMETER",
        extratags=tags,
        metadata=None,
    )


def _as_ndpi(path: Path) -> None:
    """Put directories of a classic TIFF anew behind its end, with the upper halves of offsets after them."""
    data = bytearray(path.read_bytes())
    at, places = struct.unpack_from("<I", data, 4)[0], []
    while at:
        (count,) = struct.unpack_from("<H", data, at)
        places.append((count, bytes(data[at + 2 : at + 2 + 12 * count])))
        (at,) = struct.unpack_from("<I", data, at + 2 + 12 * count)
    data += b"\0" * (len(data) % 2)
    link = 4
    for count, tags in places:
        struct.pack_into("<Q", data, link, len(data))
        link = len(data) + 2 + 12 * count
        data += struct.pack("<H", count) + tags + bytes(8 + 4 * count)
    path.write_bytes(data)


def write_scn(path: Path, pixels: Pixels) -> Path:
    """As Leica writes it: levels are named in XML."""
    height, width = pixels.shape[:2]
    named = "".join(f'<dimension r="{n}" ifd="{n}"/>' for n in range(2))
    text = SCN.format(width=width, height=height, levels=named)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, level in enumerate((pixels, halved(pixels, 4))):
            size = 2e4 / 4**number
            file.write(
                level,
                description=text if number == 0 else None,
                tile=(128, 128),
                compression="jpeg",
                photometric="rgb",
                resolution=(size, size),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def write_ome(
    path: Path,
    pixels: Pixels,
    axes: str,
    *,
    levels: Sequence[int] = (2, 4),
    size: float | Sequence[float] = 0.5,
    unit: str = "µm",
    **options: Any,
) -> Path:
    """An OME-TIFF with its levels in SubIFDs; ``pixels`` have the axes that are named."""
    x, y = size if isinstance(size, Sequence) else (size, size)
    noted = {"axes": axes, "PhysicalSizeX": x, "PhysicalSizeY": y}
    noted |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    step = tuple(slice(None) for _ in axes)
    down = [slice(None, None, 2) if a in "YX" else all_ for a, all_ in zip(axes, step, strict=True)]
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as file:
        given: dict[str, Any] = {"tile": (64, 80), "compression": "zlib", **options}
        given["photometric"] = "rgb" if axes[-1] == "S" else "minisblack"
        file.write(pixels, subifds=len(levels), metadata=noted, **given)
        for _ in levels:
            pixels = pixels[tuple(down)]
            file.write(pixels, subfiletype=1, **given)
    return path


def write_vips(path: Path, pixels: Pixels, **options: Any) -> Path:
    """As libvips writes it."""
    pyvips = pytest.importorskip("pyvips")
    image = pyvips.Image.new_from_array(pixels, interpretation="srgb").copy(xres=2000, yres=2000)
    image.tiffsave(str(path), tile=True, tile_width=128, tile_height=128, **options)
    return path


def of_channels(planes: int = 3, channels: int = 2) -> NDArray[np.uint16]:
    """Sixteen bits, (T, C, Z, Y, X), no two planes alike."""
    first = small()[:, :, 0].astype(np.uint16)
    made = [[[first * 7 + 1000 * t + 100 * c + 10 * z for z in range(planes)] for c in range(channels)]
            for t in range(2)]  # fmt: skip
    return np.array(made, np.uint16)


# name: (how it is written, how the pixels of tifffile are turned into (C, I, J, K))
Write = Callable[[Path], Any]


@dataclass(frozen=True)
class Made:
    """How a file is written, and the axes of what tifffile reads of it, without those of length one."""

    write: Write
    axes: str
    suffix: str = ".tif"
    options: tuple[tuple[str, Any], ...] = ()

    def voxels(self, path: Path, level: int = 0) -> Pixels:
        """What tifffile reads, as (C, I, J, K)."""
        with tifffile.TiffFile(path) as file:
            return self.turned(file.series[0].levels[level].asarray())

    def turned(self, found: Pixels) -> Pixels:
        """An array with these axes as (C, I, J, K)."""
        order = [self.axes.index(letter) for letter in "TCSXYZ" if letter in self.axes]
        turned = found.transpose(order)
        turned = turned if "Z" in self.axes else turned[..., None]
        spatial = turned.shape[-3:]
        return turned.reshape(-1, *spatial)


def plain(pixels: Callable[[], Pixels] = small, axes: str = "YXS", **options: Any) -> Made:
    """A file that ``tifffile.imwrite`` writes."""
    return Made(lambda path: tifffile.imwrite(path, pixels(), **options), axes)


def _grey(dtype: str = "uint8") -> Callable[[], Pixels]:
    return lambda: small()[:, :, 1].astype(dtype)


def _sparse(path: Path) -> None:
    """Tiles of no bytes in the middle, as scanners write where they did not scan."""
    pixels = small().copy()
    pixels[64:128, 64:192] = 0
    tiles = [pixels[y : y + 64, x : x + 64] for y in range(0, 207, 64) for x in range(0, 301, 64)]
    padded = [np.pad(t, [(0, 64 - t.shape[0]), (0, 64 - t.shape[1]), (0, 0)]) for t in tiles]
    encoded = [imagecodecs.zlib_encode(t) if t.any() else b"" for t in padded]
    tifffile.imwrite(
        path, iter(encoded), shape=pixels.shape, dtype=np.uint8, tile=(64, 64), compression="zlib",
        photometric="rgb",
    )  # fmt: skip


def _rgba() -> Pixels:
    alpha = np.where(small()[:, :, :1] > 120, 255, 40).astype(np.uint8)
    return np.concatenate([small(), alpha], axis=2)


_TILED: dict[str, Any] = {"tile": (64, 80), "photometric": "rgb"}
_MADE: dict[str, Made] = {
    **{f"tiles {c}": plain(compression=c, **_TILED) for c in ("jpeg", "jpeg2000", "zlib", "lzw", "zstd")},
    "tiles none": plain(**_TILED),
    "tiles webp": plain(compression="webp", compressionargs={"level": 101}, **_TILED),
    "tiles packbits": plain(compression="packbits", **_TILED),
    "tiles lerc": plain(_grey("float32"), "YX", compression="lerc", tile=(64, 64)),
    "tiles of 16": plain(compression="zlib", tile=(16, 16), photometric="rgb"),
    "one tile": plain(compression="zlib", tile=(320, 320), photometric="rgb"),
    "predictor": plain(compression="zlib", predictor=True, **_TILED),
    "strips zlib": plain(compression="zlib", rowsperstrip=10, photometric="rgb"),
    "strips jpeg": plain(compression="jpeg", rowsperstrip=16, photometric="rgb"),
    "one strip": plain(compression="zlib", rowsperstrip=207, photometric="rgb"),
    "contiguous": plain(photometric="rgb"),
    "contiguous strips": plain(photometric="rgb", rowsperstrip=16),
    "big-endian": plain(_grey("uint16"), "YX", byteorder=">"),
    "big-endian tiles": plain(_grey("uint16"), "YX", byteorder=">", tile=(64, 64), compression="zlib"),
    "big": plain(bigtiff=True, compression="jpeg", **_TILED),
    "planar": plain(lambda: np.moveaxis(small(), -1, 0), "SYX", planarconfig="separate", photometric="rgb",
                    tile=(64, 80), compression="zlib"),
    "planar contiguous": plain(lambda: np.moveaxis(small(), -1, 0), "SYX", planarconfig="separate",
                               photometric="rgb"),
    "rgba": plain(_rgba, compression="zlib", extrasamples=["unassalpha"], **_TILED),
    "sixteen bits": plain(lambda: small().astype(np.uint16) * 200, compression="zlib", **_TILED),
    "float32": plain(_grey("float32"), "YX", compression="zlib", predictor=True, tile=(64, 64)),
    "float16": plain(_grey("float16"), "YX", compression="zlib", tile=(64, 64)),
    "int8": plain(lambda: small()[:, :, 1].astype(np.int8), "YX", tile=(64, 64)),
    "one bit": plain(lambda: small()[:, :, 1] > 120, "YX", photometric="minisblack", rowsperstrip=16),
    "one bit tiles": plain(lambda: small()[:, :, 1] > 120, "YX", tile=(64, 64), compression="packbits"),
    "stack": plain(lambda: of_channels()[0, 0], "ZYX", photometric="minisblack"),
    "stack of strips": plain(lambda: of_channels()[0, 0], "ZYX", photometric="minisblack",
                             compression="zlib", rowsperstrip=32),
    "colour stack": plain(lambda: np.stack([small(), small()[::-1]]), "ZYXS", metadata={"axes": "ZYXS"},
                          compression="zlib", **_TILED),
    "deep tiles": plain(lambda: of_channels()[0, 0], "ZYX", tile=(2, 64, 64), volumetric=True,
                        photometric="minisblack", compression="zlib"),
    "shaped channels": plain(lambda: of_channels()[0], "CZYX", metadata={"axes": "CZYX"}, tile=(64, 64),
                             photometric="minisblack", compression="zlib"),
    "imagej": plain(lambda: of_channels()[0].swapaxes(0, 1), "ZCYX", imagej=True,
                    metadata={"axes": "ZCYX", "spacing": 2.0, "unit": "um"}, resolution=(4.0, 2.0)),
    "imagej compressed": plain(lambda: of_channels()[0].swapaxes(0, 1), "ZCYX", imagej=True,
                               compression="zlib", metadata={"axes": "ZCYX"}),
    "time": plain(lambda: of_channels()[:, 0], "TZYX", metadata={"axes": "TZYX"}, tile=(64, 64),
                  photometric="minisblack", compression="zlib"),
    "sparse": Made(_sparse, "YXS"),
    "svs": Made(lambda path: write_svs(path, small(), tile=64), "YXS", ".svs"),
    "svs jpeg2000": Made(lambda path: write_svs(path, small(), tile=64, compression="jpeg2000"), "YXS",
                         ".svs"),
    "svs alone": Made(lambda path: write_svs(path, small(), levels=(), associated=False), "YXS", ".svs"),
    "ndpi": Made(lambda path: write_ndpi(path, small()), "YXS", ".ndpi"),
    "scn": Made(lambda path: write_scn(path, small()), "YXS", ".scn"),
    "ome colours": Made(lambda path: write_ome(path, small(), "YXS", levels=(2, 4)), "YXS", ".ome.tif"),
    "ome channels": Made(lambda path: write_ome(path, of_channels()[0], "CZYX"), "CZYX", ".ome.tif"),
    "ome channels last": Made(lambda path: write_ome(path, of_channels()[0].swapaxes(0, 1), "ZCYX"), "ZCYX",
                              ".ome.tif"),
    "ome time": Made(lambda path: write_ome(path, of_channels()[:, :1], "TCZYX"), "TZYX", ".ome.tif"),
    "ome flat": Made(lambda path: write_ome(path, of_channels()[0, :, 0], "CYX", compression=None), "CYX",
                     ".ome.tif"),
    **{f"vips {c}": Made(lambda path, c=c: write_vips(path, small(), compression=c, pyramid=True), "YXS")
       for c in ("jpeg", "deflate", "lzw", "none")},
    "vips subifds": Made(lambda path: write_vips(path, small(), compression="jpeg", pyramid=True,
                                                 subifd=True), "YXS"),
    "vips big": Made(lambda path: write_vips(path, small(), compression="deflate", bigtiff=True,
                                             predictor="horizontal"), "YXS"),
}  # fmt: skip
MADE = _MADE


def write(name: str, folder: Path) -> tuple[Path, Made]:
    """A file of that name, and how it was made."""
    made = MADE[name]
    path = folder / (name.replace(" ", "_") + made.suffix)
    made.write(path)
    return path, made


def number_of_tiles(length: int, tile: int) -> int:
    return math.ceil(length / tile)
