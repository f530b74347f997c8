"""Where there is tissue on a slide: a small label map that lies over it."""

from __future__ import annotations

from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.images.image import Image, LabelMap, ScalarImage
from zpatch.images.opened_image import OpenedImage
from zpatch.slides.tissue import tissue_of
from zpatch.sources.voxel_sources import ArraySource

TISSUE_MPP = 8.0
MOST_PIXELS = 2**26  # of the level that is read, at once
UNSTATED_WIDTH = 4096  # of the level that is read where no micrometres per pixel are known


def tissue_map(slide: Image) -> LabelMap:
    """A label map of a slide: 1 where there is tissue, 0 on glass; on the grid of its level nearest 8 µm.

    Tissue is what has a saturation above Otsu's threshold, and all that it surrounds. Of a slide that does
    not state its micrometres per pixel, the level is taken whose width is nearest 4096 pixels. Only that
    level is read. Raises OptionError for an image that is no slide, and for one without a small level.

    A subject puts it on the grid of its slide, as any mask: ``zp.Subject(slide=slide,
    tissue=zp.tissue_map(slide))``.

    >>> import tempfile
    >>> import tifffile
    >>> pixels = np.full((64, 96, 3), 240, np.uint8)
    >>> pixels[16:48, 32:64] = 180, 80, 160
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/case.tif", pixels, photometric="rgb", tile=(32, 32))
    ...     tissue = tissue_map(ScalarImage(f"{folder}/case.tif"))
    >>> tissue.shape, int(tissue.data.sum()) == 32 * 32
    ((1, 96, 64, 1), True)
    """
    thumbnail = thumbnail_of(slide)
    source = ArraySource.of(tissue_of(first_plane(thumbnail)).astype(np.uint8)[None, :, :, None])
    return LabelMap(OpenedImage(source, thumbnail.affine, unit=thumbnail.spatial_unit))


def thumbnail_of(slide: Image) -> ScalarImage:
    """The level of a slide that is nearest 8 µm a pixel. Errors are those of ``tissue_map``."""
    opened = slide.opened.slide
    if opened is None:
        raise OptionError("a tissue map is of a slide, as ScalarImage('case.svs'); this image is none")
    levels = opened.levels
    number = min(range(len(levels)), key=lambda n: _distance(levels[n], opened.mpp))
    if levels[number].width * levels[number].height > MOST_PIXELS:
        raise OptionError(
            f"{opened.file.path}: its coarsest level has {levels[number].width} x {levels[number].height} "
            f"pixels, too many for a tissue map; give a mask of your own"
        )
    return ScalarImage(
        opened.file.path, level=number, slide_mpp=opened.mpp, time=0 if opened.file.points > 1 else None
    )


def first_plane(thumbnail: ScalarImage) -> Voxels:
    """The pixels (C, I, J) of the first plane of a thumbnail."""
    _, i, j, _ = thumbnail.shape
    return thumbnail.read(PatchLocation((0, 0, 0), (i, j, 1)))[..., 0]


def _distance(level: Any, mpp: Any) -> float:
    wanted = np.log(TISSUE_MPP / level.mpp) if mpp else np.log(UNSTATED_WIDTH / level.width)
    return abs(float(wanted))
