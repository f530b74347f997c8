"""Which tasks of a run are still to be started, how many at a time, and how often their workers died.

When a worker dies, nobody can tell which of the tasks in flight killed it. Each of them is a suspect from
then on, and is run alone: the next death tells whose fault it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from zpatch.errors import WorkerError

MAX_DEATHS = 4


class Attempts:
    """The tasks of a run, by number, that wait to be started.

    ``waiting`` are tasks that no worker died with, ``suspects`` tasks that were in flight when one died.

    >>> attempts = Attempts(4)
    >>> queue, most = attempts.round(most=2)
    >>> in_flight = [queue.popleft(), queue.popleft()]
    >>> attempts.worker_died(in_flight)
    []
    >>> attempts.round(most=2)
    (deque([0, 1]), 1)
    """

    def __init__(self, count: int) -> None:
        self.waiting = deque(range(count))
        self.suspects: deque[int] = deque()
        self._deaths = [0] * count

    def __bool__(self) -> bool:
        """Whether a task is still to be started."""
        return bool(self.waiting or self.suspects)

    def round(self, most: int) -> tuple[deque[int], int]:
        """The tasks to start next, and how many of them at a time: all suspects first, each alone."""
        return (self.suspects, 1) if self.suspects else (self.waiting, most)

    def deaths_of(self, number: int) -> int:
        """How many workers died with a task in flight."""
        return self._deaths[number]

    def worker_died(self, in_flight: Iterable[int], deaths: int = 1) -> list[int]:
        """Count ``deaths`` for tasks in flight, which become suspects again; return the tasks given up."""
        in_flight = sorted(in_flight)
        for number in in_flight:
            self._deaths[number] += deaths
        self.suspects.extendleft(n for n in reversed(in_flight) if self._deaths[n] < MAX_DEATHS)
        return [number for number in in_flight if self._deaths[number] >= MAX_DEATHS]


def given_up() -> WorkerError:
    """The result of a task whose worker died too often."""
    return WorkerError(
        f"its worker was killed {MAX_DEATHS} times, perhaps for want of memory; try fewer jobs="
    )
