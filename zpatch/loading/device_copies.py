"""Batches on a GPU: one asynchronous copy each, straight from the memory that workers wrote to.

That memory is page-locked in one piece (``cudaHostRegister``), and a slot is used again when the copies from
it are done.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from zpatch.loading.batch_slots import FilledBatch
from zpatch.loading.shared_slots import Event, ImagePlace, SlotBlock
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch import PatchImage
from zpatch.sampling.patch_batch import PatchBatch


class Streams(Protocol):
    """What is needed of a device; ``CudaStreams`` is that of CUDA."""

    def page_lock(self, memory: torch.Tensor) -> int:
        """Page-lock memory; the number of the error, or 0."""
        ...

    def release(self, memory: torch.Tensor) -> None:
        """Undo ``page_lock``."""

    def event(self) -> Event:
        """The end of the work that the current stream has been given."""
        ...

    def beside(self) -> AbstractContextManager[Any]:
        """A context in which the current stream is one for copies."""
        ...

    def copy(self, memory: torch.Tensor) -> torch.Tensor:
        """Memory on the device, to which the current stream copies some memory without waiting."""
        ...

    def join(self, moved: torch.Tensor) -> None:
        """Let the current stream wait for the stream for copies, and use what was copied."""


class CudaStreams:
    """The streams of a CUDA device."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._copies: Any = None

    def page_lock(self, memory: torch.Tensor) -> int:
        """Page-lock memory; the number of the error, or 0."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        return int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))

    def release(self, memory: torch.Tensor) -> None:
        """Undo ``page_lock``."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostUnregister(memory.data_ptr())

    def event(self) -> Event:
        """The end of the work that the current stream has been given."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def beside(self) -> AbstractContextManager[Any]:
        """A context in which the current stream is one for copies."""
        if self._copies is None:
            self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._copies)

    def copy(self, memory: torch.Tensor) -> torch.Tensor:
        """Memory on the device, to which the current stream copies some memory without waiting."""
        return memory.to(self._device, non_blocking=True)

    def join(self, moved: torch.Tensor) -> None:
        """Let the current stream wait for the stream for copies, and use what was copied."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        moved.record_stream(current)


def page_lock(block: SlotBlock, streams: Streams) -> bool:
    """Page-lock the memory of a block for as long as it is mapped; whether that was possible.

    A warning says why where it was not, as under a limit of the system.
    """
    memory = torch.from_numpy(block.bytes)
    error = streams.page_lock(memory)
    if error:
        warnings.warn(
            f"the queue's {format_bytes(block.nbytes)} cannot be page-locked (CUDA's error {error}), so that "
            f"copies to the device wait; see `ulimit -l`",
            stacklevel=2,
        )
        return False
    weakref.finalize(block, streams.release, memory)
    return True


def streamed(filled: FilledBatch, streams: Streams) -> PatchBatch | None:
    """The batch on a device, in one copy that the current stream waits for, and this process does not.

    None if its patches are not all in its slot.
    """
    memory = filled.memory()
    if memory is None:
        return None
    with streams.beside():
        moved = streams.copy(memory)
        filled.release()  # the slot is used again after the work of this stream
    streams.join(moved)
    return filled.with_tensors([_part(moved, place, len(filled)) for place in filled.places])


def with_values(batch: PatchBatch, dtype: torch.dtype | None) -> PatchBatch:
    """The batch with values in place of stored voxels, computed where they are: ``slope * voxel + inter``.

    Without a ``dtype`` stored voxels are what was asked for.
    """
    if dtype is None:
        return batch
    images = {name: _with_values(image, dtype) for name, image in batch.images.items()}
    return PatchBatch(images, batch.patch_location, batch.subjects)


def _with_values(image: PatchImage, dtype: torch.dtype) -> PatchImage:
    if image.kind == "label" or image.data.is_complex() or image.data.dtype == dtype:
        return image
    values = image.data.to(dtype)
    shape = -1, *[1] * (values.ndim - 1)
    slope, inter = (
        torch.from_numpy(numbers).to(values.device, dtype).reshape(shape)
        for numbers in (image.slope, image.inter)
    )
    if np.any(image.slope != 1) or np.any(image.inter != 0):
        values.mul_(slope).add_(inter)
    return PatchImage(values, image.affine, image.kind, np.ones_like(image.slope), np.zeros_like(image.inter))


def _part(memory: torch.Tensor, place: ImagePlace, rows: int) -> torch.Tensor:
    """An image of a batch in the memory of its slot."""
    data = memory[place.offset : place.offset + rows * place.nbytes]
    return data.view(place.dtype).reshape(rows, *place.shape)
