"""Batches as they are filled, epoch after epoch: by workers through shared memory, or in this process.

Tasks are sent, and their results arrive, in one order, at most two in flight for each worker. Each task says
where its patches are to be written, so that memory is bounded before anything is read. After the last task of
an epoch follow those of the next one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zpatch.epochs.epoch_plan import Draw, EpochPlan
from zpatch.errors import QueueError
from zpatch.loading.batch_slots import HANDED_OUT, Batch, BatchSlots, FilledBatch, Row
from zpatch.loading.device_copies import Streams, page_lock
from zpatch.loading.draw_reader import DrawReader
from zpatch.loading.queue_options import QueueOptions
from zpatch.loading.queue_stats import IterationCounts
from zpatch.loading.shared_slots import SlotBlock
from zpatch.loading.worker import Result, Task, Worker
from zpatch.loading.worker_pool import START_METHOD, WorkerPool


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The batches of ``batch_size`` of a plan, after the first ``consumed`` patches."""

    plan: EpochPlan
    consumed: int
    batch_size: int

    def size_of(self, batch: int) -> int:
        """Number of patches of a batch; the last one may have fewer."""
        return min(self.batch_size, self.plan.total - self.consumed - batch * self.batch_size)

    def rows(self, draw: Draw) -> list[Row]:
        """Where the patches of a draw belong."""
        found = (divmod(place - self.consumed, self.batch_size) for place in draw.places)
        return [Row(batch, row, self.size_of(batch)) for batch, row in found]


class BatchFeed:
    """The batches of plans, one plan after the other.

    ``plan_after`` gives the plan that follows a plan, or None where that is not known yet. ``block`` has the
    slots, each for a batch. Without workers a patch is read when its batch is asked for; with workers, half
    of ``max_length`` patches wait for later batches, and more where a batch needs them.
    """

    def __init__(
        self,
        reader: DrawReader,
        plan_after: Callable[[EpochPlan], EpochPlan | None],
        block: SlotBlock,
        options: QueueOptions,
    ) -> None:
        self._plan_after = plan_after
        self.block = block
        self.slots = BatchSlots(block.count)
        self.is_closed = False
        self._runs: dict[int, Run] = {}  # the current one and those begun ahead, by serial
        self._failures: dict[int, QueueError] = {}  # of these
        self._begun = 0
        self._to_do: Iterator[Draw] = iter(())
        self._next: Draw | None = None  # of the run begun last
        self._must_send = False  # even where there are no slots
        self._read_ahead = options.max_length // 2
        self._options = options
        self.counts: IterationCounts | None = None  # of the iteration that was begun last
        self._batches = 0  # of that iteration
        self._has_warned = False
        self._worker = Worker(reader, block)
        self._pool: WorkerPool | None = None
        if options.num_workers:
            method = options.start_method or START_METHOD
            self._pool = WorkerPool(
                reader, block, self._next_task, options.num_workers, method, options.timeout
            )

    def begin(self, plan: EpochPlan, consumed: int, batches: int) -> int:
        """Begin an iteration of ``batches`` of a plan after the first ``consumed`` patches; its run's serial.

        A run that workers have begun ahead is continued. The batches of older runs are dropped.
        """
        ahead = list(self._runs.items())[1:]
        serial = None if consumed else next((s for s, run in ahead if plan.same_as(run.plan)), None)
        if serial is None:
            serial = self._start(plan, consumed)
        self._runs = {s: run for s, run in self._runs.items() if s >= serial}
        self._failures = {s: failure for s, failure in self._failures.items() if s >= serial}
        self.slots.drop_before(serial)
        workers, length = self._options.num_workers, self._options.max_length
        self._batches = batches
        self.counts = IterationCounts(self.block.watched, workers, length, plan.epoch)
        return serial

    def _start(self, plan: EpochPlan, consumed: int) -> int:
        self._begun += 1
        self._runs[self._begun] = Run(plan, consumed, self.block.layout.rows)
        self._to_do = plan.draws(consumed)
        self._next = next(self._to_do, None)
        return self._begun

    def batch(self, serial: int, number: int) -> FilledBatch:
        """A batch of a run, once it is complete; a QueueError where a draw of the run failed."""
        assert self.counts is not None
        with self.counts.waiting(self.slots.waiting):
            batch = self._complete(serial, number)
        sent = [patch for patch in batch.patches if patch is not None]
        self.counts.hand_out([patch.nbytes for patch in sent], time.monotonic_ns() - batch.done_ns)
        lease = None if batch.slot is None else self.slots.lease(batch.slot)
        are_short = self.slots.leased > HANDED_OUT
        filled = FilledBatch(self.block, batch.slot, sent, lease, slots_are_short=are_short)
        if number + 1 == self._batches:
            stats = self.counts.finish()
            if self._options.on_stats is not None:
                self._options.on_stats(stats)
        return filled

    def _complete(self, serial: int, number: int) -> Batch:
        """A batch of a run, for which results are taken in until it is complete."""
        most = self.slots.waiting + 2 * self.block.layout.rows
        while self._pool is not None and self._pool.in_flight and self.slots.waiting < self._read_ahead:
            self._receive(serial)
            if self.slots.waiting >= most:
                break
        while (batch := self.slots.take(serial, number)) is None:
            self._receive(serial)
        return batch

    def _receive(self, serial: int) -> None:
        """Take in the result of the next task."""
        if serial not in self._failures:
            try:
                self._take_in(self._next_result())
            except BaseException:  # Ctrl-C too: patches in flight may be lost
                self.close()
                raise
        if serial in self._failures:
            raise self._failures[serial]

    def _next_result(self) -> Result:
        self._must_send = self._pool is None
        if self._pool is None:
            task = self._next_task()
            assert task is not None
            return self._worker[task]
        self._pool.send()
        if not self._pool.in_flight:
            self._must_send = True
            self._pool.send()
        return self._pool.next_result()

    def _next_task(self) -> Task | None:
        """The next task, if there are slots for its batches and its plan is known already."""
        while self._next is None:
            last = self._runs.get(self._begun)
            plan = None if last is None else self._plan_after(last.plan)
            if plan is None:
                return None
            self._start(plan, 0)
        draw, run = self._next, self._runs[self._begun]
        targets = self.slots.allot(self._begun, run.rows(draw), force=self._must_send)
        if targets is None:
            return None
        self._must_send, self._next = False, next(self._to_do, None)
        return Task(self._begun, draw, targets)

    def _take_in(self, result: Result) -> None:
        task = result.task
        self.slots.arrive(result)
        if result.failure is not None:
            if task.serial in self._runs:
                self._failures.setdefault(task.serial, result.failure.error())
            return
        if self._pool is not None and any(
            sent.arrays is not None and target.slot is not None
            for sent, target in zip(result.patches, task.targets, strict=True)
        ):
            self._warn_of_slow_patches()

    def _warn_of_slow_patches(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "some patches differ from the first one in images, shapes or types, so that they do not fit "
                "the queue's slots; they are sent by a slower way",
                stacklevel=2,
            )

    def page_lock(self, streams: Streams) -> None:
        """Page-lock the slots, and use each again only after the copies from it."""
        if self.slots.returned.event is None:
            page_lock(self.block, streams)
        self.slots.returned.event = streams.event

    def close(self) -> None:
        """End the workers."""
        self.is_closed = True
        if self.counts is not None:
            self.counts.finish()
        pool, self._pool = self._pool, None  # each refers to the other, and to the memory
        if pool is not None:
            pool.close()
