"""Worker processes: started once, watched, and named in the error when they die.

Torch's DataLoader keeps them. This module alone depends on private parts of torch: of its
``_MultiProcessingDataLoaderIter`` the methods ``_shutdown_workers`` and ``_try_put_index`` and the attributes
``_shutdown``, ``_send_idx`` and ``_rcvd_idx``, and its handler of SIGCHLD.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from zpatch.errors import OptionError, QueueError
from zpatch.loading.draw_reader import DrawReader
from zpatch.loading.queue_stats import PROCESS, SUBJECT
from zpatch.loading.shared_slots import SlotBlock
from zpatch.loading.worker import Result, Task, Worker, start_worker

TASKS_PER_WORKER = 2
WATCH_S = 0.5
COUNTED_S = 2 * WATCH_S  # of the time between two looks: in the rest, this process may have been stopped
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # whatever Python's own default is


class WorkerPool:
    """Worker processes that do tasks in order, from the first ``send`` until ``close``.

    ``next_task`` gives the task to send next, or None where there is none now. ``reader`` and ``block`` are
    what the workers read patches with and write them to. Workers that give no result for ``timeout`` seconds
    while one is awaited are killed; time in which this process was stopped does not count.
    """

    def __init__(
        self,
        reader: DrawReader,
        block: SlotBlock,
        next_task: Callable[[], Task | None],
        count: int,
        start_method: str,
        timeout: float,
    ) -> None:
        self._reader = reader
        self._block = block
        self._start_method = start_method
        self._timeout = timeout
        self._wait: _Wait | None = None  # for the result that is awaited
        self._hung: str | None = None  # which workers, once some were found to hang
        self._stopped = threading.Event()
        self._worker = Worker(reader, block)
        self._loader: DataLoader[Result] = DataLoader(
            self._worker,
            batch_size=None,
            sampler=_Tasks(next_task),
            num_workers=count,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            worker_init_fn=start_worker,
            persistent_workers=True,
            prefetch_factor=TASKS_PER_WORKER,
            multiprocessing_context=start_method,
            generator=torch.Generator(),  # torch would draw a seed from its global one
        )
        self._results: Any = None  # torch's iterator over the results, once workers run
        self._limit = TASKS_PER_WORKER * count
        self._processes: list[BaseProcess] = []

    @property
    def in_flight(self) -> int:
        """Number of tasks whose results were not taken yet."""
        return 0 if self._results is None else int(self._results._send_idx - self._results._rcvd_idx)

    def send(self) -> None:
        """Send tasks, as long as there are some and each worker has fewer than ``TASKS_PER_WORKER``."""
        if self._results is None:
            self._start()
        before = -1
        while before < self.in_flight < self._limit:
            before = self.in_flight
            self._results._try_put_index()

    def next_result(self) -> Result:
        """The result of the next task in flight; a QueueError that names the worker where one died or hung.

        The next task, if any, is sent in its place.
        """
        self._wait = _Wait(time.monotonic())
        try:
            result: Result = next(self._results)
        except RuntimeError as error:
            what = f"ended: {self.describe_dead() or error}"
            if self._hung is not None:
                what = f"gave nothing for {self._timeout:g} s: {self._hung or error}"
            raise QueueError(f"a worker of the queue {what}") from error
        finally:
            self._wait = None
        return result

    def _start(self) -> None:
        others = set(multiprocessing.active_children())
        try:
            with nullcontext() if self._start_method == "fork" else self._worker.pickled_once():
                self._results = iter(self._loader)  # which sends the first tasks
        except OSError as error:
            _end_half_started(error, others)
            raise QueueError(
                f"the workers of the queue cannot be started ({error.strerror}); free some space in /dev/shm "
                f"or memory, or use fewer num_workers"
            ) from error
        self._processes = [p for p in multiprocessing.active_children() if p not in others]
        _running.add(self)
        _name_killed_workers()
        watched = weakref.ref(self)
        threading.Thread(target=_watch, args=[watched, self._stopped], daemon=True).start()

    def kill_if_hung(self, looked_s: float) -> None:
        """Kill workers that hang: torch notices within seconds that they have ended.

        ``looked_s`` is when this was called before. If that is longer ago than the calls are apart, this
        process was stopped in between, and its workers perhaps too.
        """
        wait = self._wait
        if wait is None:
            return
        wait.seconds += min(time.monotonic() - max(wait.since_s, looked_s), COUNTED_S)
        if wait.seconds > self._timeout:
            at = [(process.pid, self._at(process.pid)) for process in self._processes]
            self._hung = "; ".join(f"worker {pid} hung{subject}" for pid, subject in at if subject)
            for process in self._processes:
                process.kill()

    def describe_dead(self) -> str:
        """Which workers have died, of what, and over which subject; empty where none has."""
        return "; ".join(
            f"worker {process.pid} {_death(process.exitcode)}{self._at(process.pid)}"
            for process in self._processes
            if process.exitcode is not None  # even 0: nobody has asked it to end
        )

    def _at(self, pid: int | None) -> str:
        """Which subject a worker was reading, as part of an error."""
        for worker, subject in self._block.watched[:-1, [PROCESS, SUBJECT]].tolist():
            if worker == pid and subject:
                return f" over subject {self._reader.name_of(subject - 1)!r}"
        return ""

    def close(self) -> None:
        """End all workers."""
        self._stopped.set()
        _running.discard(self)
        loader_iterator, self._results = self._results, None
        if loader_iterator is not None:
            _closing.add(self)  # from now on it is no error that a worker ends
            try:
                loader_iterator._shutdown_workers()
            finally:
                _closing.discard(self)


def _end_half_started(error: OSError, others: Collection[BaseProcess]) -> None:
    """End the workers that torch had started before it failed; torch itself would print an error."""
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()
            process.join()
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
            half_made._shutdown = True


def _watch(watched: weakref.ref[WorkerPool], stopped: threading.Event) -> None:
    looked_s = time.monotonic()
    while not stopped.wait(WATCH_S):
        if (workers := watched()) is None:
            return
        workers.kill_if_hung(looked_s)
        looked_s = time.monotonic()
        del workers


@dataclass(slots=True)
class _Wait:
    """How long a result is awaited: since when, and for how many seconds in which this process ran."""

    since_s: float
    seconds: float = 0.0


class _Tasks:
    """The sampler of torch's DataLoader: it gives tasks instead of indices.

    Its end is the end of those that can be sent now; more may follow.
    """

    def __init__(self, next_task: Callable[[], Task | None]) -> None:
        self._next_task = next_task

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        if (task := self._next_task()) is None:
            raise StopIteration
        return task


def _unchanged(result: Result) -> Result:
    return result


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with code {exit_code}"


def check_processes(start_method: str | None, timeout: float) -> None:
    """Refuse a start method that this system does not have, and a timeout that is not above 0."""
    methods = multiprocessing.get_all_start_methods()
    if start_method is not None and start_method not in methods:
        raise OptionError(f"start_method must be one of {', '.join(methods)}, not {start_method!r}")
    if timeout <= 0:
        raise OptionError(f"timeout must be above 0 seconds, not {timeout}")


_running: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_closing: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _name_killed_workers() -> None:
    """Let torch's handler of SIGCHLD raise a QueueError that names the worker, where the worker is ours.

    The handler runs wherever the main thread is when a worker dies.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return
    if getattr(handler, "names_killed_workers", False):
        return

    def named(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            dead = "; ".join(filter(None, (workers.describe_dead() for workers in _running)))
            if dead:
                raise QueueError(f"a worker of the queue ended: {dead}") from error
            if not _closing:
                raise  # of another DataLoader

    named.names_killed_workers = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, named)
