"""The queue: patches of many subjects, read by workers, shuffled in a bounded buffer.

An epoch is a plan first: the order of subjects, the draws of each, and the picks of the shuffle are pure
functions of (seed, epoch). Workers only carry the plan out, so the stream is the same for any number of them,
and can be resumed at any patch.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from zpatch.digests import Json
from zpatch.epochs.epoch_plan import EpochPlan, Uneven
from zpatch.epochs.stream_position import (
    StreamPosition,
    Turn,
    epoch_and_consumed,
    order_identity,
    queue_state,
    subjects_digest,
)
from zpatch.errors import OptionError, QueueError
from zpatch.images.subject import Subject
from zpatch.loading.draw_reader import DrawReader
from zpatch.loading.patch_buffer import PatchBuffer
from zpatch.loading.patch_feed import PatchFeed
from zpatch.loading.queue_options import QueueOptions, as_integer
from zpatch.loading.queue_subjects import AnyTransform, OnBad, subjects_of_queue
from zpatch.loading.shared_slots import WATCH_BYTES, SlotLayout, copied
from zpatch.loading.worker import FailedDraw, Task
from zpatch.loading.worker_pool import START_METHOD, TASKS_PER_WORKER
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_sampler import PatchSampler

GROUP_PATCHES = 32


class Queue(IterableDataset[Patch]):
    """An endless training set in bounded memory: iterate it once for each epoch.

    One epoch is each subject once, with ``patches_per_volume`` patches of each (all of them with a
    GridSampler); no patch is left over for the next epoch. At most ``max_length`` patches wait in the buffer;
    with ``shuffle_patches`` each is drawn from the full buffer. The stream is a function of (seed, epoch) and
    the same for every ``num_workers``, with a random ``transform`` too: torch's, numpy's and Python's
    generators are seeded by (seed, epoch, subject, draw) before each call of it.

    Images arrive as ``dtype``, (C, I, J, K); with None they keep their stored type, and the ``slope`` and
    ``inter`` of each patch apply. Label maps keep their type if torch computes with it. An iteration without
    ``set_epoch`` before it takes the epoch after the last one that was finished. ``subject_sampler`` (torch's
    DistributedSampler, say) decides the order of subjects and needs ``shuffle_subjects=False``.

    Under torch.distributed, or with ``rank`` and ``world_size``, each process gets its share: as many
    subjects and patches as every other process. Where they cannot be divided evenly, ``uneven="pad"`` repeats
    some subjects, ``drop`` leaves the rest out, and ``error`` refuses.

    Subjects that cannot give a patch (an image that is missing, smaller than the patch or on another grid, no
    voxel of a wanted class) are an error at once that names them all; ``on_bad="skip"`` leaves them out.

    ``start_method`` is fork on Linux and spawn elsewhere. A worker that gives nothing for ``timeout``
    seconds in which this process ran has hung, which is a QueueError, as is a worker that dies and a subject
    that cannot be read. Feed the queue to ``SubjectsLoader``, or to torch's DataLoader with ``num_workers=0``
    and ``collate_fn=zpatch.collate``. It is a context manager; ``close`` ends its workers. ``options`` has
    all options, and ``position`` is the position in the stream.

    >>> import numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> from zpatch.sampling.samplers import UniformSampler
    >>> subjects = [Subject(name=name, t1=ScalarImage(np.zeros((8, 8, 8)))) for name in ("a", "b")]
    >>> with Queue(subjects, UniformSampler(4), patches_per_volume=1) as queue:
    ...     [tuple(patch.t1.data.shape) for patch in queue]
    [(1, 4, 4, 4), (1, 4, 4, 4)]
    """

    max_length = property(attrgetter("options.max_length"))
    patches_per_volume = property(attrgetter("options.patches_per_volume"))
    num_workers = property(attrgetter("options.num_workers"))
    shuffle_subjects = property(attrgetter("options.shuffle_subjects"))
    shuffle_patches = property(attrgetter("options.shuffle_patches"))
    subject_sampler = property(attrgetter("options.subject_sampler"))
    seed = property(attrgetter("options.seed"))
    dtype = property(attrgetter("options.dtype"))

    def __init__(
        self,
        subjects: Sequence[Subject],
        patch_sampler: PatchSampler,
        max_length: int = 300,
        patches_per_volume: int = 10,
        num_workers: int = 0,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        transform: AnyTransform | None = None,
        subject_sampler: Iterable[int] | None = None,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        on_bad: OnBad = "error",
        start_method: str | None = None,
        timeout: float = 120,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        options = QueueOptions(
            max_length=max_length,
            patches_per_volume=patches_per_volume,
            num_workers=num_workers,
            shuffle_subjects=shuffle_subjects,
            shuffle_patches=shuffle_patches,
            transform=transform,
            subject_sampler=subject_sampler,
            seed=seed,
            rank=rank,
            world_size=world_size,
            uneven=uneven,
            on_bad=on_bad,
            start_method=start_method,
            timeout=timeout,
            dtype=dtype,
        )
        subjects = subjects_of_queue(subjects, patch_sampler, transform, on_bad)
        self.subjects, self.patch_sampler, self.options = subjects, patch_sampler, options
        self.share = options.share_of(len(subjects))
        self.position = StreamPosition()
        self._turn = Turn("the queue is iterated by another thread; give each thread a queue of its own")
        per_volume, seed = options.patches_per_volume, options.seed  # as Python's integers
        self._reader = DrawReader(subjects, patch_sampler, per_volume, dtype, transform, seed)
        self._patches = self.count_patches()
        self._buffer: PatchBuffer | None = None

    def count_patches(self) -> NDArray[np.int64]:
        """How many patches an epoch takes of each subject, (N,)."""
        return self.patch_sampler.counts(self.subjects, self.options.patches_per_volume)

    @property
    def num_subjects(self) -> int:
        """Number of subjects of all ranks."""
        return len(self.subjects)

    @property
    def patches_per_epoch(self) -> int:
        """Number of patches in an epoch of this rank."""
        return self.plan(self.position.epoch).total

    def __len__(self) -> int:
        return self.patches_per_epoch

    @property
    def max_memory(self) -> int:
        """Bytes of all patches in the buffer and in flight to it: the size of the shared memory."""
        return WATCH_BYTES + self._slots * self._slot_bytes

    @property
    def max_memory_pretty(self) -> str:
        """``max_memory`` for people."""
        return format_bytes(self.max_memory)

    @property
    def _group(self) -> int:
        return min(GROUP_PATCHES, self.options.max_length, int(self._patches.max()))

    @property
    def _slots(self) -> int:
        # A group that arrived waits while the next task is in flight.
        return self.options.max_length + self._group * (TASKS_PER_WORKER * self.options.num_workers + 1)

    @cached_property
    def _slot_bytes(self) -> int:
        """Bytes of the largest patch; with a transform, those of the first patch after it."""
        if self.options.transform is not None:
            return SlotLayout.of_patch(self._first_patch()).nbytes
        return max(self._reader.layout_of(subject).nbytes for subject in self.subjects)

    def _first_patch(self) -> Patch:
        """The first patch of epoch 0, transformed."""
        draw = next(self.plan(0).draws())
        draw = dataclasses.replace(draw, numbers=draw.numbers[:1], arrivals=draw.arrivals[:1])
        try:
            return next(self._reader.patches(draw))
        except Exception as error:  # the same error as in a worker
            failed = FailedDraw.of(Task(0, draw, ()), self._reader.name_of(draw.subject), error)
            raise failed.error() from error

    @property
    def pending_dtype(self) -> torch.dtype | None:
        """The type of values that the patches of ``iter_shared`` still have to be converted to, if any."""
        return self.options.dtype if self.options.transform is None else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the epoch of a loaded state is resumed at its patch.

        An iteration that runs continues, and ``state_dict`` is its state until it ends.
        """
        epoch = as_integer("an epoch", epoch)
        if epoch < 0:
            raise OptionError(f"an epoch is at least 0, not {epoch}")
        self.position.choose(epoch)

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch on this rank."""
        order = self.subject_order(epoch)
        subjects, total = self.share.deal(order, self._patches)
        return EpochPlan(
            seed=self.options.seed,
            epoch=epoch,
            subjects=subjects,
            patches=self._patches[subjects],
            total=total,
            group=self._group,
            buffer=self.options.max_length,
            shuffle=self.options.shuffle_patches,
        )

    def subject_order(self, epoch: int) -> NDArray[np.int64]:
        """The subjects of an epoch by their numbers, in order, before they are dealt out to ranks."""
        return self.options.subject_order(epoch, self.num_subjects)

    def upcoming(self, plan: EpochPlan) -> EpochPlan | None:
        """The epoch after a plan, which workers begin while the buffer drains; None if not known yet."""
        sampler = self.options.subject_sampler
        if sampler is not None and not hasattr(sampler, "set_epoch"):
            return None  # it may give another order each time: it is iterated when the epoch begins
        try:
            return self.plan(plan.epoch + 1)
        except OptionError:  # its shares are uneven: an error when the epoch begins
            return None

    def __iter__(self) -> Iterator[Patch]:
        """The patches of an epoch, each in memory that is not shared."""
        for patch in self.iter_shared():
            yield copied(patch, self.pending_dtype)

    def iter_shared(self) -> Iterator[Patch]:
        """The same patches without a copy: each is a view that is valid until the next one is asked for.

        They are still to be converted to values of type ``pending_dtype``.
        """
        if get_worker_info() is not None:
            raise QueueError(
                "a queue runs its own workers: give DataLoader num_workers=0, and the number of workers "
                "to Queue(num_workers=...)"
            )
        self.options.check_share(self.share)
        with self._turn:
            self._end_iteration()
            plan = self.plan(self.position.epoch)
            consumed = self.position.begin(plan)
            mine = self.position.iteration
        try:
            with self._turn:
                buffer, reads_ahead = self._running(), self.upcoming(plan) is not None
            patches = buffer.iter_patches(plan, consumed, reads_ahead=reads_ahead)
            while True:
                with self._turn:
                    patch = next(patches, None)
                    if patch is None:
                        break
                    self.position.advance()
                yield patch
                if mine != self.position.iteration:
                    raise QueueError(
                        "the queue was closed, or another iteration of it was begun; iterate it anew"
                    )
        finally:
            if mine == self.position.iteration:
                self._end_iteration()

    def _end_iteration(self) -> None:
        """End the iteration that runs, if any, and release its last patch."""
        self.position.finish()
        if self._buffer is not None:
            self._buffer.release()

    def _running(self) -> PatchBuffer:
        if self._buffer is None or self._buffer.is_closed:
            queue = weakref.ref(self)  # workers end with the queue, which they must not keep alive
            feed = PatchFeed(
                self._reader,
                lambda plan: None if (alive := queue()) is None else alive.upcoming(plan),
                num_workers=self.options.num_workers,
                slots=self._slots,
                slot_bytes=self._slot_bytes if self.options.num_workers else 0,
                start_method=self.options.start_method or START_METHOD,
                timeout=self.options.timeout,
            )
            self._buffer = PatchBuffer(feed, self.options.max_length)
        return self._buffer

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as small JSON: the stream, and how many of its patches were handed out."""
        return queue_state(self._fingerprint(), self.options.seed, *self.position.next_patch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where another queue of the same stream was, under any ``num_workers``; see ``set_epoch``.

        The state of another stream is an OptionError that names what differs.
        """
        epoch, consumed = epoch_and_consumed(state, self._fingerprint(), self.options.seed)
        plan = self.plan(epoch)
        if consumed > plan.total:
            raise OptionError(f"the state has {consumed} patches of an epoch of {plan.total}")
        self._end_iteration()
        self.position.resume(plan, consumed)

    @cached_property
    def _subjects_digest(self) -> str:
        return subjects_digest(self.subjects)

    def _fingerprint(self) -> Json:
        """What the stream depends on, except the seed."""
        options, sampler = self.options, self.options.subject_sampler
        return {
            "cohort": self._subjects_digest,
            "sampler": repr(self.patch_sampler),
            "patches_per_volume": options.patches_per_volume,
            "max_length": options.max_length,
            "shuffle_subjects": options.shuffle_subjects,
            "shuffle_patches": options.shuffle_patches,
            "subject_sampler": sampler is not None and order_identity(sampler, self.subject_order(0)),
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
