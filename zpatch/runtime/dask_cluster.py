"""The door to dask.distributed: tasks on a cluster."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zpatch.errors import OptionError, WorkerError
from zpatch.runtime.attempts import MAX_DEATHS, Attempts, given_up
from zpatch.runtime.task_contract import Cluster, Progress, Result, Task, TaskFunction

CLUSTER_TIMEOUT_S = 30
IN_FLIGHT_PER_THREAD = 2
PROTOCOLS = ("tcp", "tls", "ucx", "ws", "wss")  # of dask.distributed


def run_on_cluster(
    function: TaskFunction[Task, Result], tasks: Sequence[Task], cluster: Cluster, progress: Progress
) -> Iterator[tuple[int, Result | WorkerError]]:
    """As ``tasks.run_tasks``, by the workers of a Dask cluster; progress is reported as tasks end."""
    with _client_of(cluster.address) as client:
        from distributed import KilledWorker, as_completed

        _check_same_folder(client, cluster.folder)
        run, attempts = uuid.uuid4().hex[:8], Attempts(len(tasks))
        while attempts:
            queue, most = attempts.round(IN_FLIGHT_PER_THREAD * max(1, sum(client.nthreads().values())))
            in_flight: dict[Any, int] = {}
            completed = as_completed(loop=client.loop)
            while queue or in_flight:
                while queue and len(in_flight) < most:
                    number = queue.popleft()
                    key = f"{cluster.names[number]}-{run}-{attempts.deaths_of(number)}"
                    future = client.submit(_on_worker, function, tasks[number], key=key, pure=False)
                    in_flight[future] = number
                    completed.add(future)
                future = next(completed)
                number = in_flight.pop(future)
                try:
                    result, amount = future.result()
                except KilledWorker:  # the cluster has run it several times; among others that counts once
                    for lost in attempts.worker_died([number], 1 if most > 1 else MAX_DEATHS):
                        yield lost, given_up()
                    continue
                if amount:
                    progress(amount)
                yield number, result


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
        return Client(**where, timeout=CLUSTER_TIMEOUT_S, set_as_default=False)
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
        socket.create_connection((place.hostname, place.port), CLUSTER_TIMEOUT_S).close()


def _on_worker(function: TaskFunction[Task, Result], task: Task) -> tuple[Result, int]:
    """The result, and the progress in all."""
    amounts: list[int] = []
    return function(task, amounts.append), sum(amounts)


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
