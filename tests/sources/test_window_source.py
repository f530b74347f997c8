"""Windows of an image are crops, and paddings as those of numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zpatch as zp
from zpatch.errors import OptionError

MODES = ["constant", "edge", "reflect", "symmetric", "wrap"]
SHAPE = (6, 9, 7)
small = st.tuples(*[st.integers(-8, 8)] * 3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> zp.Image:
    """An image of a store, with a slope and an intercept."""
    folder = tmp_path_factory.mktemp("scaled")
    image = nib.Nifti1Image(np.random.default_rng(0).normal(0, 100, SHAPE), np.diag([1.0, 2, 3, 1]))
    image.header.set_data_dtype(np.int16)
    image.to_filename(folder / "t1.nii")
    zp.convert(folder, folder / "store", chunk=4)
    return zp.Cohort(folder / "store")[0].image


def padded(values: Any, first: Any, size: Any, mode: str, fill: float) -> Any:
    before = [max(-f, 0) for f in first]
    after = [max(f + s - n, 0) for f, s, n in zip(first, size, SHAPE, strict=True)]
    extra: dict[str, Any] = {"constant_values": fill} if mode == "constant" else {}
    whole = np.pad(values, [(0, 0), *zip(before, after, strict=True)], mode=mode, **extra)  # type: ignore[call-overload]
    return whole[
        (slice(None), *(slice(f + b, f + b + s) for f, b, s in zip(first, before, size, strict=True)))
    ]


@pytest.mark.parametrize("mode", MODES)
@given(first=small, size=st.tuples(*[st.integers(1, 12)] * 3), fill=st.sampled_from([0.0, -7.5]))
def test_a_window_is_that_of_the_padded_volume(
    stored: zp.Image, mode: str, first: Any, size: Any, fill: float
) -> None:
    window = stored.window(first, size, padding_mode=mode, fill=fill)
    wanted = padded(stored.data, first, size, mode, fill)
    assert window.shape == wanted.shape
    assert window.dtype == stored.dtype
    np.testing.assert_array_equal(window.data, wanted)
    np.testing.assert_allclose(window.affine[:, 3], stored.affine @ [*first, 1])
    boxes = [zp.PatchLocation((0, 0, 0), size), zp.PatchLocation((0, 0, 0), (1, 1, 1))]
    for found, box in zip(window.read_group(boxes), boxes, strict=True):
        np.testing.assert_array_equal(found, wanted[:, : box.size[0], : box.size[1], : box.size[2]])
    np.testing.assert_array_equal(np.asarray(window.dask), wanted)


def test_what_is_done_to_a_window_is_done_to_its_padding_too(stored: zp.Image) -> None:
    window = stored.window((-2, 0, 0), (10, 9, 7), fill=50)
    wanted = padded(stored.data, (-2, 0, 0), (10, 9, 7), "constant", 50)
    np.testing.assert_allclose(
        window.rescaled(2, 1, -100, 100).data, np.clip(wanted, -100, 100) * 2 + 1, rtol=1e-5
    )
    flipped = window.oriented("LAS")
    np.testing.assert_array_equal(flipped.data, wanted[:, ::-1])
    inner = window.window((1, 2, 3), (4, 4, 4))
    np.testing.assert_array_equal(inner.data, wanted[:, 1:5, 2:6, 3:7])
    half = window.resampled((2, 4, 6)).data
    assert half.shape == (1, 5, 5, 4)
    whole = zp.ScalarImage(wanted, affine=window.affine).resampled((2, 4, 6)).data
    np.testing.assert_allclose(half, whole, rtol=1e-5, atol=1e-3)


def test_windows_of_label_maps_are_drawn_from(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 4, 5] = 2
    subject = zp.Subject(seg=zp.LabelMap(labels).window((-2, 0, 1), (9, 9, 6)))
    assert {place.index for place in zp.LabelSampler(3, "seg").locations(subject, 5)} == {(4, 3, 3)}
    assert subject.seg.statistics == {}


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (((0, 0, 0), (4, 0, 4)), {}, "at least 1"),
        (((0, 0, 0), (4, 4, 4)), {"padding_mode": "mirror"}, "padding_mode must be one of"),
        (((-1, 0, 0), (4, 4, 4)), {"fill": 300}, "cannot be padded with fill=300"),
    ],
)
def test_windows_that_cannot_be_are_an_error(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises((OptionError, ValueError), match=words):
        zp.LabelMap(np.zeros(SHAPE, np.uint8)).window(*arguments, **options)
