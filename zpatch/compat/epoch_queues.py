"""Queues as TorchIO has them: each iteration is the next epoch, and the caller sets that of a sampler.

``CountedQueue`` takes a different number of patches from each subject, and its patches name their subject.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from zpatch.epochs.epoch_plan import EpochPlan
from zpatch.images.subject import Subject
from zpatch.loading.patch_queue import Queue
from zpatch.loading.queue_options import QueueOptions
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_sampler import PatchSampler


class Subjects(Protocol):
    """Subjects by their numbers: a list, a cohort, or a dataset of subjects."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Subject: ...


class EpochQueue(Queue):
    """A queue of which each iteration gives the next epoch, also where the last one was broken off.

    Whoever made the ``subject_sampler`` sets its epoch, also where the queue is resumed from a state.
    """

    def _begin_iteration(self) -> None:
        """End the iteration that runs, and the epoch that it broke off."""
        super()._begin_iteration()
        self.position.leave_broken_epoch()

    def upcoming(self, plan: EpochPlan) -> EpochPlan | None:
        """The epoch after a plan, if the order of its subjects is known already."""
        return super().upcoming(plan) if self.options.subject_sampler is None else None

    def subject_order(self, epoch: int) -> NDArray[np.int64]:
        """The subjects of an epoch by their numbers, in the order that a ``subject_sampler`` gives now."""
        if self.options.subject_sampler is None:
            return super().subject_order(epoch)
        return np.array(list(self.options.subject_sampler), dtype=np.int64)


class CountedQueue(EpochQueue):
    """A queue that takes ``counts[n]`` patches of subject ``n``, or all of its grid if those are fewer.

    ``options`` are those of all subjects; their ``patches_per_volume`` is replaced by the largest count.
    """

    def __init__(
        self, subjects: Subjects, counts: Sequence[int], sampler: PatchSampler, options: QueueOptions
    ) -> None:
        self._counts = np.array(counts)
        options = dataclasses.replace(options, patches_per_volume=max(counts))
        super().__init__(NumberedSubjects(subjects), sampler, **options.as_keywords())

    def count_patches(self) -> NDArray[np.int64]:
        """How many patches an epoch takes of each subject, (N,)."""
        return np.asarray(np.minimum(super().count_patches(), self._counts))


class NumberedSubjects(Sequence[Subject]):
    """Subjects whose names begin with their numbers: a patch of a queue has only the name of its subject."""

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
