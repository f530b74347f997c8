"""One page about a slide: a thumbnail with the outline of its tissue, and its levels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.errors import OptionError
from zpatch.geometry.boxes import Bools, Voxels
from zpatch.images.image import ScalarImage
from zpatch.images.tissue_map import first_plane, thumbnail_of
from zpatch.report.page import GENERATOR, TEMPLATES
from zpatch.report.pictures import png
from zpatch.report.report import OUTPUT, check_may_write
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.runtime.whole_file import whole_file
from zpatch.slides.slide_levels import format_mpp
from zpatch.slides.tissue import tissue_of
from zpatch.store.lock import writing_to

LONGEST_SIDE = 1000  # of the thumbnail, in pixels
OUTLINE = (0, 140, 70)


@dataclass(frozen=True, slots=True)
class WrittenSlideReport:
    """A report of a slide that was written, and the share of the slide that is tissue."""

    slide: Path
    output: Path
    bytes: int
    tissue: float

    def to_json(self) -> Json:
        """The result as plain JSON."""
        return {
            "slide": str(self.slide),
            "output": str(self.output),
            "bytes": self.bytes,
            "tissue": self.tissue,
        }


def write_slide_report(
    slide: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> WrittenSlideReport:
    """Write an HTML page about a slide to ``output``, by default ``report.html``; only a small level is read.

    Raises what ``write_report`` raises, SourceError for a file that is no slide, and DamageError for tiles of
    the small level that cannot be decoded.
    """
    path, target = Path(slide), Path(OUTPUT if output is None else output)
    image = ScalarImage(path)
    if image.opened.slide is None:
        raise OptionError(f"{path}: a report is about a store, or about a slide")
    check_may_write(target)
    file, mpp = image.opened.slide.file, image.opened.slide.mpp
    pixels = first_plane(thumbnail_of(image))
    inside = tissue_of(pixels).T
    picture = _outlined(_colours(pixels), inside)
    sizes = ["unknown"] * len(file.levels) if mpp is None else [format_mpp(m) for m in file.sizes(mpp)]
    text = TEMPLATES.get_template("slide.html.j2").render(
        generator=GENERATOR,
        path=file.path,
        picture=png(picture),
        facts={
            "format": f"{file.kind}, read by {file.door}",
            "pixels": f"{image.num_channels} x {image.dtype}, encoded as {file.codec}",
            "size": format_bytes(path.stat().st_size),
            "tissue": f"{inside.mean():.0%} of the slide",
        },
        levels=[
            (number, level.shape[1], level.shape[2], size, level.tile[1], level.tile[2])
            for number, (level, size) in enumerate(zip(file.levels, sizes, strict=True))
        ],
        associated=file.associated,
    )
    with writing_to(target), whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return WrittenSlideReport(path, target, target.stat().st_size, float(inside.mean()))


def _colours(pixels: Voxels) -> NDArray[np.uint8]:
    """Pixels (C, I, J) of any number of channels and any type as colours (rows, columns, 3)."""
    values = pixels.transpose(2, 1, 0)[..., :3].astype(np.float32)
    if values.shape[2] < 3:
        values = np.repeat(values[..., :1], 3, axis=2)
    most = 255.0 if pixels.dtype == np.uint8 else float(values.max()) or 1.0
    return np.asarray(np.clip(values * (255 / most), 0, 255), np.uint8)


def _outlined(pixels: NDArray[np.uint8], inside: Bools) -> NDArray[np.uint8]:
    """A picture made smaller by means of squares of pixels, with the border of a mask drawn into it."""
    step = -(-max(inside.shape) // LONGEST_SIDE)
    rows, columns = (n // step * step for n in inside.shape)
    squares = pixels[:rows, :columns].reshape(rows // step, step, columns // step, step, 3)
    small: NDArray[np.uint8] = squares.mean(axis=(1, 3)).astype(np.uint8)
    mask = np.pad(inside[:rows:step, :columns:step], 1, mode="edge")
    border = np.zeros(small.shape[:2], bool)
    for axis in (0, 1):
        for shift in (-1, 1):
            border |= np.roll(mask, shift, axis)[1:-1, 1:-1] != mask[1:-1, 1:-1]
    small[border] = OUTLINE
    return small
