"""The peak of a sweep is the most that a replay of it, patch by patch, holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.geometry.boxes import Triple
from zpatch.planning.peak_memory import AxisLifetimes, Held, sweep_peak_bytes

Counts = tuple[int, int, int]


@st.composite
def lives(draw: st.DrawFn, patches: int) -> AxisLifetimes:
    """Up to five pieces of an axis of so many patches."""
    ends = st.lists(st.integers(0, patches - 1), min_size=2, max_size=2).map(sorted)
    pieces = draw(st.lists(st.tuples(ends, st.integers(1, 50)), max_size=5))
    births, deaths, sizes = ([e[0] for e, _ in pieces], [e[1] for e, _ in pieces], [n for _, n in pieces])
    return AxisLifetimes(*(np.array(values, dtype=np.int64) for values in (births, deaths, sizes)))


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[list[Held], Counts]:
    counts = draw(st.tuples(*[st.integers(1, 5)] * 3))
    kind = st.builds(Held, st.tuples(*map(lives, counts)), st.integers(1, 8))
    return draw(st.lists(kind, min_size=1, max_size=3)), counts


def held_at(patch: Triple, kinds: Sequence[Held]) -> int:
    """What is held at a patch: all that was born up to it and does not die before it."""
    total = 0
    for kind in kinds:
        for pieces in itertools.product(*(range(len(axis.size)) for axis in kind.axes)):
            chosen = list(zip(kind.axes, pieces, strict=True))
            birth = tuple(int(axis.birth[n]) for axis, n in chosen)
            death = tuple(int(axis.death[n]) for axis, n in chosen)
            if birth <= patch <= death:
                total += kind.voxel_bytes * math.prod(int(axis.size[n]) for axis, n in chosen)
    return total


@given(sweeps())
def test_the_peak_is_that_of_a_replay(sweep: tuple[list[Held], Counts]) -> None:
    kinds, counts = sweep
    replay = [held_at(patch, kinds) for patch in np.ndindex(counts)]
    assert sweep_peak_bytes(kinds, counts) == max(replay)


@given(sweeps())
def test_a_kind_with_negative_bytes_takes_away_from_one_that_counts_it_too(
    sweep: tuple[list[Held], Counts],
) -> None:
    kinds, counts = sweep
    twice = [*kinds, kinds[0], Held(kinds[0].axes, -kinds[0].voxel_bytes)]
    assert sweep_peak_bytes(twice, counts) == sweep_peak_bytes(kinds, counts)


def test_patches_may_be_counted_from_any_number_on() -> None:
    axis = AxisLifetimes(np.array([7, 9]), np.array([8, 9]), np.array([4, 2])).within(7)
    assert (axis.birth.tolist(), axis.death.tolist(), axis.size.tolist()) == ([0, 2], [1, 2], [4, 2])


def test_where_nothing_is_held_the_peak_is_zero() -> None:
    nothing = AxisLifetimes(*np.zeros((3, 0), dtype=np.int64))
    assert sweep_peak_bytes([Held((nothing, nothing, nothing), 4)], (3, 2, 1)) == 0


def test_bytes_are_counted_beyond_32_bits() -> None:
    piece = AxisLifetimes(np.array([0]), np.array([0]), np.array([40_000]))
    assert sweep_peak_bytes([Held((piece, piece, piece), 4)], (1, 1, 1)) == 4 * 40_000**3


@pytest.mark.parametrize("rows", [10, 1000])
def test_the_peak_does_not_grow_with_the_length_of_the_sweep(rows: int) -> None:
    row = np.arange(rows)
    slow = AxisLifetimes(row, np.minimum(row + 1, rows - 1), np.full(rows, 16))
    other = AxisLifetimes(np.arange(4), np.arange(4), np.full(4, 16))
    assert sweep_peak_bytes([Held((slow, other, other), 4)], (rows, 4, 4)) == 17 * 16**3 * 4
