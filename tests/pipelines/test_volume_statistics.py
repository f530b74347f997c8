"""Numbers of volumes in passes over boxes are those of numpy for the volume in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.pipelines.volume_statistics import Masked, moments, quantiles

SHAPES = st.tuples(*[st.integers(1, 5)] * 3)
floats = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0])
volumes = st.sampled_from(["f4", "i2", "u1"]).flatmap(
    lambda dtype: npst.arrays(dtype, SHAPES, elements=floats if dtype == "f4" else None)
)


@given(volumes, st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_quantiles_are_exactly_those_of_numpy(volume: Any, wanted: list[float]) -> None:
    found = quantiles(Masked(zp.ScalarImage(volume)), wanted)
    np.testing.assert_allclose(found, np.quantile(volume.astype(np.float64), wanted), rtol=1e-6, atol=1e-9)


@given(volumes)
def test_moments_are_those_of_numpy(volume: Any) -> None:
    values = volume.astype(np.float64)
    found = moments(Masked(zp.ScalarImage(volume)))
    scale = np.abs(values).max() + 1e-30
    assert found.count == values.size
    assert abs(found.mean - values.mean()) <= 1e-9 * scale
    assert (found.low, found.high) == (values.min(), values.max())
    if values.size > 1:
        assert abs(found.std - values.std(ddof=1)) <= 1e-6 * scale
    else:
        assert math.isnan(found.std)


@pytest.fixture
def masked() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 100, (90, 70, 80)).astype(np.float32), rng.integers(0, 4, (90, 70, 80)).astype(
        np.uint8
    )


def test_a_mask_labels_of_it_and_a_threshold_choose_values(masked: tuple[Any, Any]) -> None:
    volume, labels = masked
    image, seg = zp.ScalarImage(volume), zp.LabelMap(labels)
    for chosen, inside in (
        (Masked(image, seg), labels != 0),
        (Masked(image, seg, labels=(1, 3)), np.isin(labels, (1, 3))),
        (Masked(image, above=20.0), volume > 20),
    ):
        values = volume[inside].astype(np.float64)
        found = moments(chosen)
        assert found.count == values.size
        np.testing.assert_allclose((found.mean, found.std), (values.mean(), values.std(ddof=1)), rtol=1e-5)
        np.testing.assert_allclose(
            quantiles(chosen, [0.01, 0.5]), np.quantile(values, [0.01, 0.5]), rtol=1e-5
        )


def test_an_empty_mask_has_no_numbers_and_one_of_another_shape_is_an_error(masked: tuple[Any, Any]) -> None:
    volume, labels = masked
    empty = Masked(zp.ScalarImage(volume), zp.LabelMap(np.zeros_like(labels)))
    assert moments(empty).count == 0
    assert all(map(math.isnan, quantiles(empty, [0, 1])))
    with pytest.raises(OptionError, match=r"the mask has \(90, 70, 79\) voxels and the image \(90, 70, 80\)"):
        moments(Masked(zp.ScalarImage(volume), zp.LabelMap(labels[:, :, 1:])))
