"""Slope, intercept and bounds: the arithmetic of numpy, in the precision of each type."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import many_examples

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.errors import DamageError

finite = st.floats(-1e6, 1e6)
steep = finite.filter(lambda slope: abs(slope) > 1e-3)
VALUES = np.linspace(-1000, 1000, 41)

SCALED = {
    **dict.fromkeys(["b1", "u1", "i1", "u2", "i2", "f2"], "f4"),
    **dict.fromkeys(["u4", "i4", "u8", "i8", "f4", "f8"], "f8"),
    "c8": "c8",
    "c16": "c16",
}


def scaled(scaling: Scaling, values: Any) -> Any:
    return np.clip(values * scaling.slope + scaling.inter, scaling.low, scaling.high)


def test_scaled_values_have_a_type_that_holds_them() -> None:
    for code, wide in SCALED.items():
        voxels = np.array([0, 1]).astype(code)
        assert Scaling(2.0, 1.0).dtype_of(voxels.dtype) == np.dtype(wide)
        assert Scaling(2.0, 1.0).apply(voxels).dtype == np.dtype(wide)
        assert Scaling(2.0, 1.0).apply(voxels).tolist() == [1, 3]
        assert UNSCALED.dtype_of(voxels.dtype) == voxels.dtype


def test_slope_one_and_intercept_zero_without_bounds_is_no_scaling() -> None:
    assert Scaling() == Scaling(1, 0) == UNSCALED
    assert not UNSCALED.is_bounded
    assert all(s != UNSCALED for s in (Scaling(2), Scaling(1, 1), Scaling(low=0), Scaling(high=0)))
    assert Scaling(low=0).is_bounded
    assert Scaling(high=0).is_bounded


@many_examples
@given(first=steep, inter=finite, second=steep, more=finite)
def test_a_scaling_of_a_scaling_applies_both_in_order(
    first: float, inter: float, second: float, more: float
) -> None:
    both = Scaling(first, inter).then(second, more)
    expected = (VALUES * first + inter) * second + more
    np.testing.assert_allclose(scaled(both, VALUES), expected, rtol=1e-9, atol=1e-6 * abs(expected).max())


@many_examples
@given(
    bounds=st.tuples(finite, finite).map(sorted), slope=steep, inter=finite,
    later=st.tuples(finite, finite).map(sorted), values=st.lists(finite, min_size=1),
)  # fmt: skip
def test_bounds_clip_before_later_scalings(
    bounds: list[float], slope: float, inter: float, later: list[float], values: list[float]
) -> None:
    both = UNSCALED.within(*bounds).then(slope, inter).within(*later)
    expected = np.clip(np.clip(values, *bounds) * slope + inter, *later)
    np.testing.assert_allclose(scaled(both, np.array(values)), expected, rtol=1e-9, atol=1e-3)
    assert both.low <= both.high


@given(bounds=st.tuples(finite, finite).map(sorted), later=st.tuples(finite, finite).map(sorted))
def test_bounds_within_bounds_apply_in_order(bounds: list[float], later: list[float]) -> None:
    values = np.linspace(-1e6, 1e6, 101)
    both = UNSCALED.within(*bounds).within(*later)
    np.testing.assert_array_equal(scaled(both, values), np.clip(np.clip(values, *bounds), *later))


def test_a_slope_of_zero_makes_all_values_equal() -> None:
    flat = Scaling(2.0, 1.0).within(0, 5).then(0, 3.5)
    assert scaled(flat, VALUES).tolist() == [3.5] * len(VALUES)
    assert (flat.low, flat.high) == (3.5, 3.5)
    assert UNSCALED.then(0, 3.5).apply(np.array([-7, 9], np.int16)).tolist() == [3.5, 3.5]


def test_a_scaling_without_bounds_stays_without_bounds() -> None:
    for slope in (2.0, -2.0):
        later = UNSCALED.then(slope, 3.0)
        assert (later.low, later.high) == (-math.inf, math.inf)
        assert not later.is_bounded


@pytest.mark.parametrize("order", ["C", "F"])
def test_values_are_in_new_memory_of_the_same_order(order: Any) -> None:
    voxels = np.array(np.arange(24).reshape(2, 3, 4), np.int16, order=order)
    before = voxels.copy()
    for scaling in (UNSCALED, Scaling(2.0, 1.0), Scaling(2.0, 1.0, 5, 9)):
        values = scaling.apply(voxels)
        assert not np.shares_memory(values, voxels)
        assert values.flags.f_contiguous == voxels.flags.f_contiguous
        np.testing.assert_array_equal(voxels, before)
        np.testing.assert_array_equal(values, scaled(scaling, voxels))


@pytest.mark.parametrize("dtype", [">i2", ">u2", ">f4", ">f8", ">c8"])
def test_values_of_big_endian_voxels_are_in_native_order(dtype: str) -> None:
    voxels = np.arange(5).astype(dtype)
    for scaling in (UNSCALED, Scaling(2.0, 1.0)):
        values = scaling.apply(voxels)
        assert values.dtype.isnative
        assert values.tolist() == [n * scaling.slope + scaling.inter for n in range(5)]


def test_nan_stays_nan_and_infinity_is_clipped() -> None:
    voxels = np.array([math.nan, math.inf, -math.inf, 1.0], np.float32)
    values = Scaling(2.0, 1.0, -10, 10).apply(voxels)
    np.testing.assert_array_equal(values, [math.nan, 10, -10, 3])


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<i2", "<u8"])
def test_values_are_cast_to_the_type_of_the_memory(dtype: str) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    out = np.zeros((4, 3, 4), dtype)[::2].transpose(2, 1, 0)
    for scaling in (UNSCALED, Scaling(0.5, 1.0)):
        scaling.write(voxels.T, out)
        np.testing.assert_array_equal(out, scaled(scaling, voxels.T).astype(dtype))


@pytest.mark.parametrize("number", [np.float64, np.float32, np.int64, int])
def test_numpy_scalars_scale_as_python_floats_do(number: Any) -> None:
    # A numpy scalar would make numpy compute in its own precision, and the compiled loop would differ.
    voxels = np.arange(-500, 500, dtype=np.int16)
    given_, plain = (
        UNSCALED.within(kind(-400), kind(300)).then(kind(3), kind(7)) for kind in (number, float)
    )
    assert given_ == plain
    assert {type(value) for value in given_} == {float}
    third = Scaling().then(np.float64(1) / 3, np.float64(0.1)).apply(voxels)
    assert third.tobytes() == Scaling(1 / 3, 0.1).apply(voxels).tobytes()


def test_a_scaling_survives_pickling() -> None:
    scaling = Scaling(0.1, -3.0, 0.0, 1.0)
    assert pickle.loads(pickle.dumps(scaling)) == scaling
    assert type(pickle.loads(pickle.dumps(scaling))) is Scaling


def test_a_view_of_a_file_that_was_cut_short_is_an_error_never_other_voxels(tmp_path: Path) -> None:
    pytest.importorskip("zpatch.chunks._gather", reason="installed without a compiler")
    np.arange(2**16, dtype=np.float32).tofile(tmp_path / "voxels")
    mapped = np.memmap(tmp_path / "voxels", np.float32, "r", shape=(1, 64, 32, 32))
    os.truncate(tmp_path / "voxels", 8)
    for out in (
        np.empty((1, 64, 32, 32), np.float32),
        np.empty((1, 32, 32, 64), np.float32).transpose(0, 3, 2, 1),
    ):
        with pytest.raises(DamageError, match="cut short or unmounted while it was read"):
            Scaling().write(mapped, out)
