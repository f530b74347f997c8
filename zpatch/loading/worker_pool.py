"""Worker processes: started once, watched, and named when they die."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from zpatch.errors import OptionError, QueueError
from zpatch.loading.shared_slots import SharedPickle
from zpatch.loading.worker import Delivery, FailedDraw, SubjectDraws, Task, start_worker

TASKS_PER_WORKER = 2
WATCH_S = 0.5
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # whatever Python's own is
Result = Delivery | FailedDraw


class _Workers:
    """Worker processes that are started once, and watched."""

    def __init__(
        self,
        draws: SubjectDraws,
        tasks: Callable[[], Iterator[Task]],
        count: int,
        start_method: str,
        timeout: float,
    ) -> None:
        self._draws = draws
        self._start_method = start_method
        self._timeout = timeout
        self._waiting_since: float | None = None
        self._hung: str | None = None  # which workers, once they were found to
        self._stopped = threading.Event()
        self._loader: DataLoader[Result] = DataLoader(
            draws,
            batch_size=None,
            sampler=_Tasks(tasks),
            num_workers=count,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            worker_init_fn=start_worker,
            persistent_workers=True,
            prefetch_factor=TASKS_PER_WORKER,
            multiprocessing_context=start_method,
            generator=torch.Generator(),  # torch would draw a seed from its global one
        )
        self._results: Iterator[Result] | None = None
        self._processes: list[BaseProcess] = []

    def next_result(self) -> Result:
        """What comes back next."""
        if self._results is None:
            self._start()
        assert self._results is not None
        self._waiting_since = time.monotonic()
        try:
            result = next(self._results, None)
            if result is None:  # the tasks had come to an end, and there are new ones
                self._results = iter(self._loader)
                result = next(self._results)
        except RuntimeError as error:
            what = f"ended: {self.describe_dead() or error}"
            if self._hung is not None:
                what = f"gave nothing for {self._timeout:g} s: {self._hung or error}"
            raise QueueError(f"a worker of the queue {what}") from error
        finally:
            self._waiting_since = None
        return result

    def _start(self) -> None:
        others = set(multiprocessing.active_children())
        try:
            if self._start_method != "fork":
                self._draws.pickle = _shared_pickle_of(self._draws)
            self._results = iter(self._loader)
        except OSError as error:
            _end_half_started(error, others)
            raise QueueError(
                f"the workers of the queue cannot be started ({error.strerror}); free some space in /dev/shm "
                f"or memory, or use fewer num_workers"
            ) from error
        finally:
            self._draws.pickle = None  # each worker holds its file
        self._processes = [p for p in multiprocessing.active_children() if p not in others]
        _running.add(self)
        _name_killed_workers()
        watched = weakref.ref(self)
        threading.Thread(target=_watch, args=[watched, self._stopped], daemon=True).start()

    def kill_if_hung(self) -> None:
        """End workers that hang: torch notices within seconds that they are gone."""
        since = self._waiting_since
        if since is not None and time.monotonic() - since > self._timeout:
            at = [(process.pid, self._at(process.pid)) for process in self._processes]
            self._hung = "; ".join(f"worker {pid} hung{subject}" for pid, subject in at if subject)
            for process in self._processes:
                process.kill()

    def describe_dead(self) -> str:
        """Which workers have died, of what, and over which subject; empty where none has."""
        return "; ".join(
            f"worker {process.pid} {_death(process.exitcode)}{self._at(process.pid)}"
            for process in self._processes
            if process.exitcode is not None  # even 0: nobody has told it to end
        )

    def _at(self, pid: int | None) -> str:
        if (block := self._draws.block) is None:
            return ""
        for worker, subject in block.watched.reshape(-1, 2).tolist():
            if worker == pid and subject:
                return f" over subject {self._draws.name_of(subject - 1)!r}"
        return ""

    def close(self) -> None:
        """End all workers."""
        self._stopped.set()
        _running.discard(self)
        loader_iterator, self._results = self._results, None
        if loader_iterator is not None:
            _closing.add(self)  # how its workers end is of no interest any more
            try:
                loader_iterator._shutdown_workers()  # type: ignore[attr-defined]
            finally:
                _closing.discard(self)


def _end_half_started(error: OSError, others: Collection[BaseProcess]) -> None:
    """End the workers that torch had started before it failed, which it cannot do itself without noise."""
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()
            process.join()
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
            half_made._shutdown = True


def _watch(watched: weakref.ref[_Workers], stopped: threading.Event) -> None:
    while not stopped.wait(WATCH_S):
        if (workers := watched()) is None:
            return
        workers.kill_if_hung()
        del workers


class _Tasks:
    """The sampler of torch's DataLoader: tasks instead of indices."""

    def __init__(self, tasks: Callable[[], Iterator[Task]]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Task]:
        return self._tasks()


def _as_it_is(result: Result) -> Result:
    return result


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with code {exit_code}"


def check_processes(start_method: str | None, timeout: float) -> None:
    """Refuse how workers are to be started, or waited for, where that cannot be."""
    methods = multiprocessing.get_all_start_methods()
    if start_method is not None and start_method not in methods:
        raise OptionError(f"start_method must be one of {', '.join(methods)}, not {start_method!r}")
    if timeout <= 0:
        raise OptionError(f"timeout must be above 0 seconds, not {timeout}")


def _shared_pickle_of(draws: SubjectDraws) -> SharedPickle:
    try:
        return draws.shared_pickle()
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError) as error:
        raise QueueError(
            f"subjects, sampler or transform cannot be sent to a worker ({error}); define them at the "
            f"top of a module, or use start_method='fork'"
        ) from error


_running: weakref.WeakSet[_Workers] = weakref.WeakSet()
_closing: weakref.WeakSet[_Workers] = weakref.WeakSet()


def _name_killed_workers() -> None:
    """Torch hears of a killed worker in a signal handler, wherever the main thread is: say it as ours."""
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
