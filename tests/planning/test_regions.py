"""Regions part the shards, and a region runs the patches that its shards need."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from small_plans import adds_to, planned, plans

from zpatch.geometry.boxes import Triple
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import PredictionPlan
from zpatch.planning.regions import grid_over

pytestmark = pytest.mark.usefixtures("small_chunks")


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
def test_there_are_as_many_regions_along_the_swept_axis_as_requested(slabs: int) -> None:
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


def test_a_volume_is_padded_by_half_the_overlap_only_where_that_is_asked_for() -> None:
    for mode, first in ((None, 0), ("reflect", -2)):
        options = PredictOptions.of(image="t1", patch_size=16, patch_overlap=4, padding_mode=mode)
        assert grid_over((40, 40, 40), options).starts[0][0] == first
