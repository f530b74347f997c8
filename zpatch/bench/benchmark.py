"""A benchmark of a store: the plan is run, and other packings are tried on a sample of its voxels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from zpatch.bench.benchmark_plan import GROUP_PATCHES, TRIAL_SHARE, BenchmarkPlan
from zpatch.bench.benchmark_report import BenchmarkReport, PackingFigures
from zpatch.bench.packing import STORED, Packing, decoded_per_delivered
from zpatch.bench.patch_group import PatchGroup
from zpatch.bench.reading_speed import reading_speed
from zpatch.bench.trial_stores import StandIns, can_be_tried, stand_ins, times_as_fast
from zpatch.chunks.mapped_shards import close_shards
from zpatch.runtime.task_contract import Progress
from zpatch.runtime.tasks import core_count

COUNTED_GROUPS = 24
TRIED_GROUPS = 6


def run_benchmark(plan: BenchmarkPlan, progress: Progress = lambda ms: None) -> BenchmarkReport:
    """Run a plan. ``progress`` is called with milliseconds, which add up to the plan's ``about_s``."""
    load = os.getloadavg()[0] / core_count()
    groups = plan.groups(COUNTED_GROUPS, plan.group)
    speeds = []
    try:
        for processes in plan.jobs:
            speeds.append(
                reading_speed(
                    plan.store,
                    plan.subjects,
                    patch_size=plan.patch_size,
                    group=plan.group,
                    processes=processes,
                    seconds=plan.seconds,
                )
            )
            progress(round(plan.speed_s * 1000))
        packings = tuple(_figures(plan, groups, speeds[0].warm, progress))
    finally:
        close_shards(plan.store)
    counts = sorted({1, plan.group, GROUP_PATCHES})
    return BenchmarkReport(
        plan=plan,
        patch_bytes=sum(group.delivered_bytes for group in groups) // (len(groups) * plan.group),
        speeds=tuple(speeds),
        packings=packings,
        decoded_by_group={n: decoded_per_delivered(plan.groups(COUNTED_GROUPS, n)) for n in counts},
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load=load,
    )


def _figures(
    plan: BenchmarkPlan, groups: Sequence[PatchGroup], warm: float, progress: Progress
) -> Iterator[PackingFigures]:
    """The figures of each packing, relative to the store's own."""
    alone = [single for group in groups for single in group.singly()]
    affordable = max(1, int(warm * plan.trial_s / plan.group / 4))
    tried = plan.groups(min(TRIED_GROUPS, affordable, len(plan.subjects)), plan.group)
    with contextlib.ExitStack() as stack:
        base = None
        if plan.is_tried and can_be_tried(tried, STORED):
            base = stack.enter_context(stand_ins(tried, STORED, plan.packings))
        for packing in plan.packings:
            gain, size = _tried(plan, tried, packing, base)
            yield PackingFigures(
                chunk=packing.chunk or plan.stored.chunk,
                codec=packing.codec or plan.stored.codec,
                decoded_per_delivered=decoded_per_delivered(groups, packing),
                patch_by_patch=decoded_per_delivered(alone, packing),
                patches_per_s=None if gain is None else warm * gain,
                size=size,
            )
            progress(round(plan.trial_s * 1000))


def _tried(
    plan: BenchmarkPlan, groups: Sequence[PatchGroup], packing: Packing, base: StandIns | None
) -> tuple[float | None, float | None]:
    """Speed and size of a packing relative to the store's own; None if it is too large to try."""
    if packing is STORED and base is not None:
        return 1.0, 1.0
    if base is None or not can_be_tried(groups, packing):
        return None, None
    with stand_ins(groups, packing, plan.packings) as other:
        gain = times_as_fast(other, base, plan.seconds * TRIAL_SHARE)
        return gain, other.stored_bytes / base.stored_bytes
