"""Boxes of final voxels, in any order, become whole shards with a count of the voxels that were skipped."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from blending_oracle import image_sink
from hypothesis import given
from hypothesis import strategies as st

from zpatch.blending.sinks import ShardAssembler, TensorSink, output_record
from zpatch.chunks.layout import Layout
from zpatch.errors import IncompleteCoverageError
from zpatch.geometry.boxes import Triple
from zpatch.records.image_record import ImageRecord


def record_of(voxels: torch.Tensor, shard: Triple) -> ImageRecord:
    """The record of an image (C, I, J, K) in shards of (i, j, k) voxels."""
    channels, i, j, k = voxels.shape
    layout = Layout(chunks=(channels, *shard[::-1]), shards=(channels, *shard[::-1]))
    return output_record("ann", "out", "scalar", voxels.numpy().dtype, layout, (channels, i, j, k), np.eye(4))


@st.composite
def cut_axes(draw: st.DrawFn) -> tuple[Triple, Triple, list[tuple[slice, ...]]]:
    """A shape, the shape of its shards, and boxes that part it, in any order."""
    shape, shard, cuts = [], [], []
    for _ in range(3):
        n = draw(st.integers(1, 12))
        ends = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))})
        shape.append(n)
        shard.append(draw(st.integers(1, n + 2)))
        cuts.append([slice(a, b) for a, b in itertools.pairwise(ends)])
    boxes = draw(st.permutations(list(itertools.product(*cuts))))
    return (shape[0], shape[1], shape[2]), (shard[0], shard[1], shard[2]), boxes


@given(cut_axes(), st.integers(1, 2))
def test_each_shard_is_yielded_once_with_its_last_voxel(
    cut: tuple[Triple, Triple, list[tuple[slice, ...]]], channels: int
) -> None:
    shape, shard_shape, boxes = cut
    voxels = torch.arange(channels * np.prod(shape), dtype=torch.float32).reshape(channels, *shape)
    record = record_of(voxels, shard_shape)
    assembler = ShardAssembler(record)
    left = torch.ones(shape)
    found = set()
    for box in boxes:
        left[box] = 0
        for shard in assembler.put((box[0].start, box[1].start, box[2].start), voxels[:, *box]):
            assert shard.number not in found
            found.add(shard.number)
            _, z, y, x = shard.number
            place = [slice(n * s, (n + 1) * s) for n, s in zip((x, y, z), shard_shape, strict=True)]
            assert not left[tuple(place)].any()
            np.testing.assert_array_equal(shard.voxels, voxels[:, *place].permute(0, 3, 2, 1))
    assert assembler.complete
    assert len(found) == np.prod([-(-n // s) for n, s in zip(shape, shard_shape, strict=True)])


def test_skipped_voxels_are_counted_for_each_shard() -> None:
    assembler = ShardAssembler(record_of(torch.zeros(1, 4, 2, 2), (2, 2, 2)))
    half = torch.zeros(1, 1, 2, 2)
    skipped = [3, 0, 0, 4]
    shards = [s for i, n in enumerate(skipped) for s in assembler.put((i, 0, 0), half, skipped=n)]
    assert [(shard.number, shard.skipped) for shard in shards] == [((0, 0, 0, 0), 3), ((0, 0, 0, 1), 4)]


def test_voxels_that_are_not_finite_are_counted_once_where_a_box_is_in_several_shards() -> None:
    assembler = ShardAssembler(record_of(torch.zeros(1, 4, 2, 2), (2, 2, 2)))
    shards = list(assembler.put((0, 0, 0), torch.zeros(1, 4, 2, 2), skipped=2, not_finite=5))
    assert sum(shard.not_finite for shard in shards) == 5
    assert sum(shard.skipped for shard in shards) == 2


def test_an_image_tells_how_many_of_its_voxels_were_not_finite(tmp_path: Path) -> None:
    sink = image_sink(tmp_path, (8, 4, 4))
    sink.put((0, 0, 0), torch.full((1, 8, 4, 4), torch.nan), not_finite=128)
    record = sink.finish().record
    assert record is not None
    assert (record.stats["not_finite"], sink.not_finite) == (128, 128)
    assert record.warnings == ("the network gave NaN or infinite values in 128 voxels",)


def test_an_image_tells_how_many_of_its_voxels_were_skipped(tmp_path: Path) -> None:
    sink = image_sink(tmp_path, (8, 4, 4))
    sink.put((0, 0, 0), torch.ones(1, 4, 4, 4), skipped=7)
    sink.put((4, 0, 0), torch.ones(1, 4, 4, 4))
    record = sink.finish().record
    assert record is not None
    assert record.stats["skipped"] == 7


def test_a_tensor_sink_counts_them_as_well() -> None:
    sink = TensorSink((2, 1, 1))
    sink.put((0, 0, 0), torch.ones(1, 2, 1, 1), skipped=1)
    assert (sink.skipped, sink.finish().tolist()) == (1, [[[[1]], [[1]]]])


def test_an_output_that_lacks_voxels_is_not_finished(tmp_path: Path) -> None:
    sink = image_sink(tmp_path, (8, 4, 4))
    sink.put((0, 0, 0), torch.ones(1, 4, 4, 4))
    with pytest.raises(IncompleteCoverageError, match="image 'out' has shards that were never completed"):
        sink.finish()
    with pytest.raises(IncompleteCoverageError, match="no voxel was written"):
        TensorSink((1, 1, 1)).finish()
