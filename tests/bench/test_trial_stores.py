"""Stand-ins for a store in another packing."""

from __future__ import annotations

import numpy as np
import pytest
from bench_stores import MakeStore, group_of, periodic

from zpatch.bench.packing import (
    STORED,
    Packing,
    parts_of_patch,
)
from zpatch.bench.patch_group import array_of
from zpatch.bench.trial_stores import can_be_tried, stand_ins, times_as_fast
from zpatch.chunks.codec import CODECS
from zpatch.sources.group_read import read_requests
from zpatch.sources.voxel_source import Request, new_voxels


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk", [16, 32])
def test_stand_ins_are_read_like_a_store_in_their_packing(
    make_store: MakeStore, chunk: int, codec: str
) -> None:
    store = make_store(periodic(96, 64, 64), chunk=16)
    group = group_of(
        store, ((5, 0, 17), (50, 40, 47)), ((0, 0, 0), (16, 16, 16)), ((46, 24, 17), (50, 40, 47))
    )
    image = group.images[0]
    packing = Packing(chunk, codec)
    with stand_ins([group], packing, [STORED, packing, Packing(64)]) as made:
        [(_, [source])] = made.groups
        assert source.array.chunks == packing.chunks_of(image)
        outs = [new_voxels((1, *location.size), image.dtype) for location in group.locations]
        read_requests([Request(source, group.locations, outs)])
        assert made.read_s() > 0
        folder = source.array.path
    for out, location in zip(outs, group.locations, strict=True):
        np.testing.assert_array_equal(out, image.read(location))
    assert not folder.exists()


def test_stand_ins_estimate_the_size_of_the_files(make_store: MakeStore, rng: np.random.Generator) -> None:
    store = make_store(rng.integers(0, 40, (64, 64, 64), dtype=np.int16))
    group = group_of(store, ((0, 0, 0), (64, 64, 64)))
    sizes = {}
    for codec in CODECS:
        with stand_ins([group], Packing(32, codec), [Packing(32)]) as made:
            sizes[codec] = made.stored_bytes
    voxel_bytes = 2 * 64**3
    assert voxel_bytes < sizes["none"] < voxel_bytes * 1.01
    assert sizes["zstd"] < sizes["lz4"] < sizes["none"]
    files = array_of(group.images[0]).path.rglob("c/*/*/*")
    assert sizes["lz4"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)


def test_stand_ins_are_timed_against_each_other_in_turns(make_store: MakeStore) -> None:
    group = group_of(make_store(periodic(64, 64, 64)), ((0, 0, 0), (64, 64, 64)))
    with stand_ins([group], STORED, [STORED]) as made, stand_ins([group], STORED, [STORED]) as other:
        assert times_as_fast(made, other, 0.01) > 0


def test_a_volume_smaller_than_any_chunk_has_stand_ins_too(make_store: MakeStore) -> None:
    group = group_of(make_store(periodic(5, 1, 3)), ((0, 0, 0), (5, 1, 3)))
    with stand_ins([group], Packing(64, "zstd"), [STORED, Packing(64)]) as made:
        assert made.read_s() > 0


def test_packings_that_take_much_memory_to_plan_are_not_tried(make_store: MakeStore) -> None:
    group = group_of(make_store(periodic(64, 64, 64)), *[((0, 0, 0), (64, 64, 64))] * 3)
    assert can_be_tried([group], Packing(16))
    assert not can_be_tried([group], Packing(1))
    assert parts_of_patch((64, 64, 64), group.images[0]) == 27
