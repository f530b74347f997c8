"""A batch whose patches arrived: as a view of its slot, as a copy, or patch by patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from zpatch.loading.shared_slots import ImagePlace, SlotBlock, SlotLease, new_memory
from zpatch.loading.worker import Delivered, unpacked
from zpatch.sampling.patch import Patch, PatchImage
from zpatch.sampling.patch_batch import PatchBatch, stack


class FilledBatch:
    """The patches of a batch, in a slot of a block as far as they go into it.

    Its slot is not used again while its ``lease`` is referred to, until ``release``. ``slots_are_short``
    where a view might be referred to for so long that the queue lacks slots.
    """

    def __init__(
        self,
        block: SlotBlock,
        slot: int | None,
        patches: Sequence[Delivered | None],
        lease: SlotLease | None,
        *,
        slots_are_short: bool = False,
    ) -> None:
        self.block, self.slot = block, slot
        self._sent = [sent for sent in patches if sent is not None]
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
