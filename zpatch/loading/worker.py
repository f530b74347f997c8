"""What a worker of the queue does: a draw in, its transformed patches out, in slots of shared memory."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from zpatch.chunks.scaling import UNSCALED
from zpatch.geometry.affines import Affine, crop_affine
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.group_read import read_group
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.loading.epoch_plan import Draw
from zpatch.loading.shared_slots import ImagePlace, SharedPickle, SlotBlock, SlotLayout, new_tensor
from zpatch.runtime.tasks import end_with_parent
from zpatch.sampling.grid_sampler import GridSampler, PatchSampler
from zpatch.sampling.patch import Patch, torch_dtype
from zpatch.sampling.randomness import Purpose, rng

Transform = Callable[[Patch], Patch]


@dataclass(frozen=True, slots=True)
class Task:
    """A draw, and the slots that take its patches. ``serial`` tells the runs of a queue apart."""

    serial: int
    draw: Draw
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Delivered:
    """A patch in its slot; one that does not fit there travels by itself."""

    subject: str
    location: PatchLocation
    layout: SlotLayout
    affines: Sequence[Affine]
    loose: Sequence[NDArray[Any]] | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a worker gives for a task: a patch for each of its slots."""

    task: Task
    patches: Sequence[Delivered]


@dataclass(frozen=True, slots=True)
class FailedDraw:
    """What a worker gives instead."""

    task: Task
    subject: str
    reason: str
    traceback: str

    @classmethod
    def of(cls, task: Task, subject: str, error: BaseException) -> FailedDraw:
        """What is to be said of an error."""
        reason = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        return cls(task, subject, reason, "".join(traceback.format_exception(error)))

    def __str__(self) -> str:
        epoch = self.task.draw.epoch
        return f"subject {self.subject!r} failed in epoch {epoch}: {self.reason}\n\n{self.traceback}"


class SubjectDraws(Dataset[Any]):
    """The patches of any draw; made once, and handed to each worker as it starts.

    ``dtype`` is what images come to a transform in. Without one, or with None, they keep their stored type,
    and slope and intercept stand beside: values are made of them once, where they go. ``block`` is where a
    worker puts patches, ``pickle`` what brings all else to workers that are not forked.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        sampler: PatchSampler,
        patches_per_volume: int,
        transform: Transform | None,
        dtype: torch.dtype | None,
        seed: int,
    ) -> None:
        self.subjects = subjects
        self.sampler = sampler
        self.transform = transform
        self.block: SlotBlock | None = None
        self.pickle: SharedPickle | None = None
        self._patches_per_volume = patches_per_volume
        self._dtype = dtype
        self._seed = seed

    def __getitem__(self, task: Task) -> Delivery | FailedDraw:
        """Do a task in a worker."""
        assert self.block is not None
        worker = get_worker_info()
        number = worker.id if worker else 0
        self.block.watched[2 * number : 2 * number + 2] = os.getpid(), task.draw.subject + 1
        try:
            subject = self.subjects[task.draw.subject]
            return Delivery(task, self._delivered(subject, task, self.block))
        except (Exception, SystemExit) as error:  # whatever it is, it must reach the caller with its subject
            return FailedDraw.of(task, self.name_of(task.draw.subject), error)
        finally:
            self.block.watched[2 * number + 1] = 0

    def shared_pickle(self) -> SharedPickle:
        """All that a worker needs but the block of slots."""
        return SharedPickle(
            {name: part for name, part in vars(self).items() if name not in ("block", "pickle")}
        )

    def __getstate__(self) -> tuple[SharedPickle, SlotBlock | None]:
        assert self.pickle is not None
        return self.pickle, self.block

    def __setstate__(self, state: tuple[SharedPickle, SlotBlock | None]) -> None:
        pickle, self.block = state
        vars(self).update(pickle.read(), pickle=None)

    def name_of(self, subject: int) -> str:
        """The name of a subject by its number."""
        names = getattr(self.subjects, "names", None)  # of a cohort: without making the subject
        return str(names[subject] if names else self.subjects[subject].name)

    def _delivered(self, subject: Subject, task: Task, block: SlotBlock) -> list[Delivered]:
        layout = self.layout_of(subject)
        if self.transform is None and layout.nbytes <= block.slot_bytes:
            locations = self._locations(subject, task.draw)
            outs = [[block.tensor(slot, place) for slot in task.slots] for place in layout.images]
            affines = self._read(subject, locations, outs)
            return [
                Delivered(subject.name, at, layout, of) for at, of in zip(locations, affines, strict=True)
            ]
        return [
            self._sent(patch, slot, block)
            for patch, slot in zip(self.patches(task.draw), task.slots, strict=True)
        ]

    def _sent(self, patch: Patch, slot: int, block: SlotBlock) -> Delivered:
        layout, images = SlotLayout.of_patch(patch), patch.images.values()
        loose = None
        if layout.nbytes <= block.slot_bytes:
            for place, image in zip(layout.images, images, strict=True):
                block.tensor(slot, place).copy_(image.data.detach())
        else:
            loose = [packed(image.data) for image in images]
        affines = [image.affine for image in images]
        return Delivered(patch.subject, patch.location, layout, affines, loose)

    def patches(self, draw: Draw) -> Iterator[Patch]:
        """The transformed patches of a draw, each in memory of its own."""
        subject = self.subjects[draw.subject]
        locations, layout = self._locations(subject, draw), self.layout_of(subject)
        tensors = [[new_tensor(place) for _ in locations] for place in layout.images]
        affines = self._read(subject, locations, tensors)
        for n, (number, location) in enumerate(zip(draw.numbers, locations, strict=True)):
            patch = layout.patch([of[n] for of in tensors], affines[n], location, subject.name)
            yield self._transformed(patch, draw, number)

    def layout_of(self, subject: Subject) -> SlotLayout:
        """How a patch of a subject lies in a slot, before any transform."""
        size = self.sampler.patch_size
        places = []
        for name, image in subject.images.items():
            dtype, (slope, inter) = self._type_of(image)
            shape = image.num_channels, *size
            places.append(ImagePlace(name, image.kind, shape, dtype, slope=slope, inter=inter))
        return SlotLayout.of(places)

    def _type_of(self, image: Image) -> tuple[torch.dtype, tuple[float, float]]:
        """What an image comes in, and what is left to be done to make values of it."""
        if image.kind == "label" or image.dtype.kind == "c":
            return torch_dtype(image.dtype), (1.0, 0.0)
        if self._dtype is not None and (self.transform is not None or self._fills_with_a_value(image)):
            return self._dtype, (1.0, 0.0)
        widen = self._dtype is None
        if image.scaling.is_bounded or self._fills_with_a_value(image):
            return torch_dtype(image.dtype, widen=widen), (1.0, 0.0)
        return torch_dtype(image.source.dtype, widen=widen), (image.scaling.slope, image.scaling.inter)

    def _fills_with_a_value(self, image: Image) -> bool:
        """Whether padding is of values, which stored voxels do not stand for."""
        if not isinstance(self.sampler, GridSampler) or self.sampler.padding_mode != "constant":
            return False
        fill = self.sampler.fill_of(image)
        with np.errstate(all="ignore"):
            stored = np.array(fill).astype(image.source.dtype)
        return image.scaling != UNSCALED or stored != fill

    def _locations(self, subject: Subject, draw: Draw) -> list[PatchLocation]:
        if isinstance(self.sampler, GridSampler):
            grid = self.sampler.grid_of(subject)
            return [grid.location(number) for number in draw.numbers]
        generator = rng(self._seed, draw.epoch, draw.subject, draw.visit, purpose=Purpose.LOCATIONS)
        drawn = self.sampler.locations(subject, self._patches_per_volume, generator)
        return [drawn[number] for number in draw.numbers]

    def _read(
        self, subject: Subject, locations: Sequence[PatchLocation], tensors: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[Affine]]:
        """Read all images of some patches as one group into tensors; the patches' affines."""
        images = list(subject.images.values())
        scaled = [self._type_of(image)[1] == (1.0, 0.0) for image in images]
        grid = self.sampler if isinstance(self.sampler, GridSampler) else None
        read_group(
            images,
            locations,
            scaled=scaled,
            padding_mode=None if grid is None else grid.padding_mode,
            fill=0 if grid is None else [grid.fill_of(image) for image in images],
            out=[[tensor.numpy() for tensor in of] for of in tensors],
        )
        return [[crop_affine(image.affine, at.index) for image in images] for at in locations]

    def _transformed(self, patch: Patch, draw: Draw, number: int) -> Patch:
        if self.transform is None:
            return patch
        place = draw.visit << 32 | number
        stream = rng(self._seed, draw.epoch, draw.subject, place, purpose=Purpose.TRANSFORM)
        try:
            with seeded_globals(int(stream.integers(2**63))), one_thread():
                changed: Any = self.transform(patch)
            if not isinstance(changed, Patch):
                raise TypeError(f"a transform gives a Patch, not {type(changed).__name__}")
            for name, image in changed.images.items():
                if not isinstance(image.data, torch.Tensor):
                    raise TypeError(f"the data of {name!r} must be a tensor, not {type(image.data).__name__}")
        except Exception as error:
            error.add_note(f"in the transform of the patch at {patch.location.index}")
            raise
        return changed


def start_worker(worker: int) -> None:
    """Let a worker end with its parent, however that ends, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def packed(data: torch.Tensor) -> NDArray[Any]:
    """A tensor as a worker sends it: as an array, which takes neither file descriptor nor thread."""
    data = data.detach().contiguous()
    return (data.view(torch.int16) if data.dtype == torch.bfloat16 else data).numpy()


def unpacked(data: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that was sent."""
    tensor = torch.from_numpy(data)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread, as it does in a worker: the sums of several are rounded otherwise."""
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators, and put them back as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
