"""The plan of a prediction: its batches, and its figures, which a run keeps to."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_plans import MODES, Bools, adds_to, in_sweep_order, planned, plans, seeds

from zpatch.blending.grid_blend import GridBlend
from zpatch.blending.reduction import Finaliser
from zpatch.blending.regridding import Regridder
from zpatch.blending.sinks import BlendedSink, FinalisingSink
from zpatch.geometry.boxes import Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.planning.peak_memory import KEPT_PIECES_BYTES, held_of_head, sweep_peak_bytes
from zpatch.planning.prediction_plan import FLIPPED_OUTPUTS, Head, PlannedHead, PredictionPlan
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.tiling.output_cells import OutputGrid
from zpatch.tiling.volume_tiles import Tile, Tiling

pytestmark = pytest.mark.usefixtures("small_chunks")


# Batches


@given(plans())
def test_the_patches_run_are_those_of_the_batches_of_all_regions(plan: PredictionPlan) -> None:
    run = [sum(map(len, plan.batches(adds_to(plan, number)))) for number in range(len(plan.regions))]
    assert plan.patches_run == sum(run) >= plan.patches


@given(plans(), seeds, st.sampled_from([0.0, 0.1, 0.7, 1.0]))
def test_the_content_of_a_batch_does_not_depend_on_which_patches_are_needed(
    plan: PredictionPlan, rng: np.random.Generator, share: float
) -> None:
    some = rng.random(plan.grid.counts) < share
    positions, size = in_sweep_order(plan), plan.batch_size
    batches = [positions[first : first + size] for first in range(0, len(positions), size)]
    assert list(plan.batches(np.ones(plan.grid.counts, dtype=bool))) == batches
    assert list(plan.batches(some)) == [batch for batch in batches if any(some[at] for at in batch)]


# Memory


class Watch:
    """A sink that looks at a blend's sums, at the shards begun and at what waits, whenever voxels come."""

    def __init__(self, planned_head: PlannedHead, skipped: Bools | None) -> None:
        kind, self.tiling = planned_head.head, planned_head.tiling
        self.voxel_bytes = kind.kept_channels * np.dtype(kind.kept_dtype).itemsize
        self.left: dict[Triple, int] = {}
        self.most = 0
        sink: BlendedSink = FinalisingSink(Finaliser(lambda voxels: voxels[:1]), self)
        self.regridder = Regridder(self.tiling, sink, skipped=skipped) if self.tiling.output else None
        self.blend = GridBlend(self.tiling, self.regridder or sink, skipped=skipped)

    def size(self, shard: Triple) -> int:
        shape = self.tiling.output.shape if self.tiling.output else self.tiling.shape
        ends = zip(shard, self.tiling.shard_shape, shape, strict=True)
        return math.prod(min((n + 1) * u, m) - n * u for n, u, m in ends)

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0) -> None:
        shard = cast(Triple, tuple(a // u for a, u in zip(first, self.tiling.shard_shape, strict=True)))
        self.left.setdefault(shard, self.size(shard))
        self.look(arriving=1)
        self.left[shard] -= math.prod(voxels.shape[1:])
        if not self.left[shard]:
            del self.left[shard]

    def look(self, arriving: int = 0) -> None:
        tiles = self.blend._sums.values()
        sums = sum(t.nbytes for tile in tiles for t in (tile.voxels, tile.weights) if t is not None)
        shards = sum(self.size(shard) * self.voxel_bytes for shard in self.left)
        self.most = max(self.most, sums + shards + self.waiting(arriving))

    def waiting(self, arriving: int) -> int:
        """Bytes of final tiles that wait until cells are made, without those that are just arriving."""
        tiles = list(self.regridder._tiles.values()) if self.regridder else []
        kept = [v for tile in tiles[: len(tiles) - arriving] for v in (tile.voxels, *tile.faces.values())]
        return sum(v.nbytes for v in kept if v is not None)


@st.composite
def swept_heads(draw: st.DrawFn, *, returned: bool = False) -> PlannedHead:
    long_axis = draw(st.integers(0, 2))
    sides = []
    for axis in range(3):
        n = draw(st.integers(1, 60 if axis == long_axis else 12))
        p = draw(st.integers(max(4, -(-n // 5)), max(4, n) + 3))
        o = draw(st.sampled_from([o for o in range(0, p, 2) if 4 * o <= 3 * p]))
        m = draw(st.sampled_from([n, n, 2 * n, -(-n // 2)]))
        sides.append((n, p, o, m, draw(st.integers(4, 40))))
    shape, size, overlap, output, shard = zip(*sides, strict=True)
    tiling = Tiling.over(
        PatchGrid.over(shape, size, overlap),
        draw(st.sampled_from(MODES)),
        swept_axis=draw(st.integers(0, 2)),
        output_shape=output,
        shard_shape=shard,
        output=draw(output_grids(output)) if returned else None,
    )
    kind = Head("seg", draw(st.integers(1, 3)), 4, size, 1, draw(st.sampled_from(["|u1", "<f4"])))
    return PlannedHead(kind, cast(Any, None), tiling)


@st.composite
def output_grids(draw: st.DrawFn, volume: Triple) -> OutputGrid:
    """Grids with permuted and reversed axes, and voxels of 0.4 to 2.5 times the size."""
    axes, shape, matrix = draw(st.permutations([0, 1, 2])), [0, 0, 0], np.zeros((4, 4))
    for axis, (n, along) in enumerate(zip(volume, axes, strict=True)):
        factor, is_reversed = draw(st.sampled_from([1, 0.4, 0.7, 1.3, 2.5])), draw(st.booleans())
        shape[along] = max(1, int(n / factor + 0.5))
        matrix[axis, along] = -factor if is_reversed else factor
        matrix[axis, 3] = n - 0.5 - factor / 2 if is_reversed else factor / 2 - 0.5
    return OutputGrid((shape[0], shape[1], shape[2]), matrix)


def watched(planned_head: PlannedHead, skipped: Bools | None) -> int:
    """The most that is held of sums and shards, and waits, when all patches come in sweep order."""
    tiling, watch = planned_head.tiling, Watch(planned_head, skipped)
    for location in tiling.grid.locations(tiling.swept_axis):
        size = watch.blend.size_of(location)
        watch.blend.add(torch.ones(planned_head.head.channels, *size), location)
        watch.look()
    watch.blend.finish()
    return watch.most


def stated(planned_head: PlannedHead, **options: Any) -> int:
    tiling = planned_head.tiling
    shards, patches = (tuple(map(range, counts)) for counts in (tiling.shard_counts, tiling.grid.counts))
    kinds = list(held_of_head(planned_head, cast(Any, shards), cast(Any, patches), **options))
    return sweep_peak_bytes(kinds, [tiling.grid.counts[axis] for axis in tiling.order])


@given(swept_heads(returned=True))
def test_nor_does_what_waits_to_be_resampled(planned_head: PlannedHead) -> None:
    assert watched(planned_head, None) <= stated(planned_head)


@given(swept_heads(returned=True), seeds, st.sampled_from([0.1, 0.5, 0.9]))
def test_nor_does_it_where_patches_are_skipped(
    planned_head: PlannedHead, rng: np.random.Generator, share: float
) -> None:
    skipped = rng.random(planned_head.tiling.grid.counts) < share
    assert watched(planned_head, skipped) <= stated(planned_head, masked=True)


@given(swept_heads())
def test_sums_and_shards_never_take_more_than_is_stated(planned_head: PlannedHead) -> None:
    measured, bound = watched(planned_head, None), stated(planned_head)
    assert measured <= bound


@given(swept_heads(), seeds, st.sampled_from([0.1, 0.5, 0.9]))
def test_nor_do_they_where_patches_are_skipped(
    planned_head: PlannedHead, rng: np.random.Generator, share: float
) -> None:
    skipped = rng.random(planned_head.tiling.grid.counts) < share
    assert watched(planned_head, skipped) <= stated(planned_head, masked=True)


@given(swept_heads())
def test_sums_are_stated_for_tiles_that_a_patch_touched_and_another_still_will(
    planned_head: PlannedHead,
) -> None:
    tiling, kind = planned_head.tiling, planned_head.head
    order = {
        at: n for n, at in enumerate(map(tiling.grid.position_of, tiling.grid.locations(tiling.swept_axis)))
    }
    lives: dict[Tile, list[int]] = {}
    for at, n in order.items():
        for tile, _ in tiling.tiles_hit(at):
            lives.setdefault(tile, []).append(n)
    held = np.zeros(len(order), dtype=int)
    for tile, ranks in lives.items():
        if len(ranks) > 1:
            held[min(ranks) : max(ranks) + 1] += math.prod(tile.shape) * kind.channels * kind.sum_bytes
    shards, patches = (tuple(map(range, counts)) for counts in (tiling.shard_counts, tiling.grid.counts))
    sums = list(held_of_head(planned_head, cast(Any, shards), cast(Any, patches)))[:2]
    assert sweep_peak_bytes(sums, [tiling.grid.counts[axis] for axis in tiling.order]) == held.max()


def test_memory_does_not_grow_with_the_swept_axis() -> None:
    peaks = {planned((n, 40, 36)).peak_bytes for n in (112, 208, 808)}
    assert len(peaks) == 1


def test_all_jobs_together_are_counted() -> None:
    assert planned(jobs=3).peak_bytes == 3 * planned().peak_bytes


def test_without_a_limit_freed_outputs_are_kept_and_count() -> None:
    limited, free = planned(batch_size=3), planned(batch_size=3, max_memory=None)
    assert free.peak_bytes - limited.peak_bytes == limited.outputs_bytes // 2 + KEPT_PIECES_BYTES


def test_larger_batches_take_more_memory() -> None:
    patch_bytes = 16**3 * 4
    one, three = planned(batch_size=1).peak_bytes, planned(batch_size=3).peak_bytes
    assert three - one >= 2 * (3 * patch_bytes + 2 * 2 * patch_bytes)


def test_test_time_augmentation_takes_more_memory_for_flipped_batches() -> None:
    patch_bytes, channels, batch_size = 16**3 * 4, 2, 3
    plain, flipped = planned(batch_size=batch_size), planned(batch_size=batch_size, tta=True)
    more = FLIPPED_OUTPUTS * batch_size * channels * patch_bytes
    assert flipped.outputs_bytes - plain.outputs_bytes == more
    assert flipped.peak_bytes - plain.peak_bytes == more + batch_size * patch_bytes


# What a kill costs


def most_redone(plan: PredictionPlan) -> int:
    """The most patches that a kill makes run again, over all moments of all tasks.

    Of each head the shard completed before may still be being encoded when the next one is; the batch that
    waits for it then and one more are through the network. Batches are run whole.
    """
    most, positions = 0, in_sweep_order(plan)
    ranks = np.full(plan.grid.counts, -1)
    for n, at in enumerate(positions):
        ranks[at] = n
    for region in plan.regions:
        heads = []  # of each head, its shards as they are completed: rank of the last patch, patches
        for planned_head, wanted in zip(plan.heads, region.wanted(plan.heads), strict=True):
            shards = []
            for shard in np.argwhere(wanted):
                alone = np.zeros(planned_head.tiling.shard_counts, dtype=bool)
                alone[tuple(shard)] = True
                adds = planned_head.tiling.patches_for(alone)
                if ranks[adds].max() >= 0:
                    shards.append((int(ranks[adds].max()), adds))
            heads.append(sorted(shards, key=lambda shard: shard[0]))
        for now in {last for shards in heads for last, _ in shards}:
            again = np.zeros(plan.grid.counts, dtype=bool)
            for shards in heads:
                complete = sum(last < now for last, _ in shards)
                for _, adds in shards[max(0, complete - 1) :]:
                    again |= adds
            run = now + 2 * plan.batch_size
            again &= (ranks >= 0) & (ranks <= run)
            batches = plan.batches(again)
            most = max(most, sum(int(ranks[at]) <= run for batch in batches for at in batch))
    return most


@given(plans())
def test_a_kill_costs_no_more_patches_than_the_plan_states(plan: PredictionPlan) -> None:
    assert most_redone(plan) <= plan.redone_patches


def test_what_a_kill_costs_does_not_grow_with_the_swept_axis() -> None:
    assert planned((112, 40, 36)).redone_patches == planned((1008, 40, 36)).redone_patches < 1008


# What is printed


def test_a_plan_is_printed_and_given_as_json() -> None:
    skipped = np.zeros((8, 3, 3), dtype=bool)
    skipped[0] = True
    plan = planned((100, 40, 36), skipped=skipped, slabs=2)
    assert plan.grid.counts == skipped.shape
    found = plan.to_json()
    assert json.loads(json.dumps(found)) == found == {
        "subject": "ann",
        "shape": [100, 40, 36],
        "native_shape": [100, 40, 36],
        "patches": 63,
        "patches_skipped": 9,
        "patches_run_twice": plan.patches_run - 63,
        "regions": 2,
        "chunks_in": plan.chunks_in,
        "bytes_in": 100 * 40 * 36,
        "bytes_out": 100 * 40 * 36,
        "shards_out": 13,
        "levels": 0,
        "peak_bytes": plan.peak_bytes,
        "patches_redone_at_most": plan.redone_patches,
    }  # fmt: skip
    assert found["patches_run_twice"] > 0
    assert str(plan).startswith("ann: 100 x 40 x 36 voxels in 63 patches, 9 more are masked out, ")
    for part in (
        f", {plan.patches_run - 63} runs more where regions meet; ",
        f"13 shards of {format_bytes(100 * 40 * 36)} out; ",
        f"at most {format_bytes(plan.peak_bytes)} of memory; ",
        f"up to {plan.redone_patches} patches again after a kill",
    ):
        assert part in str(plan)


def test_what_does_not_happen_is_not_printed() -> None:
    assert "masked" not in str(planned())
    assert "where regions meet" not in str(planned())


def test_heads_are_counted_together() -> None:
    plan = planned(scales=(1, 0.5))
    assert plan.bytes_out == 100 * 40 * 36 + 50 * 20 * 18
    assert plan.shards_out == sum(math.prod(h.tiling.shard_counts) for h in plan.heads)
    assert [h.record.shape for h in plan.heads] == [(36, 40, 100), (18, 20, 50)]


# Heads


@pytest.mark.parametrize(
    ("patch", "made", "shape", "expected"),
    [
        ((16, 16, 16), (16, 16, 16), (100, 40, 36), (100, 40, 36)),
        ((16, 16, 16), (8, 8, 8), (101, 41, 1), (51, 21, 1)),
        ((16, 16, 1), (32, 4, 1), (100, 41, 1), (200, 10, 1)),
        ((64, 64, 64), (1, 1, 1), (3, 31, 33), (1, 1, 1)),
    ],
)
def test_an_output_is_scaled_as_its_patches_are(
    patch: Triple, made: Triple, shape: Triple, expected: Triple
) -> None:
    assert Head("seg", 1, 4, made, 1, "<f4").shape_for(shape, patch) == expected
