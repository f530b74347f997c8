"""The tissue map of a slide: drawn tissue is found, and the map lies over the slide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slides_made
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.images import tissue_map

WIDTH, HEIGHT = 1600, 1200


def drawn(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Glass with two pieces in pink and violet, and where they are: (height, width, 3), (height, width)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    truth = ((x - 500) / 300) ** 2 + ((y - 500) / 260) ** 2 < 1
    truth |= ((x - 1200) / 180) ** 2 + ((y - 800) / 200) ** 2 < 1
    glass = 242 + rng.integers(-2, 3, (HEIGHT, WIDTH, 1)) + rng.integers(-1, 2, (HEIGHT, WIDTH, 3))
    grain = ndimage.gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), 6)[..., None]
    tissue = np.where(grain > 0.02, (120, 70, 150), (205, 120, 170)) + rng.normal(0, 6, (HEIGHT, WIDTH, 3))
    pixels = np.where(truth[..., None], tissue, glass)
    hole = np.hypot(x - 500, y - 500) < 60
    return np.where(hole[..., None], glass, pixels).astype(np.uint8), truth


def whole(image: zp.Image) -> NDArray[Any]:
    return image.read(zp.PatchLocation((0, 0, 0), image.spatial_shape))


@pytest.mark.parametrize("mpp", [1.0, None])
def test_drawn_tissue_is_found_with_its_holes_closed(
    tmp_path: Path, rng: np.random.Generator, mpp: float | None
) -> None:
    pixels, truth = drawn(rng)
    path = slides_made.write_svs(tmp_path / "a.svs", pixels, mpp=mpp, levels=(2, 8), compression="zlib")
    slide = zp.ScalarImage(path)
    found = zp.tissue_map(slide)
    assert found.dtype == np.uint8
    assert set(np.unique(whole(found))) == {0, 1}
    assert found.spatial_shape == ((200, 150, 1) if mpp else (WIDTH, HEIGHT, 1))
    assert found.spatial_unit == slide.spatial_unit
    placed = whole(zp.Subject(slide=slide, tissue=found).tissue)[0, :, :, 0].T > 0
    assert (placed & truth).sum() / (placed | truth).sum() > 0.9
    assert placed[500, 500]


def test_a_slide_of_glass_has_an_almost_empty_map(tmp_path: Path, rng: np.random.Generator) -> None:
    glass = (242 + rng.integers(-2, 3, (400, 500, 3))).astype(np.uint8)
    path = slides_made.write_svs(tmp_path / "a.svs", glass, levels=(4,), compression="zlib")
    assert whole(zp.tissue_map(zp.ScalarImage(path))).mean() < 0.01


def test_a_slide_in_grey_has_one_too(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels, truth = drawn(rng)
    path = slides_made.write_ome(tmp_path / "a.ome.tif", pixels[..., 1], "YX", levels=(2, 4), size=2.0)
    found = zp.tissue_map(zp.ScalarImage(path))
    assert found.spatial_shape == (WIDTH // 4, HEIGHT // 4, 1)
    inside = whole(found)[0, :, :, 0].T > 0
    wanted = truth[::4, ::4]
    assert (inside & wanted).sum() / (inside | wanted).sum() > 0.8


def test_what_is_no_slide_and_what_has_no_small_level_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="a tissue map is of a slide"):
        zp.tissue_map(zp.ScalarImage(np.zeros((3, 3, 1))))
    tifffile.imwrite(tmp_path / "a.tif", slides_made.small(), tile=(64, 64), photometric="rgb")
    monkeypatch.setattr(tissue_map, "MOST_PIXELS", 1000)
    with pytest.raises(OptionError, match=r"its coarsest level has 301 x 207 pixels, too many .*give a mask"):
        zp.tissue_map(zp.ScalarImage(tmp_path / "a.tif"))
