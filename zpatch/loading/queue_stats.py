"""Where the time of a queue goes: what workers and training count as they run, and a short table of it.

Each worker writes a row of the shared block that no one else writes, so that there are no locks. Counts only
grow; the statistics of an iteration are differences to what they were as it began.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.work_counts import STAGES, Work, during, worked

Rows = NDArray[np.int64]

# The columns of a worker's row.
PROCESS, SUBJECT = 0, 1
WORK = slice(2, 2 + len(Work))
FOR_SLOTS = WORK.stop  # nanoseconds of waiting
FOR_TASKS = FOR_SLOTS + 1
IDLE_SINCE = FOR_TASKS + 1  # 0 while it does a task
WAITED_THEN = IDLE_SINCE + 1  # how long training had waited by then
COUNTED = slice(WORK.start, IDLE_SINCE)

# The columns of the last row, that of training: nanoseconds.
WAITED, WAITING_SINCE = 0, 1

SELDOM = 0.1  # of the time: if training waits less, the queue keeps up
NS = 1e-9


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Where the time went in an iteration of a queue, as a short table if printed.

    It is of the iteration that runs, or of the last one: from its beginning until its last batch was handed
    out, or until it was broken off. Times are in seconds of this rank.

    ``epoch`` is the iteration's epoch, ``patches``, ``batches`` and ``nbytes`` are what was delivered in
    ``elapsed_s``. Training waited ``waited_s`` for the queue; batches that were complete before they were
    asked for waited for training, ``batches_waited_s`` in all.

    ``fetching``, ``decoding``, ``padding``, ``transform``, ``waiting_for_slots`` and ``waiting_for_tasks``
    are shares of the time of the ``workers``; together they are 1, or 0 before a worker has done anything.
    Fetching is opening files, and reading or verifying the chunks that a process reads for the first time. Of
    arrays in memory or of other libraries, Dask expressions, Zarr arrays of other programs and slides,
    all reading is fetching, which cannot be told from their decoding. Decoding is all other work of a
    task: places, plans, decompression, copies. A worker waits for slots while training waits for a batch and
    all slots that it may give out are in use; it waits for tasks while training does not ask for batches.
    Without workers this process does the tasks, and what it does between them is waiting for tasks.

    ``mean_fill`` and ``most_fill`` are patches that waited in the buffer of ``max_length`` as batches were
    asked for. ``new_chunks`` were read for the first time by a process, ``fetched_bytes`` of them from files
    or the system's page cache; ``known_chunks`` had been read before. ``rejected`` locations were refused by
    ``accept`` and drawn again; ``exhausted`` patches were taken although refused, after ``max_rejections``
    others.

    >>> import zpatch as zp
    >>> subject = zp.Subject(t1=zp.ScalarImage(np.zeros((8, 8, 8))))
    >>> queue = zp.Queue([subject], zp.UniformSampler(4), patches_per_volume=6)
    >>> batches = list(zp.SubjectsLoader(queue, batch_size=3))
    >>> stats = queue.stats()
    >>> stats.patches, stats.batches, stats.nbytes
    (6, 2, 1536)
    """

    epoch: int
    patches: int
    batches: int
    nbytes: int
    elapsed_s: float
    waited_s: float
    batches_waited_s: float
    workers: int
    fetching: float
    decoding: float
    padding: float
    transform: float
    waiting_for_slots: float
    waiting_for_tasks: float
    mean_fill: float
    most_fill: int
    max_length: int
    new_chunks: int
    known_chunks: int
    fetched_bytes: int
    rejected: int
    exhausted: int

    @property
    def waiting(self) -> float:
        """The share of the time in which training waited for the queue."""
        return self.waited_s / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def patches_per_s(self) -> float:
        """Patches delivered in a second."""
        return self.patches / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def advice(self) -> str:
        """One sentence: what takes the time, what will help, and what will not."""
        if not self.patches:
            return "nothing was delivered yet"
        waits = f"training waits {self.waiting:.0%} of the time"
        if self.waiting < SELDOM:
            return (
                f"{waits}: the queue keeps up; a faster training step will help, more workers and faster "
                f"storage will not"
            )
        stage = max(STAGES, key=self._share)
        if not self.workers:
            most = f"mostly for {_NAMES[stage]}"
            return f"{waits}, as it reads patches itself, {most}: num_workers above 0 will help"
        if self.waiting_for_slots > self._share(stage):
            return (
                f"{waits}, and workers wait for slots {self.waiting_for_slots:.0%} of theirs: a larger "
                f"max_length (now {self.max_length}), with more patches_per_volume, will help, more workers "
                f"will not"
            )
        if self.waiting_for_tasks > sum(map(self._share, STAGES)):
            return (
                f"{waits}, for first patches or as it takes batches in bursts, and workers wait for tasks "
                f"{self.waiting_for_tasks:.0%} of theirs: a larger max_length helps against bursts, more "
                f"workers will not"
            )
        return (
            f"{waits}; {self._share(stage):.0%} of the workers' time is {_NAMES[stage]}: {_HELPS[stage]} "
            f"will not"
        )

    def _share(self, stage: Work) -> float:
        return float(getattr(self, stage.name.lower()))

    def to_json(self) -> Json:
        """All figures by name, and the advice."""
        rates = {"waiting": self.waiting, "patches_per_s": self.patches_per_s}
        return {**dataclasses.asdict(self), **rates, "advice": self.advice}

    def __str__(self) -> str:
        shares = [f"{stage.name.lower()} {self._share(stage):.0%}" for stage in STAGES]
        shares += [f"waiting for slots {self.waiting_for_slots:.0%}, for tasks {self.waiting_for_tasks:.0%}"]
        each = self.batches_waited_s / self.batches if self.batches else 0.0
        delivered = f"{self.patches} patches in {self.batches} batches, {format_bytes(self.nbytes)}"
        rate = f"{self.elapsed_s:.1f} s: {self.patches_per_s:.3g} a second"
        taken = f" ({self.exhausted} patches taken all the same)" if self.exhausted else ""
        rejected = f"; {self.rejected} locations rejected{taken}" if self.rejected else ""
        rows = {
            f"epoch {self.epoch}": f"{delivered}, in {rate}",
            "training": f"waited {self.waiting:.0%} of the time, {self.waited_s:.1f} s; "
            f"a batch waited {each:.2g} s for it",
            f"{self.workers or 'no'} worker{'s' * (self.workers != 1)}": ", ".join(shares),
            "buffer": f"{self.mean_fill:.3g} of {self.max_length} patches, at most {self.most_fill}",
            "chunks": f"{self.new_chunks} read for the first time, {format_bytes(self.fetched_bytes)}; "
            f"{self.known_chunks} again{rejected}",
        }
        lines = [f"{name:<11} {text}" for name, text in rows.items()]
        return "\n".join([*lines, self.advice])


_NAMES = {
    Work.FETCHING: "fetching",
    Work.DECODING: "decoding",
    Work.PADDING: "padding",
    Work.TRANSFORM: "the transform",
}
_HELPS = {
    Work.FETCHING: "faster storage or more workers will help, a cheaper transform",
    Work.DECODING: "more workers, a faster codec or other chunks (zpatch bench) will help, faster storage",
    Work.PADDING: "more workers, or patches that reach less beyond the border, will help, faster storage",
    Work.TRANSFORM: "more workers or a cheaper transform will help, faster storage",
}


class WorkerRow:
    """What a worker counts, in its row of the block."""

    def __init__(self, rows: Rows, number: int) -> None:
        self._rows = rows
        self._row = rows[number]

    @contextmanager
    def task(self, subject: int) -> Iterator[None]:
        """Count a task over a subject, which is named in the row meanwhile."""
        row = self._row
        if idle_since := int(row[IDLE_SINCE]):
            row[FOR_SLOTS : FOR_TASKS + 1] += _waits(self._rows, idle_since, int(row[WAITED_THEN]))
            row[IDLE_SINCE] = 0
        row[: SUBJECT + 1] = os.getpid(), subject + 1
        before = worked()
        try:
            with during(Work.DECODING):
                yield
        finally:
            row[WORK] += np.subtract(worked(), before)
            now_ns = time.monotonic_ns()
            row[WAITED_THEN] = _training_waited(self._rows, now_ns)
            row[IDLE_SINCE] = now_ns
            row[SUBJECT] = 0


def _training_waited(rows: Rows, now_ns: int) -> int:
    """How long training has waited so far, in nanoseconds."""
    waited, since = rows[-1, : WAITING_SINCE + 1].tolist()
    return int(waited + (now_ns - since if since else 0))


def _waits(rows: Rows, idle_since_ns: int, waited_then_ns: int) -> tuple[int, int]:
    """How long a worker that is idle has waited for slots, as training waited too, and for tasks."""
    now_ns = time.monotonic_ns()
    idle_ns = max(0, now_ns - idle_since_ns)
    for_slots = min(max(0, _training_waited(rows, now_ns) - waited_then_ns), idle_ns)
    return for_slots, idle_ns - for_slots


def _totals(rows: Rows, workers: int) -> NDArray[np.int64]:
    """The counts of all workers together, with waiting that has not ended."""
    mine = rows[: max(1, workers)]
    total: NDArray[np.int64] = mine[:, COUNTED].sum(axis=0)
    for idle_since, waited_then in mine[:, [IDLE_SINCE, WAITED_THEN]].tolist():
        if idle_since:
            total[-2:] += _waits(rows, idle_since, waited_then)
    return total


class IterationCounts:
    """What is counted in an iteration, until it is finished: then the block is no longer referred to."""

    def __init__(self, rows: Rows, workers: int, max_length: int, epoch: int) -> None:
        self._rows: Rows | None = rows
        self._workers, self._max_length, self._epoch = workers, max_length, epoch
        self._before = _totals(rows, workers)
        self._waited_before = _training_waited(rows, time.monotonic_ns())
        self._begun_ns = time.monotonic_ns()
        self._patches = self._batches = self._nbytes = self._batches_waited_ns = 0
        self._fills = self._most_fill = 0
        self._finished: QueueStats | None = None

    @contextmanager
    def waiting(self, fill: int) -> Iterator[None]:
        """Count how long training waits for a batch that it asks for; ``fill`` patches are in the buffer."""
        self._fills += fill
        self._most_fill = max(self._most_fill, fill)
        assert self._rows is not None
        training = self._rows[-1]
        training[WAITING_SINCE] = time.monotonic_ns()
        try:
            yield
        finally:
            waited_ns = time.monotonic_ns() - int(training[WAITING_SINCE])
            training[WAITING_SINCE] = 0
            training[WAITED] += waited_ns

    def hand_out(self, nbytes: Sequence[int], waited_ns: int) -> None:
        """Count a batch, by the bytes of each of its patches, that waited for training."""
        self._batches += 1
        self._patches += len(nbytes)
        self._nbytes += sum(nbytes)
        self._batches_waited_ns += max(0, waited_ns)

    def finish(self) -> QueueStats:
        """The statistics, which are final from now on."""
        self._finished, self._rows = self.stats(), None
        return self._finished

    def stats(self) -> QueueStats:
        """The statistics so far."""
        if self._finished is not None:
            return self._finished
        assert self._rows is not None
        now_ns = time.monotonic_ns()
        counted = _totals(self._rows, self._workers) - self._before
        waited_ns = _training_waited(self._rows, now_ns) - self._waited_before
        return QueueStats(
            epoch=self._epoch,
            patches=self._patches,
            batches=self._batches,
            nbytes=self._nbytes,
            elapsed_s=(now_ns - self._begun_ns) * NS,
            waited_s=waited_ns * NS,
            batches_waited_s=self._batches_waited_ns * NS,
            workers=self._workers,
            mean_fill=self._fills / self._batches if self._batches else 0.0,
            most_fill=self._most_fill,
            max_length=self._max_length,
            **_named(counted),
        )


def _named(counted: NDArray[np.int64]) -> dict[str, Any]:
    """Counts of workers by the names of statistics: shares of their time, and numbers."""
    work, waits = counted[: len(Work)].tolist(), counted[len(Work) :].tolist()
    times = [*work[: len(STAGES)], *waits]
    all_ns = sum(times) or 1
    names = [*(stage.name.lower() for stage in STAGES), "waiting_for_slots", "waiting_for_tasks"]
    shares = {name: max(0, taken) / all_ns for name, taken in zip(names, times, strict=True)}
    return shares | {of.name.lower(): work[of] for of in Work if of not in STAGES}
