"""Batches on their way, and as they arrive: the slot of each, what arrived of it, and when its slot is free.

A batch gets a slot with the first of its patches that is sent to be read, and keeps it until nobody refers to
its tensors any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zpatch.loading.queue_options import QueueOptions
from zpatch.loading.shared_slots import ImagePlace, ReturnedSlots, SlotBlock, SlotLease, new_memory
from zpatch.loading.worker import Delivered, Result, Target, unpacked
from zpatch.loading.worker_pool import TASKS_PER_WORKER
from zpatch.sampling.patch import Patch, PatchImage
from zpatch.sampling.patch_batch import PatchBatch, stack

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

    ``done_ns`` is when the last of those that arrived was written. Without a ``slot`` its patches arrive in
    memory of their own.
    """

    slot: int | None
    patches: list[Delivered | None]
    in_flight: int = 0
    done_ns: int = 0
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

    def arrive(self, result: Result) -> None:
        """Note what arrived for the targets of a task: patches, or none where it failed."""
        serial, targets = result.task.serial, result.task.targets
        patches = result.patches if result.failure is None else [None] * len(targets)
        for target, patch in zip(targets, patches, strict=True):
            key = serial, target.batch
            batch = self._batches[key]
            batch.in_flight -= 1
            batch.patches[target.row] = patch
            batch.done_ns = max(batch.done_ns, result.done_ns)
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


class FilledBatch:
    """The patches of a batch, in a slot of a block as far as they go into it.

    Its slot is not used again while its ``lease`` is referred to, until ``release``. ``slots_are_short``
    where a view might be referred to for so long that the queue lacks slots.
    """

    def __init__(
        self,
        block: SlotBlock,
        slot: int | None,
        patches: Sequence[Delivered],
        lease: SlotLease | None,
        *,
        slots_are_short: bool = False,
    ) -> None:
        self.block, self.slot = block, slot
        self._sent = patches
        self._lease = lease
        self.slots_are_short = slots_are_short

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def places(self) -> Sequence[ImagePlace]:
        """The images of the batch, and where they begin in its slot."""
        return self._sent[0].layout.images

    def memory(self) -> torch.Tensor | None:
        """The bytes of the batch in its slot, valid until ``release``; None if a patch of it is elsewhere."""
        if self.slot is None or any(sent.arrays is not None for sent in self._sent):
            return None
        return self.block.slot_bytes(self.slot)

    def patches(self) -> Iterator[Patch]:
        """The patches, each valid until ``release``."""
        for row, sent in enumerate(self._sent):
            places = sent.layout.images
            if sent.arrays is None:
                assert self.slot is not None
                tensors = [self.block.tensor(self.slot, row, place) for place in places]
            else:
                tensors = [
                    unpacked(data, place.dtype) for data, place in zip(sent.arrays, places, strict=True)
                ]
            yield sent.layout.patch(tensors, sent.affines, sent.location, sent.subject)

    def view(self) -> PatchBatch:
        """The batch without a copy: its tensors refer to the lease too; a copy if a patch is elsewhere."""
        if self._lease is None or self.slot is None or self.memory() is None:
            return self.copy()
        return self.with_tensors(
            [self.block.leased_tensor(self.slot, len(self), place, self._lease) for place in self.places]
        )

    def copy(self) -> PatchBatch:
        """The batch in newly allocated memory; an OptionError if its patches differ in shape or type."""
        batch = stack(self.patches(), len(self), new_memory)
        self.release()
        return batch

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> PatchBatch:
        """The batch with the voxels of its images in some tensors, (B, C, I, J, K)."""
        images = {}
        for number, (place, data) in enumerate(zip(self.places, tensors, strict=True)):
            affines = np.stack([sent.affines[number] for sent in self._sent])
            scales = np.array([(of.slope, of.inter) for of in (s.layout.images[number] for s in self._sent)])
            images[place.name] = PatchImage(data, affines, place.kind, *scales.T)
        sent = self._sent
        return PatchBatch(images, [of.location for of in sent], [of.subject for of in sent])

    def release(self) -> None:
        """Let the slot be used again."""
        if self._lease is not None:
            self._lease.end()
