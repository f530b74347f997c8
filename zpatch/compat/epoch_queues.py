"""Queues as TorchIO has them: each iteration is an epoch, and a subject sampler is the caller's own.

``CountedQueue`` takes of each subject a number of patches of its own, and its patches tell their subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from zpatch.images.subject import Subject
from zpatch.loading.epoch_plan import EpochPlan
from zpatch.loading.patch_queue import Queue
from zpatch.sampling.grid_sampler import GridSampler, PatchSampler
from zpatch.sampling.patch import Patch


class Subjects(Protocol):
    """Whatever gives subjects by their numbers."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Subject: ...


class EpochQueue(Queue):
    """A queue that goes on to the next epoch in each iteration, also where the last one was broken off.

    The epoch of a ``subject_sampler`` is set by its owner, also where the queue goes on from a state.
    """

    def iter_shared(self) -> Iterator[Patch]:
        """The patches of the next epoch, or of the rest of one; see ``Queue.iter_shared``."""
        self._end_iteration()  # if an epoch was chosen while it ran, that is the next one
        if self._consumed and not self._resumed:
            self.set_epoch(self._epoch + 1)
        return super().iter_shared()

    def upcoming(self, plan: EpochPlan) -> EpochPlan | None:
        """The epoch after one, where the order of its subjects is known already."""
        return super().upcoming(plan) if self.subject_sampler is None else None

    def _subject_order(self, epoch: int) -> NDArray[np.int64]:
        if self.subject_sampler is None:
            return super()._subject_order(epoch)
        return np.array(list(self.subject_sampler), dtype=np.int64)


class CountedQueue(EpochQueue):
    """A queue that takes ``counts[n]`` patches of subject ``n``; at most all of those of a grid."""

    def __init__(
        self,
        subjects: Subjects,
        counts: Sequence[int],
        sampler: PatchSampler,
        max_length: int,
        **options: Any,
    ) -> None:
        self._counts = np.array(counts)
        super().__init__(NumberedSubjects(subjects), sampler, max_length, max(counts), **options)

    def _count_patches(self) -> NDArray[np.int64]:
        if isinstance(self.patch_sampler, GridSampler):
            return np.asarray(np.minimum(super()._count_patches(), self._counts))
        return self._counts


class NumberedSubjects(Sequence[Subject]):
    """Subjects by names that tell their numbers: of its subject, a patch of a queue has only the name."""

    def __init__(self, subjects: Subjects) -> None:
        self._subjects = subjects

    def __len__(self) -> int:
        return len(self._subjects)

    @overload
    def __getitem__(self, index: int) -> Subject: ...
    @overload
    def __getitem__(self, index: slice) -> list[Subject]: ...
    def __getitem__(self, index: int | slice) -> Subject | list[Subject]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        subject = self._subjects[index]
        return Subject.of(subject.images, name=f"{index}: {subject.name}")


def subject_number(patch: Patch) -> int:
    """The number of the subject of a patch."""
    return int(patch.subject.partition(":")[0])
