"""One epoch of a queue before anything is read: which patches, in which order they are read and handed out.

Nothing here grows with the epoch but a few integers for each of its subjects, and a run that was cut off is
replayed up to where it was without reading anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import new_digest
from zpatch.errors import OptionError
from zpatch.sampling.randomness import Purpose, rng

Uneven = Literal["pad", "drop", "error"]
UNEVEN = ("pad", "drop", "error")


@dataclass(frozen=True, slots=True)
class Draw:
    """Patches of one subject that are read together.

    ``visit`` counts how often the epoch came to the subject before; ``numbers`` are patches of that visit,
    and ``arrivals`` their places in the order in which the epoch reads its patches.
    """

    epoch: int
    subject: int
    visit: int
    numbers: tuple[int, ...]
    arrivals: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan:
    """One epoch as a pure function of its fields.

    ``subjects`` are those to be read, in order; ``patches`` how many there are of each. ``total`` is how many
    patches the epoch has; where that is more than there are, it begins anew.
    """

    seed: int
    epoch: int
    subjects: NDArray[np.int64]
    patches: NDArray[np.int64]
    total: int
    group: int
    buffer: int
    shuffle: bool

    def same_as(self, other: EpochPlan | None) -> bool:
        """Whether another plan gives the same stream."""
        return other is not None and self.digest == other.digest

    @property
    def digest(self) -> str:
        """A digest of all that the stream depends on."""
        numbers = self.seed, self.epoch, self.total, self.group, self.buffer, self.shuffle
        state = new_digest(repr(numbers).encode())
        state.update(self.subjects.tobytes() + self.patches.tobytes())
        return state.hexdigest()

    def order(self) -> Iterator[int]:
        """The arrivals as they are handed out: a sliding shuffle.

        Each is drawn from the full buffer, and the next to arrive takes its place; none is refilled in bulk.
        """
        if not self.shuffle:
            yield from range(self.total)
            return
        picks = rng(self.seed, self.epoch, purpose=Purpose.SHUFFLE)
        buffer = list(range(min(self.buffer, self.total)))
        upcoming = len(buffer)
        while buffer:
            place = int(picks.integers(len(buffer)))
            arrival = buffer[place]
            buffer[place] = buffer[-1]
            buffer.pop()
            if upcoming < self.total:
                buffer.append(upcoming)
                upcoming += 1
            yield arrival

    def draws(self, consumed: int = 0) -> Iterator[Draw]:
        """What is to be read, in order, for the patches after the first ``consumed`` that are handed out."""
        waiting, unread = self._waiting(consumed), consumed + self.buffer
        visits: dict[int, int] = {}
        arrival = 0
        while arrival < self.total:
            for subject, count in zip(self.subjects.tolist(), self.patches.tolist(), strict=True):
                visit = visits.get(subject, 0)
                visits[subject] = visit + 1
                wanted = [
                    number
                    for number in range(min(count, self.total - arrival))
                    if arrival + number >= unread or arrival + number in waiting
                ]
                for first in range(0, len(wanted), self.group):
                    numbers = tuple(wanted[first : first + self.group])
                    yield Draw(self.epoch, subject, visit, numbers, tuple(arrival + n for n in numbers))
                arrival += count
                if arrival >= self.total:
                    return

    def _waiting(self, consumed: int) -> set[int]:
        """What is in the buffer when the first ``consumed`` patches were handed out."""
        waiting = set(range(min(self.buffer, self.total)))
        for arrival, following in zip(
            itertools.islice(self.order(), consumed), itertools.count(self.buffer), strict=False
        ):
            waiting.remove(arrival)
            if following < self.total:
                waiting.add(following)
        return waiting


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of each epoch is this process's: rank ``rank`` of ``world_size``."""

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
        """Refuse a number of subjects that cannot be dealt out."""
        if subjects < self.world_size:
            raise OptionError(
                f"{subjects} subjects cannot be dealt out to {self.world_size} ranks; use fewer processes"
            )
        if self.uneven == "error" and subjects % self.world_size:
            raise OptionError(
                f"{subjects} subjects are not the same number for each of {self.world_size} ranks; "
                f"say uneven='pad' to repeat some or uneven='drop' to leave some out"
            )

    def deal(self, order: NDArray[np.int64], patches: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Choose the rank's subjects out of an epoch's ``order``; and how many patches each rank gives.

        ``patches`` is how many there are of each subject. All ranks have as many subjects and patches: what
        is missing is repeated (``pad``) or what is over is left out (``drop``).
        """
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
                f"say uneven='pad' or uneven='drop' to give each rank as many"
            )
        total = max(totals) if self.uneven == "pad" else min(totals)
        return order[self.rank :: self.world_size], total
