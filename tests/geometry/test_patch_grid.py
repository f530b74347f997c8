"""Patches on a grid, against their definition."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.errors import PatchLocationError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.geometry.patch_grid import PatchGrid, axis_starts


@st.composite
def axes(draw: st.DrawFn, *, may_be_small: bool = False) -> tuple[int, int, int]:
    """Axis length, patch length and overlap; with ``may_be_small`` also axes shorter than the patch."""
    p = draw(st.integers(1, 40))
    o = 2 * draw(st.integers(0, (p - 1) // 2))
    n = draw(st.integers(1, 160) if may_be_small else st.integers(p, p + 160))
    return n, p, o


@st.composite
def grids(draw: st.DrawFn) -> PatchGrid:
    """Small grids of all kinds: with and without a border, also over volumes smaller than the patch."""
    sides = [draw(st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2))) for _ in range(3)]
    shape, patch, overlap = zip(*((n, p, min(2 * h, (p - 1) // 2 * 2)) for n, p, h in sides), strict=True)
    return PatchGrid.over(shape, patch, overlap, border=draw(st.booleans()))


def grid_on_one_axis(axis: tuple[int, int, int], *, border: bool) -> PatchGrid:
    n, p, o = axis
    return PatchGrid.over((n, 1, 1), (p, 1, 1), (o, 0, 0), border=border)


# Starts


@given(axes())
def test_starts_are_a_range_and_one_patch_flush_with_the_border_if_voxels_are_left(
    axis: tuple[int, int, int],
) -> None:
    n, p, o = axis
    expected = list(range(0, n - p + 1, p - o))
    if expected[-1] + p != n:
        expected.append(n - p)
    assert axis_starts(n, p, o).tolist() == expected


@given(axes())
def test_patches_cover_an_axis_and_end_with_it(axis: tuple[int, int, int]) -> None:
    n, p, o = axis
    starts = axis_starts(n, p, o).tolist()
    assert {v for s in starts for v in range(s, s + p)} == set(range(n))


# Order


@given(grids())
def test_patches_are_in_lexicographic_order_with_i_slowest(grid: PatchGrid) -> None:
    indices = [location.index for location in grid.locations()]
    assert indices == list(itertools.product(*(s.tolist() for s in grid.starts)))
    assert indices == sorted(indices)
    assert {location.size for location in grid.locations()} == {grid.patch_size}


@given(grids())
def test_a_patch_is_found_by_its_number_and_has_one_position(grid: PatchGrid) -> None:
    positions = list(itertools.product(*map(range, grid.counts)))
    assert [grid.location(n) for n in range(len(grid))] == list(grid.locations())
    assert [grid.at(position) for position in positions] == list(grid.locations())
    assert [grid.position_of(location) for location in grid.locations()] == positions


@given(grids(), st.integers(0, 2))
def test_any_axis_can_be_the_slowest_while_the_others_keep_their_order(grid: PatchGrid, slowest: int) -> None:
    locations = list(grid.locations(slowest))
    others = [axis for axis in range(3) if axis != slowest]
    assert locations == sorted(
        grid.locations(), key=lambda at: (at.index[slowest], *(at.index[axis] for axis in others))
    )


@pytest.mark.parametrize("number", [-1, 27, 1000])
def test_a_patch_number_outside_the_grid_is_refused_with_the_number_of_patches(number: int) -> None:
    grid = PatchGrid.over((6, 6, 6), (2, 2, 2))
    with pytest.raises(PatchLocationError, match=f"patch {number} of a grid of 27 patches"):
        grid.location(number)


@pytest.mark.parametrize(
    ("index", "axis"), [((1, 0, 0), "I"), ((0, 3, 0), "J"), ((0, 0, 6), "K"), ((0, 0, -2), "K")]
)
def test_a_box_that_is_not_a_patch_of_the_grid_is_refused_with_its_axis(index: Triple, axis: str) -> None:
    grid = PatchGrid.over((6, 6, 6), (2, 2, 2))
    with pytest.raises(PatchLocationError, match=f"not of this grid .axis {axis}; patches of") as caught:
        grid.position_of(PatchLocation(index, (2, 2, 2)))
    assert str(index) in str(caught.value)


def test_a_box_of_another_size_than_the_patches_is_refused_with_both_sizes() -> None:
    grid = PatchGrid.over((6, 6, 6), (2, 2, 2))
    with pytest.raises(PatchLocationError, match=r"size \(2, 2, 3\) is not of this grid .*\(2, 2, 2\)"):
        grid.position_of(PatchLocation((0, 0, 0), (2, 2, 3)))


# Borders


@given(axes())
def test_a_border_adds_half_the_overlap_on_each_side(axis: tuple[int, int, int]) -> None:
    n, p, o = axis
    grid = grid_on_one_axis(axis, border=True)
    assert grid.pad_before[0] == grid.pad_after[0] == o // 2
    assert grid.starts[0].tolist() == [s - o // 2 for s in axis_starts(n + o, p, o).tolist()]
    assert grid.starts[0][0] == -(o // 2)
    assert grid.starts[0][-1] + p == n + o // 2


@given(axes(may_be_small=True), st.booleans())
def test_a_grid_covers_exactly_its_volume_and_its_padding(axis: tuple[int, int, int], border: bool) -> None:
    n, p, o = axis
    grid = grid_on_one_axis(axis, border=border)
    covered = {v for s in grid.starts[0].tolist() for v in range(s, s + p)}
    assert covered == set(range(-grid.pad_before[0], n + grid.pad_after[0]))
    wanted = o // 2 if border else 0
    assert min(grid.pad_before[0], grid.pad_after[0]) >= wanted


@given(axes(may_be_small=True), st.booleans())
def test_a_volume_smaller_than_the_patch_is_padded_evenly_and_has_one_patch(
    axis: tuple[int, int, int], border: bool
) -> None:
    n, p, o = axis
    grid = grid_on_one_axis(axis, border=border)
    before, after = grid.pad_before[0], grid.pad_after[0]
    assert 0 <= after - before <= 1
    if n + (o if border else 0) <= p:
        assert grid.counts == (1, 1, 1)
        assert n + before + after == p
    else:
        assert before == after == (o // 2 if border else 0)
