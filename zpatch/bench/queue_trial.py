"""A queue over a store before training begins: where its time goes, with a consumer that does nothing."""

from __future__ import annotations

from typing import Any

from zpatch.bench.benchmark_plan import BenchmarkPlan
from zpatch.errors import OptionError, one_line
from zpatch.loading.patch_queue import Queue
from zpatch.loading.queue_stats import QueueStats
from zpatch.loading.subjects_loader import SubjectsLoader
from zpatch.networks.model_files import made_by_factory
from zpatch.sampling.samplers import UniformSampler


def queue_trial(
    plan: BenchmarkPlan,
    *,
    patches: int,
    patches_per_volume: int,
    batch_size: int,
    num_workers: int,
    max_length: int,
    transform: str | None = None,
) -> QueueStats:
    """The statistics of a warm epoch of about ``patches`` random patches of the plan's subjects.

    An epoch before it starts the workers and reads each file once. ``transform`` is
    ``package.module:factory``; the factory is called without arguments and returns a transform of a patch.

    Raises OptionError for a transform that cannot be loaded, and for wrong options of the queue; QueueError
    for a subject that cannot be read and for a transform that fails.
    """
    subjects = plan.subjects[: max(1, patches // patches_per_volume)]
    queue = Queue(
        subjects,
        UniformSampler(plan.patch_size),
        max_length,
        patches_per_volume,
        num_workers,
        transform=None if transform is None else transform_of(transform),
    )
    with queue:
        for _ in range(2):
            for _ in SubjectsLoader(queue, batch_size, reuse="next"):
                pass
        return queue.stats()


def transform_of(spec: str) -> Any:
    """The transform that ``package.module:factory`` makes; an OptionError in one line if it cannot."""
    if ":" not in spec:
        raise OptionError(f"transform {spec!r} is not package.module:factory", option="transform")
    try:
        made = made_by_factory(spec)
    except Exception as error:  # a user's module may fail in any way
        what = f"{type(error).__name__}: {one_line(error)}"
        raise OptionError(f"transform {spec!r} cannot be loaded: {what}", option="transform") from error
    if not callable(made):
        raise OptionError(
            f"transform {spec!r} gave {type(made).__name__}, which cannot be called with a patch",
            option="transform",
        )
    return made
