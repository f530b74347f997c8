"""Where work runs: in this thread, in dask's threads, in local processes, or on a Dask cluster.

Tasks that leave this process take paths and give one small record, so that no array passes the scheduler.
They are idempotent: one whose worker was killed is simply run again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from zpatch.errors import OptionError, WorkerError

T = TypeVar("T")
Task = TypeVar("Task")
Result = TypeVar("Result")

Scheduler = Literal["sync", "threads"] | Any  # or a distributed.Client
Progress = Callable[[int], None]
TaskFunction = Callable[[Task, Progress], Result]

MAX_DEATHS = 4
POLL_S = 0.2
CLUSTER_TIMEOUT_S = 30
IN_FLIGHT_PER_THREAD = 2
PROTOCOLS = ("tcp", "tls", "ucx", "ws", "wss")  # of dask.distributed


def is_cluster(scheduler: Scheduler) -> bool:
    """Whether a scheduler is a distributed.Client."""
    return not isinstance(scheduler, str) and hasattr(scheduler, "scheduler_info")


def run_graph(graph: dict[Any, Any], keys: Any, scheduler: Scheduler = "sync") -> Any:
    """Compute one or several keys of a Dask graph, in this thread (``sync``) or dask's pool (``threads``)."""
    return _getter(scheduler)(graph, keys)


def _getter(scheduler: Scheduler) -> Callable[..., Any]:
    if scheduler == "sync":
        from dask.local import get_sync

        return get_sync
    if scheduler == "threads":
        from dask.threaded import get

        return get
    raise OptionError(f"scheduler must be 'sync', 'threads' or a distributed.Client, not {scheduler!r}")


def thread_count(scheduler: Scheduler) -> int:
    """How many tasks the scheduler runs at a time."""
    if scheduler == "sync":
        return 1
    from dask.system import CPU_COUNT

    return CPU_COUNT


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
        yield from _on_cluster(function, tasks, names, folder, scheduler, progress)
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
                        yield number, _given_up()


def _given_up() -> WorkerError:
    return WorkerError(
        f"its worker was killed {MAX_DEATHS} times, perhaps for want of memory; try fewer --jobs"
    )


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


def _on_cluster(
    function: TaskFunction[Task, Result],
    tasks: Sequence[Task],
    names: Sequence[str],
    folder: Path,
    scheduler: str,
    progress: Progress,
) -> Iterator[tuple[int, Result | WorkerError]]:
    with _client_of(scheduler) as client:
        from distributed import KilledWorker, as_completed

        _check_same_folder(client, folder)
        run = uuid.uuid4().hex[:8]
        numbers: dict[Any, int] = {}

        def result_of(future: Any) -> Result:
            result: Result
            result, amount = future.result()
            if amount:
                progress(amount)
            return result

        def submit(number: int, attempt: str) -> Any:
            key = f"{names[number]}-{run}-{attempt}"
            future = client.submit(_on_worker, function, tasks[number], key=key, pure=False)
            numbers[future] = number
            return future

        waiting = deque(range(len(tasks)))
        suspects: list[int] = []
        most = IN_FLIGHT_PER_THREAD * max(1, sum(client.nthreads().values()))
        first = [submit(waiting.popleft(), "together") for _ in range(min(most, len(tasks)))]
        completed = as_completed(first, loop=client.loop)
        for future in completed:
            number = numbers.pop(future)
            try:
                yield number, result_of(future)
            except KilledWorker:
                suspects.append(number)
            if waiting:
                completed.add(submit(waiting.popleft(), "together"))
        for number in suspects:  # each alone: only now is a death its own fault
            try:
                yield number, result_of(submit(number, "alone"))
            except KilledWorker:
                yield number, _given_up()


def _client_of(scheduler: str) -> Any:
    """A connection to a scheduler, by its address or its file."""
    try:
        from distributed import Client
    except ImportError:
        raise OptionError("--scheduler needs dask.distributed; pip install 'zpatch[distributed]'") from None
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        _check_answers(scheduler)
        return Client(**where, timeout=CLUSTER_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"no Dask scheduler answers at {scheduler!r} ({error})") from None


def _check_answers(scheduler: str) -> None:
    """Knock first: a Client that fails to connect may lock up the interpreter when it is collected."""
    address = scheduler
    if Path(scheduler).is_file():
        address = json.loads(Path(scheduler).read_text())["address"]
    place = urlsplit(address)
    if place.scheme not in PROTOCOLS or not place.hostname:
        raise ValueError("an address is like tcp://host:8786")
    if place.scheme in ("tcp", "tls") and place.port:
        socket.create_connection((place.hostname, place.port), CLUSTER_TIMEOUT_S).close()


def _on_worker(function: TaskFunction[Task, Result], task: Task) -> tuple[Result, int]:
    """The result, and how much was told to be done."""
    amounts: list[int] = []
    return function(task, amounts.append), sum(amounts)


def _check_same_folder(client: Any, folder: Path) -> None:
    """A file written here must be seen by every worker: else they would write somewhere else."""
    folder.mkdir(parents=True, exist_ok=True)
    nonce = folder / f".nonce-{uuid.uuid4().hex}"
    nonce.touch()
    try:
        blind = [worker for worker, sees in client.run(nonce.exists).items() if not sees]
    finally:
        nonce.unlink()
    if blind:
        raise OptionError(f"workers {', '.join(blind)} do not see {folder}; use a file system that all share")
