"""Where work runs: in this thread, in dask's threads, in local processes, or on a Dask cluster.

Tasks that leave this process take paths and give one small record, so that no array passes the scheduler.
They are idempotent: one whose worker was killed is simply run again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

from zpatch.errors import WorkerError
from zpatch.runtime.dask_cluster import run_on_cluster
from zpatch.runtime.task_contract import MAX_DEATHS, Progress, Result, Task, TaskFunction, given_up

T = TypeVar("T")
POLL_S = 0.2


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is in use: two are alive at most."""
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
    folder: Path,
    names: Sequence[str],
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Progress = lambda amount: None,
) -> Iterator[tuple[int, Result | WorkerError]]:
    """Run ``function(task, progress)`` for each task; give each task's number and result as they finish.

    In so many local processes as ``jobs``, in this one where that is 1; or on the Dask cluster at
    ``scheduler``, an address or a scheduler file, whose workers must see ``folder``. A task whose worker
    dies is run again, and after four deaths its result is a WorkerError.
    """
    if scheduler is not None:
        yield from run_on_cluster(function, tasks, names, folder, scheduler, progress)
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
    deaths = [0] * len(tasks)
    waiting = deque(range(len(tasks)))
    while waiting:
        # Whoever was there when a worker died is run alone: the next death tells whose fault it is.
        suspect = deaths[waiting[0]] > 0
        limit = 1 if suspect else jobs
        running: dict[Future[Result], int] = {}
        with _worker_pool(context, limit, reported.amounts) as pool:
            try:
                while running or (waiting and suspect == (deaths[waiting[0]] > 0)):
                    while waiting and len(running) < limit and suspect == (deaths[waiting[0]] > 0):
                        future = pool.submit(_in_worker, function, waiting[0], tasks[waiting[0]])
                        running[future] = waiting.popleft()
                    done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    reported.update()
                    for future in done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                for number in sorted(running.values(), reverse=True):
                    deaths[number] += 1
                    if deaths[number] < MAX_DEATHS:
                        waiting.appendleft(number)
                    else:
                        yield number, given_up()


class _Reported:
    """Progress of all tasks: each has a number of its own, which only its worker changes. There is no lock
    that a worker could be killed with."""

    def __init__(self, amounts: Any, progress: Progress) -> None:
        self.amounts = amounts
        self._progress = progress
        self._told = 0

    def update(self) -> None:
        now = sum(self.amounts)
        if now > self._told:
            self._progress(now - self._told)
            self._told = now


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
