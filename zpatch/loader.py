"""Batches of patches for a training loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import cast

import torch

from zpatch.errors import OptionError
from zpatch.patch import Patch, PatchBatch, collate


class SubjectsLoader:
    """Batches from a queue, a grid sampler, or anything that yields patches.

    ``batch.t1.data`` is (B, C, I, J, K); its memory is (b, c, z, y, x), the order of the store, so that a
    batch costs one copy. Call ``.contiguous()`` where an operation needs the other order.
    ``drop_last`` leaves out a last batch that is not full. ``pin_memory`` puts batches into page-locked
    memory, ``device`` copies them there, without waiting where the memory is pinned.
    """

    def __init__(
        self,
        dataset: Iterable[Patch],
        batch_size: int = 1,
        *,
        drop_last: bool = False,
        pin_memory: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, not {batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.device = None if device is None else torch.device(device)

    def __len__(self) -> int:
        patches = len(cast(Sized, self.dataset))
        return patches // self.batch_size if self.drop_last else -(-patches // self.batch_size)

    def __iter__(self) -> Iterator[PatchBatch]:
        patches = iter(self.dataset)
        while group := list(itertools.islice(patches, self.batch_size)):
            if self.drop_last and len(group) < self.batch_size:
                return
            yield self._placed(collate(group))

    def _placed(self, batch: PatchBatch) -> PatchBatch:
        if self.pin_memory:
            batch = batch.map_data(torch.Tensor.pin_memory)
        if self.device is not None:
            batch = batch.map_data(lambda data: data.to(self.device, non_blocking=self.pin_memory))
        return batch
