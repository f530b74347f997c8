"""Memory that the queue and its workers share: one block of slots, with one patch in each.

A worker writes voxels where the training process reads them; only numbers and layouts are sent between them.
The block is a file without a name: it is freed with the last process that has it open, however that process
ends. So is the pickle from which workers get their reader.
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
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.errors import QueueError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.runtime import buffer_pool
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch import Patch, PatchImage
from zpatch.store.image_record import Kind

ALIGNMENT = 64
WATCH_BYTES = 4096  # before the slots: process and subject of each worker

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """An image of a patch, and the ``offset`` of its first byte in a slot.

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
        """Bytes of the image in a slot, rounded up to the alignment."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def of_size(self, size: Triple) -> ImagePlace:
        """The image in a patch of another size, not placed in a slot."""
        shape = (self.shape[0], *size)
        return self if self.shape == shape else dataclasses.replace(self, shape=shape)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The images of a patch, one after the other in a slot."""

    images: tuple[ImagePlace, ...]

    @classmethod
    def of(cls, images: Sequence[ImagePlace]) -> SlotLayout:
        """The images one after the other, in order."""
        places: list[ImagePlace] = []
        offset = 0
        for image in images:
            places.append(dataclasses.replace(image, offset=offset))
            offset += image.nbytes
        return cls(tuple(places))

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
        """Bytes of a patch in a slot."""
        return sum(place.nbytes for place in self.images)

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
    """``count`` slots of ``slot_bytes`` each in shared memory.

    ``watched`` has two numbers for each worker: its process, and 1 + the subject that it is reading, or 0.
    A block can be sent to a process as that starts, forked or not.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        nbytes = WATCH_BYTES + count * slot_bytes
        try:
            self._open(NamelessFile(nbytes), count, slot_bytes)
        except (OSError, OverflowError) as error:
            number, reason = getattr(error, "errno", errno.ENOMEM), getattr(error, "strerror", error)
            full = number in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
            advice = "use a smaller max_length or patch_size" if full else "num_workers=0 needs none"
            raise QueueError(
                f"the queue's {format_bytes(nbytes)} of shared memory cannot be allocated ({reason}); "
                f"{advice}"
            ) from error

    def _open(self, file: NamelessFile, count: int, slot_bytes: int) -> None:
        self.count, self.slot_bytes = count, slot_bytes
        self._file = file
        self._map = mmap.mmap(file.handle, self.nbytes)
        self.watched: NDArray[np.int64] = np.frombuffer(self._map, np.int64, WATCH_BYTES // 8)

    @property
    def nbytes(self) -> int:
        """Size of the whole block."""
        return WATCH_BYTES + self.count * self.slot_bytes

    def __getstate__(self) -> tuple[NamelessFile, int, int]:
        return self._file, self.count, self.slot_bytes

    def __setstate__(self, state: tuple[NamelessFile, int, int]) -> None:
        self._open(*state)

    def tensor(self, slot: int, place: ImagePlace) -> torch.Tensor:
        """An image of a slot, (C, I, J, K), as a view of the shared memory."""
        voxels = math.prod(place.shape)
        if not voxels:
            return torch.empty(place.shape, dtype=place.dtype)
        start = WATCH_BYTES + slot * self.slot_bytes + place.offset
        flat = torch.frombuffer(self._map, dtype=place.dtype, count=voxels, offset=start)
        return flat.reshape(place.shape)


def new_tensor(place: ImagePlace) -> torch.Tensor:
    """Newly allocated memory for an image, (C, I, J, K), with arbitrary contents."""
    if place.dtype == torch.bfloat16:  # numpy has no such type
        return torch.empty(place.shape, dtype=place.dtype)
    dtype = torch.empty(0, dtype=place.dtype).numpy().dtype
    return torch.from_numpy(buffer_pool.empty(place.shape, dtype))


def copied(patch: Patch, dtype: torch.dtype | None) -> Patch:
    """A copy of a patch in newly allocated memory, with values of type ``dtype``, if one is given."""
    images = {}
    for place, image in zip(SlotLayout.of_patch(patch).images, patch.images.values(), strict=True):
        if dtype is not None and image.is_pending(dtype):
            place = dataclasses.replace(place, dtype=dtype, slope=1.0, inter=0.0)
        tensor = new_tensor(place)
        image.write_values(tensor, dtype)
        images[place.name] = PatchImage(tensor, image.affine, image.kind, place.slope, place.inter)
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
