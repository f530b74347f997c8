"""Memory that the queue and its workers share: one block of slots, with one batch in each.

A worker writes each patch where its batch wants it; only numbers and layouts are sent between processes. The
block is a file without a name: it is freed with the last process that has it open, however that process ends.
So is the pickle from which workers get their reader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import mmap
import os
import pickle
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.errors import QueueError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation
from zpatch.records.image_record import Kind
from zpatch.runtime import buffer_pool
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch import Patch, PatchImage

ALIGNMENT = 64
WATCH_BYTES = 2**15  # before the slots: what workers and training count
ROW = 16  # numbers of each
MOST_WORKERS = WATCH_BYTES // (8 * ROW) - 1

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """An image of a patch, and the ``offset`` in a slot of the image of the slot's first patch.

    ``shape`` is (C, I, J, K), with memory in this order. A transform may give another number of axes. Values
    are ``slope * voxel + inter``.
    """

    name: str
    kind: Kind
    shape: Shape
    dtype: torch.dtype
    slope: float = 1.0
    inter: float = 0.0
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the image."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The images of a slot, one after the other; each is a row of ``rows`` patches without gaps."""

    images: tuple[ImagePlace, ...]
    rows: int = 1

    @classmethod
    def of(cls, images: Sequence[ImagePlace], rows: int = 1) -> SlotLayout:
        """The images one after the other, in order."""
        places: list[ImagePlace] = []
        offset = 0
        for image in images:
            places.append(dataclasses.replace(image, offset=offset))
            offset += _aligned(rows * image.nbytes)
        return cls(tuple(places), rows)

    def with_rows(self, rows: int) -> SlotLayout:
        """The layout of a slot of so many patches."""
        return self if rows == self.rows else SlotLayout.of(self.images, rows)

    def is_alike(self, other: SlotLayout) -> bool:
        """Whether patches of both go into one batch: they differ at most in slope and intercept."""
        mine, others = (
            [(place.name, place.kind, place.shape, place.dtype) for place in layout.images]
            for layout in (self, other)
        )
        return mine == others

    @classmethod
    def of_patch(cls, patch: Patch) -> SlotLayout:
        """The layout of an existing patch."""
        return cls.of(
            [
                ImagePlace(name, i.kind, tuple(i.data.shape), i.data.dtype, i.slope, i.inter)
                for name, i in patch.images.items()
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        return sum(_aligned(self.rows * place.nbytes) for place in self.images)

    def patch(
        self,
        tensors: Sequence[torch.Tensor],
        affines: Sequence[Affine],
        location: PatchLocation,
        subject: str,
    ) -> Patch:
        """The patch made of a tensor and an affine for each image."""
        images = {
            place.name: PatchImage(tensor, affine, place.kind, place.slope, place.inter)
            for place, tensor, affine in zip(self.images, tensors, affines, strict=True)
        }
        return Patch(images, location, subject)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class NamelessFile:
    """A file without a name, in memory if the system has such files.

    It can be sent to a process as that starts, forked or not.
    """

    def __init__(self, nbytes: int) -> None:
        self.handle = _new_file(nbytes)

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.handle)

    def __setstate__(self, state: Any) -> None:
        self.handle = state.detach()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.handle)


class SharedPickle:
    """An object that several processes get as they start, pickled once into a nameless file.

    Python writes the arguments of a new process to a pipe. It waits forever if there is more than a pipe can
    hold, 64 KiB, and the process dies before it has read them. Of this object only a file descriptor is sent.
    """

    def __init__(self, content: Any) -> None:
        pickled = pickle.dumps(content)
        self._file = NamelessFile(len(pickled))
        with mmap.mmap(self._file.handle, len(pickled)) as written:
            written[:] = pickled

    def read(self) -> Any:
        """A copy of the object."""
        with mmap.mmap(self._file.handle, 0, access=mmap.ACCESS_READ) as written:
            return pickle.loads(written)


class SlotBlock:
    """``count`` slots in shared memory, each of the size of a ``layout``.

    ``watched`` has a row for each worker: its process, 1 + the subject that it is reading, or 0, and what
    it counts; the last row is that of training. See ``queue_stats``.
    A block can be sent to a process as that starts, forked or not; one that is not ``shared`` cannot.
    """

    def __init__(self, count: int, layout: SlotLayout, *, shared: bool = True) -> None:
        nbytes = WATCH_BYTES + count * layout.nbytes
        try:
            self._open(NamelessFile(nbytes) if shared else None, count, layout)
        except (OSError, OverflowError) as error:
            number, reason = getattr(error, "errno", errno.ENOMEM), getattr(error, "strerror", error)
            full = number in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
            advice = "use a smaller max_length or patch_size" if full else "num_workers=0 needs none"
            raise QueueError(
                f"the queue's {format_bytes(nbytes)} of shared memory cannot be allocated ({reason}); "
                f"{advice}"
            ) from error

    def _open(self, file: NamelessFile | None, count: int, layout: SlotLayout) -> None:
        self.count, self.layout = count, layout
        self._file = file
        if file is None:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = mmap.mmap(file.handle, self.nbytes)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.watched: NDArray[np.int64] = self.bytes[:WATCH_BYTES].view(np.int64).reshape(-1, ROW)

    @property
    def nbytes(self) -> int:
        """Size of the whole block."""
        return WATCH_BYTES + self.count * self.layout.nbytes

    def __getstate__(self) -> tuple[NamelessFile | None, int, SlotLayout]:
        return self._file, self.count, self.layout

    def __setstate__(self, state: tuple[NamelessFile | None, int, SlotLayout]) -> None:
        self._open(*state)

    def placed(self, layout: SlotLayout) -> SlotLayout | None:
        """The layout of a slot with a patch of some layout in it; None if the patch goes into none.

        A slot of one patch takes any that is no larger, a slot of several only those that make one batch.
        """
        if self.layout.rows == 1:
            return layout if layout.nbytes <= self.layout.nbytes else None
        return layout.with_rows(self.layout.rows) if layout.is_alike(self.layout) else None

    def tensor(self, slot: int, row: int, place: ImagePlace) -> torch.Tensor:
        """An image of patch ``row`` of a slot, (C, I, J, K), as a view of the memory."""
        start = WATCH_BYTES + slot * self.layout.nbytes + place.offset + row * place.nbytes
        return _viewed(self.bytes[start : start + place.nbytes], place.shape, place.dtype)

    def slot_bytes(self, slot: int) -> torch.Tensor:
        """The bytes of a slot."""
        start = WATCH_BYTES + slot * self.layout.nbytes
        return torch.from_numpy(self.bytes[start : start + self.layout.nbytes])

    def leased_tensor(self, slot: int, count: int, place: ImagePlace, lease: SlotLease) -> torch.Tensor:
        """An image of the first ``count`` patches of a slot, (count, C, I, J, K), which keeps a lease."""
        start = WATCH_BYTES + slot * self.layout.nbytes + place.offset
        memory = np.asarray(_Leased(self.bytes[start : start + count * place.nbytes], lease))
        return _viewed(memory, (count, *place.shape), place.dtype)


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Whether the work before it is done."""
        ...


class ReturnedSlots:
    """Slots whose leases ended, in that order.

    With an ``event``, which gives the end of the work that a device was given, a slot is kept until that is
    done: it may be copied from.
    """

    def __init__(self) -> None:
        self.event: Callable[[], Event] | None = None
        self._slots: deque[tuple[int, Event | None]] = deque()
        self._process = os.getpid()

    def append(self, slot: int) -> None:
        """Add a slot; called by the thread that drops the last tensor, whichever it is."""
        if os.getpid() == self._process:  # a forked process must not touch the device
            self._slots.append((slot, None if self.event is None else self.event()))

    def take(self) -> Iterator[int]:
        """The slots that may be used again."""
        while self._slots and ((event := self._slots[0][1]) is None or event.query()):
            yield self._slots.popleft()[0]


class SlotLease:
    """Keeps a slot from being used again, until it is ended or no longer referred to."""

    __slots__ = ("_returned", "_slot")

    def __init__(self, slot: int, returned: ReturnedSlots) -> None:
        self._slot: int | None = slot
        self._returned = returned

    def end(self) -> None:
        """Let the slot be used again."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self._returned.append(slot)

    __del__ = end


class _Leased:
    """Memory of a slot; arrays that view it keep its lease."""

    __slots__ = ("__array_interface__", "_lease", "_memory")

    def __init__(self, memory: NDArray[np.uint8], lease: SlotLease) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._lease = memory, lease


def _viewed(memory: NDArray[np.uint8], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as a tensor."""
    if not len(memory):
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(memory).view(dtype).reshape(shape)


def new_memory(shape: Shape, *, dtype: torch.dtype) -> torch.Tensor:
    """A new contiguous tensor with arbitrary contents, in memory that is reused when it is dropped."""
    if dtype == torch.bfloat16:  # numpy has no such type
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(buffer_pool.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))


def copied(patch: Patch) -> Patch:
    """A copy of a patch in newly allocated memory, without the gradient of a transform."""
    images = {}
    for place, image in zip(SlotLayout.of_patch(patch).images, patch.images.values(), strict=True):
        images[place.name] = dataclasses.replace(
            image, data=new_memory(place.shape, dtype=place.dtype).copy_(image.data.detach())
        )
    return Patch(images, patch.location, patch.subject)


def _new_file(nbytes: int) -> int:
    """The descriptor of a new file without a name."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # which says at once that a disk is full
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                os.ftruncate(file.fileno(), nbytes)
            return os.dup(file.fileno())
    handle = os.memfd_create("zpatch-queue", os.MFD_CLOEXEC)
    try:
        os.ftruncate(handle, nbytes)
    except (OSError, OverflowError):
        os.close(handle)
        raise
    return handle
