"""A queue whose subjects each give a number of patches of their own, and whose patches tell their subject."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from zpatch.cohort import Subject
from zpatch.patch import Patch
from zpatch.patch_queue import Queue
from zpatch.samplers import GridSampler, PatchSampler


class Subjects(Protocol):
    """Whatever gives subjects by their numbers."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Subject: ...


class CountedQueue(Queue):
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


class CallersOrder:
    """A subject sampler whose epoch the caller sets, not the queue."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)
