"""Blending is a partition of unity: whatever the mode, the weights of a voxel sum to one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.blending import (
    OVERLAP_MODES,
    check_overlap_mode,
    kept_by_crop,
    partition_of_unity,
    window,
)
from zpatch.errors import OptionError
from zpatch.grid import axis_starts

MODES = st.sampled_from(OVERLAP_MODES)
Axis = tuple[int, int, int]


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    """Axis length, patch length and an even overlap of up to the patch length less one."""
    p = draw(st.integers(1, 40))
    return p + draw(st.integers(0, 150)), p, 2 * draw(st.integers(0, (p - 1) // 2))


def weights_and_voxels(mode: str, axis: Axis) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Weights (patch, voxel of the patch), and which voxel of the axis each belongs to."""
    n, p, o = axis
    starts = axis_starts(n, p, o)
    return partition_of_unity(mode, starts, p, o), starts[:, None] + np.arange(p)


def patches_over_each_voxel(voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(voxels.ravel())


def owners_by_pasting(axis: Axis) -> NDArray[np.int64]:
    """Which patch each voxel comes from, as TorchIO does it: crop each patch, then paste in order."""
    n, p, o = axis
    volume = np.full(n, -1)
    for patch, start in enumerate(axis_starts(n, p, o)):
        stop = start + p
        cropped_start = start if start == 0 else start + o // 2
        cropped_stop = stop if stop == n else stop - o // 2
        volume[cropped_start:cropped_stop] = patch
    return volume


# All modes


@given(MODES, axes())
def test_the_weights_of_a_voxel_sum_to_one(mode: str, axis: Axis) -> None:
    weights, voxels = weights_and_voxels(mode, axis)
    totals = np.bincount(voxels.ravel(), weights.ravel())
    np.testing.assert_allclose(totals, np.ones(axis[0]), rtol=1e-12)


@given(MODES, axes())
def test_a_voxel_that_only_one_patch_covers_keeps_weight_one(mode: str, axis: Axis) -> None:
    weights, voxels = weights_and_voxels(mode, axis)
    alone = patches_over_each_voxel(voxels)[voxels] == 1
    assert (weights[alone] == 1).all()


@given(MODES, axes())
def test_no_weight_is_negative_or_above_one(mode: str, axis: Axis) -> None:
    weights, _ = weights_and_voxels(mode, axis)
    assert weights.min() >= 0
    assert weights.max() <= 1


@given(st.sampled_from(["average", "hann", "gaussian"]), axes())
def test_every_patch_has_a_say_in_every_voxel_that_it_covers(mode: str, axis: Axis) -> None:
    weights, _ = weights_and_voxels(mode, axis)
    assert weights.min() > 0


@given(MODES, axes(), st.integers(-50, 50))
def test_weights_do_not_depend_on_where_the_axis_starts(mode: str, axis: Axis, shift: int) -> None:
    n, p, o = axis
    starts = axis_starts(n, p, o)
    moved = partition_of_unity(mode, starts + shift, p, o)
    assert np.array_equal(moved, partition_of_unity(mode, starts, p, o))


@pytest.mark.parametrize("mode", OVERLAP_MODES)
def test_more_than_255_patches_over_a_voxel_are_counted_right(mode: str) -> None:
    axis = (1200, 600, 598)
    weights, voxels = weights_and_voxels(mode, axis)
    assert patches_over_each_voxel(voxels).max() > 255
    totals = np.bincount(voxels.ravel(), weights.ravel())
    np.testing.assert_allclose(totals, np.ones(1200), rtol=1e-12)


# Average, hann, gaussian


@given(axes())
def test_average_weighs_all_patches_over_a_voxel_alike(axis: Axis) -> None:
    weights, voxels = weights_and_voxels("average", axis)
    np.testing.assert_allclose(weights, 1 / patches_over_each_voxel(voxels)[voxels], rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3, 8, 33, 128])
def test_a_hann_window_is_the_squared_sine_without_its_zeros(p: int) -> None:
    expected = [math.sin(math.pi * (n + 1) / (p + 1)) ** 2 for n in range(p)]
    np.testing.assert_allclose(window("hann", p), expected, rtol=1e-12)
    assert window("hann", p).min() > 0


@pytest.mark.parametrize("p", [1, 2, 3, 8, 33, 128])
def test_a_gaussian_window_has_a_sigma_of_an_eighth_of_the_patch_about_its_centre(p: int) -> None:
    centre, sigma = (p - 1) / 2, p / 8
    expected = [math.exp(-((n - centre) ** 2) / (2 * sigma**2)) for n in range(p)]
    np.testing.assert_allclose(window("gaussian", p), expected, rtol=1e-12)
    assert window("gaussian", p).min() > 0


@given(st.sampled_from(["hann", "gaussian"]), axes())
def test_where_patches_overlap_their_weights_stand_in_the_ratio_of_their_windows(
    mode: str, axis: Axis
) -> None:
    weights, voxels = weights_and_voxels(mode, axis)
    for voxel in range(axis[0]):
        patch, place = np.nonzero(voxels == voxel)
        shares = window(mode, axis[1])[place]
        np.testing.assert_allclose(weights[patch, place], shares / shares.sum(), rtol=1e-12)


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
@pytest.mark.parametrize("p", [1, 2, 7, 32])
def test_a_window_is_symmetric(mode: str, p: int) -> None:
    np.testing.assert_allclose(window(mode, p), window(mode, p)[::-1], rtol=1e-12)


# Crop


@given(axes())
def test_crop_gives_each_voxel_to_the_last_patch_that_keeps_it(axis: Axis) -> None:
    weights, voxels = weights_and_voxels("crop", axis)
    owners = owners_by_pasting(axis)
    assert np.array_equal(weights, owners[voxels] == np.arange(len(voxels))[:, None])


@given(axes())
def test_crop_leaves_each_voxel_with_exactly_one_patch(axis: Axis) -> None:
    weights, voxels = weights_and_voxels("crop", axis)
    assert np.array_equal(np.bincount(voxels.ravel(), weights.ravel()), np.ones(axis[0]))


@pytest.mark.parametrize(
    ("start", "kept"),
    [(0, (0, 6)), (10, (2, 6)), (32, (2, 8))],
    ids=["at the first edge", "inside", "at the last edge"],
)
def test_crop_cuts_half_the_overlap_but_at_the_edges_of_the_volume(start: int, kept: tuple[int, int]) -> None:
    assert kept_by_crop(start, 8, 4, 0, 40) == kept


def test_crop_of_a_patch_as_long_as_the_volume_cuts_nothing() -> None:
    assert kept_by_crop(0, 8, 4, 0, 8) == (0, 8)


# Errors


@pytest.mark.parametrize("mode", ["mean", "Hann", ""])
def test_an_unknown_mode_is_refused_with_those_there_are(mode: str) -> None:
    for refuse in (check_overlap_mode, lambda mode: window(mode, 8)):
        with pytest.raises(OptionError, match="overlap_mode .* crop, average, hann, gaussian, not") as caught:
            refuse(mode)
        assert repr(mode) in str(caught.value)


@pytest.mark.parametrize("mode", OVERLAP_MODES)
def test_a_known_mode_is_accepted(mode: str) -> None:
    check_overlap_mode(mode)
    assert len(window(mode, 8)) == 8
