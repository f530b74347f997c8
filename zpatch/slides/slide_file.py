"""A path -> a slide: its levels, how large a pixel is, and by which door it was opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.errors import OptionError, SourceError, ZpatchError
from zpatch.runtime.guarded_files import open_regular
from zpatch.slides import openslide_file, pixel_sizes, tiff_file, tiff_level
from zpatch.slides.slide_levels import Pair, SlideLevel, whole_factor
from zpatch.slides.tiles import TiledLevel

TIFF_SUFFIXES = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".qptiff", ".btf", ".tf8", ".lsm", ".stk")
OPENSLIDE_SUFFIXES = (".mrxs", ".vms", ".vmu", ".bif", ".dcm", ".czi", ".svslide")
SUFFIXES = TIFF_SUFFIXES + OPENSLIDE_SUFFIXES
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ASSOCIATED = ("label", "macro", "thumbnail")
_OF_SCANNERS = ("svs", "ndpi", "scn", "philips", "bif", "qpi", "avs", "indica")  # they name series themselves
_ANY_TIFF = "generic-tiff"  # OpenSlide's name for what it turns into red, green and blue


@dataclass(frozen=True, slots=True, eq=False)
class SlideFile:
    """A slide, or another TIFF image.

    Attributes:
        path: Its file.
        door: ``tifffile`` or ``openslide``.
        kind: The format, as its door calls it.
        levels: Finest first.
        mpp: Micrometres per pixel of the finest level along x and y; None if the file states none.
        plane_step: Micrometres between planes; 0 if the file states none.
        codec: How tiles are encoded.
        associated: Name, width and height of images beside it: label, macro, thumbnail.
        channel_axis: ``t`` if channels are time points, else ``c``.
        points: The number of time points in the file.
    """

    path: Path
    door: str
    kind: str
    levels: tuple[TiledLevel, ...]
    mpp: Pair | None
    plane_step: float = 0.0
    codec: str = "unknown"
    associated: tuple[tuple[str, int, int], ...] = ()
    channel_axis: str = "c"
    points: int = 1

    def factors(self, number: int) -> Pair:
        """By how much the pixels of a level are larger than those of the finest one, along x and y."""
        (_, width, height, _), (_, w, h, _) = self.levels[0].shape, self.levels[number].shape
        return whole_factor(width, w), whole_factor(height, h)

    def sizes(self, mpp: Pair) -> list[Pair]:
        """Micrometres per pixel of all levels, if the finest one has ``mpp``."""
        factors = [self.factors(number) for number in range(len(self.levels))]
        return [(mpp[0] * x, mpp[1] * y) for x, y in factors]

    def described(self, mpp: Pair | None) -> list[SlideLevel]:
        """All levels, for people."""
        sizes = [None] * len(self.levels) if mpp is None else [sum(each) / 2 for each in self.sizes(mpp)]
        return [
            SlideLevel(level.shape[1], level.shape[2], size)
            for level, size in zip(self.levels, sizes, strict=True)
        ]


def is_slide_file(path: Path) -> bool:
    """Whether a path is named as slides and TIFF files are."""
    return path.name.lower().endswith(SUFFIXES)


def open_slide(path: Path, axes: str | None = None, time: int | None = None) -> SlideFile:
    """Open a slide by tifffile, or by OpenSlide where it is of another format, or tifffile has no codec here.

    ``axes`` names the axes of a TIFF file whose own names are not t, c, z, y and x; ``time`` is the time
    point that is read. Raises SourceError for a file that neither reads, or whose library is missing.
    """
    mark = FileMark.of_voxels(path)
    if path.suffix.lower() not in OPENSLIDE_SUFFIXES and _start_of(path) in _TIFF_STARTS:
        try:
            return _by_tifffile(mark, axes, time)
        except tiff_file.NoCodecError as error:  # only: OpenSlide ends the process at some damaged files
            if slide := _else_by_openslide(mark):
                return slide
            raise error from None
        except ZpatchError:
            raise
        except Exception as error:  # whatever a damaged directory makes tifffile raise
            raise tiff_file.damaged_directory(path, error) from error
    if path.suffix.lower() in TIFF_SUFFIXES:
        raise SourceError(f"{path}: it is no TIFF file (its first bytes are of none); copy the file again")
    return _by_openslide(mark)


def _start_of(path: Path) -> bytes:
    with open(open_regular(path, follow=True), "rb") as file:
        return file.read(4)


def _else_by_openslide(mark: FileMark) -> SlideFile | None:
    """A slide that tifffile cannot read; None for what is no slide of a scanner, as a label map."""
    try:
        slide = _by_openslide(mark)
    except SourceError:
        return None
    return None if slide.kind == _ANY_TIFF else slide


def _by_openslide(mark: FileMark) -> SlideFile:
    return SlideFile(
        path=mark.path,
        door="openslide",
        kind=openslide_file.vendor_of(mark),
        levels=openslide_file.levels_of(mark),
        mpp=openslide_file.mpp_of(mark),
        associated=openslide_file.associated_of(mark),
    )


def _by_tifffile(mark: FileMark, axes: str | None, time: int | None) -> SlideFile:
    file = tiff_file.opened(mark)
    chosen = _main_series(file.series, mark.path)
    series = file.series[chosen]
    _check_whole(file.file, series, mark.path)
    pages = tiff_level.PageAxes.of(series, axes, mark.path)
    points = pages.count("t")
    _check_time(time, points, pages.count("c") * pages.samples, mark.path)
    point = time if points > 1 else None
    levels = [
        tiff_level.TiffLevel.of(file, mark, chosen, number, axes=axes, time=point)
        for number in range(len(series.levels))
    ]
    finest = levels[0]
    *mpp, step = _pixel_size(file.file, series, chosen)
    return SlideFile(
        path=mark.path,
        door="tifffile",
        kind=series.kind or "generic",
        levels=tuple(sorted((level for level in levels if _fits(level, finest)), key=_size, reverse=True)),
        mpp=(mpp[0], mpp[1]) if min(mpp) > 0 else None,
        plane_step=step,
        codec=tiff_file.codec_of(series.keyframe),
        associated=tuple(
            (each.name or f"series {n}", each.keyframe.imagewidth, each.keyframe.imagelength)
            for n, each in enumerate(file.series)
            if n != chosen
        ),
        channel_axis="t" if points > 1 and point is None else "c",
        points=points,
    )


def _check_time(time: int | None, points: int, channels: int, path: Path) -> None:
    """Refuse a time point that is not there, and channels of several time points of which none is chosen."""
    if time is not None and not 0 <= time < points:
        allowed = f"0 to {points - 1}" if points > 1 else "0"
        raise OptionError(f"{path}: time must be {allowed}, not {time}", option="time")
    if time is None and points > 1 and channels > 1:
        raise OptionError(
            f"{path} has {points} time points and {channels} channels; say time=N for one of 0 to "
            f"{points - 1}",
            option="time",
        )


def _fits(level: TiledLevel, finest: TiledLevel) -> bool:
    """Whether a level is one of the same image: of its channels, planes and type, and no larger."""
    (c, i, j, k), (channels, width, height, planes) = level.shape, finest.shape
    return (c, k, level.dtype) == (channels, planes, finest.dtype) and i <= width and j <= height


def _size(level: TiledLevel) -> int:
    """Pixels of a plane."""
    return level.shape[1] * level.shape[2]


def _check_whole(file: Any, series: Any, path: Path) -> None:
    """Refuse a file of which tifffile reads less than its description says, as its end is missing."""
    said = 0
    if file.is_imagej and series.kind != "imagej":
        said = int((file.imagej_metadata or {}).get("images", 0))
    if said > len(file.pages):
        raise SourceError(
            f"{path}: it is cut short: {len(file.pages)} of its {said} planes are there; copy the file again"
        )
    if not tiff_file.has_description(file.pages.first):
        raise SourceError(f"{path}: it is cut short, as its description is missing; copy the file again")


def _main_series(series: Sequence[Any], path: Path) -> int:
    """The series of the slide itself: the largest one that is no label, macro or thumbnail.

    A scanner calls them so; an only image of another program may have any name, as ``labels``.
    """
    if not series:
        raise SourceError(f"{path}: it holds no image that can be read; copy the file again")
    is_beside = [each.name.lower().startswith(_ASSOCIATED) for each in series]
    if all(is_beside) and series[0].kind not in _OF_SCANNERS:
        is_beside = [False] * len(series)
    sizes = {
        number: each.keyframe.imagewidth * each.keyframe.imagelength
        for number, each in enumerate(series)
        if not is_beside[number]
    }
    if not sizes:
        raise SourceError(
            f"{path}: it has associated images only ({', '.join(each.name for each in series)}), and not "
            f"the slide itself; copy the file again"
        )
    return max(sizes, key=lambda number: (sizes[number], -number))


def _pixel_size(file: Any, series: Any, number: int) -> tuple[float, float, float]:
    """Micrometres per pixel along x and y, and between planes; 0 for what is not known."""
    page, kind = series.keyframe, series.kind
    tags, text = getattr(page, "tags", {}), str(getattr(page, "description", ""))
    x, y, z = 0.0, 0.0, 0.0
    match kind:
        case "svs":
            x = y = pixel_sizes.of_aperio(text)
        case "philips":
            x, y = pixel_sizes.of_philips(text)
        case "ome":
            x, y, z = pixel_sizes.of_ome(_ome_pixels(file, number))
        case "imagej":
            notes = file.imagej_metadata or {}
            unit = str(notes.get("unit", ""))
            x, y = pixel_sizes.of_tags(tags, unit)
            z = pixel_sizes.micrometres(notes.get("spacing"), unit)
    if min(x, y) <= 0 and kind not in ("ome", "imagej"):
        x, y = pixel_sizes.of_tags(tags)
    return x, y, z


def _ome_pixels(file: Any, number: int) -> dict[str, Any]:
    """The attributes of the element Pixels of an image of OME-XML; empty where it cannot be parsed."""
    try:
        images = tiff_file.tifffile_module().xml2dict(file.ome_metadata)["OME"]["Image"]
        pixels = (images if isinstance(images, list | tuple) else [images])[number]["Pixels"]
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError):
        return {}
    return pixels if isinstance(pixels, dict) else {}


def slide_affine(slide: SlideFile, number: int, mpp: Pair | None) -> Any:
    """Pixel (I, J, K) of a level to micrometres, 4 x 4; to pixels of the finest level where ``mpp`` is None.

    The outer faces of all levels meet at the low end, where the world coordinate is minus half a pixel.
    """
    (x, y), (fx, fy) = mpp or (1.0, 1.0), slide.factors(number)
    affine = np.diag([x * fx, y * fy, slide.plane_step or 1.0, 1.0])
    affine[:2, 3] = x * (fx - 1) / 2, y * (fy - 1) / 2
    return affine
