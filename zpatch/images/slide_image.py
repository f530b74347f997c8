"""A slide -> an opened image: one level of it, or that of some micrometres per pixel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

from zpatch.errors import OptionError
from zpatch.geometry.voxel_grid import VoxelGrid
from zpatch.images.opened_image import OpenedImage, OpenedSlide
from zpatch.resampling.interpolation import Interpolation
from zpatch.slides.slide_file import SlideFile, open_slide, slide_affine
from zpatch.slides.slide_levels import Pair, checked_mpp, format_mpp, level_for
from zpatch.slides.tiles import TiledLevel
from zpatch.sources.tiled_source import TiledSource
from zpatch.sources.voxel_source import VoxelSource
from zpatch.sources.voxel_sources import ArraySource


@dataclass(frozen=True, slots=True)
class SlideOptions:
    """What is read of a slide: ``mpp`` micrometres per pixel, or a ``level``; neither is the finest level.

    ``slide_mpp`` is that of the finest level, where its file states none or a wrong one.
    """

    mpp: float | Sequence[float] | None = None
    level: int | None = None
    slide_mpp: float | Sequence[float] | None = None

    def refuse_any(self, path: object) -> None:
        """Refuse options that are for slides, for an image that is none."""
        for name in ("mpp", "level", "slide_mpp"):
            if getattr(self, name) is not None:
                raise OptionError(f"{path}: {name}= is for slides and TIFF files", option=name)


def opened_slide(
    path: Path, axes: str | None, time: int | None, options: SlideOptions, *, of_labels: bool
) -> OpenedImage:
    """Open a slide. Pixels of the mpp that is asked for are resampled, from a finer level; labels are picked.

    Raises OptionError for an ``mpp`` of a slide whose own is unknown, and for a level that is not there.
    """
    file = open_slide(path, axes, time)
    known = file.mpp if options.slide_mpp is None else checked_mpp(options.slide_mpp, "slide_mpp")
    slide = OpenedSlide(file, known)
    if options.mpp is None:
        return _of_level(slide, _checked_level(file, 0 if options.level is None else options.level), time)
    if options.level is not None:
        raise OptionError("mpp= and level= both choose a level; say one of them", option="level")
    if known is None:
        raise OptionError(
            f"{path}: it does not state its micrometres per pixel, so that mpp= cannot be read; say "
            f"slide_mpp= with those of its finest level, or level= for one of its {len(file.levels)} levels",
            option="slide_mpp",
        )
    wanted = checked_mpp(options.mpp, "mpp")
    number, is_close = level_for(file.sizes(known), wanted, path)
    _, width, height, _ = file.levels[0].shape
    extent = known[0] * width, known[1] * height
    if any(want > size for want, size in zip(wanted, extent, strict=True)):
        raise OptionError(
            f"{path}: one pixel of mpp={format_mpp(wanted)} is larger than the slide, of {extent[0]:.4g} x "
            f"{extent[1]:.4g} micrometres; ask for less",
            option="mpp",
        )
    opened = _of_level(slide, number, time)
    return opened if is_close else _resampled(opened, wanted, of_labels=of_labels)


def _checked_level(file: SlideFile, number: int) -> int:
    if not isinstance(number, SupportsIndex) or not 0 <= number.__index__() < len(file.levels):
        raise OptionError(
            f"{file.path}: level must be 0 to {len(file.levels) - 1}, not {number!r}", option="level"
        )
    return number.__index__()


def _of_level(slide: OpenedSlide, number: int, time: int | None) -> OpenedImage:
    file = slide.file
    parts = [f"level {number}"] if number else []
    if file.points > 1 and file.channel_axis != "t":
        parts.append(f"time point {time} of {file.points}")
    return OpenedImage(
        _source(file.levels[number]),
        slide_affine(file, number, slide.mpp),
        path=file.path,
        unit="micrometer" if slide.mpp else None,
        channel_axis=file.channel_axis,
        part=", ".join(parts),
        slide=slide,
    )


def _source(level: TiledLevel) -> VoxelSource:
    mapped = level.mapped()
    return TiledSource(level) if mapped is None else ArraySource.of(mapped)


def _resampled(opened: OpenedImage, wanted: Pair, *, of_labels: bool) -> OpenedImage:
    _, i, j, k = opened.source.shape
    before, spacing = VoxelGrid((i, j, k), opened.affine), (*wanted, None)
    after = before.with_spacing(spacing)
    how = Interpolation("nearest" if of_labels else "linear", not of_labels, of_labels=of_labels)
    made = opened.resampled(after.shape, before.spacing_matrix(spacing), how)
    return dataclasses.replace(made, affine=after.affine)
