"""Planning a prediction: run the network on one patch, read the mask, keep the first plan that fits."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from zpatch.errors import MemoryLimitError, ModelError, OptionError
from zpatch.images.normalization import lacks_statistics
from zpatch.images.subject import Subject
from zpatch.networks.network import Network
from zpatch.planning.model_inputs import Measure, ModelInputs, measured
from zpatch.planning.peak_memory import kept_bytes, region_bytes
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import Head, NetworkCost, PredictionPlan
from zpatch.planning.probe import check_names, network_cost, probe
from zpatch.planning.regions import NOT_BEGUN, Shards, grid_over, partitions, planned_heads
from zpatch.runtime.byte_sizes import format_bytes, parse_bytes
from zpatch.runtime.failures import Failures
from zpatch.runtime.process_memory import private_bytes, resident_bytes
from zpatch.sources.input_files import InputSeal

WORKER_BYTES = 2**26  # that a forked worker copies of this process, mostly to count references
ROWS_OF_A_REGION = 4  # rows of patches along the swept axis, at least, where a cluster shares the work


def plan_prediction(
    network: Network,
    subjects: Sequence[Subject],
    options: PredictOptions,
    *,
    begun: Mapping[str, Shards] = MappingProxyType({}),
    failures: Failures | None = None,
    estimate: bool = False,
    measure: Measure = measured,
) -> list[PredictionPlan]:
    """The plan of each subject. The network is run on one patch of the first one that can be read.

    Nothing is written.

    ``begun`` has the shards of an output that is to be resumed, by subject and output: they are kept.
    ``failures`` notes the subjects that cannot be read, unless none can. With a limit of memory, or to
    ``estimate`` the time, the network is run on a whole batch too. ``measure`` gives the statistics that
    ``options.normalize`` needs of an image, by its name, that has none stored. Raises MemoryLimitError if no
    plan of a subject fits ``options.max_memory``.
    """
    _check_subjects(subjects)
    failures, unread = failures or Failures(), Failures(keep_going=True)
    heads: tuple[Head, ...] = ()
    cost: NetworkCost | None = None
    sealed: list[tuple[ModelInputs, tuple[InputSeal, ...]]] = []
    for subject in subjects:
        with failures.caught(subject.name, but=ModelError):  # that of a network that fails on its first patch
            inputs = ModelInputs.of(subject, options, measure)
            sealed.append((inputs, _sealed(inputs)))  # before the network runs: files may change
            if heads:
                continue
            # A first patch that cannot be read fails where it is predicted, which a finished one is not.
            with unread.caught(subject.name, but=ModelError):
                heads = probe(network, inputs, options)
                if estimate or options.max_memory is not None:
                    cost = network_cost(network, inputs, options)
    if not heads:
        raise (unread if unread.found else failures).error()
    limit = MemoryLimit.of(options, network)
    plans: list[PredictionPlan] = []
    for inputs, seals in sealed:
        name = inputs.subject.name
        with failures.caught(name):
            slabs, of_subject = _slabs(inputs, options, len(subjects)), begun.get(name, NOT_BEGUN)
            found = candidates(
                inputs, heads, options, slabs=slabs, tta=network.tta, begun=of_subject, cost=cost
            )
            plans.append(dataclasses.replace(first_fitting(found, limit, of_subject), seals=seals))
    if not plans:
        raise failures.error()
    return plans


def _sealed(inputs: ModelInputs) -> tuple[InputSeal, ...]:
    return tuple(
        InputSeal.of(f"image {view.name!r} of subject {inputs.subject.name!r}", view.image.source)
        for view in inputs.views
    )


def candidates(
    inputs: ModelInputs,
    heads: Sequence[Head],
    options: PredictOptions,
    *,
    slabs: int = 1,
    tta: bool = False,
    begun: Shards = NOT_BEGUN,
    cost: NetworkCost | None = None,
) -> Iterator[PredictionPlan]:
    """Plans of a subject, from the fastest to those that hold less: more regions, then smaller shards.

    A plan has at least ``slabs`` regions along the swept axis, if there are as many shards. ``begun`` has the
    stored shapes of shards by output; if it has all outputs, no other shards are tried. ``cost`` is the
    network's, if it was measured.
    """
    subject, images = inputs.subject, inputs.images
    is_measured = options.normalize and any(lacks_statistics(subject[name]) for name in options.image)
    identities = tuple(image.identity() for image in images) if is_measured else ()
    grid = grid_over(images[0].spatial_shape, options)
    skipped = inputs.outside(grid, options)
    for planned in planned_heads(inputs, heads, grid, options, begun):
        for regions in partitions(planned, slabs):
            plan = PredictionPlan(
                subject=subject,
                views=inputs.views,
                native=inputs.native,
                grid=grid,
                batch_size=options.batch_size,
                heads=planned,
                regions=regions,
                skipped=skipped,
                region_bytes=0,
                jobs=options.jobs,
                tta=tta,
                cost=cost,
                identities=identities,
            )
            kept = kept_bytes(plan) if options.max_memory is None else 0
            yield dataclasses.replace(plan, region_bytes=region_bytes(plan) + kept)


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit for this process and its workers together, all of whose memory counts.

    Pages of the files that are read do not count: the system takes them back when it needs them.

    Attributes:
        bytes: The limit.
        held: What the processes hold before any region is run: Python, torch, the network, what it keeps.
        processes: The number of processes.
    """

    bytes: int
    held: int
    processes: int = 1

    @classmethod
    def of(cls, options: PredictOptions, network: Network) -> Self | None:
        """The limit of some options, for a process in which the network has run.

        A worker is a copy of this process. It copies the pages that it writes, and unpickles the network.
        """
        if options.max_memory is None:
            return None
        workers, copied = options.jobs if options.jobs > 1 else 0, private_bytes()
        if (weights := network.weight_bytes) is not None:
            copied = min(copied, WORKER_BYTES + weights)
        held = resident_bytes() + workers * copied
        return cls(parse_bytes(options.max_memory), held, 1 + workers)

    def refuse(self, plan: PredictionPlan, *, is_begun: bool) -> MemoryLimitError:
        """The error for a plan that does not fit, and none does that holds less."""
        is_many = self.processes > 1
        who, held = f"{self.processes} processes" if is_many else "the process", format_bytes(self.held)
        if self.held >= self.bytes:
            advice = "allow more, or use fewer jobs" if is_many else "allow more"
            return MemoryLimitError(
                f"{who} alone {'take' if is_many else 'takes'} {held} already, with Python, torch and the "
                f"network, and the limit is {format_bytes(self.bytes)}; {advice}"
            )
        advice = "use a smaller patch_size, batch_size or number of jobs, or allow more"
        if is_begun:
            advice = "it was begun in these shards: allow more, or say overwrite=True to start over"
        return MemoryLimitError(
            f"the prediction of {plan.subject.name!r} needs {format_bytes(plan.peak_bytes)}, of which the "
            f"network {format_bytes(plan.jobs * plan.network_bytes)}, beside the {held} that {who} "
            f"{'hold' if is_many else 'holds'}, and the limit is {format_bytes(self.bytes)}; {advice}"
        )


def first_fitting(
    plans: Iterable[PredictionPlan], limit: MemoryLimit | None, begun: Shards = NOT_BEGUN
) -> PredictionPlan:
    """The first plan with which the processes hold at most the bytes of the limit.

    Raises MemoryLimitError about the plan that holds least; ``begun`` are shards that could not be changed.
    """
    least = None
    for plan in plans:
        if limit is None or limit.held + plan.peak_bytes <= limit.bytes:
            return plan
        least = plan if least is None or plan.peak_bytes < least.peak_bytes else least
    assert least is not None
    assert limit is not None
    raise limit.refuse(least, is_begun={h.head.name: h.record.shards for h in least.heads} == begun)


def _check_subjects(subjects: Sequence[Subject]) -> None:
    given: Any = subjects
    if isinstance(given, Subject):
        raise OptionError("subjects= is one subject; give a list of it")
    if not len(subjects):
        raise OptionError("there is no subject to predict")
    for name, times in Counter(subject.name for subject in subjects).items():
        if times > 1:
            raise OptionError(f"{times} subjects are called {name!r}; give each a different name")
    check_names([subject.name for subject in subjects], "subject", OptionError)


def _slabs(inputs: ModelInputs, options: PredictOptions, subjects: int) -> int:
    """The number of regions along the swept axis that lets all jobs, or a cluster, share the work."""
    if options.scheduler is None or options.jobs > 1:
        return math.ceil(options.jobs / subjects)
    grid = grid_over(inputs.images[0].spatial_shape, options)
    return max(1, max(grid.counts) // ROWS_OF_A_REGION)
