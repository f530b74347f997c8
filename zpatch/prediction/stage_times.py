"""Where the time of a prediction goes, by stage; of all its processes together."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from zpatch.digests import Json

STAGES = ("reading", "network", "blending", "reducing", "writing", "waiting")
NO_TIMES: Mapping[str, float] = MappingProxyType({})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StageTimes:
    """The seconds of a prediction by stage, summed over all tasks and processes.

    Batches are read, and shards are written, in threads beside the network, so the shares of all stages may
    be more than the whole. Planning does not count.

    Attributes:
        seconds: The seconds of each stage. ``reading`` has decoding and resampling, ``network`` the copies to
            and from a device, ``blending`` also the return to the scan's own grid, ``reducing`` the filling
            of shards, ``writing`` encoding, syncing, coarser levels and the commit, and ``waiting`` is for
            the next batch, or for the shard before.
        total: The seconds that all tasks took.

    >>> times = StageTimes({"network": 6.0, "reading": 3.0}, total=8.0)
    >>> print(times + StageTimes({"network": 2.0}, total=2.0))
    10.0 s: reading 30 %, network 80 %, blending 0 %, reducing 0 %, writing 0 %, waiting 0 %
    """

    seconds: Mapping[str, float] = field(default_factory=lambda: NO_TIMES)
    total: float = 0.0

    def __add__(self, other: StageTimes) -> StageTimes:
        seconds: Counter[str] = Counter()
        for one in (self, other):
            seconds.update(one.seconds)
        return StageTimes(dict(seconds), self.total + other.total)

    def to_json(self) -> Json:
        """The seconds of all stages and in all, as plain JSON."""
        return {**{stage: self.seconds.get(stage, 0.0) for stage in STAGES}, "total": self.total}

    def __str__(self) -> str:
        whole = self.total or 1.0
        shares = (f"{stage} {self.seconds.get(stage, 0.0) / whole:.0%}" for stage in STAGES)
        return f"{self.total:.1f} s: {', '.join(shares).replace('%', ' %')}"


OnTimes = Callable[[StageTimes], None]


class StageClock:
    """Counts the time of tasks by stage, in any of their threads.

    A stage inside another one of the same thread counts for itself only.
    """

    def __init__(self) -> None:
        self._nanoseconds: Counter[str] = Counter()
        self._total = 0
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block for a stage."""
        outer, self._thread.inner = getattr(self._thread, "inner", 0), 0
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            taken = time.perf_counter_ns() - begin
            with self._lock:
                self._nanoseconds[name] += taken - self._thread.inner
            self._thread.inner = outer + taken

    @contextmanager
    def task(self) -> Iterator[None]:
        """Count the block as a task."""
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            taken = time.perf_counter_ns() - begin
            with self._lock:
                self._total += taken

    def add(self, times: StageTimes) -> None:
        """Add what was counted elsewhere."""
        with self._lock:
            for name, seconds in times.seconds.items():
                self._nanoseconds[name] += round(seconds * 1e9)
            self._total += round(times.total * 1e9)

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each is there counts as waiting. None of them is kept."""
        upcoming, end = iter(items), object()
        while True:
            with self.stage("waiting"):
                item = next(upcoming, end)
            if item is end:
                return
            yield item  # type: ignore[misc]
            del item

    @property
    def times(self) -> StageTimes:
        """What was counted so far."""
        with self._lock:
            return StageTimes({name: ns / 1e9 for name, ns in self._nanoseconds.items()}, self._total / 1e9)
