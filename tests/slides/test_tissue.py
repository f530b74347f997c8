"""Where there is tissue: thresholds and holes as scikit-image and SciPy find them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import ndimage
from skimage import color, filters

from zpatch.slides.tissue import BINS, filled, otsu_threshold, saturation, tissue_of


@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=24)))
def test_holes_are_filled_as_scipy_fills_them(mask: NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(filled(mask), ndimage.binary_fill_holes(mask))


def test_holes_of_a_maze_are_filled() -> None:
    """A spiral, of which the outside reaches the middle by many turns."""
    mask = np.ones((81, 81), bool)
    top, left, bottom, right = 0, 0, 80, 80
    while right - left > 3:
        mask[top, left:right] = mask[top:bottom, right - 2] = mask[bottom - 2, left + 2 : right] = False
        mask[top + 2 : bottom, left + 2] = False
        top, left, bottom, right = top + 4, left + 4, bottom - 4, right - 4
    np.testing.assert_array_equal(filled(mask), ndimage.binary_fill_holes(mask))


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(1, 60)), min_size=2, max_size=8))
def test_the_threshold_parts_values_as_that_of_scikit_image(groups: list[tuple[float, int]]) -> None:
    values = np.concatenate([np.full(count, value, np.float32) for value, count in groups])
    counts, _ = np.histogram(values, bins=BINS, range=(0, 1))
    if np.count_nonzero(counts) < 2:
        return
    theirs = filters.threshold_otsu(hist=(counts, (np.arange(BINS) + 0.5) / BINS))
    ours = otsu_threshold(values)
    upper = np.floor(values * BINS).clip(max=BINS - 1) > np.floor(theirs * BINS)
    np.testing.assert_array_equal(values > ours, upper)


def test_saturation_is_that_of_scikit_image(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (3, 40, 30), np.uint8)
    wanted = color.rgb2hsv(np.moveaxis(pixels, 0, -1))[..., 1]
    np.testing.assert_allclose(saturation(pixels), wanted, atol=1e-6)
    np.testing.assert_allclose(saturation(pixels.astype(np.float32) / 255), wanted, atol=1e-6)
    np.testing.assert_allclose(saturation(pixels.astype(np.uint16) * 257), wanted, atol=1e-6)
    assert not saturation(np.zeros((3, 4, 4), np.uint8)).any()


@pytest.mark.parametrize("value", [255, 240, 0])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_glass_alone_is_no_tissue(rng: np.random.Generator, value: int, channels: int) -> None:
    glass = np.full((channels, 200, 150), value, np.int64)
    noise = rng.integers(-2, 3, (200, 150)) if channels == 1 else rng.integers(-1, 2, (1, 200, 150))
    pixels = np.clip(glass + noise, 0, 255).astype(np.uint8)
    if value:
        assert tissue_of(pixels).mean() < 0.01
