"""Cells: each voxel of an output is in one of them, and is made from the tiles that it names."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.geometry.boxes import Triple
from zpatch.resampling.axis_taps import AxisTaps
from zpatch.resampling.interpolation import Interpolation
from zpatch.tiling.output_cells import OutputAxis, OutputGrid, cells_of_tiles


class Cut(NamedTuple):
    axis: OutputAxis
    edges: list[int]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Outputs of 0.4 to 2.5 times the voxels, also reversed, on volumes cut into tiles of any length."""
    length, factor = draw(st.integers(1, 60)), draw(st.one_of(st.just(1.0), st.floats(0.4, 2.5)))
    inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6)) - {length}
    count = max(1, round(length / factor))
    places = (np.arange(count) + 0.5) * factor - 0.5
    is_reversed = draw(st.booleans())
    if is_reversed:
        places = length - 1 - places
    mode = draw(st.sampled_from(["linear", "nearest"]))
    taps = AxisTaps.at(places, length, Interpolation(mode), factor)
    return Cut(OutputAxis(taps, draw(st.integers(1, 30)), is_reversed), [0, *sorted(inner), length])


@given(cuts())
def test_cells_part_the_output_in_the_order_of_the_tiles(cut: Cut) -> None:
    axis, cells = cut.axis, cut.axis.cells(cut.edges)
    count = len(axis.taps.first)
    covered = [n for cell in cells for n in range(cell.first, cell.first + cell.length)]
    assert sorted(covered) == list(range(count))
    assert [cell.tile for cell in cells] == sorted(cell.tile for cell in cells)
    assert [cell.shard for cell in cells] == sorted(cell.shard for cell in cells)
    shards = -(-count // axis.shard_length)
    for cell in cells:
        stored = shards - 1 - cell.shard if axis.is_reversed else cell.shard
        assert {n // axis.shard_length for n in range(cell.first, cell.first + cell.length)} == {stored}


@given(cuts())
def test_a_cell_is_made_from_its_tile_and_at_most_the_last_voxel_of_the_one_before(cut: Cut) -> None:
    for cell in cut.axis.cells(cut.edges):
        assert cell.taps is not None
        start = cut.edges[cell.tile] - cell.reach
        assert cell.reach in (0, 1)
        assert cell.taps.start >= 0
        assert start + cell.taps.stop <= cut.edges[cell.tile + 1]
        assert (cell.taps.start == 0) or not cell.reach
        rows = slice(cell.first, cell.first + cell.length)
        assert np.array_equal(cell.taps.first + start, cut.axis.taps.first[rows])
        assert np.array_equal(cell.taps.weights, cut.axis.taps.weights[rows])


def test_an_output_on_the_grid_of_the_volume_has_the_tiles_as_cells() -> None:
    cells = cells_of_tiles([0, 5, 8, 16], 8)
    assert [(c.tile, c.reach, c.shard, c.first, c.length) for c in cells] == [
        (0, 0, 0, 0, 5), (1, 0, 0, 5, 3), (2, 0, 1, 8, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_the_axes_of_a_grid_are_those_of_its_matrix(axes: Triple) -> None:
    matrix = np.zeros((4, 4))
    for axis, along in enumerate(axes):
        matrix[axis, along] = -1.5 if axis == 1 else 0.5
    grid = OutputGrid((4, 5, 6), matrix)
    assert grid.axes == axes
    assert grid.is_reversed == (False, True, False)
    assert [len(grid.axis(axis, 9, (2, 2, 2)).taps.first) for axis in range(3)] == [
        grid.shape[along] for along in axes
    ]
