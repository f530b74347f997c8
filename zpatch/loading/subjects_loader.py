"""Batches of patches for a training loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import torch

from zpatch.errors import OptionError
from zpatch.loading.patch_batch import PatchBatch, stack
from zpatch.runtime import buffer_pool
from zpatch.sampling.patch import Patch


class SubjectsLoader:
    """Batches from a queue, a grid sampler, or anything that yields patches.

    ``batch.t1.data`` is (B, C, I, J, K); its memory is (b, c, z, y, x), the order of the store, so that a
    batch costs one copy. ``contiguous`` puts it into the order (b, c, i, j, k) instead, for operations that
    need that. ``drop_last`` leaves out a last batch that is not full. ``pin_memory`` puts batches into
    page-locked memory where there is a device that copies from that, ``device`` copies them there, without
    waiting where the memory is pinned.
    ``state_dict`` and ``load_state_dict`` are those of the queue, between two batches.
    """

    def __init__(
        self,
        dataset: Iterable[Patch],
        batch_size: int = 1,
        *,
        drop_last: bool = False,
        pin_memory: bool = False,
        device: torch.device | str | None = None,
        contiguous: bool = False,
    ) -> None:
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, not {batch_size}")
        if pin_memory and not _can_pin():
            pin_memory = False
            warnings.warn(
                "pin_memory=True does nothing here: there is no GPU that copies from it", stacklevel=2
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.device = None if device is None else torch.device(device)
        self.contiguous = contiguous

    def __len__(self) -> int:
        patches = len(cast(Sized, self.dataset))
        return patches // self.batch_size if self.drop_last else -(-patches // self.batch_size)

    def __iter__(self) -> Iterator[PatchBatch]:
        # A queue lends its patches one by one, and each is copied straight into its batch.
        iter_shared = getattr(self.dataset, "iter_shared", None)
        patches = iter(self.dataset if iter_shared is None else iter_shared())
        dtype = getattr(self.dataset, "pending_dtype", None)
        while len(batch := stack(patches, self.batch_size, self._new_memory, dtype)):
            if self.drop_last and len(batch) < self.batch_size:
                return
            yield self._placed(batch)

    def _new_memory(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        if self.pin_memory or dtype == torch.bfloat16:
            return torch.empty(shape, dtype=dtype, pin_memory=self.pin_memory)
        return torch.from_numpy(buffer_pool.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))

    def _placed(self, batch: PatchBatch) -> PatchBatch:
        if self.device is not None:
            batch = batch.map_data(lambda data: data.to(self.device, non_blocking=self.pin_memory))
        if self.contiguous:
            batch = batch.map_data(self._contiguous)
        return batch

    def _contiguous(self, data: torch.Tensor) -> torch.Tensor:
        """The same in the order of its axes, and page-locked where it was."""
        if data.is_contiguous():
            return data
        pin_memory = self.pin_memory and data.device.type == "cpu"
        memory = torch.empty_like(data, memory_format=torch.contiguous_format, pin_memory=pin_memory)
        return memory.copy_(data)

    def state_dict(self) -> dict[str, Any]:
        """Where the queue's stream is: past the batches that were given."""
        state: dict[str, Any] = cast(Any, self.dataset).state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where another one was."""
        cast(Any, self.dataset).load_state_dict(state)


def _can_pin() -> bool:
    """Whether there is a device that copies from page-locked memory; Apple's are none."""
    return torch.cuda.is_available() or torch.xpu.is_available()
