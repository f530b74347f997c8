"""The queue: patches of many subjects, read by workers, shuffled in a bounded buffer.

An epoch is a plan before it is anything else: the order of subjects, the draws of each, and the picks of the
shuffle are pure functions of (seed, epoch). Workers only carry it out, so the stream is the same for any
number of them.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from zpatch.cohort import Subject
from zpatch.errors import OptionError, QueueError
from zpatch.geometry import PatchLocation
from zpatch.grid import PatchGrid
from zpatch.memory import format_bytes
from zpatch.patch import Patch
from zpatch.randomness import Purpose, rng
from zpatch.samplers import GridSampler, PatchSampler, RandomSampler, read_patches

GROUP_PATCHES = 32
PREFETCHED_GROUPS = 2
IMAGE_DTYPES = (torch.float16, torch.float32, torch.float64)

Transform = Callable[[Patch], Patch]


@dataclass(frozen=True, slots=True)
class Draw:
    """A task for a worker: patches ``first`` to ``stop`` of a subject in an epoch."""

    epoch: int
    subject: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Failed:
    """What a worker says instead of patches."""

    subject: str
    reason: str
    traceback: str


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """One epoch, as a pure function of its fields: which draws, in which order, and how they are shuffled.

    ``patches`` is the number of patches of each subject.
    """

    seed: int
    epoch: int
    subjects: Sequence[int]
    patches: Sequence[int]
    group: int
    buffer: int
    shuffle: bool

    def draws(self) -> Iterator[Draw]:
        """The tasks in the order in which their patches enter the buffer."""
        for subject in self.subjects:
            count = self.patches[subject]
            for first in range(0, count, self.group):
                yield Draw(self.epoch, subject, first, min(first + self.group, count))

    def shuffled(self, arriving: Iterator[Patch]) -> Iterator[Patch]:
        """Sliding shuffle: each patch handed out is drawn from the full buffer, and the next one that
        arrives takes its place; nothing is refilled in bulk."""
        if not self.shuffle:
            yield from arriving
            return
        picks = rng(self.seed, self.epoch, purpose=Purpose.SHUFFLE)
        buffer = list(itertools.islice(arriving, self.buffer))
        while buffer:
            place = int(picks.integers(len(buffer)))
            patch = buffer[place]
            buffer[place] = buffer[-1]
            buffer.pop()
            buffer.extend(itertools.islice(arriving, 1))
            yield patch


class _SubjectDraws(Dataset[list[Patch] | _Failed]):
    """What a worker does: a draw in, its transformed patches out."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        sampler: PatchSampler,
        patches_per_volume: int,
        transform: Transform | None,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self._subjects = subjects
        self._sampler = sampler
        self._patches_per_volume = patches_per_volume
        self._transform = transform
        self._dtype = dtype
        self._seed = seed

    def __getitem__(self, draw: Draw) -> list[Patch] | _Failed:
        subject = self._subjects[draw.subject]
        try:
            return self._patches(subject, draw)
        except Exception as error:  # whatever it is, it must reach the caller with its subject
            return _Failed(subject.name, f"{type(error).__name__}: {error}", traceback.format_exc())

    def _patches(self, subject: Subject, draw: Draw) -> list[Patch]:
        if isinstance(self._sampler, GridSampler):
            grid = self._sampler.grid_of(subject)
            patches = self._sampler.read(subject, _some(grid, draw))
        else:
            patches = read_patches(subject, self._drawn(self._sampler, subject, draw))
        return [self._finished(patch, draw, number) for number, patch in enumerate(patches, start=draw.first)]

    def _drawn(self, sampler: RandomSampler, subject: Subject, draw: Draw) -> list[PatchLocation]:
        generator = rng(self._seed, draw.epoch, draw.subject, purpose=Purpose.LOCATIONS)
        return sampler.locations(subject, self._patches_per_volume, generator)[draw.first : draw.stop]

    def _finished(self, patch: Patch, draw: Draw, number: int) -> Patch:
        cast = {
            name: image.data.to(self._dtype)
            for name, image in patch.images.items()
            if image.kind != "label" and not image.data.is_complex()
        }
        patch = patch.with_data(**cast)
        if self._transform is None:
            return patch
        stream = rng(self._seed, draw.epoch, draw.subject, number, purpose=Purpose.TRANSFORM)
        with seeded_globals(int(stream.integers(2**63))):
            return self._transform(patch)


def _packed(patches: list[Patch] | _Failed) -> list[Patch] | _Failed:
    """Patches as a worker sends them: arrays in memory order, which take no file descriptor each."""
    if isinstance(patches, _Failed):
        return patches
    return [patch.map_data(lambda data: _memory_order(data).contiguous().numpy()) for patch in patches]


def _unpacked(patches: list[Patch] | _Failed) -> list[Patch] | _Failed:
    if isinstance(patches, _Failed):
        return patches
    return [patch.map_data(lambda data: _memory_order(torch.from_numpy(data))) for patch in patches]


def _memory_order(data: torch.Tensor) -> torch.Tensor:
    """(C, I, J, K) as (c, z, y, x), and back; whatever else a transform made, as it is."""
    return data.permute(0, 3, 2, 1) if data.ndim == 4 else data


class _CurrentPlan:
    """The sampler of torch's DataLoader: the draws of the epoch at hand."""

    def __init__(self) -> None:
        self.plan: EpochPlan | None = None

    def __iter__(self) -> Iterator[Draw]:
        return self.plan.draws() if self.plan else iter(())


def _some(grid: PatchGrid, draw: Draw) -> list[PatchLocation]:
    return [grid.location(number) for number in range(draw.first, draw.stop)]


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


class Queue(IterableDataset[Patch]):
    """An endless training set in bounded memory: iterate it once for each epoch.

    One epoch is each subject once, ``patches_per_volume`` patches from each (all of them for a
    GridSampler), none carried over. At most ``max_length`` patches wait in the buffer; with
    ``shuffle_patches`` each is drawn from the full buffer. The stream is a function of (seed, epoch) and
    the same for every ``num_workers``, with random ``transform`` too: each call of it runs with torch's,
    numpy's and Python's generators seeded by (seed, epoch, subject, draw).

    ``dtype`` is what images come in; label maps keep their type. An iteration that is not preceded by
    ``set_epoch`` takes the epoch after the last one that was finished. ``subject_sampler`` (torch's
    DistributedSampler, say) takes over the order of subjects and needs ``shuffle_subjects=False``.
    ``start_method`` is fork on Linux and spawn elsewhere; ``timeout`` is in seconds.

    Feed it to ``SubjectsLoader``, or to torch's DataLoader with ``num_workers=0`` and
    ``collate_fn=zpatch.collate``. It is a context manager; ``close`` ends its workers.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        patch_sampler: PatchSampler,
        max_length: int = 300,
        patches_per_volume: int = 10,
        num_workers: int = 0,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        transform: Transform | None = None,
        subject_sampler: Iterable[int] | None = None,
        *,
        seed: int = 0,
        start_method: str | None = None,
        timeout: float = 120,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, count in (("max_length", max_length), ("patches_per_volume", patches_per_volume)):
            if count < 1:
                raise OptionError(f"{name} must be at least 1, not {count}")
        if num_workers < 0:
            raise OptionError(f"num_workers must be at least 0, not {num_workers}")
        if subject_sampler is not None and shuffle_subjects:
            raise OptionError("a subject_sampler decides the order; say shuffle_subjects=False with it")
        if dtype not in IMAGE_DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(map(str, IMAGE_DTYPES))}, not {dtype}")
        if not len(subjects):
            raise OptionError("a queue needs at least one subject")
        self.subjects = list(subjects)
        self.patch_sampler = patch_sampler
        self.max_length = max_length
        self.patches_per_volume = patches_per_volume
        self.num_workers = num_workers
        self.shuffle_subjects = shuffle_subjects
        self.shuffle_patches = shuffle_patches
        self.subject_sampler = subject_sampler
        self.seed = seed
        self.dtype = dtype
        self._epoch = 0
        self._patches = [self._patches_of(subject) for subject in self.subjects]
        self._group = min(GROUP_PATCHES, max_length, max(self._patches))
        self._draws = _SubjectDraws(self.subjects, patch_sampler, patches_per_volume, transform, dtype, seed)
        self._current = _CurrentPlan()
        self._start_method = start_method
        self._timeout = timeout
        self._loader: DataLoader[list[Patch] | _Failed] | None = None

    def _patches_of(self, subject: Subject) -> int:
        if isinstance(self.patch_sampler, GridSampler):
            return len(self.patch_sampler.grid_of(subject))
        return self.patches_per_volume

    @property
    def num_subjects(self) -> int:
        """Number of subjects."""
        return len(self.subjects)

    @property
    def patches_per_epoch(self) -> int:
        """Number of patches in an epoch."""
        if self.subject_sampler is None:
            return sum(self._patches)
        return sum(self._patches[subject] for subject in self.subject_sampler)

    def __len__(self) -> int:
        return self.patches_per_epoch

    @property
    def max_memory(self) -> int:
        """Bytes of the voxels in the buffer and on their way to it, at most."""
        in_flight = self._group * max(1, self.num_workers * PREFETCHED_GROUPS)
        return (self.max_length + in_flight) * self._patch_bytes()

    @property
    def max_memory_pretty(self) -> str:
        """``max_memory`` for people."""
        return format_bytes(self.max_memory)

    def _patch_bytes(self) -> int:
        voxels = int(np.prod(self.patch_sampler.patch_size))
        return max(
            sum(
                voxels * image.num_channels * self._item_bytes(image.kind, image.dtype)
                for image in subject.images.values()
            )
            for subject in self.subjects
        )

    def _item_bytes(self, kind: str, dtype: np.dtype[Any]) -> int:
        if kind != "label" and dtype.kind != "c":
            return self.dtype.itemsize
        return dtype.itemsize * (2 if dtype.kind == "u" and dtype.itemsize in (2, 4) else 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        if epoch < 0:
            raise OptionError(f"an epoch is at least 0, not {epoch}")
        self._epoch = epoch

    def plan(self, epoch: int) -> EpochPlan:
        """What an epoch will be."""
        return EpochPlan(
            seed=self.seed,
            epoch=epoch,
            subjects=self._subject_order(epoch),
            patches=self._patches,
            group=self._group,
            buffer=self.max_length,
            shuffle=self.shuffle_patches,
        )

    def _subject_order(self, epoch: int) -> list[int]:
        if self.subject_sampler is not None:
            return list(self.subject_sampler)
        if not self.shuffle_subjects:
            return list(range(self.num_subjects))
        order = rng(self.seed, epoch, purpose=Purpose.SUBJECT_ORDER).permutation(self.num_subjects)
        return [int(subject) for subject in order]

    def __iter__(self) -> Iterator[Patch]:
        if get_worker_info() is not None:
            raise QueueError(
                "a queue runs its own workers: give DataLoader num_workers=0, and the number of workers "
                "to Queue(num_workers=...)"
            )
        plan = self.plan(self._epoch)
        yield from plan.shuffled(self._arriving(plan))
        self._epoch = plan.epoch + 1

    def _arriving(self, plan: EpochPlan) -> Iterator[Patch]:
        for patches in self._groups(plan):
            if isinstance(patches, _Failed):
                raise QueueError(
                    f"subject {patches.subject!r} failed in epoch {plan.epoch}: {patches.reason}\n\n"
                    f"{patches.traceback}"
                )
            yield from patches

    def _groups(self, plan: EpochPlan) -> Iterator[list[Patch] | _Failed]:
        if self.num_workers == 0:
            yield from map(self._draws.__getitem__, plan.draws())
            return
        if self._loader is None:
            self._loader = self._start_workers()
        self._current.plan = plan
        try:
            yield from map(_unpacked, self._loader)
        except RuntimeError as error:
            self.close()
            raise QueueError(f"a worker of the queue ended or hung: {error}") from error

    def _start_workers(self) -> DataLoader[list[Patch] | _Failed]:
        return DataLoader(
            self._draws,
            batch_size=None,
            sampler=self._current,
            num_workers=self.num_workers,
            collate_fn=_packed,
            persistent_workers=True,
            prefetch_factor=PREFETCHED_GROUPS,
            timeout=self._timeout,
            multiprocessing_context=self._start_method,
        )

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        self._loader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
