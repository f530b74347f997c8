"""Tiles part a volume, fill its shards, and know the patches that add to them and their rank."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.errors import OptionError
from zpatch.geometry.boxes import Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.tiling import windows
from zpatch.tiling.volume_tiles import Tile, Tiling, sweep_order

MODES = st.sampled_from(windows.OVERLAP_MODES)

seeds = st.integers(0, 2**32).map(np.random.default_rng)


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


def all_tiles(tiling: Tiling) -> list[Tile]:
    return list(itertools.starmap(Tile.of, itertools.product(*(axis.tiles for axis in tiling.axes))))


def box_of(tile: Tile) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(tile.first, tile.shape, strict=True))


def weights_of(tiling: Tiling) -> list[NDArray[Any]]:
    """For each axis the weights of all patches, (patch, voxel of the output), from the definition."""
    found = []
    for axis, overlap, n, m in zip(
        tiling.axes, tiling.grid.patch_overlap, tiling.grid.spatial_shape, tiling.shape, strict=True
    ):
        starts, stops = (np.array([getattr(p, end) for p in axis.patches]) for end in ("start", "stop"))
        weights = np.zeros((len(starts), m))
        shares = windows.partition_of_unity(tiling.mode, starts, stops, overlap * m // n)
        for row, start, share in zip(weights, starts.tolist(), shares, strict=True):
            inside = slice(max(start, 0), min(start + len(share), m))
            row[inside] = share[inside.start - start : max(inside.stop - start, 0)]
        found.append(weights)
    return found


def adds_to(tiling: Tiling, tile: Tile) -> list[Triple]:
    """Positions of the patches with a weight anywhere in a tile, by looking at all, in sweep order."""
    axes = zip(weights_of(tiling), box_of(tile), strict=True)
    i, j, k = (np.flatnonzero(weights[:, part].any(axis=1)).tolist() for weights, part in axes)
    return sorted(itertools.product(i, j, k), key=lambda at: [at[a] for a in tiling.order])


@given(tilings())
def test_tiles_part_the_volume_and_fill_its_shards(tiling: Tiling) -> None:
    seen = np.full(tiling.shape, -1)
    counts = tiling.shard_counts
    assert counts == tuple(-(-n // u) for n, u in zip(tiling.shape, tiling.shard_shape, strict=True))
    for number, shard in enumerate(np.ndindex(counts)):
        for tile in tiling.tiles_of(shard):
            assert tile.shards == tuple(range(n, n + 1) for n in shard)
            assert (seen[box_of(tile)] == -1).all()
            seen[box_of(tile)] = number
    of_voxel = [np.arange(n) // u for n, u in zip(tiling.shape, tiling.shard_shape, strict=True)]
    i, j, k = np.ix_(*of_voxel)
    assert np.array_equal(seen, (i * counts[1] + j) * counts[2] + k)


@given(tilings())
def test_a_patch_hits_the_tiles_that_it_adds_to(tiling: Tiling) -> None:
    hit = {at: {tile for tile, _ in tiling.tiles_hit(at)} for at in np.ndindex(tiling.grid.counts)}
    for tile in all_tiles(tiling):
        positions = adds_to(tiling, tile)
        assert tile.contributors == len(positions) > 0
        assert set(itertools.product(*tile.positions)) == set(positions)
        assert {position for position, tiles in hit.items() if tile in tiles} == set(positions)


@given(tilings())
def test_the_share_of_a_patch_in_a_tile_is_where_it_has_weight_there(tiling: Tiling) -> None:
    weights = weights_of(tiling)
    for position in np.ndindex(tiling.grid.counts):
        patches = [axis.patches[n] for axis, n in zip(tiling.axes, position, strict=True)]
        assert tiling.size_of(position) == tuple(patch.stop - patch.start for patch in patches)
        for tile, share in tiling.tiles_hit(position):
            for axis, (first, n) in enumerate(zip(tile.first, tile.shape, strict=True)):
                in_tile = weights[axis][position[axis], first : first + n]
                inside = np.arange(n)[share.in_tile[axis]]
                assert np.flatnonzero(in_tile).tolist() == inside.tolist()
                np.testing.assert_allclose(share.weights[axis], in_tile[inside], rtol=1e-6)
                in_patch = range(tiling.size_of(position)[axis])[share.in_patch[axis]]
                assert [patches[axis].start + v for v in in_patch] == (first + inside).tolist()


@given(tilings(), st.permutations(range(3)))
def test_tiles_are_hit_in_the_order_of_axes_that_is_asked_for(tiling: Tiling, order: list[int]) -> None:
    for position in np.ndindex(tiling.grid.counts):
        hit = [tile.number for tile, _ in tiling.tiles_hit(position, order)]
        assert hit == sorted(hit, key=lambda number: [number[axis] for axis in order])


@given(tilings())
def test_the_rank_of_a_patch_is_its_number_in_sweep_order_among_the_contributors_of_the_tile(
    tiling: Tiling,
) -> None:
    ranks = {
        (tile, at): share.rank
        for at in np.ndindex(tiling.grid.counts)
        for tile, share in tiling.tiles_hit(at)
    }
    for tile in all_tiles(tiling):
        positions = adds_to(tiling, tile)
        assert [ranks[tile, position] for position in positions] == list(range(len(positions)))


@given(tilings(), seeds, st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_the_ranks_of_some_patches_in_a_tile_are_those_of_its_contributors_among_them(
    tiling: Tiling, rng: np.random.Generator, share: float
) -> None:
    some = rng.random(tiling.grid.counts) < share
    for tile in all_tiles(tiling):
        positions = adds_to(tiling, tile)
        assert tiling.ranks(tile, some) == [n for n, at in enumerate(positions) if some[at]]


@given(tilings(), seeds, st.sampled_from([0.0, 0.3, 1.0]))
def test_voxels_of_a_tile_are_reached_by_some_patches_where_one_has_weight(
    tiling: Tiling, rng: np.random.Generator, share: float
) -> None:
    some, weights = rng.random(tiling.grid.counts) < share, weights_of(tiling)
    for tile in all_tiles(tiling):
        i, j, k = (w[:, part] > 0 for w, part in zip(weights, box_of(tile), strict=True))
        expected = np.einsum("abc,ai,bj,ck->ijk", some.astype(int), *map(np.int64, (i, j, k))) > 0
        assert np.array_equal(tiling.reached(tile, some), expected)


@given(tilings(), seeds, st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_the_patches_for_some_shards_are_those_that_add_to_any(
    tiling: Tiling, rng: np.random.Generator, share: float
) -> None:
    shards = rng.random(tiling.shard_counts) < share
    expected = np.zeros(tiling.grid.counts, dtype=bool)
    for tile in all_tiles(tiling):
        if shards[tuple(of.start for of in tile.shards)]:
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
