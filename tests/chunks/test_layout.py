"""How arrays are cut into chunks and shards: the rules of the store, for all shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.chunks.layout import (
    MAX_CHUNKS_IN_SHARD,
    MAX_SHARD_BYTES,
    SHARD_BYTES,
    Layout,
    chunk_counts,
    covering_chunks,
    plan_layout,
    plan_output_layout,
)

SIDES = st.integers(1, 400) | st.integers(1, 40_000)
SPATIAL = st.tuples(SIDES, SIDES, SIDES)
HUGE = st.integers(8_000, 80_000)
SHAPES = st.one_of(
    SPATIAL, st.tuples(st.integers(1, 99), HUGE, HUGE), st.tuples(st.integers(1, 70), SIDES, SIDES, SIDES)
)
ITEMSIZES = st.sampled_from([1, 2, 4, 8, 16])
CHUNKS = st.sampled_from([8, 16, 32, 48, 64])
SPACINGS = st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 3.0, 8.0])] * 3)


def check_cut(layout: Layout, shape: tuple[int, ...]) -> None:
    """Shards are whole chunks and cover the array; none is outside it."""
    assert len(layout.chunks) == len(layout.shards) == len(shape)
    sides = zip(shape, layout.chunks, layout.shards, layout.shard_counts(shape), strict=True)
    for n, chunk, shard, count in sides:
        assert 1 <= chunk <= n
        assert shard % chunk == 0
        assert (count - 1) * shard < n <= count * shard


def shard_bytes(layout: Layout, itemsize: int) -> int:
    return math.prod(layout.shards) * itemsize


def chunks_in_shard(layout: Layout) -> int:
    return math.prod(layout.shards) // math.prod(layout.chunks)


def rounded_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


# Conversion


@st.composite
def plans(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], int]:
    """A layout of anything that may be converted, with the shape and the itemsize of the array."""
    shape, itemsize, colours = draw(SHAPES), draw(ITEMSIZES), 1
    if len(shape) == 4 and draw(st.booleans()):
        colours, itemsize = draw(st.sampled_from([3, 4])), 1
        shape = (shape[0] * colours, *shape[1:])
    spacing, chunk = draw(SPACINGS), draw(CHUNKS)
    return plan_layout(shape, itemsize, spacing=spacing, chunk=chunk, interleaved=colours), shape, itemsize


@given(plans())
def test_shards_are_whole_chunks_that_cover_the_array(plan: tuple[Layout, tuple[int, ...], int]) -> None:
    layout, shape, _ = plan
    check_cut(layout, shape)


@given(plans())
def test_no_shard_is_larger_than_128_mib_however_large_the_planes(
    plan: tuple[Layout, tuple[int, ...], int],
) -> None:
    layout, _, itemsize = plan
    assert shard_bytes(layout, itemsize) <= MAX_SHARD_BYTES == 128 * 2**20


@given(plans())
def test_no_shard_has_an_index_of_more_entries_than_allowed(
    plan: tuple[Layout, tuple[int, ...], int],
) -> None:
    assert chunks_in_shard(plan[0]) <= MAX_CHUNKS_IN_SHARD


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("shape", [(300, 300, 300), (2000, 2000, 2000), (1000, 4, 64, 64)])
def test_not_even_tiny_chunks_make_an_index_of_more_entries_than_allowed(
    shape: tuple[int, ...], chunk: int
) -> None:
    assert chunks_in_shard(plan_layout(shape, 1, chunk=chunk)) <= MAX_CHUNKS_IN_SHARD


@given(SHAPES, ITEMSIZES, CHUNKS)
def test_a_shard_is_a_slab_of_full_planes_where_one_plane_of_voxels_is_small_enough(
    shape: tuple[int, ...], itemsize: int, chunk: int
) -> None:
    layout = plan_layout(shape, itemsize, chunk=chunk)
    width_y, width_x = (rounded_up(n, c) for n, c in zip(shape[-2:], layout.chunks[-2:], strict=True))
    plane_bytes = width_y * width_x * itemsize
    chunks_in_plane = (width_y // layout.chunks[-2]) * (width_x // layout.chunks[-1])
    fits = plane_bytes <= MAX_SHARD_BYTES and chunks_in_plane <= MAX_CHUNKS_IN_SHARD
    assert (layout.shards[-2:] == (width_y, width_x)) == fits


@given(SHAPES, ITEMSIZES)
def test_chunks_are_cubes_of_32_voxels_where_the_volume_is_large_enough_and_planes_fit(
    shape: tuple[int, ...], itemsize: int
) -> None:
    layout = plan_layout(shape, itemsize)
    nz, ny, nx = shape[-3:]
    assert layout.chunks[-2:] == (min(32, ny), min(32, nx))
    if 32 * rounded_up(ny, 32) * rounded_up(nx, 32) * itemsize <= MAX_SHARD_BYTES:
        assert layout.chunks[-3] == min(32, nz)


@pytest.mark.parametrize("shape", [(189, 233, 197), (182, 218, 182), (155, 240, 240), (256, 256, 256)])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_a_volume_of_usual_size_is_one_to_six_files(shape: tuple[int, ...], itemsize: int) -> None:
    assert 1 <= math.prod(plan_layout(shape, itemsize).shard_counts(shape)) <= 6


@given(SPATIAL, st.sampled_from([2**10, 2**16, 2**20, 2**24]))
def test_a_shard_is_as_large_as_its_limit_or_one_chunk_deep(shape: tuple[int, ...], wanted: int) -> None:
    layout = plan_layout(shape, 2, shard_bytes=wanted)
    assert shard_bytes(layout, 2) <= wanted or layout.shards[0] == layout.chunks[0]


# Anisotropy; stored order is (z, y, x)


@pytest.mark.parametrize(
    ("spacing", "chunks"),
    [
        ((5.0, 1.0, 1.0), (8, 64, 64)),
        ((1.0, 5.0, 1.0), (64, 8, 64)),
        ((0.5, 0.5, 2.0), (64, 64, 8)),
        ((3.0, 1.0, 1.0), (32, 32, 32)),
        ((5.0, 5.0, 1.0), (32, 32, 32)),
        ((5.0, 0.0, 1.0), (32, 32, 32)),
        ((math.nan, 1.0, 1.0), (32, 32, 32)),
    ],
)
def test_chunks_are_flatter_along_the_one_axis_that_is_over_three_times_as_coarse(
    spacing: tuple[float, ...], chunks: tuple[int, ...]
) -> None:
    layout = plan_layout((256, 256, 256), 2, spacing=spacing)
    assert layout.chunks == chunks
    assert math.prod(layout.chunks) == 32**3


# Channels


@given(st.tuples(st.integers(1, 70), SIDES, SIDES, SIDES), ITEMSIZES)
def test_each_chunk_is_of_one_channel_and_of_the_shape_it_would_have_alone(
    shape: tuple[int, ...], itemsize: int
) -> None:
    layout = plan_layout(shape, itemsize)
    alone = plan_layout(shape[1:], itemsize)
    assert layout.chunks == (1, *alone.chunks)
    assert layout.shards[1:] == alone.shards


def test_channels_of_small_volumes_share_a_shard() -> None:
    shape = (100, 16, 64, 64)
    assert plan_layout(shape, 2).shards[0] == 100
    assert plan_layout(shape, 2, shard_bytes=10 * 16 * 64 * 64 * 2).shards[0] == 10


def test_each_channel_of_a_large_volume_has_its_own_shards() -> None:
    assert plan_layout((4, 512, 512, 512), 2).shards[0] == 1


@given(SPATIAL, SPACINGS, st.integers(1, 5))
def test_colours_share_a_shard_and_each_has_its_own_chunks(
    shape: tuple[int, int, int], spacing: Any, volumes: int
) -> None:
    layout = plan_layout((3 * volumes, *shape), 1, spacing=spacing, interleaved=3)
    assert (layout.chunks[0], layout.shards[0]) == (1, 3)


# Output of a sweep

OUTPUT_SHAPES = st.tuples(st.integers(1, 64), SIDES, SIDES, SIDES)


@given(OUTPUT_SHAPES, st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_output_shards_are_one_chunk_thick_along_the_swept_axis_and_at_most_32_mib(
    shape: tuple[int, ...], itemsize: int, swept_axis: int
) -> None:
    layout = plan_output_layout(shape, itemsize, swept_axis=swept_axis)
    check_cut(layout, shape)
    thick = layout.shards[1 + swept_axis]
    assert thick == layout.chunks[1 + swept_axis]
    assert thick == shape[1 + swept_axis] or (thick >= 32 and (thick == 32 or min(shape[1:]) < 32))
    assert shard_bytes(layout, itemsize) <= SHARD_BYTES == 32 * 2**20 or chunks_in_shard(layout) == shape[0]


@given(OUTPUT_SHAPES, st.integers(0, 2))
def test_output_shards_have_all_channels_in_chunks_of_one(shape: tuple[int, ...], swept_axis: int) -> None:
    layout = plan_output_layout(shape, 1, swept_axis=swept_axis)
    assert layout.shards[0] == shape[0]
    assert layout.chunks[0] == 1


@pytest.mark.parametrize("swept_axis", range(3))
def test_an_output_of_usual_size_has_one_shard_for_each_layer_of_chunks(swept_axis: int) -> None:
    layout = plan_output_layout((1, 189, 233, 197), 1, swept_axis=swept_axis)
    counts = layout.shard_counts((1, 189, 233, 197))
    assert math.prod(counts) == counts[1 + swept_axis]


# Chunks that boxes touch


@st.composite
def boxes_in_an_array(draw: st.DrawFn) -> tuple[Any, Any, tuple[int, ...], tuple[int, ...]]:
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 12)) for _ in range(ndim))
    chunks = tuple(draw(st.integers(1, 8)) for _ in range(ndim))
    ends = [
        [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
        for _ in range(draw(st.integers(0, 5)))
    ]
    pairs = np.array(ends, dtype=np.int64).reshape(-1, ndim, 2)
    return pairs[..., 0], pairs[..., 1], shape, chunks


@given(boxes_in_an_array())
def test_covering_chunks_are_those_that_share_a_voxel_with_a_box_ordered_by_chunk(case: Any) -> None:
    first, stop, shape, chunks = case
    counts = chunk_counts(shape, chunks)
    voxel_chunks = np.zeros(shape, dtype=np.int64)
    for voxel in np.ndindex(shape):
        place = tuple(v // c for v, c in zip(voxel, chunks, strict=True))
        voxel_chunks[voxel] = np.ravel_multi_index(place, counts)
    expected = [
        (int(chunk), box)
        for box, (a, b) in enumerate(zip(first, stop, strict=True))
        for chunk in np.unique(voxel_chunks[tuple(map(slice, a, b))])
    ]
    found = covering_chunks(first, stop, shape, chunks)
    assert list(zip(*(side.tolist() for side in found), strict=True)) == sorted(expected)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 70)), min_size=1, max_size=4))
def test_as_many_chunks_are_counted_as_there_are_starts_of_chunks(sides: list[tuple[int, int]]) -> None:
    shape, chunks = zip(*sides, strict=True)
    assert chunk_counts(shape, chunks) == tuple(len(range(0, n, c)) for n, c in sides)
