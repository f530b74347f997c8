"""Plans of small volumes for tests: chosen by hand, or any that hypothesis finds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
import zpatch.planning.regions
from zpatch.errors import MemoryLimitError
from zpatch.geometry.boxes import Triple
from zpatch.planning.model_inputs import ModelInputs
from zpatch.planning.planning import MemoryLimit, candidates, first_fitting
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import Head, PredictionPlan
from zpatch.planning.regions import NOT_BEGUN, Shards, grid_over

MODES = ["crop", "average", "hann", "gaussian"]

Bools = NDArray[np.bool_]
seeds = st.integers(0, 2**32).map(np.random.default_rng)


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
    if skipped is not None:
        options["mask"] = lambda subject, location: not skipped[grid.position_of(location)]
    options = {"max_memory": "1 TiB", **options}  # nothing that is freed is kept
    chosen = PredictOptions.of(image="t1", patch_size=patch_size, patch_overlap=patch_overlap, **options)
    grid = grid_over(shape, chosen)
    heads = [head(chosen, scale, f"head-{n}") for n, scale in enumerate(scales)]
    inputs = ModelInputs.of(subject, chosen)
    found = candidates(inputs, heads, chosen, slabs=slabs, tta=tta, begun=begun)
    return first_fitting(found, None if limit is None else MemoryLimit(limit, held=0), begun)


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
