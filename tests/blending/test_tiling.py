"""Tiles part a volume, lie in one shard each, and know the patches that add to them and their order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.blending import windows
from zpatch.blending.tiling import MIN_TILE_VOXELS, AxisScale, AxisTiles, Tiling, sweep_order
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.geometry.patch_grid import PatchGrid, axis_starts

MODES = st.sampled_from(windows.OVERLAP_MODES)

seeds = st.integers(0, 2**32).map(np.random.default_rng)


@dataclass(frozen=True)
class Axis:
    """One axis in the frame of the output, straight from the definitions.

    ``weights`` is (patch, voxel of the output), 0 where a patch does not reach.
    """

    patches: list[PatchLocation]
    weights: NDArray[np.float64]
    length: int
    shard: int
    tiles: AxisTiles


@st.composite
def lengths(draw: st.DrawFn, longest: int = 160) -> tuple[int, int, int]:
    """Axis length, patch length and any overlap; the axis may be shorter than the patch."""
    p = draw(st.integers(1, 40))
    return draw(st.integers(1, longest)), p, 2 * draw(st.integers(0, (p - 1) // 2))


@st.composite
def axes(draw: st.DrawFn, *, scaled: bool) -> Axis:
    mode, (n, p, o) = draw(MODES), draw(lengths())
    starts = PatchGrid.over((n, 1, 1), (p, 1, 1), (o, 0, 0), border=draw(st.booleans())).starts[0]
    ratios = st.sampled_from([n // 4, n // 2, n, 2 * n]).map(lambda m: max(m, 1))
    m = draw(ratios | st.integers(1, 2 * n)) if scaled else n
    shard = draw(st.integers(1, m + 10))
    patches = [PatchLocation((s, 0, 0), (p, 1, 1)).scaled(m / n) for s in starts.tolist()]
    ends = np.array([(box.index[0], box.index_fin[0]) for box in patches])
    weights = np.zeros((len(patches), m))
    shares = windows.partition_of_unity(mode, ends[:, 0], ends[:, 1], o * m // n)
    for row, share, first in zip(weights, shares, ends[:, 0], strict=True):
        for voxel, weight in enumerate(share, start=first):
            if 0 <= voxel < m:
                row[voxel] = weight
    tiles = AxisTiles.cut(mode, starts, p, o, n, output_length=m if scaled else None, shard_length=shard)
    return Axis(patches, weights, m, shard, tiles)


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    """Volumes with one longer axis, cut into several shards, also of another resolution."""
    long_axis = draw(st.integers(0, 2))
    sides = []
    for axis in range(3):
        n = draw(st.integers(1, 70 if axis == long_axis else 20))
        p = draw(st.integers(-(-n // 6), 30))
        o = draw(st.sampled_from([o for o in range(0, p, 2) if 6 * (p - o) >= n]))
        m = draw(st.sampled_from([n, max(1, n // 2), 2 * n]))
        sides.append((n, p, o, m, draw(st.integers(5, m + 5))))
    shape, size, overlap, output, shard = zip(*sides, strict=True)
    return Tiling.over(
        PatchGrid.over(shape, size, overlap, border=draw(st.booleans())),
        draw(MODES),
        swept_axis=draw(st.integers(0, 2)),
        output_shape=output,
        shard_shape=shard,
    )


def all_tiles(tiling: Tiling) -> list[Triple]:
    i, j, k = (range(len(axis.touching)) for axis in tiling.axes)
    return list(itertools.product(i, j, k))


def adds_to(tiling: Tiling, tile: Triple) -> list[Triple]:
    """Positions of the patches with a weight anywhere in a tile, by looking at all, in sweep order."""
    low, high = tiling.bounds(tile)
    touching = []
    for axis, a, b in zip(tiling.axes, low, high, strict=True):
        numbers = range(len(axis.starts))
        touching.append([n for n in numbers if max(axis.first[n], a) < min(axis.stop[n], b)])
    i, j, k = touching
    return sorted(itertools.product(i, j, k), key=lambda at: [at[a] for a in tiling.order])


# One axis


@pytest.mark.parametrize("scaled", [False, True])
def test_tiles_of_an_axis_part_it_and_each_lies_in_one_shard(scaled: bool) -> None:
    @given(axes(scaled=scaled))
    def check(axis: Axis) -> None:
        edges = axis.tiles.edges.tolist()
        assert (edges[0], edges[-1]) == (0, axis.length)
        assert edges == sorted(set(edges))
        for shard, (first, stop) in zip(axis.tiles.shard.tolist(), itertools.pairwise(edges), strict=True):
            assert first // axis.shard == (stop - 1) // axis.shard == shard
        assert axis.tiles.shards == -(-axis.length // axis.shard)
        numbers = [t for shard in range(axis.tiles.shards) for t in axis.tiles.tiles_of(shard)]
        assert numbers == list(range(len(edges) - 1))

    check()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_tile_awaits_exactly_the_patches_that_weigh_in_it_in_ascending_order(scaled: bool) -> None:
    @given(axes(scaled=scaled))
    def check(axis: Axis) -> None:
        tiles, weighs = axis.tiles, axis.weights > 0
        in_tile = [weighs[:, a:b].any(axis=1) for a, b in itertools.pairwise(tiles.edges)]
        assert [t.tolist() for t in tiles.touching] == [np.flatnonzero(row).tolist() for row in in_tile]
        assert tiles.awaited.tolist() == [row.sum() for row in in_tile]
        for patch, hit in enumerate(np.array(in_tile).T):
            span = range(int(tiles.first_tile[patch]), int(tiles.stop_tile[patch]))
            assert np.flatnonzero(hit).tolist() == list(span)

    check()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_patch_has_its_weights_where_they_are_not_zero_and_they_sum_to_one(scaled: bool) -> None:
    @given(axes(scaled=scaled))
    def check(axis: Axis) -> None:
        tiles, totals = axis.tiles, np.zeros(axis.length)
        for n, (patch, weights) in enumerate(zip(axis.patches, axis.weights, strict=True)):
            first, stop = int(tiles.first[n]), int(tiles.stop[n])
            assert (tiles.starts[n], tiles.stops[n]) == (patch.index[0], patch.index_fin[0])
            assert np.flatnonzero(weights).tolist() == list(range(first, stop))
            assert tiles.weights[n].dtype == np.float32
            np.testing.assert_allclose(tiles.weights[n], weights[first:stop], rtol=1e-6)
            totals[first:stop] += tiles.weights[n]
        np.testing.assert_allclose(totals, 1, atol=1e-6)

    check()


@given(axes(scaled=True))
def test_borders_of_patches_are_edges_unless_another_edge_is_close(axis: Axis) -> None:
    edges = axis.tiles.edges
    ends = {0, axis.length, *range(0, axis.length, axis.shard)}
    borders = {
        v for row in axis.weights > 0 if row.any() for v in (row.argmax(), len(row) - row[::-1].argmax())
    }
    assert ends <= set(edges.tolist()) <= ends | borders
    inner = [edge for edge in edges.tolist() if edge not in ends]
    for edge in inner:
        assert np.abs(np.delete(edges, np.searchsorted(edges, edge)) - edge).min() >= MIN_TILE_VOXELS == 16
    for border in borders - set(edges.tolist()):
        assert np.abs(edges - border).min() < MIN_TILE_VOXELS


@given(axes(scaled=True))
def test_a_patch_knows_the_shards_that_it_adds_to(axis: Axis) -> None:
    for row, first, stop in zip(axis.weights > 0, *axis.tiles.shards_hit(), strict=True):
        assert list(range(first, stop)) == sorted({int(v) // axis.shard for v in np.flatnonzero(row)})


def test_patches_far_apart_are_cut_into_tiles_at_their_borders() -> None:
    tiles = AxisTiles.cut("average", np.array([0, 48, 96]), 64, 16, 160)
    assert tiles.edges.tolist() == [0, 48, 64, 96, 112, 160]
    assert [t.tolist() for t in tiles.touching] == [[0], [0, 1], [1], [1, 2], [2]]


def test_no_tile_crosses_a_shard() -> None:
    tiles = AxisTiles.cut("average", np.array([0, 48, 96]), 64, 16, 160, shard_length=64)
    assert tiles.edges.tolist() == [0, 48, 64, 96, 112, 128, 160]
    assert tiles.shard.tolist() == [0, 0, 1, 1, 1, 2]
    assert [list(tiles.tiles_of(shard)) for shard in range(3)] == [[0, 1], [2, 3, 4], [5]]


def test_crop_leaves_each_tile_to_one_patch_where_borders_are_not_close() -> None:
    tiles = AxisTiles.cut("crop", np.array([0, 48, 96]), 64, 16, 160)
    assert tiles.edges.tolist() == [0, 56, 104, 160]
    assert tiles.awaited.tolist() == [1, 1, 1]


def test_in_crop_a_flush_patch_takes_all_that_it_keeps_from_the_patch_before_it() -> None:
    starts = axis_starts(150, 64, 16)
    assert starts.tolist() == [0, 48, 86]
    tiles = AxisTiles.cut("crop", starts, 64, 16, 150)
    assert (tiles.first.tolist(), tiles.stop.tolist()) == ([0, 56, 94], [56, 94, 150])


def test_a_flush_patch_whose_neighbour_keeps_nothing_at_half_resolution_is_no_error() -> None:
    starts = axis_starts(41, 16, 8)
    assert starts[-2:].tolist() == [24, 25]
    tiles = AxisTiles.cut("crop", starts, 16, 8, 41, output_length=20)
    assert tiles.edges[-1] == 20
    idle = tiles.first_tile == tiles.stop_tile
    assert idle.any()
    assert not {int(n) for t in tiles.touching for n in t} & set(np.flatnonzero(idle).tolist())


@st.composite
def padded_axes(draw: st.DrawFn) -> tuple[AxisTiles, int, int, int]:
    """An axis shorter than its patches: tiles and length, and what a network makes of a patch's length."""
    p, q = draw(st.sampled_from([(16, 8), (32, 8), (16, 1), (30, 10), (8, 16), (12, 36), (12, 12)]))
    n, o = draw(st.integers(1, p - 1)), 2 * draw(st.integers(0, (p - 1) // 2))
    m = max(1, int(n * q / p + 0.5))
    starts = PatchGrid.over((n, 1, 1), (p, 1, 1), (o, 0, 0), border=draw(st.booleans())).starts[0]
    return AxisTiles.cut(draw(MODES), starts, p, o, n, output_length=m, made_length=q), n, p, q


@given(padded_axes())
def test_on_a_short_axis_a_patch_has_the_extent_that_the_network_gives_it_but_for_rounding(
    axis: tuple[AxisTiles, int, int, int],
) -> None:
    tiles, _, p, q = axis
    assert np.abs(tiles.stops - tiles.starts - q).max() <= (1 if q < p else 0)
    totals = np.zeros(tiles.edges[-1])
    for first, weights in zip(tiles.first, tiles.weights, strict=True):
        totals[first : first + len(weights)] += weights
    np.testing.assert_allclose(totals, 1, atol=1e-6)


@given(padded_axes())
def test_where_one_patch_covers_a_short_axis_it_lies_where_the_network_puts_it(
    axis: tuple[AxisTiles, int, int, int],
) -> None:
    tiles, n, p, q = axis
    if len(tiles.starts) == 1:
        assert tiles.starts[0] <= 0
        assert tiles.stops[0] >= tiles.edges[-1]
        assert abs(tiles.starts[0] + (p - n) // 2 * q / p) <= 0.5


@pytest.mark.parametrize(("n", "m", "p", "q", "o"), [(5, 3, 12, 6, 10), (7, 4, 20, 10, 18)])
def test_crop_leaves_no_gap_where_patches_overlap_less_in_the_padding(
    n: int, m: int, p: int, q: int, o: int
) -> None:
    starts = PatchGrid.over((n, 1, 1), (p, 1, 1), (o, 0, 0), border=True).starts[0]
    tiles = AxisTiles.cut("crop", starts, p, o, n, output_length=m, made_length=q)
    covered = [range(a, b) for a, b in zip(tiles.first, tiles.stop, strict=True)]
    assert sorted(itertools.chain(*covered)) == list(range(m))


def test_a_scale_that_the_output_does_not_have_says_nothing_of_its_padding() -> None:
    for n, m, p, q in [(3, 2, 16, 11), (3, 3, 16, 8), (3, 2, 16, 16), (40, 16, 16, 8), (3, 2, 16, 0)]:
        assert AxisScale.of(n, m, p, q) == AxisScale.of(n, m, p)
    assert AxisScale.of(3, 2, 16, 11).place(np.array([-6, 10])).tolist() == [-4, 7]


@pytest.mark.parametrize("output_length", [20, 40, 160])
def test_ends_of_patches_are_scaled_with_the_output(output_length: int) -> None:
    tiles = AxisTiles.cut("hann", np.array([0, 24, 48]), 32, 8, 80, output_length=output_length)
    scale = output_length / 80
    assert tiles.starts.tolist() == [0, 24 * scale, 48 * scale]
    assert tiles.stops.tolist() == [32 * scale, 56 * scale, 80 * scale]


# Volumes


@given(tilings())
def test_tiles_part_the_volume_and_fill_its_shards(tiling: Tiling) -> None:
    seen = np.full(tiling.shape, -1)
    counts = tiling.shard_counts
    assert counts == tuple(-(-n // u) for n, u in zip(tiling.shape, tiling.shard_shape, strict=True))
    for number, shard in enumerate(np.ndindex(counts)):
        for tile in tiling.tiles_of(shard):
            assert tiling.shard_of(tile) == shard
            box = tuple(map(slice, *tiling.bounds(tile)))
            assert (seen[box] == -1).all()
            seen[box] = number
    of_voxel = [np.arange(n) // u for n, u in zip(tiling.shape, tiling.shard_shape, strict=True)]
    i, j, k = np.ix_(*of_voxel)
    assert np.array_equal(seen, (i * counts[1] + j) * counts[2] + k)


@given(tilings())
def test_a_patch_hits_the_tiles_that_it_adds_to(tiling: Tiling) -> None:
    hit = {position: set(tiling.tiles_hit(position)) for position in np.ndindex(tiling.grid.counts)}
    for tile in all_tiles(tiling):
        positions = adds_to(tiling, tile)
        assert tiling.awaited(tile) == len(positions) > 0
        assert {position for position, tiles in hit.items() if tile in tiles} == set(positions)


@given(tilings())
def test_the_turn_of_a_patch_is_its_rank_in_sweep_order_among_those_of_the_tile(tiling: Tiling) -> None:
    for tile in all_tiles(tiling):
        positions = adds_to(tiling, tile)
        assert [tiling.turn(tile, position) for position in positions] == list(range(len(positions)))


@given(tilings(), seeds, st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_the_turns_of_a_tile_are_those_of_its_patches_that_are_not_skipped(
    tiling: Tiling, rng: np.random.Generator, share: float
) -> None:
    skipped = rng.random(tiling.grid.counts) < share
    for tile in all_tiles(tiling):
        positions = adds_to(tiling, tile)
        assert tiling.turns(tile, skipped) == [n for n, at in enumerate(positions) if not skipped[at]]


@given(tilings(), seeds, st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_the_patches_for_some_shards_are_those_that_add_to_any(
    tiling: Tiling, rng: np.random.Generator, share: float
) -> None:
    shards = rng.random(tiling.shard_counts) < share
    expected = np.zeros(tiling.grid.counts, dtype=bool)
    for tile in all_tiles(tiling):
        if shards[tiling.shard_of(tile)]:
            for position in adds_to(tiling, tile):
                expected[position] = True
    assert np.array_equal(tiling.patches_for(shards), expected)


def test_without_a_shard_shape_the_volume_is_one_shard() -> None:
    tiling = Tiling.over(PatchGrid.over((50, 20, 8), (16, 8, 8), (8, 4, 0)), "hann")
    assert tiling.shape == tiling.shard_shape == (50, 20, 8)
    assert tiling.shard_counts == (1, 1, 1)
    assert list(tiling.tiles_of((0, 0, 0))) == all_tiles(tiling)


@pytest.mark.parametrize(("swept", "order"), [(0, (0, 1, 2)), (1, (1, 0, 2)), (2, (2, 0, 1))])
def test_the_swept_axis_is_slowest_and_the_others_keep_their_order(swept: int, order: Triple) -> None:
    assert sweep_order(swept) == order
    assert Tiling.over(PatchGrid.over((8, 8, 8), (4, 4, 4)), "crop", swept_axis=swept).order == order


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match="overlap_mode must be one of"):
        Tiling.over(PatchGrid.over((8, 8, 8), (4, 4, 4)), "mean")
