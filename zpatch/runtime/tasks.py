"""Tasks, run in this process, in local processes, or on a Dask cluster.

Tasks that leave this process take paths and return one small record, so that no array passes the scheduler.
They are idempotent: a task whose worker was killed is run again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from zpatch.errors import WorkerError
from zpatch.runtime.attempts import Attempts, given_up
from zpatch.runtime.dask_cluster import run_on_cluster
from zpatch.runtime.task_contract import Cluster, Progress, Result, Task, TaskFunction

T = TypeVar("T")
POLL_S = 0.2


def core_count() -> int:
    """The number of cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the item before it is in use: two are alive at most."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="zpatch-read-ahead") as pool:
        upcoming = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
            del item


def run_tasks(
    function: TaskFunction[Task, Result],
    tasks: Sequence[Task],
    *,
    jobs: int = 1,
    cluster: Cluster | None = None,
    progress: Progress = lambda amount: None,
) -> Iterator[tuple[int, Result | WorkerError]]:
    """Run ``function(task, progress)`` for each task; give each task's number and result as they finish.

    Tasks run in ``jobs`` local processes, in this process where that is 1, or on a Dask ``cluster``. A task
    whose worker dies is run again, and after four deaths its result is a WorkerError.
    """
    if cluster is not None:
        yield from run_on_cluster(function, tasks, cluster, progress)
    elif jobs > 1 and len(tasks) > 1:
        yield from _in_processes(function, tasks, min(jobs, len(tasks)), progress)
    else:
        for number, task in enumerate(tasks):
            yield number, function(task, progress)


def _in_processes(
    function: TaskFunction[Task, Result], tasks: Sequence[Task], jobs: int, progress: Progress
) -> Iterator[tuple[int, Result | WorkerError]]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    reported = _Reported(context.RawArray("q", len(tasks)), progress)
    attempts = Attempts(len(tasks))
    while attempts:
        queue, most = attempts.round(jobs)
        in_flight: dict[Future[Result], int] = {}
        with _worker_pool(context, most, reported.amounts) as pool:
            try:
                while queue or in_flight:
                    while queue and len(in_flight) < most:
                        future = pool.submit(_in_worker, function, queue[0], tasks[queue[0]])
                        in_flight[future] = queue.popleft()
                    done, _ = wait(in_flight, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    reported.update(in_flight.values())
                    for future in done:
                        result = future.result()
                        yield in_flight.pop(future), result
            except BrokenProcessPool:
                for number in attempts.worker_died(in_flight.values()):
                    yield number, given_up()


class _Reported:
    """Progress of all tasks. Each task has an amount that only its worker changes: this needs no lock, which
    a killed worker would never release."""

    def __init__(self, amounts: Any, progress: Progress) -> None:
        self.amounts = amounts
        self._progress = progress
        self._reported = [0] * len(amounts)  # the most that any attempt of a task has reported

    def update(self, in_flight: Iterable[int]) -> None:
        """Report what is new of the tasks in flight: a look at all tasks for each would take n * n."""
        new = 0
        for number in in_flight:
            if (more := self.amounts[number] - self._reported[number]) > 0:
                self._reported[number] += more
                new += more
        if new:
            self._progress(new)


@contextlib.contextmanager
def _worker_pool(context: Any, workers: int, amounts: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and at once when the block is left early."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (amounts,))
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_amounts: Any = None


def _start_worker(amounts: Any) -> None:
    global _amounts
    _amounts = amounts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and decides
    end_with_parent()


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has ended, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=[parent.sentinel], daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _in_worker(function: TaskFunction[Task, Result], number: int, task: Task) -> Result:
    _amounts[number] = 0

    def count(amount: int) -> None:
        _amounts[number] += amount

    return function(task, count)
