"""Shared by the tests of the queue: a stream as values, and transforms that any worker can import.

Nothing here needs pytest, so that a worker that is spawned starts quickly.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import dask.array as da
import nibabel as nib
import numpy as np
import torch
import zarr
from zarr.codecs import GzipCodec

import zpatch as zp
from zpatch.loading.shared_slots import ImagePlace, SharedPickle, SlotBlock, SlotLayout
from zpatch.sampling.patch_sampler import PatchSampler, RandomSampler

START_METHODS = ["fork", "spawn", "forkserver"]

# A patch as values: its subject and place, and of each image its name, type, shape, scale, affine and voxels.
Item = tuple[str, tuple[int, int, int], tuple[Any, ...]]


def item(patch: zp.Patch) -> Item:
    """All of a patch, to compare it with another one."""
    images = tuple(
        (
            name,
            image.kind,
            str(image.data.dtype),
            tuple(image.data.shape),
            (float(image.slope), float(image.inter)),
            np.asarray(image.affine).tobytes(),
            voxel_bytes(image.data),
        )
        for name, image in patch.images.items()
    )
    return patch.subject, patch.location.index, images


def voxel_bytes(data: torch.Tensor) -> bytes:
    """The voxels of a tensor in the order of its axes."""
    flat = data.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def items(patches: Iterable[zp.Patch]) -> list[Item]:
    return [item(patch) for patch in patches]


def stream(
    subjects: Sequence[zp.Subject],
    sampler: PatchSampler | None = None,
    epochs: Sequence[int] = (0,),
    **options: Any,
) -> list[Item]:
    """All patches of some epochs, as values."""
    with zp.Queue(subjects, zp.UniformSampler(12) if sampler is None else sampler, **options) as queue:
        found = []
        for epoch in epochs:
            queue.set_epoch(epoch)
            found += items(queue)
    return found


def small_subjects(count: int, *, size: int = 12, dtype: Any = np.int16) -> list[zp.Subject]:
    """Subjects sub-00, sub-01, ... in memory, no voxel like another one nearby."""
    voxels = np.arange(size**3).reshape(size, size, size)
    return [
        zp.Subject(
            name=f"sub-{number:02}",
            t1=zp.ScalarImage((voxels + 31 * number).astype(dtype)),
            seg=zp.LabelMap((voxels // (number + 2) % 3).astype(np.uint8)),
        )
        for number in range(count)
    ]


def stop_forkserver() -> None:
    """End the process that Python keeps for the next one to be forked."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def subjects_of_all_kinds(folder: Path) -> list[zp.Subject]:
    """A subject from each source of voxels and of each type, all of one size."""
    shape = (14, 15, 16)
    voxels = np.random.default_rng(5).integers(0, 200, shape)
    channels = np.stack([voxels, voxels + 1000]).astype(np.int16)
    images: dict[str, Any] = {"channels": zp.ScalarImage(channels)}  # first, as the largest
    images |= {
        name: zp.ScalarImage(voxels.astype(name))
        for name in ("bool", "uint8", "int8", "uint16", "int32", "uint32", "float16", "float32", "float64")
    }
    header = nib.Nifti1Image(voxels.astype(np.int16), np.diag([2, 3, 4, 1]))
    header.header.set_slope_inter(0.5, -7)
    nib.save(header, folder / "scaled.nii")
    array = zarr.create_array(folder / "gzip.zarr", data=voxels.astype(np.float32), compressors=GzipCodec())
    int16 = images["int16"] = zp.ScalarImage(voxels.astype(np.int16))
    images |= {
        "complex64": zp.ScalarImage((voxels + 2j).astype(np.complex64)),
        "big-endian": zp.ScalarImage(voxels.astype(">i2")),
        "nifti": zp.ScalarImage(folder / "scaled.nii"),
        "zarr": zp.ScalarImage(array, axes="xyz"),
        "dask": zp.ScalarImage(da.from_array(voxels.astype(np.int16), chunks=7)),
        "mapped": int16.map(squared),
        "scaled": int16.rescaled(0.125, -3),
        "scaled-double": images["float64"].rescaled(0.1, 3),
        "cut": int16.rescaled(0.01, -1, low=20, high=150),
    }
    labels = zp.LabelMap((voxels % 3 * 30000).astype(np.uint16))
    return [zp.Subject(name=name, t1=image, seg=labels) for name, image in images.items()]


def squared(array: Any) -> Any:
    return array.astype(np.float32) ** 2


def normalised(subject: zp.Subject) -> zp.Subject:
    """As a cohort is mapped: the normalised image, and its clipped values as another image."""
    images = {"t1": zp.Normalize()(subject.t1), "clipped": zp.Normalize("clip")(subject.t1)}
    return subject.with_images(**images)


# Slots


def numbered(place: ImagePlace, first: int) -> torch.Tensor:
    """Voxels of an image, unlike those of another number."""
    values = torch.arange(first, first + math.prod(place.shape))
    return (values % 2 if place.dtype == torch.bool else values).to(place.dtype).reshape(place.shape)


def write_slots(block: SlotBlock, layout: SlotLayout, slots: Iterable[int]) -> None:
    """Write to slots as a worker does, and to the numbers that are watched."""
    for slot in slots:
        for row in range(layout.rows):
            for place in layout.images:
                block.tensor(slot, row, place).copy_(numbered(place, 10 * slot + row))
        block.watched[slot, 0] = 100 + slot


def copy_shared_pickle(shared: SharedPickle, block: SlotBlock) -> None:
    """Read a shared pickle, as a worker does that starts."""
    values = shared.read()
    block.watched[0, :2] = len(values), sum(values)


# Transforms


def unchanged(patch: zp.Patch) -> zp.Patch:
    return patch


def noisy(patch: zp.Patch) -> zp.Patch:
    """Draws from all three global generators."""
    noise = torch.randn(patch.t1.data.shape) + np.random.normal() + random.random()  # noqa: NPY002
    return patch.with_data(t1=patch.t1.data + noise)


def noisy_torch(patch: zp.Patch) -> zp.Patch:
    return patch.with_data(t1=torch.randn(1))


def noisy_numpy(patch: zp.Patch) -> zp.Patch:
    return patch.with_data(t1=torch.tensor(np.random.normal()))  # noqa: NPY002


def noisy_random(patch: zp.Patch) -> zp.Patch:
    return patch.with_data(t1=torch.tensor([random.random(), random.random()]))


def halved(patch: zp.Patch) -> zp.Patch:
    """Changes shapes: every other voxel along I, and no channel axis in the label map."""
    return patch.with_data(t1=patch.t1.data[:, ::2], seg=patch.seg.data[0])


def with_mask(patch: zp.Patch) -> zp.Patch:
    """Adds an image."""
    mask = dataclasses.replace(patch.seg, data=patch.seg.data > 0)
    return dataclasses.replace(patch, images={**patch.images, "mask": mask})


def without_labels(patch: zp.Patch) -> zp.Patch:
    """Drops an image."""
    return dataclasses.replace(patch, images={"t1": patch.t1})


def doubled_but_the_first(patch: zp.Patch) -> zp.Patch:
    """Patches of subjects but the first one are twice as long along J: they do not fit a slot."""
    if patch.subject in ("sub-00", "sub-01"):
        return patch
    return patch.map_data(lambda data: torch.cat([data, data + 1], dim=2))


def in_bfloat16(patch: zp.Patch) -> zp.Patch:
    return patch.with_data(t1=patch.t1.data.bfloat16())


def grown_in_bfloat16(patch: zp.Patch) -> zp.Patch:
    """As doubled_but_the_first, in a type that numpy does not know."""
    return in_bfloat16(doubled_but_the_first(patch))


def grown_and_renamed(patch: zp.Patch) -> zp.Patch:
    return renamed(doubled_but_the_first(patch))


def nothing(patch: zp.Patch) -> Any:
    """Forgets to return."""


def as_array(patch: zp.Patch) -> zp.Patch:
    """Puts an array where a tensor belongs."""
    return patch.with_data(t1=patch.t1.data.numpy())  # type: ignore[arg-type]


def slow(patch: zp.Patch) -> zp.Patch:
    time.sleep(0.01)
    return patch


def threads(patch: zp.Patch) -> zp.Patch:
    """How many threads torch may use: its sums depend on that."""
    return patch.with_data(t1=torch.tensor([torch.get_num_threads()]))


def renamed(patch: zp.Patch) -> zp.Patch:
    """Gives each patch a different name."""
    return dataclasses.replace(patch, subject=f"{patch.subject} at {patch.location.index}")


def weighed(patch: zp.Patch) -> zp.Patch:
    """Lets a parameter of a network change voxels, which leaves a gradient on them."""
    return patch.with_data(t1=patch.t1.data * torch.nn.Parameter(torch.tensor(2.0)))


@dataclass
class Counted:
    """Counts how often it is pickled."""

    pickled: int = 0

    def __call__(self, patch: zp.Patch) -> zp.Patch:
        return patch

    def __getstate__(self) -> dict[str, int]:
        self.pickled += 1
        return vars(self)


@dataclass
class Failing:
    """Fails on a subject."""

    subject: str

    def __call__(self, patch: zp.Patch) -> zp.Patch:
        if patch.subject == self.subject:
            raise ArithmeticError("no luck here")
        return patch


@dataclass
class FailingLater:
    """Fails after a number of calls, in each process."""

    calls: int

    def __call__(self, patch: zp.Patch) -> zp.Patch:
        self.calls -= 1
        if self.calls < 0:
            raise ArithmeticError("no more luck here")
        return patch


@dataclass
class Deadly:
    """Ends the worker that reads a subject, in some way, and notes when."""

    note: Path
    way: str = "KILL"
    subject: str = "sub-03"

    def __call__(self, patch: zp.Patch) -> zp.Patch:
        if patch.subject == self.subject:
            self.note.write_text(f"{time.time()} {os.getpid()}")
            self._end()
        return patch

    def _end(self) -> None:
        if self.way == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.way == "SEGV":
            ctypes.string_at(0)
        elif self.way == "hang":
            time.sleep(100)
        elif self.way == "sys.exit":
            sys.exit(0)
        else:
            os._exit(int(self.way))


# Samplers


def is_even(patch: zp.Patch) -> bool:
    """Accepts patches whose first voxel is even."""
    return bool(patch.t1.data[0, 0, 0, 0] % 2 == 0)


def accepts_nothing(patch: zp.Patch) -> bool:
    return False


class Picky(RandomSampler):
    """Fails on a subject."""

    def starts(self, subject: zp.Subject, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        if subject.name == "sub-02":
            raise ArithmeticError("no luck here")
        return np.zeros((count, 3), dtype=np.int64)


SAMPLERS: dict[str, PatchSampler] = {
    "uniform": zp.UniformSampler(12),
    "label": zp.LabelSampler(12, label_probabilities={1: 1, 2: 2}),
    "weighted": zp.WeightedSampler(12, "seg"),
    "grid": zp.GridSampler(patch_size=(24, 20, 28), patch_overlap=4, padding_mode="reflect"),
}
