"""One epoch of a queue before anything is read: its patches, the order of reading, the order of handing out.

A plan takes a few integers for each subject of the epoch, however many patches there are. A run that was
stopped is resumed at any patch without reading, or counting, those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import new_digest
from zpatch.epochs.shuffle import Shuffle
from zpatch.errors import OptionError

Uneven = Literal["pad", "drop", "error"]
UNEVEN = ("pad", "drop", "error")


@dataclass(frozen=True, slots=True)
class Draw:
    """Patches of one subject that are read together.

    ``subject`` is a number, and ``visit`` counts how often the ``epoch`` has read the subject before.
    ``numbers`` are the numbers of the patches within that visit, and ``places`` their places in the order
    in which the epoch hands out its patches.
    """

    epoch: int
    subject: int
    visit: int
    numbers: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """Subjects to read, in order, by their numbers.

    ``first`` has for each how often the subject was read before, and ``times`` how often it is read in one
    pass over all subjects: in pass n it is visit ``first + n * times`` of the subject.

    >>> Visits.of(np.array([7, 8, 7])).first.tolist(), Visits.of(np.array([7, 8, 7])).times.tolist()
    ([0, 0, 1], [2, 1, 2])
    """

    subjects: NDArray[np.int64]
    first: NDArray[np.int64]
    times: NDArray[np.int64]

    @classmethod
    def of(cls, subjects: NDArray[np.int64]) -> Self:
        """The visits of some subjects, which may come more than once."""
        order = np.argsort(subjects, kind="stable")
        sorted_subjects = subjects[order]
        low, high = (np.searchsorted(sorted_subjects, sorted_subjects, side) for side in ("left", "right"))
        first, times = np.empty_like(order), np.empty_like(order)
        first[order], times[order] = np.arange(len(order)) - low, high - low
        return cls(subjects, first, times)

    def of_rank(self, rank: int, world_size: int) -> Visits:
        """Every ``world_size``-th visit, from number ``rank`` on."""
        return Visits(*(of[rank::world_size] for of in (self.subjects, self.first, self.times)))


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """One epoch as a pure function of its fields.

    ``seed`` and ``epoch`` are the address of its random numbers. ``visits`` are those of the subjects
    to read, in order, and ``patches`` the number of patches of each. ``total`` is the number of patches of
    the epoch; if the subjects have fewer, they are visited again. At most ``group`` patches are read
    together. At most ``buffer`` wait to be handed out: with ``shuffle`` in another order than they are read
    in, by fewer than ``buffer`` places.
    """

    seed: int
    epoch: int
    visits: Visits
    patches: NDArray[np.int64]
    total: int
    group: int
    buffer: int
    shuffle: bool

    def same_as(self, other: EpochPlan | None) -> bool:
        """Whether another plan gives the same patches in the same order."""
        return other is not None and self.digest == other.digest

    @property
    def digest(self) -> str:
        """A digest of all numbers that the stream depends on."""
        numbers = self.seed, self.epoch, self.total, self.group, self.buffer, self.shuffle
        state = new_digest(repr(numbers).encode())
        visits = self.visits
        for array in (visits.subjects, visits.first, visits.times, self.patches):
            state.update(array.tobytes())
        return state.hexdigest()

    def draws(self, consumed: int = 0) -> Iterator[Draw]:
        """The draws to read, in order, for all patches but the first ``consumed`` that are handed out.

        >>> one = Visits.of(np.array([0])), np.array([5])
        >>> plan = EpochPlan(0, 0, *one, total=5, group=5, buffer=2, shuffle=False)
        >>> next(plan.draws(3))
        Draw(epoch=0, subject=0, visit=0, numbers=(3, 4), places=(3, 4))
        """
        shuffle = Shuffle(self.seed, self.epoch, self.total, self.buffer if self.shuffle else 1)
        columns = self.visits.subjects, self.visits.first, self.visits.times, self.patches
        first, passes = 0, 0
        while first < self.total:
            for subject, visit, times, patches in zip(*(column.tolist() for column in columns), strict=True):
                stop = min(first + patches, self.total)
                if stop + shuffle.window > consumed:  # the places of others are known to be consumed
                    places = shuffle.places(first, stop)
                    yield from self._groups(subject, visit + passes * times, places, consumed)
                first = stop
                if first == self.total:
                    return
            passes += 1

    def _groups(self, subject: int, visit: int, places: NDArray[np.int64], consumed: int) -> Iterator[Draw]:
        """The draws of a visit, whose patches have some places in the order."""
        wanted = np.flatnonzero(places >= consumed)
        for n in range(0, len(wanted), self.group):
            numbers = wanted[n : n + self.group]
            yield Draw(self.epoch, subject, visit, tuple(numbers.tolist()), tuple(places[numbers].tolist()))


@dataclass(frozen=True, slots=True)
class Share:
    """The part of each epoch that this process gets: rank ``rank`` of ``world_size``.

    ``uneven`` says what happens if the subjects of an epoch cannot be divided evenly: ``pad`` repeats some,
    ``drop`` leaves some out, ``error`` refuses.
    """

    rank: int = 0
    world_size: int = 1
    uneven: Uneven = "pad"

    def __post_init__(self) -> None:
        if self.uneven not in UNEVEN:
            raise OptionError(f"uneven must be one of {', '.join(UNEVEN)}, not {self.uneven!r}")
        if not 0 <= self.rank < self.world_size:
            raise OptionError(
                f"rank must be from 0 to {self.world_size - 1} of {self.world_size}, not {self.rank}"
            )

    def check(self, subjects: int) -> None:
        """Refuse a number of subjects that cannot be dealt out to the ranks."""
        if not subjects:
            raise OptionError("no subject of the queue gives a patch")
        if subjects < self.world_size:
            raise OptionError(
                f"{subjects} subjects cannot be dealt out to {self.world_size} ranks; use fewer processes"
            )
        if self.uneven == "error" and subjects % self.world_size:
            raise OptionError(
                f"{subjects} subjects cannot be divided evenly among {self.world_size} ranks; "
                f"say uneven='pad' to repeat some or uneven='drop' to leave some out"
            )

    def deal(
        self, order: NDArray[np.int64], patches: NDArray[np.int64], *, counts_all: bool = False
    ) -> tuple[Visits, int]:
        """The visits of this rank from the ``order`` of an epoch, and the number of patches of every rank.

        ``patches`` has the number of patches of each subject; those without any are left out. All ranks get
        the same number of subjects and of patches: subjects and patches are repeated (``pad``) or left out
        (``drop``) to make them equal. With ``counts_all`` a subject's visits are counted over all ranks, so
        that none of its patches comes twice; else on each rank.

        >>> visits, total = Share(1, 2).deal(np.array([2, 0, 1]), np.array([5, 5, 5]))
        >>> visits.subjects.tolist(), total
        ([0, 2], 10)
        """
        order = order[patches[order] > 0]
        self.check(len(order))
        ranks, rest = divmod(len(order), self.world_size)
        if rest:
            order = (
                np.resize(order, (ranks + 1) * self.world_size)
                if self.uneven == "pad"
                else order[: ranks * self.world_size]
            )
        totals = [int(patches[order[rank :: self.world_size]].sum()) for rank in range(self.world_size)]
        if len(set(totals)) > 1 and self.uneven == "error":
            raise OptionError(
                f"the ranks' subjects have {min(totals)} to {max(totals)} patches; "
                f"say uneven='pad' or uneven='drop' to give each rank the same number"
            )
        total = max(totals) if self.uneven == "pad" else min(totals)
        if counts_all:
            return Visits.of(order).of_rank(self.rank, self.world_size), total
        return Visits.of(order[self.rank :: self.world_size]), total
