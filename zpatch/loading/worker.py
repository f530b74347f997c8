"""A worker of the queue: it gets a draw, and writes each patch to its place in a batch, in shared memory."""

from __future__ import annotations

import contextlib
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from zpatch.epochs.epoch_plan import Draw
from zpatch.errors import QueueError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation
from zpatch.loading.draw_reader import DrawReader, FailedDraw
from zpatch.loading.queue_stats import WorkerRow
from zpatch.loading.shared_slots import SharedPickle, SlotBlock, SlotLayout, new_memory
from zpatch.runtime.tasks import end_with_parent
from zpatch.sampling.patch import Patch


class Target(NamedTuple):
    """Where a patch is written: a row of a batch, by the batch's number and by its slot, if it has one."""

    batch: int
    row: int
    slot: int | None


@dataclass(frozen=True, slots=True)
class Task:
    """A draw, and a target for each of its patches. ``serial`` is the number of the run that it is of."""

    serial: int
    draw: Draw
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Delivered:
    """A patch that was written to its target.

    ``layout`` places its images in the slot; ``affines`` has an affine for each. A patch that goes into no
    slot is sent as ``arrays``, one for each image.
    """

    subject: str
    location: PatchLocation
    layout: SlotLayout
    affines: Sequence[Affine]
    arrays: Sequence[NDArray[Any]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its images."""
        return sum(place.nbytes for place in self.layout.images)


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker returns for a task: a patch for each of its targets, or why it failed, and when."""

    task: Task
    patches: Sequence[Delivered] = ()
    failure: FailedDraw | None = None
    done_ns: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """Where the images of a patch are written: a slot, or memory from which they are sent."""

    layout: SlotLayout
    tensors: Sequence[torch.Tensor]
    in_slot: bool

    def delivered(self, subject: str, location: PatchLocation, affines: Sequence[Affine]) -> Delivered:
        """What is sent of the patch."""
        arrays = None if self.in_slot else [packed(tensor) for tensor in self.tensors]
        return Delivered(subject, location, self.layout, affines, arrays)


class Worker(Dataset[Any]):
    """The dataset of torch's DataLoader whose workers these are: its items are done tasks.

    Each worker process gets a copy as it starts, and writes patches to the slots of ``block``. Without
    workers the queue does its tasks itself.
    """

    def __init__(self, reader: DrawReader, block: SlotBlock) -> None:
        self._reader = reader
        self._block = block
        self._pickle: SharedPickle | None = None

    def __getitem__(self, task: Task) -> Result:
        """Do a task."""
        worker = get_worker_info()
        with WorkerRow(self._block.watched, worker.id if worker else 0).task(task.draw.subject):
            try:
                return Result(task, self._delivered(task), done_ns=time.monotonic_ns())
            except (Exception, SystemExit) as error:  # it must reach the caller with its subject
                name = self._reader.name_of(task.draw.subject)
                return Result(task, failure=FailedDraw.of(task.draw, name, error))

    def _delivered(self, task: Task) -> list[Delivered]:
        reader = self._reader
        if reader.transform is not None:
            return [
                self._copied(patch, target)
                for patch, target in zip(reader.patches(task.draw), task.targets, strict=True)
            ]
        subject = reader.subjects[task.draw.subject]
        layout, locations = reader.layout_of(subject), reader.locations(subject, task.draw)
        placed = self._block.placed(layout)
        memory = [self._memory(target, layout, placed) for target in task.targets]
        affines = reader.read(subject, layout, locations, [*zip(*(of.tensors for of in memory), strict=True)])
        return [
            patch.delivered(subject.name, location, of)
            for patch, location, of in zip(memory, locations, affines, strict=True)
        ]

    def _copied(self, patch: Patch, target: Target) -> Delivered:
        layout, images = SlotLayout.of_patch(patch), patch.images.values()
        memory = self._memory(target, layout, self._block.placed(layout))
        for tensor, image in zip(memory.tensors, images, strict=True):
            tensor.copy_(image.data.detach())
        return memory.delivered(patch.subject, patch.location, [image.affine for image in images])

    def _memory(self, target: Target, layout: SlotLayout, placed: SlotLayout | None) -> _Memory:
        """The memory for a patch of a layout, ``placed`` in a slot if it goes into one."""
        if target.slot is None or placed is None:
            return _Memory(
                layout, [new_memory(place.shape, dtype=place.dtype) for place in layout.images], in_slot=False
            )
        tensors = [self._block.tensor(target.slot, target.row, place) for place in placed.images]
        return _Memory(placed, tensors, in_slot=True)

    @contextlib.contextmanager
    def pickled_once(self) -> Iterator[None]:
        """Pickle the reader once, for all workers that are started inside; each opens the file of the pickle.

        A QueueError if it cannot be pickled.
        """
        try:
            self._pickle = SharedPickle(self._reader)
        except (AttributeError, TypeError, RuntimeError, pickle.PicklingError) as error:
            raise QueueError(
                f"subjects, sampler or transform cannot be sent to a worker ({error}); define them at the "
                f"top of a module, or use start_method='fork'"
            ) from error
        try:
            yield
        finally:
            self._pickle = None

    def __getstate__(self) -> tuple[SharedPickle, SlotBlock]:
        assert self._pickle is not None
        return self._pickle, self._block

    def __setstate__(self, state: tuple[SharedPickle, SlotBlock]) -> None:
        shared, block = state
        self.__init__(shared.read(), block)  # type: ignore[misc]


def start_worker(worker: int) -> None:
    """Let a worker end with its parent, however that ends, and ignore Ctrl-C, which the parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def packed(data: torch.Tensor) -> NDArray[Any]:
    """A tensor as a worker sends it: as an array, which takes neither file descriptor nor thread."""
    data = data.detach().contiguous()
    return (data.view(torch.int16) if data.dtype == torch.bfloat16 else data).numpy()


def unpacked(data: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that was sent as an array."""
    tensor = torch.from_numpy(data)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor
