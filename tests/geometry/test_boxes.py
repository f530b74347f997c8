"""Boxes in voxels and affines; plain integers and numpy are the oracle."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.errors import OptionError, PatchLocationError, PatchOverlapError, PatchSizeError
from zpatch.geometry.affines import crop_affine, max_corner_distance, spacing_mm
from zpatch.geometry.boxes import (
    PatchLocation,
    Triple,
    allowed_centres,
    centre_of,
    check_patch_fits,
    patch_overlap_triple,
    patch_size_triple,
    reversed_axes,
    stored_corners,
    triple,
)

INDICES = st.tuples(*[st.integers(-20, 40)] * 3)
SIZES = st.tuples(*[st.integers(1, 30)] * 3)
LOCATIONS = st.builds(PatchLocation, INDICES, SIZES, st.none() | st.integers(0, 9))
FACTORS = st.floats(0.01, 20)


@st.composite
def affines(draw: st.DrawFn) -> NDArray[np.float64]:
    """Oblique affines of known handedness, with spacings from 0.1 to 8 mm."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.standard_normal((3, 3)))[0] * rng.uniform(0.1, 8, 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


@st.composite
def boxes_inside(draw: st.DrawFn, spatial_shape: Triple = (7, 8, 9)) -> PatchLocation:
    size = [draw(st.integers(1, n)) for n in spatial_shape]
    index = [draw(st.integers(0, n - s)) for n, s in zip(spatial_shape, size, strict=True)]
    return PatchLocation(tuple(index), tuple(size))


def voxels_of(start: int, size: int) -> set[int]:
    return set(range(start, start + size))


# One integer or three


@pytest.mark.parametrize("value", [7, np.int16(7), [7, 7, 7], (7, 7, np.int64(7)), np.array([7, 7, 7])])
def test_one_integer_or_three_give_three_python_integers(value: Any) -> None:
    result = triple(value, "patch_size")
    assert result == (7, 7, 7)
    assert all(type(v) is int for v in result)


@pytest.mark.parametrize(
    "value", [7.0, "7", "777", None, [7, 7], [7, 7, 7, 7], [7, 7, 7.5], [7, [7, 7]], [[7] * 3]]
)
def test_anything_else_is_refused_with_the_name_and_the_value(value: Any) -> None:
    with pytest.raises(OptionError, match="patch_size must be one integer or three, not ") as caught:
        triple(value, "patch_size")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, (4, 0, 4)])
def test_a_patch_size_below_one_is_refused(value: Any) -> None:
    with pytest.raises(PatchSizeError, match="patch_size must be at least 1 on every axis, not ") as caught:
        patch_size_triple(value)
    assert repr(value) in str(caught.value)


def test_a_patch_size_of_one_is_allowed() -> None:
    assert patch_size_triple((1, 2, 3)) == (1, 2, 3)


@given(st.integers(1, 40), st.integers(-5, 60))
def test_an_overlap_is_allowed_when_even_not_negative_and_smaller_than_the_patch(p: int, o: int) -> None:
    if o in range(0, p, 2):
        assert patch_overlap_triple(o, (p, p, p)) == (o, o, o)
    else:
        with pytest.raises(PatchOverlapError):
            patch_overlap_triple(o, (p, p, p))


@pytest.mark.parametrize(("overlap", "found"), [((4, 3, 4), "3 on axis J"), ((4, 4, -2), "-2 on axis K")])
def test_an_odd_or_negative_overlap_is_refused_with_its_axis_and_the_reason(
    overlap: Triple, found: str
) -> None:
    with pytest.raises(PatchOverlapError, match=f"even and at least 0, not {found}; half of it is cut"):
        patch_overlap_triple(overlap, (8, 8, 8))


@pytest.mark.parametrize("p", range(1, 12))
def test_an_overlap_that_is_too_large_is_refused_with_the_largest_one_that_fits(p: int) -> None:
    too_large = p + p % 2
    with pytest.raises(
        PatchOverlapError, match=rf"{too_large} voxels on axis I .* the patch \({p}\)"
    ) as caught:
        patch_overlap_triple(too_large, (p, p, p))
    advised = int(str(caught.value).rpartition(" ")[2])
    assert patch_overlap_triple(advised, (p, p, p)) == (advised,) * 3
    assert advised + 2 >= p


# Locations


@given(LOCATIONS)
def test_the_end_of_a_location_is_its_index_plus_its_size(location: PatchLocation) -> None:
    assert location.index_ini == location.index
    assert np.array_equal(np.subtract(location.index_fin, location.index_ini), location.size)


def test_a_location_is_a_value_equal_to_its_copies_and_usable_as_a_key() -> None:
    assert {PatchLocation((1, 2, 3), (4, 5, 6), 7): "here"}[PatchLocation((1, 2, 3), (4, 5, 6), 7)] == "here"
    assert PatchLocation((1, 2, 3), (4, 5, 6), 7) != PatchLocation((1, 2, 3), (4, 5, 6), 8)
    with pytest.raises(AttributeError):
        PatchLocation((1, 2, 3), (4, 5, 6)).index = (0, 0, 0)


def test_slices_of_a_location_cut_out_its_voxels() -> None:
    volume = np.arange(6 * 7 * 8).reshape(6, 7, 8)
    cut = volume[PatchLocation((1, 2, 3), (2, 3, 4)).to_slices()]
    assert np.array_equal(cut, volume[1:3, 2:5, 3:7])


def test_slices_of_a_location_below_zero_are_refused_because_they_would_wrap_around() -> None:
    with pytest.raises(PatchLocationError, match=r"\(0, -1, 0\) starts below 0"):
        PatchLocation((0, -1, 0), (4, 4, 4)).to_slices()


@given(INDICES, SIZES, SIZES, st.tuples(FACTORS, FACTORS, FACTORS) | FACTORS)
def test_boxes_that_abut_still_abut_when_scaled_by_any_ratio(
    index: Triple, first_size: Triple, second_size: Triple, factor: Any
) -> None:
    first = PatchLocation(index, first_size)
    second = PatchLocation(first.index_fin, second_size)
    assert first.scaled(factor).index_fin == second.scaled(factor).index_ini


@given(st.tuples(*[st.integers(1, 3000)] * 3), st.tuples(*[st.integers(1, 3000)] * 3))
def test_a_whole_volume_scaled_to_an_output_shape_has_exactly_that_shape(
    shape: Triple, output: Triple
) -> None:
    whole = PatchLocation((0, 0, 0), shape, subject_index=5)
    assert whole.scaled(np.divide(output, shape).tolist()) == PatchLocation(
        (0, 0, 0), output, subject_index=5
    )


@given(LOCATIONS, st.integers(1, 8))
def test_scaling_by_an_integer_multiplies_index_and_size(location: PatchLocation, factor: int) -> None:
    scaled = location.scaled(factor)
    assert scaled.index == tuple(factor * v for v in location.index)
    assert scaled.size == tuple(factor * v for v in location.size)


@given(LOCATIONS, SIZES)
def test_clipping_keeps_exactly_the_voxels_inside_the_volume(location: PatchLocation, shape: Triple) -> None:
    clipped = location.clipped(shape)
    for i, p, j, q, n in zip(location.index, location.size, clipped.index, clipped.size, shape, strict=True):
        assert voxels_of(j, q) == voxels_of(i, p) & voxels_of(0, n)
        assert q >= 0
    assert clipped.subject_index == location.subject_index


@given(LOCATIONS, SIZES)
def test_a_box_is_within_a_volume_if_all_its_voxels_are(location: PatchLocation, shape: Triple) -> None:
    axes = zip(location.index, location.size, shape, strict=True)
    assert location.lies_within(shape) == all(voxels_of(i, p) <= voxels_of(0, n) for i, p, n in axes)


@given(LOCATIONS)
def test_a_location_is_the_box_between_its_ends(location: PatchLocation) -> None:
    assert PatchLocation.between(location.index_ini, location.index_fin, location.subject_index) == location
    assert PatchLocation.between(np.array(location.index_ini), np.array(location.index_fin)) == PatchLocation(
        location.index, location.size
    )


@given(st.lists(boxes_inside(), max_size=4), st.integers(0, 2), st.integers(3, 5))
def test_corners_in_stored_order_cut_the_same_voxels_out_of_a_stored_array(
    boxes: list[PatchLocation], first_channel: int, stop_channel: int
) -> None:
    stored = np.arange(5 * 9 * 8 * 7).reshape(5, 9, 8, 7)
    volume = reversed_axes(stored)
    assert np.shares_memory(volume, stored)
    assert volume.shape == (5, 7, 8, 9)
    first, stop = stored_corners(boxes, range(first_channel, stop_channel))
    assert first.shape == stop.shape == (len(boxes), 4)
    for box, a, b in zip(boxes, first, stop, strict=True):
        part = volume[(slice(first_channel, stop_channel), *box.to_slices())]
        np.testing.assert_array_equal(reversed_axes(part), stored[tuple(map(slice, a, b))])


# Centres


@pytest.mark.parametrize("p", range(1, 13))
@pytest.mark.parametrize("spare", range(5))
def test_allowed_centres_are_the_centres_of_exactly_the_patches_that_fit(p: int, spare: int) -> None:
    n = p + spare
    box = allowed_centres((n, n, n), (p, p, p))
    centres = {start + p // 2 for start in range(n - p + 1)}
    assert centres == {centre_of(start, p) for start in range(n - p + 1)}
    assert centres == set(range(p // 2, n - (p - 1) // 2))
    for first, count in zip(box.index, box.size, strict=True):
        assert voxels_of(first, count) == centres


def test_allowed_centres_treat_each_axis_by_its_own_size() -> None:
    assert allowed_centres((10, 11, 12), (4, 5, 12)) == PatchLocation((2, 2, 6), (7, 7, 1))


def test_a_patch_that_does_not_fit_is_refused_with_axis_subject_both_sizes_and_a_remedy() -> None:
    with pytest.raises(PatchSizeError) as caught:
        check_patch_fits((64, 64, 96), (64, 64, 80), "sub-01")
    for part in ("96 voxels", "axis K", "'sub-01'", "(80 voxels)", "smaller patch_size", "padding_mode"):
        assert part in str(caught.value)


def test_a_patch_as_large_as_the_volume_fits() -> None:
    check_patch_fits((64, 64, 80), (64, 64, 80), "sub-01")


# Affines


@given(affines(), INDICES, SIZES)
def test_a_voxel_of_a_patch_has_the_world_position_of_the_same_voxel_of_its_volume(
    affine: NDArray[np.float64], index: Triple, voxel: Triple
) -> None:
    before = affine.copy()
    in_patch = crop_affine(affine, index) @ [*voxel, 1]
    in_volume = affine @ [*np.add(index, voxel), 1]
    np.testing.assert_allclose(in_patch, in_volume, atol=1e-9)
    assert np.array_equal(affine, before)


@given(st.integers(0, 2**32 - 1), st.tuples(*[st.floats(0.05, 10)] * 3))
def test_spacing_is_the_voxel_size_however_the_volume_is_turned(
    seed: int, spacing: tuple[float, ...]
) -> None:
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    np.testing.assert_allclose(spacing_mm(affine), spacing, rtol=1e-12)


@given(affines(), affines(), SIZES)
def test_the_distance_of_affines_is_that_of_the_farthest_corner_in_voxels_of_the_first(
    first: NDArray[np.float64], second: NDArray[np.float64], shape: Triple
) -> None:
    apart = max(
        float(np.linalg.norm(first @ [*corner, 1] - second @ [*corner, 1]))
        for corner in itertools.product(*((0, n - 1) for n in shape))
    )
    found = max_corner_distance(first, second, shape)
    assert found == pytest.approx(apart / min(spacing_mm(first)), rel=1e-9)


def test_a_shift_of_one_voxel_is_a_distance_of_one_voxel() -> None:
    first = np.diag([2.0, 2.0, 2.0, 1.0])
    assert max_corner_distance(first, crop_affine(first, (0, 1, 0)), (5, 6, 7)) == pytest.approx(1)
    assert max_corner_distance(first, first, (5, 6, 7)) == 0
