"""Packings: their chunks equal the chunks of convert, and counts of decoded bytes are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bench_stores import MakeStore, group_of, periodic

import zpatch as zp
from zpatch.bench.packing import (
    STORED,
    Packing,
    decoded_bytes,
    decoded_per_delivered,
    distinct_sides,
    stored_options,
)
from zpatch.bench.patch_group import PatchGroup, array_of
from zpatch.images.cohort import Cohort
from zpatch.images.image import Image


def chunks_by_hand(group: PatchGroup, image: Image, chunks: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The chunks of all voxels of all patches, voxel by voxel."""
    touched = set()
    for location in group.locations:
        voxels = np.stack(np.meshgrid(*(np.r_[s] for s in location.to_slices()), indexing="ij"), axis=-1)
        touched |= set(map(tuple, (voxels.reshape(-1, 3)[:, ::-1] // chunks[1:]).tolist()))
    return touched


@pytest.mark.parametrize("packing", [STORED, Packing(8), Packing(16), Packing(32)])
def test_decoded_bytes_count_each_touched_chunk_once(cohort: zp.Cohort, packing: Packing) -> None:
    for number, subject in enumerate(cohort):
        group = PatchGroup.drawn(subject, (20, 9, 13), 4, np.random.default_rng(number))
        expected = 0
        for image in group.images:
            chunks = packing.chunks_of(image)
            count = len(chunks_by_hand(group, image, chunks)) * image.num_channels
            expected += count * math.prod(chunks) * image.source.dtype.itemsize
        assert decoded_bytes(group, packing) == expected


def test_a_patch_of_one_chunk_decodes_its_own_bytes_and_a_patch_across_eight_chunks_eight_times_as_many(
    make_store: MakeStore,
) -> None:
    store = make_store(periodic(48, 48, 48), chunk=16)
    aligned, across = ((16, 16, 16), (16, 16, 16)), ((8, 8, 8), (16, 16, 16))
    assert decoded_per_delivered([group_of(store, aligned)]) == 1
    assert decoded_per_delivered([group_of(store, across)]) == 8
    assert decoded_per_delivered([group_of(store, aligned, aligned)]) == 0.5
    assert decoded_per_delivered(group_of(store, aligned, aligned).singly()) == 1
    assert decoded_per_delivered([group_of(store, aligned)], Packing(32)) == 8


@pytest.mark.parametrize("chunk", [8, 16, 32])
@pytest.mark.parametrize("spacing", [1, 5])
def test_the_chunks_of_a_packing_equal_the_chunks_of_convert(
    make_store: MakeStore, chunk: int, spacing: float
) -> None:
    cohort = Cohort(make_store(periodic(70, 40, 36), chunk=chunk, spacing=spacing, codec="zstd"))
    images = [cohort[0].images["t1"]]
    assert Packing(chunk).chunks_of(images[0]) == array_of(images[0]).chunks
    assert stored_options(images, (8, 16, 32)) == Packing(chunk, "zstd")
    assert stored_options(images, (24,)) == Packing(None, "zstd")


def test_sides_that_give_equal_chunks_are_tried_once(make_store: MakeStore) -> None:
    images = [Cohort(make_store(periodic(20, 20, 20)))[0].images["t1"]]
    assert distinct_sides(images, (32, 16, 64)) == [32, 16]
    assert stored_options(images, (32, 16, 64)).chunk == 32
