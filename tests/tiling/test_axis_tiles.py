"""The tiles of an axis part it, are in one shard each, and know which patches add to them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.geometry.boxes import PatchLocation
from zpatch.geometry.patch_grid import PatchGrid, axis_starts
from zpatch.tiling import windows
from zpatch.tiling.axis_tiles import MIN_TILE_VOXELS, AxisPatch, AxisScale, AxisTiles

MODES = st.sampled_from(windows.OVERLAP_MODES)

Weights = NDArray[np.float32]


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
    return Axis(patches, weights, m, shard, AxisTiles.cut(mode, starts, o, AxisScale.of(n, m, p), shard))


def edges_of(axis: AxisTiles) -> list[int]:
    """The ends of all tiles, which leave no gap."""
    ends = [(tile.first, tile.stop) for tile in axis.tiles]
    assert all(a < b for a, b in ends)
    assert all(stop == first for (_, stop), (first, _) in itertools.pairwise(ends))
    return [first for first, _ in ends] + [ends[-1][1]]


def span_of(patch: AxisPatch) -> tuple[int, int, Weights]:
    """Where a patch adds to the output, from its first share to its last, and its weights there."""
    if not patch.shares:
        return 0, 0, np.zeros(0, np.float32)
    ends = [(share.tile.first + share.in_tile.start, share.tile.first + share.in_tile.stop)
            for share in patch.shares]  # fmt: skip
    assert all(stop == first for (_, stop), (first, _) in itertools.pairwise(ends))
    assert ends == [(patch.start + s.in_patch.start, patch.start + s.in_patch.stop) for s in patch.shares]
    assert all(len(s.weights) == b - a for s, (a, b) in zip(patch.shares, ends, strict=True))
    return ends[0][0], ends[-1][1], np.concatenate([share.weights for share in patch.shares])


@pytest.mark.parametrize("scaled", [False, True])
def test_tiles_of_an_axis_part_it_and_each_is_in_one_shard(scaled: bool) -> None:
    @given(axes(scaled=scaled))
    def check(axis: Axis) -> None:
        edges = edges_of(axis.tiles)
        assert (edges[0], edges[-1]) == (0, axis.length)
        for number, tile in enumerate(axis.tiles.tiles):
            assert tile.number == number
            assert tile.length == tile.stop - tile.first
            shard = tile.first // axis.shard
            assert (tile.stop - 1) // axis.shard == shard
            assert tile.shards == range(shard, shard + 1)
        assert axis.tiles.shards == -(-axis.length // axis.shard)
        of_shards = [tile for shard in range(axis.tiles.shards) for tile in axis.tiles.tiles_of(shard)]
        assert of_shards == list(axis.tiles.tiles)

    check()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_contributors_of_a_tile_are_exactly_the_patches_with_weight_in_it_ascending(scaled: bool) -> None:
    @given(axes(scaled=scaled))
    def check(axis: Axis) -> None:
        tiles, weighs = axis.tiles, axis.weights > 0
        in_tile = [weighs[:, tile.first : tile.stop].any(axis=1) for tile in tiles.tiles]
        assert [list(t.contributors) for t in tiles.tiles] == [
            np.flatnonzero(row).tolist() for row in in_tile
        ]
        for number, (patch, hit) in enumerate(zip(tiles.patches, np.array(in_tile).T, strict=True)):
            assert [share.tile.number for share in patch.shares] == np.flatnonzero(hit).tolist()
            assert [share.tile.contributors[share.rank] for share in patch.shares] == [number] * hit.sum()
            assert [patch.share_of(share.tile.number) for share in patch.shares] == list(patch.shares)

    check()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_patch_has_its_weights_where_they_are_not_zero_and_they_sum_to_one(scaled: bool) -> None:
    @given(axes(scaled=scaled))
    def check(axis: Axis) -> None:
        tiles, totals = axis.tiles, np.zeros(axis.length)
        for n, (patch, weights) in enumerate(zip(axis.patches, axis.weights, strict=True)):
            first, stop, found = span_of(tiles.patches[n])
            assert (tiles.patches[n].start, tiles.patches[n].stop) == (patch.index[0], patch.index_fin[0])
            assert np.flatnonzero(weights).tolist() == list(range(first, stop))
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, weights[first:stop], rtol=1e-6)
            totals[first:stop] += found
        np.testing.assert_allclose(totals, 1, atol=1e-6)

    check()


@given(axes(scaled=True))
def test_borders_of_patches_are_edges_unless_another_edge_is_close(axis: Axis) -> None:
    edges = np.array(edges_of(axis.tiles))
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
    axis = AxisTiles.cut("average", np.array([0, 48, 96]), 16, AxisScale.of(160, 160, 64))
    assert edges_of(axis) == [0, 48, 64, 96, 112, 160]
    assert [tile.contributors for tile in axis.tiles] == [(0,), (0, 1), (1,), (1, 2), (2,)]


def test_no_tile_crosses_a_shard() -> None:
    axis = AxisTiles.cut("average", np.array([0, 48, 96]), 16, AxisScale.of(160, 160, 64), 64)
    assert edges_of(axis) == [0, 48, 64, 96, 112, 128, 160]
    assert [tile.shards.start for tile in axis.tiles] == [0, 0, 1, 1, 1, 2]
    numbers = [[tile.number for tile in axis.tiles_of(shard)] for shard in range(3)]
    assert numbers == [[0, 1], [2, 3, 4], [5]]


def test_crop_leaves_each_tile_to_one_patch_where_borders_are_not_close() -> None:
    axis = AxisTiles.cut("crop", np.array([0, 48, 96]), 16, AxisScale.of(160, 160, 64))
    assert edges_of(axis) == [0, 56, 104, 160]
    assert [len(tile.contributors) for tile in axis.tiles] == [1, 1, 1]


def test_in_crop_a_flush_patch_takes_all_that_it_keeps_from_the_patch_before_it() -> None:
    starts = axis_starts(150, 64, 16)
    assert starts.tolist() == [0, 48, 86]
    axis = AxisTiles.cut("crop", starts, 16, AxisScale.of(150, 150, 64))
    assert [span_of(patch)[:2] for patch in axis.patches] == [(0, 56), (56, 94), (94, 150)]


def test_a_patch_that_keeps_nothing_beside_a_flush_one_at_half_resolution_is_no_error() -> None:
    starts = axis_starts(41, 16, 8)
    assert starts[-2:].tolist() == [24, 25]
    axis = AxisTiles.cut("crop", starts, 8, AxisScale.of(41, 20, 16))
    assert edges_of(axis)[-1] == 20
    idle = {number for number, patch in enumerate(axis.patches) if not patch.shares}
    assert idle
    assert not {number for tile in axis.tiles for number in tile.contributors} & idle


@st.composite
def padded_axes(draw: st.DrawFn) -> tuple[AxisTiles, int, int, int]:
    """An axis shorter than its patches: tiles, length, patch length, and what a network makes of that."""
    p, q = draw(st.sampled_from([(16, 8), (32, 8), (16, 1), (30, 10), (8, 16), (12, 36), (12, 12)]))
    n, o = draw(st.integers(1, p - 1)), 2 * draw(st.integers(0, (p - 1) // 2))
    m = max(1, int(n * q / p + 0.5))
    starts = PatchGrid.over((n, 1, 1), (p, 1, 1), (o, 0, 0), border=draw(st.booleans())).starts[0]
    return AxisTiles.cut(draw(MODES), starts, o, AxisScale.of(n, m, p, q)), n, p, q


@given(padded_axes())
def test_on_a_short_axis_a_patch_has_the_length_that_the_network_makes_up_to_rounding(
    axis: tuple[AxisTiles, int, int, int],
) -> None:
    tiles, _, p, q = axis
    assert max(abs(patch.stop - patch.start - q) for patch in tiles.patches) <= (1 if q < p else 0)
    totals = np.zeros(edges_of(tiles)[-1])
    for first, stop, weights in map(span_of, tiles.patches):
        totals[first:stop] += weights
    np.testing.assert_allclose(totals, 1, atol=1e-6)


@given(padded_axes())
def test_one_patch_that_covers_a_short_axis_is_where_the_network_puts_it(
    axis: tuple[AxisTiles, int, int, int],
) -> None:
    tiles, n, p, q = axis
    if len(tiles.patches) == 1:
        [patch] = tiles.patches
        assert patch.start <= 0
        assert patch.stop >= edges_of(tiles)[-1]
        assert abs(patch.start + (p - n) // 2 * q / p) <= 0.5


@pytest.mark.parametrize(("n", "m", "p", "q", "o"), [(5, 3, 12, 6, 10), (7, 4, 20, 10, 18)])
def test_crop_leaves_no_gap_where_patches_overlap_less_in_the_padding(
    n: int, m: int, p: int, q: int, o: int
) -> None:
    starts = PatchGrid.over((n, 1, 1), (p, 1, 1), (o, 0, 0), border=True).starts[0]
    axis = AxisTiles.cut("crop", starts, o, AxisScale.of(n, m, p, q))
    covered = [range(*span_of(patch)[:2]) for patch in axis.patches]
    assert sorted(itertools.chain(*covered)) == list(range(m))


def test_the_scale_of_a_patch_is_ignored_where_the_output_does_not_agree_with_it() -> None:
    for n, m, p, q in [(3, 2, 16, 11), (3, 3, 16, 8), (3, 2, 16, 16), (40, 16, 16, 8), (3, 2, 16, 0)]:
        assert AxisScale.of(n, m, p, q) == AxisScale.of(n, m, p)
    assert AxisScale.of(3, 2, 16, 11).place(np.array([-6, 10])).tolist() == [-4, 7]


@pytest.mark.parametrize("output_length", [20, 40, 160])
def test_ends_of_patches_are_scaled_with_the_output(output_length: int) -> None:
    axis = AxisTiles.cut("hann", np.array([0, 24, 48]), 8, AxisScale.of(80, output_length, 32))
    scale = output_length / 80
    assert [patch.start for patch in axis.patches] == [0, 24 * scale, 48 * scale]
    assert [patch.stop for patch in axis.patches] == [32 * scale, 56 * scale, 80 * scale]
