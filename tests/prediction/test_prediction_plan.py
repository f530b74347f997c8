"""A prediction's plan: regions part the work, memory is stated beforehand, and what is stated is so."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
import zpatch.prediction.regions
from zpatch.blending.grid_blend import GridBlend, Skipped
from zpatch.blending.tiling import Tile, Tiling
from zpatch.chunks.layout import plan_output_layout
from zpatch.errors import MemoryLimitError, OptionError, PatchOverlapError, PatchSizeError
from zpatch.geometry.boxes import Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.prediction.peak_memory import SMALL_PIECES_BYTES, held_of_head, peak_bytes
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import FLIPPED_OUTPUTS, Head, PlannedHead, PredictionPlan
from zpatch.prediction.regions import NOT_BEGUN, Shards, grid_over, plan_subject
from zpatch.runtime.buffer_pool import POOL_SLACK
from zpatch.runtime.byte_sizes import format_bytes

MODES = ["crop", "average", "hann", "gaussian"]

Bools = NDArray[np.bool_]
seeds = st.integers(0, 2**32).map(np.random.default_rng)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Any:
    """Output in chunks of 8 voxels and small shards, so that small volumes have many shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            zpatch.prediction.regions,
            "plan_output_layout",
            functools.partial(plan_output_layout, chunk=8),
        )
        patch.setattr(zpatch.prediction.regions, "SHARD_BYTES", 2**16)
        patch.setattr(zpatch.prediction.regions, "SMALLEST_SHARD_BYTES", 2**12)
        yield


def head(options: PredictOptions, scale: float = 1, name: str = "seg", channels: int = 2) -> Head:
    """An output whose patches are ``scale`` times as long as the input's."""
    i, j, k = (max(1, int(p * scale)) for p in options.patch_size)
    return Head(name, channels, 4, (i, j, k), 1, "|u1")


def planned(
    shape: Triple = (100, 40, 36),
    patch_size: Any = 16,
    patch_overlap: Any = 4,
    *,
    scales: Sequence[float] = (1,),
    slabs: int = 1,
    limit: int | None = None,
    skipped: Bools | None = None,
    tta: bool = False,
    begun: Shards = NOT_BEGUN,
    **options: Any,
) -> PredictionPlan:
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(np.broadcast_to(np.uint8(0), shape)))
    chosen = PredictOptions.of(image="t1", patch_size=patch_size, patch_overlap=patch_overlap, **options)
    heads = [head(chosen, scale, f"head-{n}") for n, scale in enumerate(scales)]
    how: dict[str, Any] = {"slabs": slabs, "limit": limit, "skipped": skipped, "tta": tta, "begun": begun}
    return plan_subject(subject, [subject["t1"]], heads, chosen, **how)


@st.composite
def plans(draw: st.DrawFn) -> PredictionPlan:
    """Plans of one to three heads, in one region or several, along and across the sweep, some with a mask."""
    long_axis = draw(st.integers(0, 2))
    shape = [draw(st.integers(40, 100) if axis == long_axis else st.integers(5, 40)) for axis in range(3)]
    size = draw(st.tuples(*[st.sampled_from([8, 12, 16])] * 3))
    everything: dict[str, Any] = {
        "shape": tuple(shape),
        "patch_size": size,
        "patch_overlap": tuple(draw(st.sampled_from([0, 2, p // 4 * 2])) for p in size),
        "scales": (1, *draw(st.lists(st.sampled_from([0.5, 0.25, 2]), max_size=2))),
        "slabs": draw(st.integers(1, 9)),
        "overlap_mode": draw(st.sampled_from(MODES)),
        "batch_size": draw(st.integers(1, 5)),
    }
    plan = planned(**everything)
    masked = draw(st.sampled_from([None, 0.1, 0.9, 1.0]))
    if masked is not None:
        everything["skipped"] = draw(seeds).random(plan.grid.counts) < masked
    limit = draw(st.sampled_from([None, plan.peak_bytes * 3 // 4]))
    try:
        return planned(**everything, limit=limit)
    except MemoryLimitError:
        return planned(**everything)


def adds_to(plan: PredictionPlan, number: int) -> Bools:
    """The patches that add to the shards of a region, whether they are run or not."""
    found = np.zeros(plan.grid.counts, dtype=bool)
    for head, shards in zip(plan.heads, plan.regions[number].wanted(plan.heads), strict=True):
        found |= head.tiling.patches_for(shards)
    return found


def in_sweep_order(plan: PredictionPlan) -> list[Triple]:
    """Positions of the patches that are run."""
    order = plan.heads[0].tiling.order
    skipped = np.zeros(plan.grid.counts, bool) if plan.skipped is None else plan.skipped
    positions = itertools.product(*map(range, plan.grid.counts))
    run = [(i, j, k) for i, j, k in positions if not skipped[i, j, k]]
    return sorted(run, key=lambda at: [at[axis] for axis in order])


# Regions


@given(plans())
def test_every_shard_of_every_head_is_in_one_region(plan: PredictionPlan) -> None:
    for of_head in zip(*(region.wanted(plan.heads) for region in plan.regions), strict=True):
        assert (sum(shards.astype(int) for shards in of_head) == 1).all()


@given(plans())
def test_a_region_runs_the_patches_that_add_to_its_shards_and_no_others(plan: PredictionPlan) -> None:
    for number, region in enumerate(plan.regions):
        i, j, k = np.nonzero(adds_to(plan, number))
        assert [(r.start, r.stop) for r in region.patches] == [(a.min(), a.max() + 1) for a in (i, j, k)]
        if len(plan.heads) == 1:
            assert len(i) == math.prod(map(len, region.patches))


@pytest.mark.parametrize("slabs", [1, 2, 3, 5, 100])
def test_regions_lie_along_the_swept_axis_as_many_as_are_asked_for(slabs: int) -> None:
    plan = planned(slabs=slabs)
    assert plan.swept_axis == 0
    assert len(plan.regions) == min(slabs, 13)
    rows = [len(region.shards[0][0]) for region in plan.regions]
    assert max(rows) - min(rows) <= 1
    for region in plan.regions:
        assert [len(r) for r in region.shards[0][1:]] == list(plan.heads[0].tiling.shard_counts[1:])


@pytest.mark.parametrize(
    ("shape", "axis"), [((90, 40, 40), 0), ((40, 90, 40), 1), ((40, 40, 90), 2), ((40, 90, 90), 2)]
)
def test_the_longest_axis_is_swept(shape: Triple, axis: int) -> None:
    plan = planned(shape)
    assert plan.swept_axis == axis
    assert {planned_head.tiling.swept_axis for planned_head in plan.heads} == {axis}


@given(plans())
def test_the_patches_run_are_those_of_the_batches_of_all_regions(plan: PredictionPlan) -> None:
    run = [sum(map(len, plan.batches(adds_to(plan, number)))) for number in range(len(plan.regions))]
    assert plan.patches_run == sum(run) >= plan.patches


# Batches


@given(plans(), seeds, st.sampled_from([0.0, 0.1, 0.7, 1.0]))
def test_what_is_in_a_batch_does_not_depend_on_which_patches_are_needed(
    plan: PredictionPlan, rng: np.random.Generator, share: float
) -> None:
    some = rng.random(plan.grid.counts) < share
    positions, size = in_sweep_order(plan), plan.batch_size
    batches = [positions[first : first + size] for first in range(0, len(positions), size)]
    assert list(plan.batches(np.ones(plan.grid.counts, dtype=bool))) == batches
    assert list(plan.batches(some)) == [batch for batch in batches if any(some[at] for at in batch)]


# Memory


class Watch:
    """A sink that looks at a blend's sums and at the shards begun, whenever a tile comes."""

    def __init__(self, tiling: Tiling, voxel_bytes: int) -> None:
        self.tiling, self.voxel_bytes = tiling, voxel_bytes
        self.left: dict[Triple, int] = {}
        self.blend: GridBlend | None = None
        self.most = 0

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0) -> None:
        shard = tuple(a // u for a, u in zip(first, self.tiling.shard_shape, strict=True))
        ends = zip(shard, self.tiling.shard_shape, self.tiling.shape, strict=True)
        size = math.prod(min((n + 1) * u, m) - n * u for n, u, m in ends)
        self.left.setdefault(cast(Triple, shard), size)
        self.look()
        self.left[cast(Triple, shard)] -= math.prod(voxels.shape[1:])
        if not self.left[cast(Triple, shard)]:
            del self.left[cast(Triple, shard)]

    def look(self) -> None:
        assert self.blend is not None
        tiles = self.blend._sums.values()
        sums = sum(t.nbytes for tile in tiles for t in (tile.voxels, tile.weights) if t is not None)
        shards = 0
        for shard in self.left:
            ends = zip(shard, self.tiling.shard_shape, self.tiling.shape, strict=True)
            shards += math.prod(min((n + 1) * u, m) - n * u for n, u, m in ends) * self.voxel_bytes
        self.most = max(self.most, sums + shards)


@st.composite
def swept_heads(draw: st.DrawFn) -> PlannedHead:
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
    )
    kind = Head("seg", draw(st.integers(1, 3)), 4, size, 1, draw(st.sampled_from(["|u1", "<f4"])))
    return PlannedHead(kind, cast(Any, None), tiling)


def watched(planned_head: PlannedHead, skipped: Bools | None) -> int:
    """The most that is held of sums and shards when all patches come in sweep order."""
    tiling, kind = planned_head.tiling, planned_head.head
    watch = Watch(tiling, kind.kept_channels * np.dtype(kind.kept_dtype).itemsize)
    fill = None if skipped is None else Skipped(skipped, lambda shape: torch.zeros(1, *shape))
    watch.blend = GridBlend(tiling, watch, lambda voxels: voxels[:1], skipped=fill)
    for location in tiling.grid.locations(tiling.swept_axis):
        size = watch.blend.size_of(location)
        watch.blend.add(torch.ones(kind.channels, *size), location)
        watch.look()
    watch.blend.finish()
    return watch.most


def stated(planned_head: PlannedHead, **options: Any) -> int:
    tiling = planned_head.tiling
    shards, patches = (tuple(map(range, counts)) for counts in (tiling.shard_counts, tiling.grid.counts))
    kinds = list(held_of_head(planned_head, cast(Any, shards), cast(Any, patches), **options))
    return peak_bytes(kinds, [tiling.grid.counts[axis] for axis in tiling.order])


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
    assert peak_bytes(sums, [tiling.grid.counts[axis] for axis in tiling.order]) == held.max()


def test_memory_does_not_grow_with_the_swept_axis() -> None:
    peaks = {planned((n, 40, 36)).peak_bytes for n in (112, 208, 808)}
    assert len(peaks) == 1


def test_all_jobs_together_are_counted() -> None:
    assert planned(jobs=3).peak_bytes == 3 * planned().peak_bytes


def test_larger_batches_take_more_memory() -> None:
    patch_bytes = 16**3 * 4
    one, three = planned(batch_size=1).peak_bytes, planned(batch_size=3).peak_bytes
    assert three - one >= 2 * (3 * patch_bytes + 2 * 2 * patch_bytes)


def test_test_time_augmentation_takes_more_memory_for_what_it_flips() -> None:
    patch_bytes, channels, batch_size = 16**3 * 4, 2, 3
    plain, flipped = planned(batch_size=batch_size), planned(batch_size=batch_size, tta=True)
    more = FLIPPED_OUTPUTS * batch_size * channels * patch_bytes
    assert flipped.outputs_bytes - plain.outputs_bytes == more
    assert flipped.peak_bytes - plain.peak_bytes == more + batch_size * patch_bytes


def test_a_limit_makes_bands_across_the_sweep_and_says_what_is_run_twice() -> None:
    volume: dict[str, Any] = {"shape": (200, 100, 100), "patch_size": 12}
    free = planned(**volume)
    assert planned(**volume, limit=free.peak_bytes).regions == free.regions
    fixed = SMALL_PIECES_BYTES + POOL_SLACK
    limit = fixed + (free.peak_bytes - fixed) // 2
    tight = planned(**volume, limit=limit)
    assert tight.peak_bytes <= limit
    assert len(tight.regions) > 1 == len(free.regions)
    assert {len(region.shards[0][0]) for region in tight.regions} == {25}
    assert tight.patches == free.patches == free.patches_run < tight.patches_run


@given(plans(), st.floats(0.2, 1.2))
def test_a_limit_is_kept_or_refused(plan: PredictionPlan, share: float) -> None:
    limit = int(plan.peak_bytes * share)
    options = {
        "shape": plan.grid.spatial_shape,
        "patch_size": plan.grid.patch_size,
        "patch_overlap": plan.grid.patch_overlap,
        "batch_size": plan.batch_size,
    }
    try:
        assert planned(**cast(Any, options), limit=limit).peak_bytes <= limit
    except MemoryLimitError:
        with pytest.raises(MemoryLimitError):
            planned(**cast(Any, options), limit=limit // 2)


def test_a_refusal_says_what_would_fit_and_what_to_do() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        planned(limit=1000)
    message = str(caught.value)
    assert re.search(r"the prediction of 'ann' needs .* beside the network, and 1000 B are left", message)
    assert "use a smaller patch_size, batch_size or number of jobs, or allow more" in message
    low, high = 1000, planned().peak_bytes
    while high - low > 1:
        middle = (low + high) // 2
        try:
            high = planned(limit=middle).peak_bytes
        except MemoryLimitError:
            low = middle
    assert f"needs {format_bytes(high)} beside" in message


def test_a_limit_that_this_process_exceeds_already_leaves_nothing() -> None:
    with pytest.raises(MemoryLimitError, match="and 0 B are left of the limit"):
        planned(limit=-5)


# Going on


def shards_of(plan: PredictionPlan) -> dict[str, tuple[int, ...]]:
    return {head.head.name: head.record.shards for head in plan.heads}


VOLUME: dict[str, Any] = {"shape": (200, 100, 100), "patch_size": 12, "scales": (1, 0.5)}


def limited(share: float, **options: Any) -> PredictionPlan:
    """With so much less for what is held besides that which nothing changes."""
    free, fixed = planned(**VOLUME).peak_bytes, SMALL_PIECES_BYTES + 2 * POOL_SLACK
    return planned(**VOLUME, limit=int(fixed + share * (free - fixed)), **options)


def test_what_was_begun_is_planned_in_the_same_shards_under_any_limit() -> None:
    first = limited(0.6)
    begun = shards_of(first)
    assert begun != shards_of(planned(**VOLUME)) == shards_of(limited(0.8))
    for again in (planned(**VOLUME, begun=begun), limited(0.8, begun=begun), limited(0.35, begun=begun)):
        assert shards_of(again) == begun
    assert len(again.regions) > len(first.regions)


def test_where_the_shards_that_were_begun_do_not_fit_the_limit_it_is_refused() -> None:
    begun = shards_of(planned(**VOLUME))
    assert shards_of(limited(0.25)) != begun
    with pytest.raises(MemoryLimitError, match=r"'ann' needs .* was begun .*: allow more, .* overwrite=True"):
        limited(0.25, begun=begun)


@pytest.mark.parametrize(
    "begun",
    [
        {},
        {"head-0": (8, 8, 8)},
        {"head-0": (8, 8, 8), "head-1": (7, 8, 8)},
        {"head-0": (8, 8, 8), "head-1": (2, 8, 8, 8)},
        {"head-0": (8, 8, 8), "head-1": (1, 1, 8, 8, 8)},
        {"head-0": (8, 8, 8), "head-1": ()},
        {"head-0": (8, 8, 8), "head-1": (8, 8, 0)},
    ],
    ids=["none", "one", "no whole chunks", "other channels", "more dimensions", "no dimensions", "no voxels"],
)
def test_shards_that_are_not_those_of_all_heads_say_nothing(begun: Shards) -> None:
    assert shards_of(planned(**VOLUME, begun=begun)) == shards_of(planned(**VOLUME))


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
def test_a_kill_costs_no_more_patches_than_is_said(plan: PredictionPlan) -> None:
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
        "patches": 63,
        "patches_skipped": 9,
        "patches_run_twice": plan.patches_run - 63,
        "regions": 2,
        "chunks_in": plan.chunks_in,
        "bytes_in": 100 * 40 * 36,
        "bytes_out": 100 * 40 * 36,
        "shards_out": 13,
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


# Options and heads


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


def test_a_volume_is_padded_by_half_the_overlap_only_where_that_is_asked_for() -> None:
    for mode, first in ((None, 0), ("reflect", -2)):
        options = PredictOptions.of(image="t1", patch_size=16, patch_overlap=4, padding_mode=mode)
        assert grid_over((40, 40, 40), options).starts[0][0] == first


def test_options_are_taken_in_the_forms_that_predict_takes() -> None:
    options = PredictOptions.of(image="t1", patch_size=16, patch_overlap=(4, 4, 0))
    assert (options.image, options.patch_size, options.patch_overlap) == (("t1",), (16,) * 3, (4, 4, 0))
    assert PredictOptions.of(image=["t1", "t2"], patch_size=16).image == ("t1", "t2")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"image": []}, OptionError, "image= names no image to predict from"),
        ({"batch_size": 0}, OptionError, "batch_size must be at least 1, not 0"),
        ({"jobs": -1}, OptionError, "jobs must be at least 1, not -1"),
        ({"overlap_mode": "mean"}, OptionError, "overlap_mode must be one of"),
        ({"reduce": "argmin"}, OptionError, "reduce must be 'argmax'"),
        ({"padding_mode": "mirror"}, OptionError, "padding_mode must be"),
        ({"normalize": "minmax"}, OptionError, "'minmax'"),
        ({"max_memory": "much"}, OptionError, "'much' is not a number of bytes"),
        ({"patch_size": 0}, PatchSizeError, "patch_size"),
        ({"patch_overlap": 3}, PatchOverlapError, "even"),
        ({"patch_overlap": 16}, PatchOverlapError, "smaller"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        PredictOptions.of(**{"image": "t1", "patch_size": 16, **options})
