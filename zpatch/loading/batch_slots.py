"""Batches on their way: which slot each is written to, what arrived of it, and when its slot is free.

A batch gets a slot with the first of its patches that is sent to be read, and keeps it until nobody refers to
its tensors any more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zpatch.loading.queue_options import QueueOptions
from zpatch.loading.shared_slots import ReturnedSlots, SlotLease
from zpatch.loading.worker import Delivered, Target
from zpatch.loading.worker_pool import TASKS_PER_WORKER

Key = tuple[int, int]  # the serial of a run, and the number of a batch in it

HANDED_OUT = 3  # batches that a loop may refer to, as one that fetches ahead does, before it gets copies


def slots_needed(options: QueueOptions, group: int, batch_size: int) -> int:
    """Slots for ``max_length`` patches that wait, for those in flight and for batches that were handed out.

    At most ``group`` patches are read together.

    >>> slots_needed(QueueOptions(max_length=300, num_workers=2), group=10, batch_size=8)
    50
    """
    length = options.max_length
    in_flight = group * (TASKS_PER_WORKER * options.num_workers + 1)
    # Patches of more places may wait, as the distances of a shuffle are random.
    late = math.isqrt(length) if options.shuffle_patches and length > 1 else 0
    return -(-(length + in_flight + late) // batch_size) + 1 + HANDED_OUT


@dataclass(frozen=True, slots=True)
class Row:
    """Where a patch belongs: row ``row`` of a batch of ``size`` patches."""

    batch: int
    row: int
    size: int


@dataclass(slots=True, eq=False)
class Batch:
    """A batch that is being filled: its patches as they arrive, and how many of them are ``in_flight``.

    Without a ``slot`` its patches arrive in memory of their own.
    """

    slot: int | None
    patches: list[Delivered | None]
    in_flight: int = 0
    is_dropped: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all patches arrived."""
        return None not in self.patches


class BatchSlots:
    """The slots of a block: free, of batches that are being filled, or leased to the tensors of a batch.

    ``waiting`` is the number of patches that arrived of batches that were not taken. ``returned`` gets the
    slots whose leases ended.
    """

    def __init__(self, count: int) -> None:
        self.waiting = 0
        self.returned = ReturnedSlots()
        self._leased = 0
        self._free = list(range(count))  # the last one to be freed is the next: its memory has pages already
        self._batches: dict[Key, Batch] = {}

    def allot(self, serial: int, rows: Sequence[Row], *, force: bool) -> tuple[Target, ...] | None:
        """Where the patches of a task are to be written; None if there are not enough slots.

        With ``force`` batches that get no slot are begun without one.
        """
        self._take_back()
        new = {row.batch: row.size for row in rows if (serial, row.batch) not in self._batches}
        if len(new) > len(self._free) and not force:
            return None
        for number, size in new.items():
            slot = self._free.pop() if self._free else None
            self._batches[serial, number] = Batch(slot, [None] * size)
        targets = []
        for row in rows:
            batch = self._batches[serial, row.batch]
            batch.in_flight += 1
            targets.append(Target(row.batch, row.row, batch.slot))
        return tuple(targets)

    def arrive(self, serial: int, targets: Sequence[Target], patches: Sequence[Delivered | None]) -> None:
        """Note what arrived for the targets of a task: patches, or None for each where it failed."""
        for target, patch in zip(targets, patches, strict=True):
            key = serial, target.batch
            batch = self._batches[key]
            batch.in_flight -= 1
            batch.patches[target.row] = patch
            if not batch.is_dropped:
                self.waiting += patch is not None
            elif not batch.in_flight:
                self._discard(key)

    def take(self, serial: int, number: int) -> Batch | None:
        """A batch, if it is complete; from now on its slot is the caller's."""
        batch = self._batches.get((serial, number))
        if batch is None or not batch.is_complete:
            return None
        self.waiting -= len(batch.patches)
        return self._batches.pop((serial, number))

    def lease(self, slot: int) -> SlotLease:
        """A lease of the slot of a batch that was taken."""
        self._leased += 1
        return SlotLease(slot, self.returned)

    @property
    def leased(self) -> int:
        """Number of slots whose leases did not end."""
        self._take_back()
        return self._leased

    def drop_before(self, serial: int) -> None:
        """Drop the batches of earlier runs; a slot is free once nothing is written to it any more."""
        for key in [key for key in self._batches if key[0] < serial]:
            batch = self._batches[key]
            if not batch.is_dropped:
                self.waiting -= sum(patch is not None for patch in batch.patches)
                batch.is_dropped = True
            if not batch.in_flight:
                self._discard(key)

    def _discard(self, key: Key) -> None:
        slot = self._batches.pop(key).slot
        if slot is not None:
            self._free.append(slot)

    def _take_back(self) -> None:
        """Free the slots whose leases have ended."""
        for slot in self.returned.take():
            self._free.append(slot)
            self._leased -= 1
