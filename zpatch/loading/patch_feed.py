"""Patches as they arrive, epoch after epoch: from workers through shared memory, or read in this process.

Tasks are sent and their results arrive in one order, at most two in flight for each worker. Each task is sent
with slots for its patches, so that memory is bounded before anything is read. After the last task of an epoch
follow those of the next one.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from zpatch.epochs.epoch_plan import Draw, EpochPlan
from zpatch.errors import QueueError
from zpatch.loading.draw_reader import DrawReader
from zpatch.loading.shared_slots import SlotBlock
from zpatch.loading.worker import Delivered, FailedDraw, Task, unpacked
from zpatch.loading.worker_pool import Result, WorkerPool
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch import Patch


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A patch that arrived, number ``number`` of run ``serial``; or the ``failure`` of its whole draw.

    With a ``slot`` its tensors are views of that slot, valid until the slot is released.
    """

    serial: int
    number: int
    patch: Patch | None
    slot: int | None = None
    failure: QueueError | None = None


class PatchFeed:
    """The patches of plans, one plan after the other, in the order of their arrival numbers.

    ``plan_after`` gives the plan that follows a plan, or None where that is not known yet. Without workers
    a patch is read when it is asked for. ``block`` holds the slots of the workers.
    """

    def __init__(
        self,
        reader: DrawReader,
        plan_after: Callable[[EpochPlan], EpochPlan | None],
        *,
        num_workers: int,
        slots: int,
        slot_bytes: int,
        start_method: str,
        timeout: float,
    ) -> None:
        self._reader = reader
        self._plan_after = plan_after
        self._plans: dict[int, EpochPlan] = {}  # the current one and those begun ahead, by serial
        self._to_do: Iterator[Draw] = iter(())
        self._begun = 0
        self._arrived: deque[Arrival] = deque()
        self._has_warned = False
        self.block: SlotBlock | None = None
        self._workers: WorkerPool | None = None
        if num_workers:
            self.block = SlotBlock(slots, slot_bytes)
            self._free = deque(range(slots))
            self._workers = WorkerPool(reader, self.block, self._tasks, num_workers, start_method, timeout)

    @property
    def has_workers(self) -> bool:
        """Whether patches arrive without being asked for."""
        return self._workers is not None

    def begin(self, plan: EpochPlan, consumed: int = 0) -> int:
        """Begin the patches of a plan after the first ``consumed``; the serial of the run that they are of.

        A run that workers have begun ahead is continued. The patches of older plans are dropped.
        """
        serial = None if consumed else self._begun_ahead(plan)
        if serial is None:
            serial = self._start(plan, consumed)
        self._plans = {s: p for s, p in self._plans.items() if s >= serial}
        arrived, self._arrived = self._arrived, deque()
        for arrival in arrived:
            if arrival.serial in self._plans:
                self._arrived.append(arrival)
            else:
                self.release(arrival)
        return serial

    def _begun_ahead(self, plan: EpochPlan) -> int | None:
        ahead = list(self._plans.items())[1:]
        return next((serial for serial, begun in ahead if plan.same_as(begun)), None)

    def _start(self, plan: EpochPlan, consumed: int) -> int:
        self._begun += 1
        self._plans[self._begun] = plan
        self._to_do = plan.draws(consumed)
        return self._begun

    def take(self) -> Arrival:
        """The next patch to arrive."""
        while not self._arrived:
            if self._workers is None:
                self._arrived.extend(self._read(next(self._to_do)))
            else:
                self._unpack(self._workers.next_result())
        return self._arrived.popleft()

    def release(self, arrival: Arrival) -> None:
        """Release the slot of a patch for another one; its tensors are no longer valid."""
        if arrival.slot is not None:
            self._free.append(arrival.slot)

    def _read(self, draw: Draw) -> Iterator[Arrival]:
        serial = self._begun
        try:
            for number, patch in zip(draw.arrivals, self._reader.patches(draw), strict=True):
                yield Arrival(serial, number, patch)
        except Exception as error:
            failed = FailedDraw.of(Task(serial, draw, ()), self._reader.name_of(draw.subject), error)
            yield Arrival(serial, draw.arrivals[0], None, failure=failed.error())

    def _unpack(self, result: Result) -> None:
        task = result.task
        if task.serial not in self._plans:
            self._free.extend(task.slots)
        elif isinstance(result, FailedDraw):
            self._free.extend(task.slots)
            self._arrived.append(Arrival(task.serial, task.draw.arrivals[0], None, failure=result.error()))
        else:
            for number, slot, sent in zip(task.draw.arrivals, task.slots, result.patches, strict=True):
                patch = sent.layout.patch(
                    self._tensors(sent, slot), sent.affines, sent.location, sent.subject
                )
                self._arrived.append(Arrival(task.serial, number, patch, slot))

    def _tensors(self, sent: Delivered, slot: int) -> list[torch.Tensor]:
        """The images of a patch: views of its slot, or the arrays that were sent instead."""
        assert self.block is not None
        places = sent.layout.images
        if sent.arrays is None:
            return [self.block.tensor(slot, place) for place in places]
        self._warn_of_slow_patches(sent.layout.nbytes, self.block.slot_bytes)
        return [unpacked(data, place.dtype) for data, place in zip(sent.arrays, places, strict=True)]

    def _warn_of_slow_patches(self, nbytes: int, slot_bytes: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"some patches take {format_bytes(nbytes)} after the transform, more than the queue's slots "
                f"of {format_bytes(slot_bytes)}; they are sent by a slower way",
                stacklevel=2,
            )

    def _tasks(self) -> Iterator[Task]:
        """The tasks of workers, without end as long as the next plan is known."""
        while True:
            draw = next(self._to_do, None)
            if draw is not None:
                slots = tuple(self._free.popleft() for _ in draw.numbers)
                yield Task(self._begun, draw, slots)
            elif (plan := self._plan_after(self._plans[self._begun])) is not None:
                self._start(plan, 0)
            else:
                return

    def close(self) -> None:
        """End the workers, and drop the slots."""
        if self._workers is not None:
            self._workers.close()
            self._workers = self.block = None
            self._arrived.clear()
