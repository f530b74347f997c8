"""The queue: patches of many subjects, read by workers, shuffled in a bounded buffer.

An epoch is a plan before it is anything else: the order of subjects, the draws of each, and the picks of the
shuffle are pure functions of (seed, epoch). Workers only carry it out, so the stream is the same for any
number of them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zpatch.cohort import Subject
from zpatch.errors import OptionError, QueueError
from zpatch.memory import format_bytes
from zpatch.patch import Patch
from zpatch.patch_worker import Draw, FailedDraw, SubjectDraws, Transform, packed, unpacked
from zpatch.randomness import Purpose, rng
from zpatch.samplers import GridSampler, PatchSampler

GROUP_PATCHES = 32
PREFETCHED_GROUPS = 2
IMAGE_DTYPES = (torch.float16, torch.float32, torch.float64)


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


def _name_killed_workers() -> None:
    """Torch hears of a killed worker in a signal handler, wherever the main thread is: say it as ours."""
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return
    if getattr(handler, "names_killed_workers", False):
        return

    def named(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            raise QueueError(f"a worker of the queue ended: {error}") from error

    named.names_killed_workers = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, named)


class _CurrentPlan:
    """The sampler of torch's DataLoader: the draws of the epoch at hand."""

    def __init__(self) -> None:
        self.plan: EpochPlan | None = None

    def __iter__(self) -> Iterator[Draw]:
        return self.plan.draws() if self.plan else iter(())


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
    ``start_method`` is fork on Linux and spawn elsewhere. A worker that gives nothing for ``timeout``
    seconds is taken for hung.

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
        self._draws = SubjectDraws(self.subjects, patch_sampler, patches_per_volume, transform, dtype, seed)
        self._current = _CurrentPlan()
        self._start_method = start_method
        self._timeout = timeout
        self._loader: DataLoader[list[Patch] | FailedDraw] | None = None
        self._workers: list[BaseProcess] = []
        self._iteration = 0
        self._check_options()

    def _check_options(self) -> None:
        methods = multiprocessing.get_all_start_methods()
        if self._start_method is not None and self._start_method not in methods:
            raise OptionError(f"start_method must be one of {', '.join(methods)}, not {self._start_method!r}")
        if self._timeout <= 0:
            raise OptionError(f"timeout must be above 0 seconds, not {self._timeout}")
        for subject in self.subject_sampler or ():
            if not 0 <= subject < self.num_subjects:
                raise OptionError(
                    f"subject_sampler gives {subject} of {self.num_subjects} subjects; they count from 0"
                )

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
            if isinstance(patches, FailedDraw):
                raise QueueError(
                    f"subject {patches.subject!r} failed in epoch {plan.epoch}: {patches.reason}\n\n"
                    f"{patches.traceback}"
                )
            yield from patches

    def _groups(self, plan: EpochPlan) -> Iterator[list[Patch] | FailedDraw]:
        if self.num_workers == 0:
            yield from map(self._draws.__getitem__, plan.draws())
            return
        self._current.plan = plan
        groups = iter(self._running())
        _name_killed_workers()
        self._iteration += 1
        mine = self._iteration
        while mine == self._iteration:
            hung = threading.Event()
            watch = threading.Timer(self._timeout, self._kill_workers, [hung])
            watch.daemon = True
            watch.start()
            try:
                group = next(groups)
            except StopIteration:
                return
            except RuntimeError as error:
                self.close()
                what = f"gave nothing for {self._timeout:g} s" if hung.is_set() else "ended"
                raise QueueError(f"a worker of the queue {what}: {error}") from error
            finally:
                watch.cancel()
            yield unpacked(group)
        raise QueueError("the queue was closed, or another iteration of it was begun; iterate it anew")

    def _running(self) -> Iterable[list[Patch] | FailedDraw]:
        """The groups of the current plan, from workers that are started once."""
        if self._loader is None:
            self._check_can_be_sent()
            self._loader = DataLoader(
                self._draws,
                batch_size=None,
                sampler=self._current,
                num_workers=self.num_workers,
                collate_fn=packed,
                persistent_workers=True,
                prefetch_factor=PREFETCHED_GROUPS,
                multiprocessing_context=self._start_method,
                generator=torch.Generator(),  # torch would draw a seed from its global one
            )
        others = set(multiprocessing.active_children())
        groups = iter(self._loader)
        self._workers = self._workers or [p for p in multiprocessing.active_children() if p not in others]
        return groups

    def _check_can_be_sent(self) -> None:
        if multiprocessing.get_context(self._start_method).get_start_method() == "fork":
            return
        try:
            pickle.dumps(self._draws)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise QueueError(
                f"subjects, sampler or transform cannot be sent to a worker ({error}); define them at the "
                f"top of a module, or use start_method='fork'"
            ) from error

    def _kill_workers(self, hung: threading.Event) -> None:
        """End workers that hang: torch then notices within seconds that they are gone."""
        hung.set()
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        loader, self._loader = self._loader, None
        self._workers = []
        self._iteration += 1
        if loader is not None and loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
