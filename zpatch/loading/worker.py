"""A worker of the queue: it gets a draw, and writes the transformed patches to slots of shared memory."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from zpatch.epochs.epoch_plan import Draw
from zpatch.errors import QueueError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation
from zpatch.loading.draw_reader import DrawReader
from zpatch.loading.shared_slots import SharedPickle, SlotBlock, SlotLayout
from zpatch.runtime.tasks import end_with_parent
from zpatch.sampling.patch import Patch


@dataclass(frozen=True, slots=True)
class Task:
    """A draw, and the slots for its patches. ``serial`` is the number of the feed's run that it is of."""

    serial: int
    draw: Draw
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Delivered:
    """A patch in its slot.

    ``layout`` places its images in the slot; ``affines`` has an affine for each. A patch that does not fit
    into the slot is sent as ``arrays``, one for each image.
    """

    subject: str
    location: PatchLocation
    layout: SlotLayout
    affines: Sequence[Affine]
    arrays: Sequence[NDArray[Any]] | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a worker returns for a task: a patch for each of its slots."""

    task: Task
    patches: Sequence[Delivered]


class WorkerTraceback(Exception):  # noqa: N818 - it is the text of a traceback
    """The traceback of an error in a worker: the cause of the error that the caller gets."""


@dataclass(frozen=True, slots=True)
class FailedDraw:
    """What a worker returns for a task that failed: the name of the subject, why, and the traceback."""

    task: Task
    subject: str
    reason: str
    traceback: str

    @classmethod
    def of(cls, task: Task, subject: str, error: BaseException) -> FailedDraw:
        """The failure of a task by an error, with the notes of the error."""
        reason = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        return cls(task, subject, reason, "".join(traceback.format_exception(error)))

    def error(self) -> QueueError:
        """The failure as an error, whose cause has the traceback."""
        error = QueueError(f"subject {self.subject!r} failed in epoch {self.task.draw.epoch}: {self.reason}")
        error.__cause__ = WorkerTraceback(f"\n\n{self.traceback}")
        return error


class Worker(Dataset[Any]):
    """The dataset of torch's DataLoader whose workers these are: its items are done tasks.

    Each worker process gets a copy as it starts, and writes patches to the slots of ``block``.
    """

    def __init__(self, reader: DrawReader, block: SlotBlock) -> None:
        self._reader = reader
        self._block = block
        self._pickle: SharedPickle | None = None

    def __getitem__(self, task: Task) -> Delivery | FailedDraw:
        """Do a task in a worker process."""
        worker = get_worker_info()
        number = worker.id if worker else 0
        self._block.watched[2 * number : 2 * number + 2] = os.getpid(), task.draw.subject + 1
        try:
            return Delivery(task, self._delivered(task))
        except (Exception, SystemExit) as error:  # whatever it is, it must reach the caller with its subject
            return FailedDraw.of(task, self._reader.name_of(task.draw.subject), error)
        finally:
            self._block.watched[2 * number + 1] = 0

    def _delivered(self, task: Task) -> list[Delivered]:
        reader, block = self._reader, self._block
        subject = reader.subjects[task.draw.subject]
        layout = reader.layout_of(subject)
        if reader.transform is None and layout.nbytes <= block.slot_bytes:
            locations = reader.locations(subject, task.draw)
            outs = [[block.tensor(slot, place) for slot in task.slots] for place in layout.images]
            affines = reader.read(subject, layout, locations, outs)
            return [
                Delivered(subject.name, at, layout, of) for at, of in zip(locations, affines, strict=True)
            ]
        return [
            self._sent(patch, slot) for patch, slot in zip(reader.patches(task.draw), task.slots, strict=True)
        ]

    def _sent(self, patch: Patch, slot: int) -> Delivered:
        layout, images = SlotLayout.of_patch(patch), patch.images.values()
        arrays = None
        if layout.nbytes <= self._block.slot_bytes:
            for place, image in zip(layout.images, images, strict=True):
                self._block.tensor(slot, place).copy_(image.data.detach())
        else:
            arrays = [packed(image.data) for image in images]
        affines = [image.affine for image in images]
        return Delivered(patch.subject, patch.location, layout, affines, arrays)

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
