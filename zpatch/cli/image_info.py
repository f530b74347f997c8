"""What ``zpatch info`` shows of a single image: a slide, or another file that is read in place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zpatch.cli.progress import print_json, show, show_table
from zpatch.errors import OptionError
from zpatch.runtime.byte_sizes import format_bytes

if TYPE_CHECKING:
    from zpatch.images.image import Image


def show_image(path: Path, *, json: bool) -> None:
    """Show one image; as JSON, or as text."""
    image = _opened(path)
    facts = _facts(path, image)
    if json:
        print_json(facts)
        return
    unit = {"millimeter": "mm", "micrometer": "µm", None: "(no unit)"}.get(facts["unit"], facts["unit"])
    spacing = " x ".join(f"{size:.4g}" for size in facts["spacing"])
    show(
        f"{path}: {facts['format']}, {' x '.join(map(str, facts['shape']))} voxels of {spacing} {unit}, "
        f"{facts['channels']} x {facts['dtype']}, {format_bytes(facts['voxel_bytes'])} in "
        f"{format_bytes(facts['file_bytes'])}"
    )
    if image.levels:
        _show_slide(facts)


def _opened(path: Path) -> Image:
    """The image, or its first time point, if it has several and channels too."""
    from zpatch.images.image import ScalarImage

    try:
        return ScalarImage(path)
    except OptionError as error:
        if error.option != "time":
            raise
    return ScalarImage(path, time=0)


def _facts(path: Path, image: Image) -> dict[str, Any]:
    slide = image.opened.slide
    facts: dict[str, Any] = {
        "path": str(path),
        "format": path.suffix.lstrip(".") if slide is None else slide.file.kind,
        "shape": list(image.spatial_shape),
        "channels": image.num_channels,
        "dtype": image.dtype.name,
        "spacing": list(image.spacing),
        "unit": image.spatial_unit,
        "voxel_bytes": math.prod(image.shape) * image.source.dtype.itemsize,
        "file_bytes": path.stat().st_size,
    }
    if slide is None:
        return facts
    file, sizes = slide.file, slide.file.sizes(slide.mpp) if slide.mpp else None
    return {
        **facts,
        "read_by": file.door,
        "codec": file.codec,
        "mpp": slide.mpp,
        "time_points": file.points,
        "levels": [
            {
                "width": level.shape[1],
                "height": level.shape[2],
                "mpp": None if sizes is None else list(sizes[number]),
                "tile": list(level.tile[1:3]),
            }
            for number, level in enumerate(file.levels)
        ],
        "associated": {name: [width, height] for name, width, height in file.associated},
    }


def _show_slide(facts: dict[str, Any]) -> None:
    from zpatch.slides.slide_levels import format_mpp

    show(f"read by {facts['read_by']}; tiles are encoded as {facts['codec']}")
    if facts["time_points"] > 1:
        show(f"{facts['time_points']} time points: choose one with --time")
    if facts["mpp"] is None:
        show("it states no micrometres per pixel: say --slide-mpp where they are needed")
    rows = [("level", "pixels", "µm per pixel", "tiles")]
    for number, level in enumerate(facts["levels"]):
        mpp = "unknown" if level["mpp"] is None else format_mpp(tuple(level["mpp"]))
        pixels = f"{level['width']} x {level['height']}"
        rows.append((str(number), pixels, mpp, " x ".join(map(str, level["tile"]))))
    show()
    show_table(rows)
    named = [f"{name} ({width} x {height})" for name, (width, height) in facts["associated"].items()]
    if named:
        show()
        show(f"associated images: {', '.join(named)}")
