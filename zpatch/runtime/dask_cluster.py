"""The door to dask.distributed: tasks on a cluster."""

from __future__ import annotations

import json
import socket
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zpatch.errors import OptionError, WorkerError
from zpatch.runtime.task_contract import Progress, Result, Task, TaskFunction, given_up

CLUSTER_TIMEOUT_S = 30
IN_FLIGHT_PER_THREAD = 2
PROTOCOLS = ("tcp", "tls", "ucx", "ws", "wss")  # of dask.distributed


def run_on_cluster(
    function: TaskFunction[Task, Result],
    tasks: Sequence[Task],
    names: Sequence[str],
    folder: Path,
    scheduler: str,
    progress: Progress,
) -> Iterator[tuple[int, Result | WorkerError]]:
    """As ``tasks.run_tasks``, by the workers of the Dask cluster at ``scheduler``."""
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
                yield number, given_up()


def _client_of(scheduler: str) -> Any:
    """A connection to a scheduler, by its address or its file."""
    try:
        from distributed import Client
    except ImportError:
        raise OptionError(
            "scheduler= needs dask.distributed; pip install 'zpatch[distributed]'", option="scheduler"
        ) from None
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        _check_answers(scheduler)
        return Client(**where, timeout=CLUSTER_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"no Dask scheduler answers at {scheduler!r} ({error})", option="scheduler"
        ) from None


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
        raise OptionError(
            f"workers {', '.join(blind)} do not see {folder}; use a file system that all share",
            option="scheduler",
        )
