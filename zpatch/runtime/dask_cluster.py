"""The door to dask.distributed: tasks on a cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from zpatch.errors import OptionError, WorkerError
from zpatch.runtime.attempts import MAX_DEATHS, Attempts, given_up
from zpatch.runtime.task_contract import Cluster, Progress, Result, Task, TaskFunction

CONNECT_TIMEOUT_S = 30
IN_FLIGHT_PER_THREAD = 2
POLL_S = 1.0
REPORT_S = 1.0
RESULT_S = 30.0  # to fetch a result, which is small
LOST = asyncio.CancelledError, concurrent.futures.CancelledError  # how futures end with their scheduler
LOG = logging.getLogger("zpatch")
PROTOCOLS = ("tcp", "tls", "ucx", "ws", "wss")  # of dask.distributed


def run_on_cluster(
    function: TaskFunction[Task, Result], tasks: Sequence[Task], cluster: Cluster, progress: Progress
) -> Iterator[tuple[int, Result | WorkerError]]:
    """As ``tasks.run_tasks``, by the workers of a Dask cluster; progress is reported about once a second.

    Raises WorkerError if the cluster has no worker for ``cluster.timeout_s``, or if its scheduler ends.
    """
    with _client_of(cluster.address) as client:
        run = _Run(client, cluster, progress, len(tasks))
        if tasks:
            run.wait_for_workers()
        _check_same_folder(client, cluster.folder)
        attempts = Attempts(len(tasks))
        while attempts:
            queue, most = attempts.round(run.most_in_flight())
            in_flight: dict[int, Any] = {}
            ended = 0
            while queue or in_flight:
                while queue and len(in_flight) < most:
                    number = queue.popleft()
                    deaths = attempts.deaths_of(number)
                    in_flight[number] = run.submit(function, tasks[number], number, deaths)
                number = run.next_done(in_flight)
                ended += 1
                if most > 1 and ended % most == 0:
                    most = run.most_in_flight()  # workers come and go
                try:
                    result, amount = run.result_of(in_flight.pop(number))
                except TaskLostError:  # the cluster has run it several times; among others that counts once
                    for lost in attempts.worker_died([number], 1 if most > 1 else MAX_DEATHS):
                        yield lost, given_up()
                    continue
                run.report(number, amount)
                yield number, result


class TaskLostError(Exception):
    """The workers that ran a task died, or the one that had its result."""


class _Run:
    """The tasks of one run on a cluster: what their workers report, and whether there are any workers."""

    def __init__(self, client: Any, cluster: Cluster, progress: Progress, count: int) -> None:
        self._client = client
        self._cluster = cluster
        self._progress = progress
        self._reported = [0] * count  # the most that any attempt of a task has reported
        self._name = uuid.uuid4().hex[:8]
        self._topic = f"zpatch-{self._name}"
        self._news: SimpleQueue[tuple[int, int | None]] = SimpleQueue()  # amounts; None when a task has ended
        client.subscribe_topic(self._topic, lambda event: self._news.put(tuple(event[1])))

    def submit(self, function: TaskFunction[Task, Result], task: Task, number: int, deaths: int) -> Any:
        """Start a task; gives its future."""
        key = f"{self._cluster.names[number]}-{self._name}-{deaths}"
        arguments = function, task, number, self._topic
        try:
            future = self._client.submit(_on_worker, *arguments, key=key, pure=False)
        except RuntimeError as error:  # of a client whose scheduler is gone
            raise self.scheduler_lost() from error
        future.add_done_callback(lambda _: self._news.put((number, None)))
        return future

    def next_done(self, in_flight: Mapping[int, Any]) -> int:
        """Wait for the next task that ends, of some futures; report progress until then."""
        while True:
            try:
                number, amount = self._news.get(timeout=POLL_S)
            except Empty:
                self.wait_for_workers()
                done = [number for number, future in in_flight.items() if future.done()]
                if done:  # a future whose result was lost with its worker says only once that it is done
                    return done[0]
                continue
            if amount is not None:
                self.report(number, amount)
            elif number in in_flight and in_flight[number].done():
                return number

    def result_of(self, future: Any) -> Any:
        """The result of a task that has ended."""
        from distributed import KilledWorker

        try:
            return future.result(timeout=RESULT_S)
        except KilledWorker as error:
            raise TaskLostError from error
        except LOST as error:
            raise self.scheduler_lost() from error
        except TimeoutError as error:
            if future.status == "error":  # it is the task's own
                raise
            raise TaskLostError from error

    def report(self, number: int, amount: int) -> None:
        """Report how much is done of a task in all."""
        if amount > self._reported[number]:
            self._progress(amount - self._reported[number])
            self._reported[number] = amount

    def wait_for_workers(self) -> None:
        """Return when the cluster has a worker."""
        until = time.monotonic() + self._cluster.timeout_s
        is_said = False
        while not self._threads():
            if time.monotonic() > until:
                raise WorkerError(
                    f"the Dask cluster at {self._cluster.address} had no worker for "
                    f"{self._cluster.timeout_s:g} s (cluster_timeout); start workers, then run the same "
                    f"command again"
                )
            if not is_said:
                LOG.warning(
                    "waiting for workers: the Dask cluster at %s has none (for at most %g s)",
                    self._cluster.address,
                    self._cluster.timeout_s,
                )
                is_said = True
            time.sleep(min(POLL_S, self._cluster.timeout_s))

    def most_in_flight(self) -> int:
        """How many tasks the workers that are there now are given at a time."""
        return IN_FLIGHT_PER_THREAD * max(1, sum(self._threads().values()))

    def _threads(self) -> Mapping[str, int]:
        """The threads of each worker that is there."""
        if self._client.status != "running":
            raise self.scheduler_lost()
        try:
            threads: Mapping[str, int] = self._client.nthreads()
            return threads
        except (OSError, *LOST) as error:
            raise self.scheduler_lost() from error

    def scheduler_lost(self) -> WorkerError:
        """The error of a run whose scheduler has ended."""
        return WorkerError(
            f"the Dask scheduler at {self._cluster.address} has ended; start it, then run the same command "
            f"again"
        )


def _client_of(address: str) -> Any:
    """A connection to a scheduler, by its address or its file."""
    try:
        from distributed import Client
    except ImportError:
        raise OptionError(
            "scheduler= needs dask.distributed; pip install 'zpatch[distributed]'", option="scheduler"
        ) from None
    where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
    try:
        _check_answers(address)
        return Client(**where, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"no Dask scheduler answers at {address!r} ({error})", option="scheduler") from None


def _check_answers(address: str) -> None:
    """Connect to the port first: a Client that fails to may lock up the interpreter when it is collected."""
    if Path(address).is_file():
        address = json.loads(Path(address).read_text())["address"]
    place = urlsplit(address)
    if place.scheme not in PROTOCOLS or not place.hostname:
        raise ValueError("an address is like tcp://host:8786")
    if place.scheme in ("tcp", "tls") and place.port:
        socket.create_connection((place.hostname, place.port), CONNECT_TIMEOUT_S).close()


def _on_worker(
    function: TaskFunction[Task, Result], task: Task, number: int, topic: str
) -> tuple[Result, int]:
    """The result, and the progress in all, which is also reported under a topic about once a second."""
    from distributed import get_worker

    done, reported = 0, time.monotonic()

    def count(amount: int) -> None:
        nonlocal done, reported
        done += amount
        if time.monotonic() - reported >= REPORT_S:
            reported = time.monotonic()
            get_worker().log_event(topic, (number, done))

    return function(task, count), done


def _check_same_folder(client: Any, folder: Path) -> None:
    """Raise ``OptionError`` unless every worker sees a file in ``folder``: they write their results there."""
    folder.mkdir(parents=True, exist_ok=True)
    nonce = folder / f".nonce-{uuid.uuid4().hex}"
    nonce.touch()
    try:
        blind = [worker for worker, sees in client.run(nonce.exists).items() if not sees]
    finally:
        nonce.unlink()
    if blind:
        raise OptionError(
            f"workers {', '.join(blind)} do not see {folder}; use a file system that all share",
            option="scheduler",
        )
