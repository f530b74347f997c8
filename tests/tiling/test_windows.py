"""Blending is a partition of unity: whatever the mode, the weights of a voxel sum to one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation
from zpatch.geometry.patch_grid import axis_starts
from zpatch.tiling.windows import (
    OVERLAP_MODES,
    check_overlap_mode,
    kept_by_crop,
    partition_of_unity,
    window,
)

MODES = st.sampled_from(OVERLAP_MODES)
WINDOWED = st.sampled_from(["average", "hann", "gaussian"])


@dataclass(frozen=True)
class Axis:
    """Patches on an axis of ``length`` voxels: patch ``i`` covers ``[starts[i], stops[i])``."""

    length: int
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    overlap: int

    def weights(self, mode: str) -> NDArray[np.float64]:
        """Weights (patch, voxel of the axis); 0 where the patch does not reach."""
        table = np.zeros((len(self.starts), self.length))
        spans = zip(self.starts, self.stops, strict=True)
        rows = partition_of_unity(mode, self.starts, self.stops, self.overlap)
        for row, (start, stop), weights in zip(table, spans, rows, strict=True):
            row[start:stop] = weights
        return table

    def covered(self) -> NDArray[np.bool_]:
        """Whether the patch covers the voxel (patch, voxel of the axis)."""
        voxels = np.arange(self.length)
        return (self.starts[:, None] <= voxels) & (voxels < self.stops[:, None])


def regular(n: int, p: int, o: int) -> Axis:
    starts = axis_starts(n, p, o)
    return Axis(n, starts, starts + p, o)


@st.composite
def axes(draw: st.DrawFn, *, scaled: bool = True) -> Axis:
    """Any grid on one axis, and where ``scaled`` also as the output of a network of another resolution."""
    p = draw(st.integers(1, 40))
    n, o = p + draw(st.integers(0, 150)), 2 * draw(st.integers(0, (p - 1) // 2))
    m = draw(st.just(n) | st.integers(1, 3 * n)) if scaled else n
    boxes = [PatchLocation((s, 0, 0), (p, 1, 1)).scaled(m / n) for s in axis_starts(n, p, o).tolist()]
    starts, stops = (np.array([end[0] for end in ends]) for ends in zip(*map(ends_of, boxes), strict=True))
    return Axis(m, starts, stops, o * m // n)


def ends_of(box: PatchLocation) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return box.index_ini, box.index_fin


def owners_by_pasting(axis: Axis) -> NDArray[np.int64]:
    """The patch that each voxel is taken from, as TorchIO does it: crop each patch, then paste in order."""
    volume = np.full(axis.length, -1)
    for patch, (start, stop) in enumerate(zip(axis.starts, axis.stops, strict=True)):
        cropped_start = start if start == 0 else start + axis.overlap // 2
        cropped_stop = stop if stop == axis.length else stop - axis.overlap // 2
        volume[cropped_start:cropped_stop] = patch
    return volume


# All modes


@given(MODES, axes())
def test_the_weights_of_a_voxel_sum_to_one(mode: str, axis: Axis) -> None:
    np.testing.assert_allclose(axis.weights(mode).sum(axis=0), np.ones(axis.length), rtol=1e-12)


@given(MODES, axes())
def test_a_voxel_that_only_one_patch_covers_keeps_weight_one(mode: str, axis: Axis) -> None:
    covered = axis.covered()
    alone = covered & (covered.sum(axis=0) == 1)
    assert (axis.weights(mode)[alone] == 1).all()


@given(MODES, axes())
def test_no_weight_is_negative_or_above_one(mode: str, axis: Axis) -> None:
    weights = axis.weights(mode)
    assert weights.min() >= 0
    assert weights.max() <= 1


@given(WINDOWED, axes())
def test_every_patch_has_weight_in_every_voxel_that_it_covers(mode: str, axis: Axis) -> None:
    assert np.array_equal(axis.weights(mode) > 0, axis.covered())


@given(MODES, axes(), st.integers(-50, 50))
def test_weights_do_not_depend_on_where_the_axis_starts(mode: str, axis: Axis, shift: int) -> None:
    here = partition_of_unity(mode, axis.starts, axis.stops, axis.overlap)
    there = partition_of_unity(mode, axis.starts + shift, axis.stops + shift, axis.overlap)
    assert all(map(np.array_equal, here, there))


@pytest.mark.parametrize("mode", OVERLAP_MODES)
def test_more_than_255_patches_over_a_voxel_are_counted_right(mode: str) -> None:
    axis = regular(1200, 600, 598)
    assert axis.covered().sum(axis=0).max() > 255
    np.testing.assert_allclose(axis.weights(mode).sum(axis=0), np.ones(1200), rtol=1e-12)


# Average, hann, gaussian


@given(axes())
def test_average_weighs_all_patches_over_a_voxel_alike(axis: Axis) -> None:
    covered = axis.covered()
    np.testing.assert_allclose(axis.weights("average"), covered / covered.sum(axis=0), rtol=1e-12)


@given(WINDOWED, axes())
def test_where_patches_overlap_their_weights_have_the_ratio_of_their_windows(mode: str, axis: Axis) -> None:
    shares = np.zeros(axis.covered().shape)
    for row, start, stop in zip(shares, axis.starts, axis.stops, strict=True):
        row[start:stop] = window(mode, stop - start)
    np.testing.assert_allclose(axis.weights(mode), shares / shares.sum(axis=0), rtol=1e-12)


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


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
@pytest.mark.parametrize("p", [1, 2, 7, 32])
def test_a_window_is_symmetric(mode: str, p: int) -> None:
    np.testing.assert_allclose(window(mode, p), window(mode, p)[::-1], rtol=1e-12)


# Crop


@given(axes())
def test_crop_gives_each_voxel_to_the_last_patch_that_keeps_it(axis: Axis) -> None:
    owners = owners_by_pasting(axis)
    assert np.array_equal(axis.weights("crop"), owners == np.arange(len(axis.starts))[:, None])


@given(axes())
def test_crop_leaves_each_voxel_with_exactly_one_patch(axis: Axis) -> None:
    assert np.array_equal(axis.weights("crop").sum(axis=0), np.ones(axis.length))


@given(axes(scaled=False))
def test_crop_leaves_every_patch_a_voxel(axis: Axis) -> None:
    assert axis.weights("crop").any(axis=1).all()


@pytest.mark.parametrize(
    ("start", "kept"),
    [(0, (0, 6)), (10, (12, 16)), (32, (34, 40))],
    ids=["at the first edge", "inside", "at the last edge"],
)
def test_crop_cuts_half_the_overlap_except_at_the_edges_of_the_volume(
    start: int, kept: tuple[int, int]
) -> None:
    assert kept_by_crop(start, start + 8, 4, 0, 40) == kept


def test_crop_of_a_patch_as_long_as_the_volume_cuts_nothing() -> None:
    assert kept_by_crop(-3, 5, 4, -3, 5) == (-3, 5)


# Errors


@pytest.mark.parametrize("mode", ["mean", "Hann", ""])
def test_an_unknown_mode_is_refused_with_the_known_ones(mode: str) -> None:
    for refuse in (check_overlap_mode, lambda mode: window(mode, 8)):
        with pytest.raises(
            OptionError, match=r"overlap_mode .* crop, average, hann, gaussian, not"
        ) as caught:
            refuse(mode)
        assert repr(mode) in str(caught.value)


@pytest.mark.parametrize("mode", OVERLAP_MODES)
def test_a_known_mode_is_accepted(mode: str) -> None:
    check_overlap_mode(mode)
    assert len(window(mode, 8)) == 8
