"""Chunks held during a sweep: every voxel is right, each chunk is read once and released in time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import assert_same_bytes, both_loops, draw_box, random_voxels, stored
from reading import loop as loop

from zpatch.chunks import gather
from zpatch.chunks.codec import CODECS
from zpatch.chunks.mapped_shards import MappedShard, close_shards
from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels
from zpatch.geometry.padding import PaddedBox
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.image import Image, ScalarImage
from zpatch.runtime.dask_graphs import Scheduler
from zpatch.sources.chunk_cache import CachedSource, cached
from zpatch.sources.group_read import read_requests
from zpatch.sources.voxel_source import ReadTasks, Request, Shape, VoxelSource, new_voxels
from zpatch.sources.voxel_sources import ArraySource

Draw = st.DataObject


@dataclass
class CountedChunks(VoxelSource):
    """Voxels (C, I, J, K) in chunks, and how often each chunk was read."""

    voxels: Voxels
    extent: Triple
    counts: Counter[Triple] = field(default_factory=Counter)
    is_broken: bool = False

    @property
    def shape(self) -> Shape:
        c, i, j, k = self.voxels.shape
        return c, i, j, k

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.voxels.dtype

    @property
    def chunk_shape(self) -> Triple:
        return self.extent

    def chunk(self, place: Triple) -> PatchLocation:
        index = [n * c for n, c in zip(place, self.chunk_shape, strict=True)]
        return PatchLocation(tuple(index), self.chunk_shape).clipped(self.shape[1:])

    def touched_by(self, box: PatchLocation) -> set[Triple]:
        ends = zip(box.index_ini, box.index_fin, self.chunk_shape, strict=True)
        return set(itertools.product(*(range(a // c, -(-b // c)) for a, b, c in ends)))

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        assert scaling == UNSCALED
        tasks = ArraySource(self.voxels).tasks(boxes, outs, scaling, parts)
        if self.is_broken:
            return ReadTasks([*tasks.writes, (self.fail,)])
        for box in boxes:
            (place,) = self.touched_by(box)
            assert box == self.chunk(place)
            self.counts[place] += 1
        return tasks

    def fail(self) -> None:
        raise OSError("the disk is gone")

    def dask(self, block_voxels: int | None = None) -> Any:
        return ArraySource(self.voxels).dask(block_voxels)


@dataclass(frozen=True)
class Sweep:
    """The patches of a grid whose numbers along I, J, K are in ``ranges``, in the order of a sweep."""

    grid: PatchGrid
    swept_axis: int
    ranges: tuple[range, range, range]

    @property
    def positions(self) -> list[Triple]:
        order = [self.swept_axis, *(axis for axis in range(3) if axis != self.swept_axis)]
        found = itertools.product(*(self.ranges[axis] for axis in order))
        return [tuple(position[order.index(axis)] for axis in range(3)) for position in found]

    def box(self, position: Triple) -> PatchLocation:
        """The part of a patch inside the volume."""
        return self.grid.at(position).clipped(self.grid.spatial_shape)


@st.composite
def sweeps(draw: st.DrawFn, longest: int = 12) -> Sweep:
    shape = draw(st.tuples(*[st.integers(1, longest)] * 3))
    size = draw(st.tuples(*[st.integers(1, 7)] * 3))
    overlap = tuple(2 * draw(st.integers(0, (p - 1) // 2)) for p in size)
    grid = PatchGrid.over(shape, size, overlap, border=draw(st.booleans()))
    ranges = []
    for count in grid.counts:
        first = draw(st.integers(0, count - 1)) if draw(st.booleans()) else 0
        stop = draw(st.integers(first + 1, count)) if draw(st.booleans()) else count
        ranges.append(range(first, stop))
    return Sweep(grid, draw(st.integers(0, 2)), tuple(ranges))


chunk_shapes = st.tuples(*[st.integers(1, 6)] * 3)


def numbered(spatial_shape: Triple, channels: int = 1) -> Voxels:
    """Voxels (C, I, J, K), all different."""
    shape = channels, *spatial_shape
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def read(
    source: VoxelSource,
    boxes: Sequence[PatchLocation],
    dtype: Any = None,
    scaling: Scaling = UNSCALED,
    scheduler: Scheduler = "sync",
) -> list[Voxels]:
    outs = [new_voxels((source.shape[0], *box.size), dtype or source.dtype) for box in boxes]
    read_requests([Request(source, boxes, outs, scaling)], scheduler)
    return outs


def of_box(voxels: Voxels, box: PatchLocation) -> Voxels:
    return voxels[(slice(None), *box.to_slices())]


def in_groups(items: Sequence[Any], length: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + length] for first in range(0, len(items), length))


@given(sweep=sweeps(), chunk_shape=chunk_shapes, group=st.integers(1, 5), channels=st.integers(1, 2))
def test_each_chunk_is_read_once_and_held_from_its_first_patch_to_its_last(
    sweep: Sweep, chunk_shape: Triple, group: int, channels: int
) -> None:
    voxels = numbered(sweep.grid.spatial_shape, channels)
    source = CountedChunks(voxels, chunk_shape)
    cache = CachedSource.of(source, sweep.grid, sweep.swept_axis, sweep.ranges)
    coming = [source.touched_by(sweep.box(position)) for position in sweep.positions]
    seen: set[Triple] = set()
    live: set[Triple] = set()
    most = 0
    for positions in in_groups(sweep.positions, group):
        boxes = [sweep.box(position) for position in positions]
        for box, patch in zip(boxes, read(cache, boxes), strict=True):
            np.testing.assert_array_equal(patch, of_box(voxels, box))
        cache.done(positions[-1])
        now, coming = set().union(*coming[: len(positions)]), coming[len(positions) :]
        most = max(most, len(live | now))
        seen |= now
        live = seen.intersection(set().union(*coming))
        assert cache.held_bytes == len(live) * cache.chunk_bytes
        assert cache.allocated_bytes == most * cache.chunk_bytes
    assert source.counts == Counter(seen)
    assert not live


@given(data=st.data(), sweep=sweeps(), chunk_shape=chunk_shapes)
def test_patches_of_a_sweep_may_be_left_out(data: Draw, sweep: Sweep, chunk_shape: Triple) -> None:
    voxels = numbered(sweep.grid.spatial_shape)
    source = CountedChunks(voxels, chunk_shape)
    cache = CachedSource.of(source, sweep.grid, sweep.swept_axis, sweep.ranges)
    touched = [source.touched_by(sweep.box(position)) for position in sweep.positions]
    for number, position in enumerate(sweep.positions):
        if data.draw(st.booleans()):
            [patch] = read(cache, [sweep.box(position)])
            np.testing.assert_array_equal(patch, of_box(voxels, sweep.box(position)))
        if data.draw(st.booleans()):
            cache.done(position)
            live = set().union(*touched[: number + 1]) & set().union(*touched[number + 1 :])
            assert cache.held_bytes <= len(live) * cache.chunk_bytes
    cache.done(sweep.positions[-1])
    assert set(source.counts.values()) <= {1}
    assert cache.held_bytes == 0


@given(data=st.data(), sweep=sweeps(), chunk_shape=chunk_shapes)
def test_any_box_may_be_read_at_any_time(data: Draw, sweep: Sweep, chunk_shape: Triple) -> None:
    voxels = numbered(sweep.grid.spatial_shape)
    source = CountedChunks(voxels, chunk_shape)
    cache = CachedSource.of(source, sweep.grid, sweep.swept_axis, sweep.ranges)
    touched = [source.touched_by(sweep.box(position)) for position in sweep.positions]
    for number, position in enumerate(sweep.positions):
        boxes = [draw_box(data, sweep.grid.spatial_shape) for _ in range(data.draw(st.integers(0, 2)))]
        boxes += [sweep.box(position)] * data.draw(st.integers(0, 2))
        for box, patch in zip(boxes, read(cache, boxes), strict=True):
            np.testing.assert_array_equal(patch, of_box(voxels, box))
        cache.done(position)
        live = set().union(*touched[: number + 1]) & set().union(*touched[number + 1 :])
        assert cache.held_bytes <= len(live) * cache.chunk_bytes


@given(sweep=sweeps(), chunk_shape=chunk_shapes, mode=st.sampled_from(["edge", "reflect", "wrap"]))
def test_padded_patches_are_read_wherever_their_voxels_are(
    sweep: Sweep, chunk_shape: Triple, mode: str
) -> None:
    shape = sweep.grid.spatial_shape
    voxels = numbered(shape)
    cache = CachedSource.of(CountedChunks(voxels, chunk_shape), sweep.grid, sweep.swept_axis, sweep.ranges)
    for position in sweep.positions:
        box = PaddedBox.of(sweep.grid.at(position), shape, mode).inner
        [patch] = read(cache, [box])
        np.testing.assert_array_equal(patch, of_box(voxels, box))
        cache.done(position)
    assert cache.held_bytes == 0


def sweep_of(image: Image, size: int, overlap: int, swept_axis: int = 2) -> Sweep:
    grid = PatchGrid.over(image.spatial_shape, (size,) * 3, (overlap,) * 3)
    i, j, k = map(range, grid.counts)
    return Sweep(grid, swept_axis, (i, j, k))


def cache_of(image: Image, sweep: Sweep) -> CachedSource:
    return CachedSource.of(image.source, sweep.grid, sweep.swept_axis, sweep.ranges)


@both_loops
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=4),
    chunk=st.tuples(*[st.integers(1, 5)] * 3),
    dtype=st.sampled_from(["|b1", "|u1", "<i2", "<u2", "<f4", "<f2"]),
    codec=st.sampled_from(list(CODECS)),
    scaling=st.sampled_from([UNSCALED, Scaling(0.3, -7.5), Scaling(2.0, 1.0, 5.0, 90.0)]),
    wanted=st.sampled_from([None, np.float32, np.float64]),
    scheduler=st.sampled_from(["sync", "threads"]),
)
def test_a_stored_image_is_read_as_the_array_in_memory(
    data: Draw, shape: list[int], chunk: tuple[int, ...], dtype: str, codec: str, scaling: Scaling,
    wanted: Any, scheduler: Scheduler, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any") / "image"
    voxels = np.random.default_rng(0).integers(0, 2 if dtype == "|b1" else 100, shape).astype(dtype)
    image = stored(folder, voxels, chunk=chunk, shard=2, codec=codec)
    size = data.draw(st.integers(1, 6))
    overlap = 2 * data.draw(st.integers(0, (size - 1) // 2))
    sweep = sweep_of(image, size, overlap, data.draw(st.integers(0, 2)))
    cache = cache_of(image, sweep)
    whole = voxels.reshape(-1, *shape[-3:]).transpose(0, 3, 2, 1)
    for positions in in_groups(sweep.positions, data.draw(st.integers(1, 9))):
        boxes = [sweep.box(position) for position in positions]
        found = read(cache, boxes, wanted or scaling.dtype_of(cache.dtype), scaling, scheduler)
        for box, patch in zip(boxes, found, strict=True):
            expected = scaling.apply(of_box(whole, box))
            assert_same_bytes(patch, expected.astype(wanted or expected.dtype))
        cache.done(positions[-1])
    assert cache.held_bytes == 0
    close_shards(folder)


@both_loops
def test_patches_are_written_to_memory_of_any_strides(tmp_path: Path) -> None:
    voxels = random_voxels((2, 9, 10, 11), "<i2")
    image = stored(tmp_path / "image", voxels, chunk=4, shard=2)
    cache = cache_of(image, sweep_of(image, 5, 2))
    box = PatchLocation((1, 2, 3), (8, 5, 6))
    memory = np.zeros((2, 16, 5, 6), np.float32)
    read_requests([Request(cache, [box], [memory[:, ::-2]], Scaling(2.0))])
    expected = of_box(voxels.transpose(0, 3, 2, 1), box)
    np.testing.assert_array_equal(memory[:, ::-2], expected.astype(np.float32) * 2)
    assert not memory[:, ::2].any()


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_a_stored_chunk_is_decoded_once_in_a_sweep(
    tmp_path: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[tuple[Path, int]] = Counter()
    decode = MappedShard.decode

    def counting(shard: MappedShard, number: int, scratch: Any) -> Any:
        decoded[shard.file, number] += 1
        return decode(shard, number, scratch)

    monkeypatch.setattr(MappedShard, "decode", counting)
    monkeypatch.setattr(gather, "_compiled", None)
    image = stored(tmp_path / "image", random_voxels((2, 9, 10, 11), "<i2"), chunk=4, shard=2)
    sweep = sweep_of(image, 5, 2)
    cache = cache_of(image, sweep)
    for position in sweep.positions:
        read(cache, [sweep.box(position)], scheduler=scheduler)
        cache.done(position)
    assert sorted(decoded.values()) == [1] * (2 * 3 * 2 * 2)  # chunks of 4 x 5 x 6 (z, y, x), two channels


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_a_block_of_a_dask_expression_is_computed_once_in_a_sweep(scheduler: Scheduler) -> None:
    computed: Counter[tuple[int, ...]] = Counter()

    def note(block: Voxels, block_info: Any = None) -> Voxels:
        computed[block_info[0]["chunk-location"]] += 1
        return block + 0.5

    voxels = numbered((9, 10, 11), channels=2)
    lazy = da.from_array(voxels, chunks=(2, 4, 3, 5)).map_blocks(note, dtype=float, meta=np.empty((0,) * 4))
    image = ScalarImage(lazy)
    sweep = sweep_of(image, 5, 2, swept_axis=1)
    cache = cache_of(image, sweep)
    for positions in in_groups(sweep.positions, 4):
        boxes = [sweep.box(position) for position in positions]
        for box, patch in zip(boxes, read(cache, boxes, scheduler=scheduler), strict=True):
            np.testing.assert_array_equal(patch, of_box(voxels, box) + 0.5)
        cache.done(positions[-1])
    assert sorted(computed.values()) == [1] * (3 * 4 * 3)


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_blocks_of_a_dask_expression_may_differ_in_size(scheduler: Scheduler) -> None:
    voxels = numbered((9, 10, 11))
    image = ScalarImage(da.from_array(voxels, chunks=((1,), (2, 5, 2), (10,), (1, 4, 6))) * 2)
    sweep = sweep_of(image, 5, 2)
    cache = cache_of(image, sweep)
    for position in sweep.positions:
        [patch] = read(cache, [sweep.box(position)], scheduler=scheduler)
        np.testing.assert_array_equal(patch, of_box(voxels, sweep.box(position)) * 2)
        cache.done(position)


def test_several_caches_are_read_in_one_graph() -> None:
    voxels = numbered((9, 10, 11))
    lazy = da.from_array(voxels, chunks=4)
    images = [ScalarImage(lazy + 1), ScalarImage(lazy * 2), ScalarImage(voxels)]
    sweep = sweep_of(images[0], 5, 2)
    sources = [cached(image.source, sweep.grid, 2, sweep.ranges)[0] for image in images]
    assert [isinstance(source, CachedSource) for source in sources] == [True, True, False]
    for position in sweep.positions:
        box = sweep.box(position)
        outs = [[new_voxels((1, *box.size), np.int64)] for _ in sources]
        read_requests([Request(source, [box], out) for source, out in zip(sources, outs, strict=True)])
        for [out], expected in zip(outs, [voxels + 1, voxels * 2, voxels], strict=True):
            np.testing.assert_array_equal(out, of_box(expected, box))
        for source in sources[:2]:
            source.done(position)


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_chunks_whose_read_failed_are_not_held(scheduler: Scheduler) -> None:
    voxels = numbered((9, 10, 11))
    source = CountedChunks(voxels, (4, 4, 4))
    sweep = sweep_of(ScalarImage(voxels), 5, 2)
    cache = CachedSource.of(source, sweep.grid, 2, sweep.ranges)
    read(cache, [sweep.box((0, 0, 0))])
    held = cache.held_bytes
    box = sweep.box((0, 0, 2))
    source.is_broken = True
    with pytest.raises(OSError, match="the disk is gone"):
        read(cache, [box], scheduler=scheduler)
    assert cache.held_bytes == held
    source.is_broken = False
    np.testing.assert_array_equal(read(cache, [box], scheduler=scheduler)[0], of_box(voxels, box))


def test_no_boxes_give_no_voxels() -> None:
    image = ScalarImage(numbered((9, 10, 11)))
    cache = cache_of(image, sweep_of(image, 5, 2))
    assert read(cache, []) == []
    cache.done((0, 0, 0))
    assert cache.held_bytes == cache.allocated_bytes == 0


def test_a_chunk_takes_no_more_memory_than_the_volume() -> None:
    source = CountedChunks(numbered((3, 10, 5), channels=2), (64, 4, 64))
    grid = PatchGrid.over((3, 10, 5), (2, 2, 2))
    cache = CachedSource.of(source, grid, 1, (range(2), range(5), range(3)))
    assert cache.chunk_bytes == 2 * 3 * 4 * 5 * 4
    read(cache, [PatchLocation((0, 0, 0), (3, 10, 5))])
    assert cache.held_bytes == 3 * cache.chunk_bytes


def test_a_cache_has_the_shape_and_type_of_its_source() -> None:
    voxels = numbered((9, 10, 11), channels=2)
    source = CountedChunks(voxels, (4, 5, 6))
    sweep = sweep_of(ScalarImage(voxels), 5, 2)
    cache = CachedSource.of(source, sweep.grid, 2, sweep.ranges)
    assert (cache.shape, cache.dtype, cache.chunk_shape) == ((2, 9, 10, 11), np.int32, (4, 5, 6))
    np.testing.assert_array_equal(cache.dask(4).compute(scheduler="sync"), voxels)


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_source_that_is_quick_to_decode_needs_no_cache(tmp_path: Path, codec: str) -> None:
    image = stored(tmp_path / "image", random_voxels((9, 10, 11), "<i2"), chunk=4, shard=2, codec=codec)
    sweep = sweep_of(image, 5, 2)
    source, _ = cached(image.source, sweep.grid, sweep.swept_axis, sweep.ranges)
    assert (source is image.source) == (codec != "zstd")
