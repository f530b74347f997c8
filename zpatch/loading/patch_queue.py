"""The queue: patches of many subjects, read by workers, shuffled in a bounded buffer.

An epoch is a plan before it is anything else: the order of subjects, the draws of each, and the picks of the
shuffle are pure functions of (seed, epoch). Workers only carry it out, so the stream is the same for any
number of them, and can be taken up again at any patch.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from zpatch.digests import Json
from zpatch.errors import OptionError, QueueError
from zpatch.images.subject import Subject
from zpatch.loading.epoch_plan import EpochPlan, Share, Uneven
from zpatch.loading.patch_buffer import PatchBuffer
from zpatch.loading.patch_feed import PatchFeed
from zpatch.loading.queue_state import epoch_and_consumed, order_identity, queue_state, subjects_digest
from zpatch.loading.shared_slots import WATCH_BYTES, SlotLayout, copied
from zpatch.loading.worker import FailedDraw, SubjectDraws, Task, Transform
from zpatch.loading.worker_pool import START_METHOD, TASKS_PER_WORKER, check_processes
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.grid_sampler import GridSampler, PatchSampler
from zpatch.sampling.patch import Patch
from zpatch.sampling.randomness import Purpose, rng

GROUP_PATCHES = 32
IMAGE_DTYPES = (torch.float16, torch.float32, torch.float64, None)


class Queue(IterableDataset[Patch]):
    """An endless training set in bounded memory: iterate it once for each epoch.

    One epoch is each subject once, ``patches_per_volume`` patches from each (all of them for a
    GridSampler), none carried over. At most ``max_length`` patches wait in the buffer; with
    ``shuffle_patches`` each is drawn from the full buffer. The stream is a function of (seed, epoch) and
    the same for every ``num_workers``, with random ``transform`` too: each call of it runs with torch's,
    numpy's and Python's generators seeded by (seed, epoch, subject, draw).

    ``dtype`` is what images come in; with None they keep their stored type, and ``slope`` and ``inter`` stand
    beside them. Label maps keep their type where torch computes with it. An iteration that is not preceded by
    ``set_epoch`` takes the epoch after the last one that was finished. ``subject_sampler`` (torch's
    DistributedSampler, say) takes over the order of subjects and needs ``shuffle_subjects=False``.

    Under torch.distributed, or with ``rank`` and ``world_size``, each process gets its share: as many
    subjects and patches as any other, no subject twice but what ``uneven="pad"`` repeats (``drop`` leaves the
    rest out, ``error`` refuses it).

    ``start_method`` is fork on Linux and spawn elsewhere. A worker that gives nothing for ``timeout``
    seconds is taken for hung. Feed the queue to ``SubjectsLoader``, or to torch's DataLoader with
    ``num_workers=0`` and ``collate_fn=zpatch.collate``. It is a context manager; ``close`` ends its workers.
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
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        start_method: str | None = None,
        timeout: float = 120,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        max_length = _integer("max_length", max_length)
        patches_per_volume = _integer("patches_per_volume", patches_per_volume)
        num_workers = _integer("num_workers", num_workers)
        for name, count in (("max_length", max_length), ("patches_per_volume", patches_per_volume)):
            if count < 1:
                raise OptionError(f"{name} must be at least 1, not {count}")
        if num_workers < 0:
            raise OptionError(f"num_workers must be at least 0, not {num_workers}")
        if subject_sampler is not None and shuffle_subjects:
            raise OptionError("a subject_sampler decides the order; say shuffle_subjects=False with it")
        if subject_sampler is not None and (rank is not None or world_size is not None):
            raise OptionError("a subject_sampler deals out subjects; leave out rank and world_size with it")
        if dtype not in IMAGE_DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(map(str, IMAGE_DTYPES))}, not {dtype}")
        if not len(subjects):
            raise OptionError("a queue needs at least one subject")
        check_processes(start_method, timeout)
        self.subjects = subjects
        self.patch_sampler = patch_sampler
        self.max_length = max_length
        self.patches_per_volume = patches_per_volume
        self.num_workers = num_workers
        self.shuffle_subjects = shuffle_subjects
        self.shuffle_patches = shuffle_patches
        self.subject_sampler = subject_sampler
        self.seed = _integer("seed", seed)
        self.dtype = dtype
        self.share = Share() if subject_sampler is not None else _share(rank, world_size, uneven)
        self.share.check(len(subjects))
        self._rank_is_found = subject_sampler is None and rank is None  # in torch.distributed
        self._draws = SubjectDraws(subjects, patch_sampler, patches_per_volume, transform, dtype, self.seed)
        self._patches = self._count_patches()
        self._check_subject_sampler()
        self._start_method = start_method or START_METHOD
        self._timeout = timeout
        self._slot_bytes: int | None = None
        self._subjects_digest: str | None = None
        self._buffer: PatchBuffer | None = None
        self._epoch, self._consumed = 0, 0  # what was handed out
        self._resumed = False  # whether the next iteration goes on from there
        self._iteration: object | None = None  # the one that runs,
        self._chosen: int | None = None  # and the epoch that is to follow it

    def _count_patches(self) -> NDArray[np.int64]:
        if isinstance(self.patch_sampler, GridSampler):
            return np.array([len(self.patch_sampler.grid_of(subject)) for subject in self.subjects])
        return np.full(len(self.subjects), self.patches_per_volume)

    def _check_subject_sampler(self) -> None:
        if self.subject_sampler is None:
            return
        if iter(self.subject_sampler) is self.subject_sampler:
            raise OptionError("a subject_sampler is iterated anew for each epoch; give a list, or a Sampler")
        given = list(self.subject_sampler)
        if not given:
            raise OptionError("the subject_sampler gives no subject")
        for subject in given:
            if not 0 <= subject < self.num_subjects:
                raise OptionError(
                    f"subject_sampler gives {subject} of {self.num_subjects} subjects; they count from 0"
                )

    @property
    def num_subjects(self) -> int:
        """Number of subjects, of all ranks."""
        return len(self.subjects)

    @property
    def patches_per_epoch(self) -> int:
        """Number of patches in an epoch, of this rank."""
        return self.plan(self._epoch).total

    def __len__(self) -> int:
        return self.patches_per_epoch

    @property
    def max_memory(self) -> int:
        """Bytes of all patches in the buffer and on their way to it: the size of the shared block."""
        return WATCH_BYTES + self._slots * self._bytes_per_slot()

    @property
    def max_memory_pretty(self) -> str:
        """``max_memory`` for people."""
        return format_bytes(self.max_memory)

    @property
    def _group(self) -> int:
        return min(GROUP_PATCHES, self.max_length, int(self._patches.max()))

    @property
    def _slots(self) -> int:
        # A group that has come in waits while the next task goes out in its place.
        in_flight = self._group * (TASKS_PER_WORKER * self.num_workers + 1)
        return self.max_length + in_flight

    def _bytes_per_slot(self) -> int:
        """What the largest patch takes; after a transform, the first one."""
        if self._slot_bytes is None:
            layouts = [self._draws.layout_of(subject) for subject in self.subjects]
            self._slot_bytes = max(layout.nbytes for layout in layouts)
            if self._draws.transform is not None:
                self._slot_bytes = SlotLayout.of_patch(self._first_patch()).nbytes
        return self._slot_bytes

    def _first_patch(self) -> Patch:
        """The first patch that is ever read, transformed."""
        draw = next(self.plan(0).draws())
        draw = dataclasses.replace(draw, numbers=draw.numbers[:1], arrivals=draw.arrivals[:1])
        try:
            return next(self._draws.patches(draw))
        except Exception as error:  # as where a worker reads it
            failed = FailedDraw.of(Task(0, draw, ()), self._draws.name_of(draw.subject), error)
            raise QueueError(str(failed)) from error

    @property
    def pending_dtype(self) -> torch.dtype | None:
        """What values are made in as patches are handed out; None where they are what they are to be."""
        return self.dtype if self._draws.transform is None else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; of a state that was loaded, go on in its epoch.

        An iteration that runs goes on, and the state is of that until it ends.
        """
        epoch = _integer("an epoch", epoch)
        if epoch < 0:
            raise OptionError(f"an epoch is at least 0, not {epoch}")
        if self._iteration is not None:
            self._chosen = epoch
        elif not (self._resumed and epoch == self._epoch):
            self._epoch, self._consumed, self._resumed = epoch, 0, False

    def plan(self, epoch: int) -> EpochPlan:
        """What an epoch will be on this rank."""
        order = self._subject_order(epoch)
        subjects, total = self.share.deal(order, self._patches)
        return EpochPlan(
            seed=self.seed,
            epoch=epoch,
            subjects=subjects,
            patches=self._patches[subjects],
            total=total,
            group=self._group,
            buffer=self.max_length,
            shuffle=self.shuffle_patches,
        )

    def _subject_order(self, epoch: int) -> NDArray[np.int64]:
        if self.subject_sampler is not None:
            if hasattr(self.subject_sampler, "set_epoch"):
                self.subject_sampler.set_epoch(epoch)
            return np.array(list(self.subject_sampler), dtype=np.int64)
        if not self.shuffle_subjects:
            return np.arange(self.num_subjects)
        return rng(self.seed, epoch, purpose=Purpose.SUBJECT_ORDER).permutation(self.num_subjects)

    def upcoming(self, plan: EpochPlan) -> EpochPlan | None:
        """The epoch that workers may begin while the buffer drains, where it is known already."""
        if self.subject_sampler is not None and not hasattr(self.subject_sampler, "set_epoch"):
            return None  # it may give another order each time, and is asked only when it is time
        try:
            return self.plan(plan.epoch + 1)
        except OptionError:  # its shares are uneven: to be refused when it is time
            return None

    def __iter__(self) -> Iterator[Patch]:
        """The patches of an epoch, each in memory of its own."""
        for patch in self.iter_shared():
            yield copied(patch, self.pending_dtype)

    def iter_shared(self) -> Iterator[Patch]:
        """The same patches, each in memory that is lent until the next one is asked for.

        Their values are still to be made, in ``pending_dtype``.
        """
        if get_worker_info() is not None:
            raise QueueError(
                "a queue runs its own workers: give DataLoader num_workers=0, and the number of workers "
                "to Queue(num_workers=...)"
            )
        self._check_rank()
        self._end_iteration()
        if not self._resumed and self._consumed == self.plan(self._epoch).total:
            self._epoch += 1  # all of it was received, though nobody asked for one more
        if not self._resumed:
            self._consumed = 0
        mine = self._iteration = object()
        try:
            plan = self.plan(self._epoch)
            buffer, reads_ahead = self._running(), self.upcoming(plan) is not None
            for patch in buffer.iter_patches(plan, self._consumed, reads_ahead=reads_ahead):
                self._consumed, self._resumed = self._consumed + 1, False
                yield patch
                if mine is not self._iteration:
                    raise QueueError(
                        "the queue was closed, or another iteration of it was begun; iterate it anew"
                    )
            self._epoch, self._consumed, self._resumed = plan.epoch + 1, 0, False
        finally:
            if mine is self._iteration:
                self._end_iteration()

    def _end_iteration(self) -> None:
        """Let no iteration run any more, and the epoch that was chosen meanwhile be the next one."""
        self._iteration = None
        if self._buffer is not None:
            self._buffer.release()
        if self._chosen is not None:
            self._epoch, self._consumed, self._resumed = self._chosen, 0, False
            self._chosen = None

    def _check_rank(self) -> None:
        """Refuse to go on with all subjects where torch.distributed has dealt them out since."""
        if not self._rank_is_found:
            return
        now = _share(None, None, self.share.uneven)
        if now != self.share and now.world_size > 1:
            raise QueueError(
                f"the queue was made as rank {self.share.rank} of {self.share.world_size}, and this is rank "
                f"{now.rank} of {now.world_size}; make the queue after init_process_group"
            )

    def _running(self) -> PatchBuffer:
        if self._buffer is None or self._buffer.is_closed:
            queue = weakref.ref(self)  # workers end with the queue, which they must not keep alive
            feed = PatchFeed(
                self._draws,
                lambda plan: None if (alive := queue()) is None else alive.upcoming(plan),
                num_workers=self.num_workers,
                slots=self._slots,
                slot_bytes=self._bytes_per_slot() if self.num_workers else 0,
                start_method=self._start_method,
                timeout=self._timeout,
            )
            self._buffer = PatchBuffer(feed, self.max_length)
        return self._buffer

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as small JSON: what the caller has received, and of which stream."""
        epoch, consumed = self._epoch, self._consumed
        if consumed and consumed == self.plan(epoch).total:
            epoch, consumed = epoch + 1 if self._chosen is None else self._chosen, 0
        return queue_state(self._fingerprint(), self.seed, epoch, consumed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another queue of the same stream was, under any ``num_workers``; see ``set_epoch``.

        A stream that would be another one is refused, and the error names what has changed.
        """
        epoch, consumed = epoch_and_consumed(state, self._fingerprint(), self.seed)
        if consumed > self.plan(epoch).total:
            raise OptionError(f"the state has {consumed} patches of an epoch of {self.plan(epoch).total}")
        self._end_iteration()
        self._epoch, self._consumed, self._resumed = epoch, consumed, True

    def _fingerprint(self) -> Json:
        """All that the stream depends on but the seed."""
        if self._subjects_digest is None:
            self._subjects_digest = subjects_digest(self.subjects)
        sampler = self.subject_sampler
        order = sampler is not None and order_identity(sampler, self._subject_order(0))  # wherever it is
        return {
            "cohort": self._subjects_digest,
            "sampler": repr(self.patch_sampler),
            "patches_per_volume": self.patches_per_volume,
            "max_length": self.max_length,
            "shuffle_subjects": self.shuffle_subjects,
            "shuffle_patches": self.shuffle_patches,
            "subject_sampler": order,
            "world_size": self.share.world_size,
            "uneven": self.share.uneven,
        }

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        self._end_iteration()
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.close()

    def __del__(self) -> None:
        if getattr(self, "_buffer", None) is not None:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be an integer, not {value!r}") from None


def _share(rank: int | None, world_size: int | None, uneven: Uneven) -> Share:
    """The share of this process: as told, else torch.distributed's, else all."""
    if (rank is None) != (world_size is None):
        raise OptionError("rank and world_size go together; say both or neither")
    if rank is not None and world_size is not None:
        return Share(rank, world_size, uneven)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Share(distributed.get_rank(), distributed.get_world_size(), uneven)
    return Share(uneven=uneven)
