"""Feeding a training loop: epochs of batches beside peers and limits, first batches, gaps, and memory."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.feed.batches import (
    BATCH,
    GROUPS,
    GROUPS_FLOAT,
    LIMIT,
    MAX_LENGTH,
    PATCH,
    PER_SUBJECT,
    WORKERS,
    ZPATCH,
    ZPATCH_ALONE,
    ZPATCH_HC,
    ZPATCH_MIXED,
    ZPATCH_NONE,
    ZPATCH_STORED,
    Contender,
)
from benchmarks.feed.peers import (
    BLOSC2,
    MONAI,
    TENSORSTORE,
    TENSORSTORE_THREADS,
    TORCHIO,
    TORCHIO_2,
    TORCHIO_2_ANEW,
    TORCHIO_2_ANEW_GZ,
    TORCHIO_GZ,
    contender_of,
)
from benchmarks.measure import Server, in_fresh_process, times_as_long
from benchmarks.stage import MIB, Goal, Options, goals, mib, table
from zpatch.loading.batch_slots import HANDED_OUT
from zpatch.loading.worker_pool import TASKS_PER_WORKER

SHAPE = (240, 240, 160)
LENGTHS = (PER_SUBJECT, MAX_LENGTH, 300)
EPOCHS = 20  # short ones, for growth
SETTLED = 4  # of them, before which memory may still grow
# The same for all: one thread of torch and OpenMP in each process, which does not spin while it waits, and
# an allocator that keeps freed memory.
ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(32 * MIB),
    "MALLOC_TRIM_THRESHOLD_": str(256 * MIB),
}

# Stores of one phase are removed before the next: all at once would take 9 GB. zpatch is in each.
CROPS = (
    ZPATCH,
    ZPATCH_ALONE,
    ZPATCH_HC,
    ZPATCH_STORED,
    ZPATCH_MIXED,
    GROUPS,
    GROUPS_FLOAT,
    LIMIT,
    BLOSC2,
    TENSORSTORE,
    TENSORSTORE_THREADS,
)
RAW = (ZPATCH, ZPATCH_NONE, LIMIT)
VOLUMES = (ZPATCH, MONAI, TORCHIO, TORCHIO_GZ, TORCHIO_2, TORCHIO_2_ANEW, TORCHIO_2_ANEW_GZ)
SKIPPED_IF_QUICK = (
    ZPATCH_HC,
    ZPATCH_NONE,
    GROUPS_FLOAT,
    TORCHIO,
    TORCHIO_2_ANEW,
    TORCHIO_2_ANEW_GZ,
)

NOT_SHOWN = (
    "Nothing but the feed uses the cores: no model, no transforms. The consumer takes each batch and drops "
    "it; a GPU would have it copied.",
    "Feeding is from a warm page cache, of 64 subjects that fit in it. All read the same volumes, at "
    "different random locations. The head is the same in each subject, at another position.",
    "An epoch's rate includes reading ahead for the next one, as the epoch before has read ahead for it. "
    "Starting workers is not included, except for TorchIO 1, which starts new ones for each epoch.",
    "zpatch's batches are views of the memory that workers wrote to; the consumer drops each before it asks "
    "for the next but one. With dtype=None images stay int16, and slope and intercept are left to apply.",
    "TorchIO 2 is a pre-release. Its queue never frees a volume: from the second epoch on it copies from "
    "memory, and reads no file. With new subjects each epoch it reads them, as the others do.",
    "zpatch's batches are contiguous, (B, C, I, J, K); those of peers have the order of memory that they "
    "give.",
    "Memory of processes is anonymous and shared pages. Pages of mapped files, which the kernel may drop at "
    "any time, are not in it: zpatch, blosc2 and tensorstore map theirs.",
)


def run(options: Options) -> str:
    """All figures, as Markdown."""
    cohort = data.cohort(options.data, SHAPE, 12 if options.quick else 64)
    feed = _Feed(cohort, options)
    parts = [_rates(feed), _first_batch(feed), _gaps(feed), _memory(feed), stats_cost(feed.zpatch)]
    shutil.rmtree(feed.stores)
    return "\n\n".join(parts)


class _Feed:
    """A cohort, and a folder for the stores of one phase."""

    def __init__(self, cohort: Path, options: Options) -> None:
        self.cohort, self.stores, self.quick = cohort, options.stores, options.quick
        self.subjects = len(list((cohort / "nii").iterdir()))
        self.patches = self.subjects * PER_SUBJECT
        self.zpatch = self.stores / contender_of(ZPATCH).store
        shutil.rmtree(self.stores, ignore_errors=True)
        self.stores.mkdir(parents=True)
        self.make([ZPATCH])

    def tidy(self) -> None:
        """Remove all stores but zpatch's default."""
        for place in self.stores.iterdir():
            if place != self.zpatch:
                shutil.rmtree(place)

    def chosen(self, names: Iterable[str]) -> list[Contender]:
        """The contenders of some names, without those that a quick run skips."""
        skipped = SKIPPED_IF_QUICK if self.quick else ()
        return [contender_of(name) for name in names if name not in skipped]

    def make(self, names: Iterable[str]) -> None:
        """Write the stores of some contenders that do not exist yet."""
        missing = [name for name in names if not (self.stores / contender_of(name).store).exists()]
        if missing:
            in_fresh_process("feed.runs:make", self.cohort, self.stores, *missing, env=ENV)

    def run(self, function: str, *arguments: object) -> Any:
        """The value of a function in a fresh process."""
        return in_fresh_process(f"feed.runs:{function}", *arguments, env=ENV).value

    def serve(self, contender: Contender) -> Server:
        """A process that gives epochs of a contender."""
        env = ENV if contender.folder is None else {**ENV, "PYTHONPATH": str(contender.folder)}
        return Server("feed.runs:epochs_of", contender.name, self.cohort, self.stores, env=env)


# Epochs in turns.


def _rates(feed: _Feed) -> str:
    few, many = (2, 2) if feed.quick else (3, 5)
    phases = {RAW: 0 if feed.quick else many, VOLUMES: few, CROPS: many}
    found = [_turns(feed, names, turns) for names, turns in phases.items() if turns]
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for times, held in found:
        for name, taken in times.items():
            seconds[name], peaks[name] = taken, held[name]
            ratios[name] = times_as_long(taken, times[ZPATCH])
    names = dict.fromkeys((*CROPS[:3], *RAW, *CROPS, *VOLUMES))
    rows = [
        (c, _rate(seconds[c.name], feed), f"{ratios[c.name]:.2f}", mib(peaks[c.name]))
        if c.name in seconds
        else (c.name, "not installed", "", "")
        for c in feed.chosen(names)
    ]
    heading = (
        f"### {feed.subjects} subjects x {PER_SUBJECT} random {PATCH}-patches of "
        f"{' x '.join(map(str, SHAPE))}, int16 and a uint8 label map; batches of {BATCH}, float32 and uint8"
    )
    head = (
        f"{WORKERS} cores, {WORKERS} workers, page cache warm",
        "patches/s: median (least to most)",
        "time / zpatch's",
        "peak MiB",
    )
    return "\n\n".join([heading, table(head, rows), goals(*_rate_goals(ratios))])


def _turns(feed: _Feed, names: Sequence[str], turns: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of an epoch of each contender, in turns, each in a separate process; and its peak memory.

    A turn is two epochs, and the second counts: the first uses up the patches that a contender has read ahead
    during the turns of others.
    """
    feed.tidy()
    there = [contender for contender in feed.chosen(names) if contender.installed]
    feed.make(contender.name for contender in there)
    servers = {contender.name: feed.serve(contender) for contender in there}
    try:
        for server in servers.values():
            server.ask("check", watch=True)
        times: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(turns):
            for name, server in servers.items():
                times[name].append(server.ask("turn"))
    finally:
        for server in servers.values():
            server.end()
        for server in servers.values():
            server.close()
    return times, {name: server.peak_bytes for name, server in servers.items()}


def _rate(taken: Sequence[float], feed: _Feed) -> str:
    rates = [feed.patches / seconds for seconds in taken]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _rate_goals(ratios: Mapping[str, float]) -> Iterable[Goal]:
    def beside_best(kind: str, what: str, bound: float) -> Iterable[Goal]:
        those = {name: ratio for name, ratio in ratios.items() if contender_of(name).kind == kind}
        if those:
            best = min(those, key=lambda name: those[name])
            yield Goal(f"as fast as {what}: {best}", those[best], bound, "times", at_least=True)

    yield from beside_best("workers", "the best with workers", 2.5)
    yield from beside_best("memory", "one that has kept all volumes in memory", 2.5)
    yield from beside_best("threads", "the best without workers", 1.5)
    for name, bound in {TORCHIO_GZ: 6, LIMIT: 0.75, GROUPS: 0.8, GROUPS_FLOAT: 0.8}.items():
        if name in ratios:
            yield Goal(f"as fast as {name}", ratios[name], bound, "times", at_least=True)
    if ZPATCH_MIXED in ratios:
        beside = 1 / ratios[ZPATCH_MIXED]
        yield Goal(f"{ZPATCH_MIXED}: as fast as uniform draws", beside, 0.9, "times", at_least=True)
    for name, bound in {ZPATCH_NONE: 0.9, ZPATCH_STORED: 1.0}.items():
        if name in ratios:
            beside = ratios[LIMIT] / ratios[name]
            yield Goal(f"{name}: as fast as {LIMIT}", beside, bound, "times", at_least=True)


# The first batch.


def _first_batch(feed: _Feed) -> str:
    store, often = feed.zpatch, 1 if feed.quick else 5
    lengths = LENGTHS[:2] if feed.quick else LENGTHS
    groups: list[float] = []
    first: dict[int, list[float]] = {length: [] for length in lengths}
    started: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(often):
        groups.append(statistics.median(feed.run("group_seconds", store)))
        for length in lengths:
            started[length].append(feed.run("first_batch", store, length, 1))
            first[length].append(feed.run("first_batch", store, length, PATCH))
    beside = {
        length: statistics.median(
            a / (b + group) for a, b, group in zip(first[length], started[length], groups, strict=True)
        )
        for length in lengths
    }
    rows = [(length, _ms(first[length]), _ms(started[length]), f"{beside[length]:.2f}") for length in lengths]
    head = ("`max_length`", "ms to it", "of 1-voxel patches: start-up", "beside start-up and one group")
    heading = f"### The first batch of a fresh process; one subject's group takes {_ms(groups)} ms"
    reached = [
        Goal(f"first batch beside that, `max_length={length}`", beside[length], 1.5, "times")
        for length in lengths[:2]
    ]
    return "\n\n".join([heading, table(head, rows), goals(*reached)])


def _ms(taken: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(taken):.1f} ({1e3 * min(taken):.1f} to {1e3 * max(taken):.1f})"


# Gaps between batches.


def _gaps(feed: _Feed) -> str:
    names = (ZPATCH,) if feed.quick else (ZPATCH, BLOSC2, TENSORSTORE, TORCHIO_GZ)
    there = [contender for contender in feed.chosen(names) if contender.installed]
    feed.make(contender.name for contender in there)
    rows, worst = [], {}
    for contender in there:
        found = feed.run("gaps", contender.name, feed.cohort, feed.stores)
        median = statistics.median(found["within"])
        longest = max(found["within"]), max(found["between"])
        worst[contender.name] = max(longest) / median
        in_ms = (f"{1e3 * seconds:.1f}" for seconds in (found["pause"], median, *longest))
        rows.append((contender, *in_ms, f"{worst[contender.name]:.2f}"))
    head = (
        "a consumer 1.5 times slower than the feed",
        "it takes: ms",
        "from batch to batch: median ms",
        "longest in an epoch",
        "longest to the next epoch",
        "longest / median",
    )
    goal = Goal("longest gap between batches, beside the median", worst[ZPATCH], 2, "times")
    return "\n\n".join(["### Gaps between batches, after warm epochs", table(head, rows), goals(goal)])


# Memory of the queue, and what it grows by.


def _memory(feed: _Feed) -> str:
    store = feed.zpatch
    voxels = PATCH**3 * (4 + 1)
    slack = WORKERS * MIB  # the plans of a worker take more for larger patches
    base, _ = feed.run("queue_in_memory", store, "", "")
    tiny, _ = feed.run("queue_in_memory", store, 1, "")
    peak, stated = feed.run("queue_in_memory", store, PATCH, "")
    batched, stated_batched = feed.run("queue_in_memory", store, PATCH, "batched")
    growth = feed.run("growth", store, EPOCHS)
    workers, mine = (max(map(_slope_mib, growth[which])) for which in ("workers", "mine"))
    rows = [
        ("base: imports, the cohort opened", mib(base), ""),
        (f"and a queue of 1-voxel patches, {WORKERS} workers", mib(tiny), mib(tiny - base)),
        (
            f"the queue, `max_memory` {mib(stated)} MiB; two patches {mib(2 * voxels)}",
            mib(peak),
            mib(peak - tiny),
        ),
        ("with batches, which are part of it", mib(batched), mib(batched - tiny)),
    ]
    delivered = MAX_LENGTH + PER_SUBJECT * (TASKS_PER_WORKER * WORKERS + 1) + HANDED_OUT * BATCH
    bounds = [tiny + stated + copies * voxels + slack for copies in (2, 0)]
    epochs = f"over {EPOCHS} short epochs"
    reached = (
        Goal("peak of the queue, a patch at a time", peak / MIB, bounds[0] / MIB, "MiB"),
        Goal("peak with batches", batched / MIB, bounds[1] / MIB, "MiB"),
        Goal(
            f"`max_memory` beside {delivered} patches: `max_length`, in flight, {HANDED_OUT} batches",
            stated_batched / (delivered * voxels),
            1.15,
            "times",
        ),
        Goal(f"growth of a worker {epochs}", workers, 1, "MiB an epoch"),
        Goal(f"growth of the training process {epochs}", mine, 1, "MiB an epoch"),
    )
    heading = f"### Memory of a queue of `max_length={MAX_LENGTH}` with {WORKERS} workers"
    head = ("all processes", "peak MiB", "above the row above; from the third on, above the second")
    return "\n\n".join([heading, table(head, rows), goals(*reached)])


def _slope_mib(held: Sequence[int]) -> float:
    """MiB that an epoch adds, after the first epochs."""
    later = np.array(held[SETTLED:]) / MIB
    return float(np.polyfit(np.arange(len(later)), later, 1)[0])


# What counting costs.


def stats_cost(store: Path) -> str:
    """The cost of what is counted for ``queue.stats()``: calls in a warm epoch, times that of one."""
    found = in_fresh_process("feed.runs:stats_cost", store, env=ENV).value
    taken = {name: found["calls"][name] * cost for name, cost in found["costs"].items()}
    rows = [
        (name, found["calls"][name], f"{1e6 * cost:.2f}", f"{100 * taken[name] / found['seconds']:.3f}")
        for name, cost in found["costs"].items()
    ]
    share = 100 * sum(taken.values()) / found["seconds"]
    heading = f"### The cost of `queue.stats()` in a warm epoch of one process, {found['seconds']:.2f} s"
    head = ("counted for", "calls", "microseconds each", "% of the epoch")
    goal = Goal("counting, of the time of the feed", share, 1, "%")
    return "\n\n".join([heading, table(head, rows), goals(goal)])
