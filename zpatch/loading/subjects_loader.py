"""Batches of patches for a training loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, cast, runtime_checkable

import torch

from zpatch.errors import OptionError
from zpatch.images.subject import Subject
from zpatch.runtime import buffer_pool
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_batch import PatchBatch, stack


@runtime_checkable
class PatchStream(Protocol):
    """A dataset whose patches are views of shared memory, and that can be resumed: a queue."""

    @property
    def pending_dtype(self) -> torch.dtype | None:
        """The type of values that shared patches still have to be converted to, if any."""

    def iter_shared(self) -> Iterator[Patch]:
        """Patches that are each valid until the next one is asked for."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where another stream was."""


class SubjectsLoader:
    """Batches from a queue, a grid sampler, or any other iterable of patches.

    ``batch.t1.data`` is (B, C, I, J, K), contiguous; ``contiguous=`` has no effect any more. ``drop_last``
    leaves out a last batch that is not full. ``pin_memory`` puts batches into page-locked memory if there
    is a device that copies from it. ``device`` copies batches to a device, without waiting for the copy
    if the memory is pinned. ``state_dict`` and ``load_state_dict`` are those of the queue, between two
    batches.

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

    def __len__(self) -> int:
        patches = len(cast(Sized, self.dataset))
        return patches // self.batch_size if self.drop_last else -(-patches // self.batch_size)

    def __iter__(self) -> Iterator[PatchBatch]:
        dtype = None
        if isinstance(self.dataset, PatchStream):  # each patch is copied once, into its batch
            patches, dtype = self.dataset.iter_shared(), self.dataset.pending_dtype
        else:
            patches = iter(self.dataset)
        while True:
            batch = stack(patches, self.batch_size, self._new_memory, dtype)
            if batch.batch_size < (self.batch_size if self.drop_last else 1):
                return
            yield self._placed(batch)

    def _new_memory(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        if self.pin_memory or dtype == torch.bfloat16:
            return torch.empty(shape, dtype=dtype, pin_memory=self.pin_memory)
        return torch.from_numpy(buffer_pool.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))

    def _placed(self, batch: PatchBatch) -> PatchBatch:
        if self.device is None:
            return batch
        return batch.map_data(lambda data: data.to(self.device, non_blocking=self.pin_memory))

    def state_dict(self) -> dict[str, Any]:
        """Where the queue's stream is: after the batches that were given."""
        return cast(PatchStream, self.dataset).state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration resume where the queue of another loader was."""
        cast(PatchStream, self.dataset).load_state_dict(state)


def _gives_subjects(dataset: Any) -> bool:
    """Whether it is a sequence of subjects, as a cohort is, instead of one of patches."""
    is_sequence = isinstance(dataset, Sequence)
    return is_sequence and len(dataset) > 0 and isinstance(dataset[0], Subject)


def _can_pin() -> bool:
    """Whether there is a device that copies from page-locked memory; Apple's do not."""
    return torch.cuda.is_available() or torch.xpu.is_available()
