"""Patches as they arrive, epoch after epoch: from workers, through slots of shared memory, or read here.

Torch's DataLoader keeps the workers. Tasks go out in order and come back in order, at most two for each
worker at a time, and slots are given out with the tasks: the memory is bounded before anything is read. When
all tasks of an epoch are out, those of the next one follow.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zpatch.loading.epoch_plan import Draw, EpochPlan
from zpatch.loading.shared_slots import SlotBlock
from zpatch.loading.worker import FailedDraw, SubjectDraws, Task, unpacked
from zpatch.loading.worker_pool import Result, _Workers
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch import Patch


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A patch that has come, number ``number`` of run ``serial``; or why it and its group will not come.

    With a ``slot`` its tensors are views of that, until it is freed.
    """

    serial: int
    number: int
    patch: Patch | None
    slot: int | None = None
    failure: str | None = None


class PatchFeed:
    """The patches of plans in the order of their arrival numbers, and one plan after the other.

    ``plan_after`` gives the plan that will follow one, or None where that is not known yet. Without workers
    nothing is read before it is asked for.
    """

    def __init__(
        self,
        draws: SubjectDraws,
        plan_after: Callable[[EpochPlan], EpochPlan | None],
        *,
        num_workers: int,
        slots: int,
        slot_bytes: int,
        start_method: str,
        timeout: float,
    ) -> None:
        self._draws = draws
        self._plan_after = plan_after
        self._plans: dict[int, EpochPlan] = {}  # those begun and not yet done with, by serial
        self._to_do: Iterator[Draw] = iter(())
        self._begun = 0
        self._here: deque[Arrival] = deque()
        self._told_of_loose = False
        self._workers: _Workers | None = None
        if num_workers:
            draws.block = SlotBlock(slots, slot_bytes)
            self._free = deque(range(slots))
            self._workers = _Workers(draws, self._tasks, num_workers, start_method, timeout)

    @property
    def has_workers(self) -> bool:
        """Whether something comes without being asked for."""
        return self._workers is not None

    def begin(self, plan: EpochPlan, consumed: int = 0) -> int:
        """Turn to a plan, of which some patches are consumed already; the serial of what will arrive.

        Where workers have begun it of themselves nothing of that is lost. Older plans are let go.
        """
        serial = None if consumed else self._begun_ahead(plan)
        if serial is None:
            serial = self._start(plan, consumed)
        self._plans = {s: p for s, p in self._plans.items() if s >= serial}
        left, self._here = self._here, deque()
        for arrival in left:
            if arrival.serial in self._plans:
                self._here.append(arrival)
            else:
                self.free(arrival)
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
        while not self._here:
            if self._workers is None:
                self._here.extend(self._read(next(self._to_do)))
            else:
                self._unpack(self._workers.next_result())
        return self._here.popleft()

    def free(self, arrival: Arrival) -> None:
        """Give the slot of a patch back, which must not be looked at any more."""
        if arrival.slot is not None:
            self._free.append(arrival.slot)

    def _read(self, draw: Draw) -> Iterator[Arrival]:
        serial = self._begun
        try:
            for number, patch in zip(draw.arrivals, self._draws.patches(draw), strict=True):
                yield Arrival(serial, number, patch)
        except Exception as error:
            failed = FailedDraw.of(Task(serial, draw, ()), self._draws.name_of(draw.subject), error)
            yield Arrival(serial, draw.arrivals[0], None, failure=str(failed))

    def _unpack(self, result: Result) -> None:
        task, block = result.task, self._draws.block
        assert block is not None
        if task.serial not in self._plans:
            self._free.extend(task.slots)
        elif isinstance(result, FailedDraw):
            self._free.extend(task.slots)
            self._here.append(Arrival(task.serial, task.draw.arrivals[0], None, failure=str(result)))
        else:
            for number, slot, sent in zip(task.draw.arrivals, task.slots, result.patches, strict=True):
                if sent.loose is None:
                    tensors = [block.tensor(slot, place) for place in sent.layout.images]
                else:
                    arrived = zip(sent.loose, sent.layout.images, strict=True)
                    tensors = [unpacked(data, place.dtype) for data, place in arrived]
                    self._tell_of_loose(sent.layout.nbytes, block.slot_bytes)
                patch = sent.layout.patch(tensors, sent.affines, sent.location, sent.subject)
                self._here.append(Arrival(task.serial, number, patch, slot))

    def _tell_of_loose(self, nbytes: int, slot_bytes: int) -> None:
        if not self._told_of_loose:
            self._told_of_loose = True
            warnings.warn(
                f"some patches take {format_bytes(nbytes)} after the transform, more than the queue's slots "
                f"of {format_bytes(slot_bytes)}; they travel a slower way",
                stacklevel=2,
            )

    def _tasks(self) -> Iterator[Task]:
        """What workers are to do, endless as long as the next plan is known."""
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
        """End the workers, and let go of the slots."""
        if self._workers is not None:
            self._workers.close()
            self._draws.block = None
            self._here.clear()
