"""The queue: patches of many subjects, read by workers, shuffled in a bounded buffer.

An epoch is a plan first: the order of subjects, the draws of each, and the places where the shuffle puts them
are pure functions of (seed, epoch). Workers only carry the plan out, so the stream is the same for any number
of them, and can be resumed at any patch. Each patch is written once, where its batch wants it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from zpatch.digests import Json
from zpatch.epochs.epoch_plan import EpochPlan, Uneven
from zpatch.epochs.stream_position import (
    StreamPosition,
    Turn,
    epoch_and_consumed,
    queue_state,
    subjects_digest,
)
from zpatch.epochs.subject_weights import GivenWeights
from zpatch.errors import OptionError, QueueError
from zpatch.images.subject import Subject
from zpatch.loading.batch_feed import BatchFeed
from zpatch.loading.batch_slots import FilledBatch, slots_needed
from zpatch.loading.device_copies import Streams
from zpatch.loading.draw_reader import DrawReader
from zpatch.loading.queue_options import QueueOptions, ShownOptions, as_integer
from zpatch.loading.queue_stats import IterationCounts, QueueStats
from zpatch.loading.queue_subjects import AnyTransform, OnBad
from zpatch.loading.shared_slots import WATCH_BYTES, SlotBlock, SlotLayout, copied
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_sampler import PatchSampler

GROUP_PATCHES = 32
ENDED = "the queue was closed, or another iteration of it was begun; iterate it anew"

T = TypeVar("T")


class Queue(ShownOptions, IterableDataset[Patch]):
    """An endless training set in bounded memory: iterate it once for each epoch.

    One epoch is each subject once, with ``patches_per_volume`` patches of each (all of them with a
    GridSampler); no patch is left over for the next epoch. At most ``max_length`` patches wait in the buffer;
    with ``shuffle_patches`` each is handed out up to so many places after its place in the order of reading.
    The stream is a function of (seed, epoch) and the same for every ``num_workers``, with a random
    ``transform`` too: torch's, numpy's and Python's generators are seeded by (seed, epoch, subject, draw)
    before each call of it.

    Images arrive as ``dtype``, (C, I, J, K); with None they keep their stored type, and the ``slope`` and
    ``inter`` of each patch apply. Label maps keep their type if torch computes with it. An iteration without
    ``set_epoch`` before it takes the epoch after the last one that was finished. ``subject_sampler`` (torch's
    DistributedSampler, say) decides the order of subjects and needs ``shuffle_subjects=False``.

    Under torch.distributed, or with ``rank`` and ``world_size``, each process gets its share: as many
    subjects and patches as every other process. Where they cannot be divided evenly, ``uneven="pad"`` repeats
    some subjects, ``drop`` leaves the rest out, and ``error`` refuses.

    ``subject_weights``, by the names of subjects or one for each, says how often they come: an epoch still
    has as many visits as subjects, N, and each comes ``N * weight / sum`` times, rounded down or up at random
    so that this is the mean; visits of one subject give different patches. Those of weight 0 never come.
    ``class_balance={"seg": {1: 1, 2: 1, 3: 2}}`` chooses these weights, and the probabilities of the
    LabelSampler of that map, so that over the cohort the centres that it draws are of these classes in this
    proportion, however rare they are. Subjects with none of the classes never come.

    Subjects that cannot give a patch (an image that is missing, smaller than the patch or on another grid, no
    voxel of a wanted class) are an error at once that names them all; ``on_bad="skip"`` leaves them out.

    A worker that dies or hangs is a QueueError, as is a subject that cannot be read. Feed the queue to
    ``SubjectsLoader``, or to torch's DataLoader with ``num_workers=0``. It is a context manager; ``close``
    ends its workers. ``options`` has all options. ``print(queue.stats())`` says where the time goes;
    ``on_stats`` gets the same as each epoch ends.

    >>> import numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> from zpatch.sampling.samplers import UniformSampler
    >>> subjects = [Subject(name=name, t1=ScalarImage(np.zeros((8, 8, 8)))) for name in ("a", "b")]
    >>> with Queue(subjects, UniformSampler(4), patches_per_volume=1) as queue:
    ...     [tuple(patch.t1.data.shape) for patch in queue]
    [(1, 4, 4, 4), (1, 4, 4, 4)]
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
        transform: AnyTransform | None = None,
        subject_sampler: Iterable[int] | None = None,
        *,
        seed: int = 0,
        subject_weights: GivenWeights | None = None,
        class_balance: Mapping[str, Mapping[int, float]] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        on_bad: OnBad = "error",
        start_method: str | None = None,
        timeout: float = 120,
        dtype: torch.dtype | None = torch.float32,
        on_stats: Callable[[QueueStats], object] | None = None,
    ) -> None:
        options = QueueOptions(
            max_length=max_length, patches_per_volume=patches_per_volume, num_workers=num_workers,
            shuffle_subjects=shuffle_subjects, shuffle_patches=shuffle_patches, transform=transform,
            subject_sampler=subject_sampler, seed=seed, subject_weights=subject_weights,
            class_balance=class_balance, rank=rank, world_size=world_size, uneven=uneven, on_bad=on_bad,
            start_method=start_method, timeout=timeout, dtype=dtype, on_stats=on_stats,
        )  # fmt: skip
        self.subjects, self.patch_sampler, self.weights = options.choose(subjects, patch_sampler)
        self.options = options
        self.position = StreamPosition()
        self.batch_size = 1
        self._streams: Streams | None = None
        self._turn = Turn("the queue is iterated by another thread; give each thread a queue of its own")
        per_volume, seed = options.patches_per_volume, options.seed  # as Python's integers
        self._reader = DrawReader(self.subjects, self.patch_sampler, per_volume, dtype, transform, seed)
        self._patches = self.count_patches()
        self.share = options.share_of(self._patches)
        self._feed: BatchFeed | None = None
        self._counted: IterationCounts | None = None  # of the iteration that was begun last

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
        """Bytes of the memory for patches that wait, are in flight, or were handed out in batches.

        It depends on ``batch_size``: 1, or that of the last ``SubjectsLoader``.
        """
        return WATCH_BYTES + self._slots * self._layout.nbytes

    @property
    def max_memory_pretty(self) -> str:
        """``max_memory`` for people."""
        return format_bytes(self.max_memory)

    @property
    def _group(self) -> int:
        return min(GROUP_PATCHES, self.options.max_length, int(self._patches.max()))

    @property
    def _slots(self) -> int:
        return slots_needed(self.options, self._group, self.batch_size)

    @property
    def _layout(self) -> SlotLayout:
        """The layout of a slot."""
        return self._reader.largest_layout(lambda: self.plan(0)).with_rows(self.batch_size)

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
        order, counts_all = self.subject_order(epoch), self.weights is not None
        visits, total = self.share.deal(order, self._patches, counts_all=counts_all)
        return EpochPlan(
            seed=self.options.seed,
            epoch=epoch,
            visits=visits,
            patches=self._patches[visits.subjects],
            total=total,
            group=self._group,
            buffer=self.options.max_length,
            shuffle=self.options.shuffle_patches,
        )

    def subject_order(self, epoch: int) -> NDArray[np.int64]:
        """The subjects of an epoch by their numbers, in order, before they are dealt out to ranks."""
        return self.options.subject_order(epoch, self.num_subjects, self.weights)

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
        return self._iterate(lambda filled: ((1, copied(patch)) for patch in filled.patches()))

    def iter_batches(
        self, batch_size: int, *, drop_last: bool, sends_stored: bool, streams: Streams | None
    ) -> Iterator[FilledBatch]:
        """The batches of an epoch as workers wrote them, each valid until the next one is asked for.

        ``sends_stored`` leaves slope and intercept to apply to voxels, where those are smaller than values.
        With ``streams`` batches are in page-locked memory.
        """
        self.batch_size, self._streams = batch_size, streams
        self._reader = self._reader.sending_stored(sends_stored)
        return self._iterate(lambda filled: [(len(filled), filled)], drop_last=drop_last)

    def _iterate(
        self, parts: Callable[[FilledBatch], Iterable[tuple[int, T]]], *, drop_last: bool = False
    ) -> Iterator[T]:
        """The parts of the batches of an epoch; each part comes with its number of patches."""
        self.options.check_process(self.share)
        with self._turn:
            self._begin_iteration()
            plan = self.plan(self.position.epoch)
            consumed = self.position.begin(plan)
            mine = self.position.iteration
        left = plan.total - consumed
        dropped = left % self.batch_size if drop_last else 0
        batches = -(-(left - dropped) // self.batch_size)
        try:
            with self._turn:
                feed = self._running()
                if self._streams is not None:
                    feed.page_lock(self._streams)
                serial = feed.begin(plan, consumed, batches)
                self._counted = feed.counts
            for number in range(batches):
                with self._turn:
                    filled = feed.batch(serial, number)
                for patches, part in parts(filled):
                    left -= patches
                    self.position.advance(patches + (dropped if left == dropped else 0))
                    yield part
                    if mine != self.position.iteration:
                        raise QueueError(ENDED)
                del filled, part  # so that the slot is used again
            if left == dropped == plan.total - consumed:
                self.position.advance(dropped)
        finally:
            if mine == self.position.iteration:
                self.position.finish()
                if self._counted is not None:
                    self._counted.finish()
            if self._feed is not None and self._feed.is_closed:
                self._feed = None  # and its memory

    def _begin_iteration(self) -> None:
        """End the iteration that runs, if any."""
        self.position.finish()

    def _running(self) -> BatchFeed:
        if self._feed is not None and self._feed.block.layout != self._layout:
            self._feed.close()
            self._feed = None
        if self._feed is None:
            queue = weakref.ref(self)  # workers end with the queue, which they must not keep alive
            self._feed = BatchFeed(
                self._reader,
                lambda plan: None if (alive := queue()) is None else alive.upcoming(plan),
                SlotBlock(self._slots, self._layout, shared=self.options.num_workers > 0),
                self.options,
            )
        return self._feed

    def stats(self) -> QueueStats:
        """Where the time goes in the iteration that runs, or went in the last one; print it for a table.

        A QueueError before the first iteration.
        """
        if self._counted is None:
            raise QueueError("the queue was not iterated yet, so that there are no stats")
        return self._counted.stats()

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
        self.position.resume(plan, consumed)

    @cached_property
    def _subjects_digest(self) -> str:
        return subjects_digest(self.subjects)

    def _fingerprint(self) -> Json:
        """What the stream depends on, except the seed."""
        return {
            "cohort": self._subjects_digest,
            "sampler": repr(self.patch_sampler),
            **({} if self.weights is None else {"subject_weights": self.weights.digest}),
            **self.options.fingerprint(self.share, lambda: self.subject_order(0)),
        }

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        self.position.finish()
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.close()

    def __del__(self) -> None:
        if getattr(self, "_feed", None) is not None:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
