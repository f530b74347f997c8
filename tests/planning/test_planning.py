"""Of all plans the first that fits the memory limit is kept, in the shards that were begun."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_plans import planned, plans

from zpatch.errors import MemoryLimitError
from zpatch.networks.network import Network
from zpatch.planning.peak_memory import SMALL_PIECES_BYTES
from zpatch.planning.planning import MemoryLimit, first_fitting
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import PredictionPlan
from zpatch.planning.regions import Shards
from zpatch.runtime.buffer_pool import POOL_SLACK
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.runtime.process_memory import private_bytes

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_a_limit_makes_bands_across_the_sweep_and_counts_patches_run_twice() -> None:
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
    assert re.search(
        r"the prediction of 'ann' needs .*, of which the network 0 B, beside the 0 B that the process holds, "
        r"and the limit is 1000 B",
        message,
    )
    assert "use a smaller patch_size, batch_size or number of jobs, or allow more" in message
    low, high = 1000, planned().peak_bytes
    while high - low > 1:
        middle = (low + high) // 2
        try:
            high = planned(limit=middle).peak_bytes
        except MemoryLimitError:
            low = middle
    assert f"needs {format_bytes(high)}, of which" in message


def test_a_process_that_holds_more_than_the_limit_says_so() -> None:
    plan = planned()
    expected = (
        r"the process alone takes 2\.0 KiB already, with Python, .* and the limit is 1\.0 KiB; allow more$"
    )
    with pytest.raises(MemoryLimitError, match=expected):
        first_fitting([plan], MemoryLimit(1024, held=2048))
    expected = r"3 processes alone take .* allow more, or use fewer jobs$"
    with pytest.raises(MemoryLimitError, match=expected):
        first_fitting([plan], MemoryLimit(1024, held=2048, processes=3))


def test_all_that_processes_hold_counts() -> None:
    plan = planned()
    assert first_fitting([plan], MemoryLimit(plan.peak_bytes + 10, held=10)) is plan
    with pytest.raises(MemoryLimitError):
        first_fitting([plan], MemoryLimit(plan.peak_bytes + 9, held=10))


def test_workers_hold_their_copies_of_the_network_and_of_pages_that_they_write() -> None:
    def held(model: Any, jobs: int) -> int:
        options = PredictOptions.of(image="t1", patch_size=8, device="cpu", max_memory="1 GiB", jobs=jobs)
        limit = MemoryLimit.of(options, Network.of(model, options))
        assert limit is not None
        assert (limit.bytes, limit.processes) == (2**30, 1 if jobs == 1 else 1 + jobs)
        return limit.held

    layer = torch.nn.Linear(1024, 4096)  # 16 MiB
    assert held(layer, 3) - held(layer, 1) == pytest.approx(3 * (2**26 + 2**24), rel=0.1)
    unknown = held(torch.sin, 3) - held(torch.sin, 1)
    assert unknown == pytest.approx(3 * private_bytes(), rel=0.1)


# Resuming


def shards_of(plan: PredictionPlan) -> dict[str, tuple[int, ...]]:
    return {head.head.name: head.record.shards for head in plan.heads}


VOLUME: dict[str, Any] = {"shape": (200, 100, 100), "patch_size": 12, "scales": (1, 0.5)}


def limited(share: float, **options: Any) -> PredictionPlan:
    """With so much less for what is held besides that which nothing changes."""
    free, fixed = planned(**VOLUME).peak_bytes, SMALL_PIECES_BYTES + 2 * POOL_SLACK
    return planned(**VOLUME, limit=int(fixed + share * (free - fixed)), **options)


def test_a_resumed_prediction_keeps_its_shards_under_any_limit() -> None:
    first = limited(0.6)
    begun = shards_of(first)
    assert begun != shards_of(planned(**VOLUME)) == shards_of(limited(0.8))
    for again in (planned(**VOLUME, begun=begun), limited(0.8, begun=begun), limited(0.35, begun=begun)):
        assert shards_of(again) == begun
    assert len(again.regions) > len(first.regions)


def test_a_resumed_prediction_whose_shards_exceed_the_limit_is_refused() -> None:
    begun = shards_of(planned(**VOLUME))
    assert shards_of(limited(0.25)) != begun
    with pytest.raises(
        MemoryLimitError, match=r"'ann' needs .* was begun .*: allow more, or .* overwrite=True"
    ):
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
