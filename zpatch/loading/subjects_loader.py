"""Batches of patches for a training loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, cast, get_args

import torch

from zpatch.errors import OptionError
from zpatch.images.subject import Subject
from zpatch.loading.batch_slots import HANDED_OUT, FilledBatch
from zpatch.loading.device_copies import CudaStreams, streamed, with_values
from zpatch.loading.patch_queue import Queue
from zpatch.loading.shared_slots import new_memory
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_batch import PatchBatch, stack

Reuse = Literal["unused", "next"]
Transfer = Literal["values", "stored"]


class SubjectsLoader:
    """Batches from a queue, a grid sampler, or any other iterable of patches.

    ``batch.t1.data`` is (B, C, I, J, K), contiguous. ``drop_last`` leaves out a last batch that is not full.
    ``state_dict`` and ``load_state_dict`` are those of the queue, between two batches.

    The tensors of a queue's batch are the memory that workers wrote to, which is used again when nobody
    refers to them any more; a loop that keeps batches gets copies, and a warning. ``reuse="next"`` is for a
    loop that promises not to look at a batch once it asks for the next one.

    ``device`` copies batches to a device. ``pin_memory`` puts batches into page-locked memory if there is a
    device that copies from it, and such copies run while this process does not wait. ``transfer="stored"``
    copies stored voxels where those are smaller than values, which are then computed on the device.

    ``contiguous=`` has no effect any more.

    >>> import numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> from zpatch.images.subject import Subject
    >>> from zpatch.sampling.grid_sampler import GridSampler
    >>> grid = GridSampler(Subject(t1=ScalarImage(np.zeros((8, 8, 12)))), patch_size=4)
    >>> [tuple(batch.t1.data.shape) for batch in SubjectsLoader(grid, batch_size=5)]
    [(5, 1, 4, 4, 4), (5, 1, 4, 4, 4), (2, 1, 4, 4, 4)]
    """

    def __init__(
        self,
        dataset: Iterable[Patch],
        batch_size: int = 1,
        *,
        drop_last: bool = False,
        pin_memory: bool = False,
        device: torch.device | str | None = None,
        reuse: Reuse = "unused",
        transfer: Transfer = "values",
        contiguous: bool | None = None,
    ) -> None:
        if contiguous is not None:
            warnings.warn(
                "contiguous= has no effect: batches are contiguous", DeprecationWarning, stacklevel=2
            )
        if isinstance(dataset, Subject | str | os.PathLike) or _gives_subjects(dataset):
            raise OptionError(
                f"a SubjectsLoader makes batches of the patches of a queue or a grid, not of {dataset!r}; "
                f"say SubjectsLoader(Queue(subjects, patch_sampler), batch_size={batch_size})"
            )
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, not {batch_size}")
        _check_choices(dataset, reuse, transfer)
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
        self.reuse, self.transfer = reuse, transfer
        self._has_warned = False
        self._streams = CudaStreams(self.device) if pin_memory and torch.cuda.is_available() else None
        if isinstance(dataset, Queue):
            dataset.batch_size = batch_size

    def __len__(self) -> int:
        patches = len(cast(Sized, self.dataset))
        return patches // self.batch_size if self.drop_last else -(-patches // self.batch_size)

    def __iter__(self) -> Iterator[PatchBatch]:
        return self._of_queue(self.dataset) if isinstance(self.dataset, Queue) else self._of_patches()

    def _of_queue(self, queue: Queue) -> Iterator[PatchBatch]:
        """The batches that workers wrote."""
        is_stored = self.transfer == "stored"
        for filled in queue.iter_batches(
            self.batch_size, drop_last=self.drop_last, sends_stored=is_stored, streams=self._streams
        ):
            made = [self._batch_of(filled, queue.dtype if is_stored else None)]
            if self.reuse == "unused":
                del filled
            yield made.pop()  # from here on only the caller refers to it
            if self.reuse == "next":
                filled.release()

    def _batch_of(self, filled: FilledBatch, pending_dtype: torch.dtype | None) -> PatchBatch:
        batch = None
        if self._streams is not None and self.device is not None:
            batch = streamed(filled, self._streams)
        if batch is None:
            batch = self._placed(self._viewed(filled))
        return with_values(batch, pending_dtype)

    def _viewed(self, filled: FilledBatch) -> PatchBatch:
        if self.reuse == "next" or not filled.slots_are_short:
            return filled.view()
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the loop refers to more than {HANDED_OUT} batches, so that it gets copies; drop those that "
                f"it needs no more, or promise not to look at them: reuse='next'",
                stacklevel=3,
            )
        return filled.copy()

    def _of_patches(self) -> Iterator[PatchBatch]:
        """The batches of other patches, each copied once."""
        patches = iter(self.dataset)
        while True:
            batch = stack(patches, self.batch_size, self._new_memory)
            if batch.batch_size < (self.batch_size if self.drop_last else 1):
                return
            yield self._placed(batch)

    def _new_memory(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        if self.pin_memory:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return new_memory(shape, dtype=dtype)

    def _placed(self, batch: PatchBatch) -> PatchBatch:
        if self.device is None:
            return batch
        return batch.to(self.device, non_blocking=self.pin_memory)

    def state_dict(self) -> dict[str, Any]:
        """Where the queue's stream is: after the batches that were given."""
        return cast(Queue, self.dataset).state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration resume where the queue of another loader was."""
        cast(Queue, self.dataset).load_state_dict(state)


def _check_choices(dataset: Any, reuse: str, transfer: str) -> None:
    """Refuse unknown choices, and those that only batches of a queue have."""
    for name, chosen, choices in (("reuse", reuse, Reuse), ("transfer", transfer, Transfer)):
        first, *others = get_args(choices)
        if chosen not in (first, *others):
            raise OptionError(f"{name} must be one of {', '.join([first, *others])}, not {chosen!r}")
        if chosen != first and not isinstance(dataset, Queue):
            raise OptionError(f"{name}={chosen!r} is for batches of a Queue, not of {dataset!r:.80}")


def _gives_subjects(dataset: Any) -> bool:
    """Whether it is a sequence of subjects, as a cohort is, instead of one of patches."""
    is_sequence = isinstance(dataset, Sequence)
    return is_sequence and len(dataset) > 0 and isinstance(dataset[0], Subject)


def _can_pin() -> bool:
    """Whether there is a device that copies from page-locked memory; Apple's do not."""
    return torch.cuda.is_available() or torch.xpu.is_available()
