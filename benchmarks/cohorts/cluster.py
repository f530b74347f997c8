"""A Dask cluster that is simulated: workers join, leave and die, in simulated time, and tasks do nothing.

It stands in for the client of ``dask_cluster``, whose bookkeeping is the real one. All time that is spent in
here is counted, so that it can be told from that of the bookkeeping.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty
from typing import Any
from unittest import mock

from zpatch.runtime import dask_cluster

DASK_RETRIES = 3  # distributed.scheduler.allowed-failures


@dataclass(frozen=True, slots=True)
class Assumptions:
    """How the cluster behaves.

    Attributes:
        workers: Workers, each with one thread, when all are there.
        first: Those that are there at the beginning; the others join one after another.
        join_s: The time until all have joined.
        task_s: The mean time of a task; times are exponential above half of it.
        reports: How often a task reports its progress.
        leave_every_s: The mean time until one of all workers leaves; its task is moved.
        die_every_s: The mean time until one of all is killed; its task is begun again.
        back_s: The time until another worker takes the place of one that is gone.
    """

    workers: int = 1000
    first: int = 10
    join_s: float = 1800.0
    task_s: float = 60.0
    reports: int = 5
    leave_every_s: float = 30.0
    die_every_s: float = 15.0
    back_s: float = 300.0

    def __str__(self) -> str:
        return (
            f"{self.first} workers at first and {self.workers:,} after {self.join_s:g} s, one thread each; "
            f"tasks of {self.task_s:g} s on average with {self.reports} reports of progress; of all workers "
            f"one leaves every {self.leave_every_s:g} s and one is killed every {self.die_every_s:g} s, and "
            f"each is replaced after {self.back_s:g} s"
        )


class SimulatedFuture:
    """What the bookkeeping uses of a future."""

    __slots__ = ("_callbacks", "_cluster", "_error", "_result", "arguments", "deaths", "key", "status")

    def __init__(self, cluster: SimulatedCluster, key: str, arguments: tuple[Any, ...]) -> None:
        self._cluster, self.key, self.arguments = cluster, key, arguments
        self._callbacks: list[Callable[[Any], object]] = []
        self._error: Exception | None = None
        self._result: Any = None
        self.deaths, self.status = 0, "pending"

    def done(self) -> bool:
        return self.status != "pending"

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._callbacks.append(callback)

    def result(self, timeout: float) -> Any:
        if self._error is not None:
            raise self._error
        return self._result

    def finish(self, result: Any, error: Exception | None = None) -> None:
        self._result, self._error = result, error
        self.status = "finished" if error is None else "error"
        for callback in self._callbacks:
            callback(self)


class SimulatedCluster:
    """Tasks in simulated time. ``answer`` makes the result of a task from its arguments.

    ``seconds`` is the processor time that the simulation itself took, ``now`` the simulated time. ``begun``
    and ``deaths`` count tasks that were begun, and tasks whose workers died.
    """

    status = "running"

    def __init__(self, assumed: Assumptions, answer: Callable[[Any], Any], seed: int = 0) -> None:
        self.assumed = assumed
        self.seconds = self.now = 0.0
        self.begun = self.moved = self.deaths = self.most_in_flight = 0
        self._answer = answer
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, str, int]] = []  # time, a number, what, the worker
        self._count = 0
        self._idle: deque[int] = deque()
        self._working: dict[int, SimulatedFuture] = {}
        self._queue: deque[SimulatedFuture] = deque()
        self._alive: set[int] = set()
        self._ids = assumed.workers
        self._listener: Callable[[Any], None] = lambda event: None
        for worker in range(assumed.workers):
            late = max(0, worker - assumed.first + 1) / max(1, assumed.workers - assumed.first)
            self._at(assumed.join_s * late, "join", worker)
        self._at(self._some(assumed.leave_every_s), "leave", -1)
        self._at(self._some(assumed.die_every_s), "die", -1)

    # What the bookkeeping calls.

    def subscribe_topic(self, topic: str, listener: Callable[[Any], None]) -> None:
        self._listener = listener

    def nthreads(self) -> dict[int, int]:
        with self._counted():
            while not self._alive:
                self._step()
            return dict.fromkeys(self._alive, 1)

    def run(self, function: Callable[[], Any]) -> dict[int, bool]:
        return {}

    def submit(self, function: Any, *arguments: Any, key: str, pure: bool) -> SimulatedFuture:
        with self._counted():
            future = SimulatedFuture(self, key, arguments)
            self._queue.append(future)
            self._start()
            self.most_in_flight = max(self.most_in_flight, len(self._queue) + len(self._working))
            return future

    # The simulation.

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        begin = time.thread_time()
        yield
        self.seconds += time.thread_time() - begin

    def advance(self, until: Callable[[], bool]) -> None:
        """Let events happen until something is so, or nothing is left to happen to a task."""
        with self._counted():
            while not until():
                if not self._queue and not self._working:
                    raise Empty
                self._step()

    def _some(self, mean: float) -> float:
        return self._rng.expovariate(1 / mean)

    def _at(self, when: float, what: str, worker: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what, worker))

    def _step(self) -> None:
        self.now, _, what, worker = heapq.heappop(self._events)
        getattr(self, f"_{what}")(worker)
        self._start()

    def _start(self) -> None:
        while self._queue and self._idle:
            worker = self._idle.popleft()
            if worker in self._alive:
                self._working[worker] = self._queue.popleft()
                self.begun += 1
                half = self.assumed.task_s / 2
                self._at(self.now + half + self._some(half), "end", worker)

    def _join(self, worker: int) -> None:
        self._alive.add(worker)
        self._idle.append(worker)

    def _end(self, worker: int) -> None:
        if worker not in self._alive:
            return
        future = self._working.pop(worker)
        self._idle.append(worker)
        _, task, number, _ = future.arguments
        for part in range(1, self.assumed.reports + 1):
            self._listener((None, (number, part)))
        future.finish((self._answer(task), self.assumed.reports))

    def _gone(self, worker: int) -> SimulatedFuture | None:
        self._alive.discard(worker)
        self._at(self.now + self.assumed.back_s, "join", self._ids)
        self._ids += 1
        return self._working.pop(worker, None)

    def _leave(self, _: int) -> None:
        self._at(self.now + self._some(self.assumed.leave_every_s), "leave", -1)
        if self._happens() and (future := self._gone(self._one_of_them())) is not None:
            self.moved += 1
            self._queue.appendleft(future)

    def _die(self, _: int) -> None:
        from distributed import KilledWorker

        self._at(self.now + self._some(self.assumed.die_every_s), "die", -1)
        if self._happens() and (future := self._gone(self._one_of_them())) is not None:
            self.deaths += 1
            future.deaths += 1
            if future.deaths > DASK_RETRIES:
                future.finish(None, KilledWorker(future.key, None, DASK_RETRIES))
            else:
                self._queue.appendleft(future)

    def _happens(self) -> bool:
        """Whether something happens to one of the workers: the oftener, the more of them there are."""
        return self._rng.random() < len(self._alive) / self.assumed.workers

    def _one_of_them(self) -> int:
        """Any worker, without a list of all."""
        if self._working and self._rng.random() < 0.9:
            return next(iter(self._working))  # the one that began first: most of its work is lost
        return next(iter(self._alive))


class _News:
    """The queue of the bookkeeping: where it would wait, simulated time passes."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self, timeout: float) -> Any:
        if not self._items:
            self._cluster.advance(lambda: bool(self._items))
        return self._items.popleft()


@contextlib.contextmanager
def simulated(cluster: SimulatedCluster) -> Iterator[None]:
    """Let every connection to a Dask cluster be to this one."""
    import distributed  # noqa: F401  # its import is not timed

    with (
        mock.patch.object(dask_cluster, "_client_of", return_value=contextlib.nullcontext(cluster)),
        mock.patch.object(dask_cluster, "SimpleQueue", side_effect=functools.partial(_News, cluster)),
    ):
        yield


def check_once(numbers: Counter[int], tasks: int) -> None:
    """Raise AssertionError unless each task has given one result."""
    assert len(numbers) == tasks, f"{tasks - len(numbers)} of {tasks} tasks gave no result"
    assert set(numbers.values()) <= {1}, "a task gave its result more than once"
