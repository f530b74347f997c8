"""How many tasks are in flight on a cluster whose workers come and go, with a client that answers at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zpatch.runtime import dask_cluster
from zpatch.runtime.dask_cluster import IN_FLIGHT_PER_THREAD
from zpatch.runtime.task_contract import Cluster, Progress
from zpatch.runtime.tasks import run_tasks


class Future:
    """One whose task is done; ``client`` counts it until its result is fetched."""

    status = "finished"

    def __init__(self, client: Client, number: int) -> None:
        self._client, self._number = client, number

    def done(self) -> bool:
        return True

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        callback(self)

    def result(self, timeout: float) -> Any:
        self._client.in_flight -= 1
        self._client.ended += 1
        return self._number, 1


class Client:
    """A client of a cluster that has ``threads(ended)`` threads after some tasks have ended."""

    status = "running"

    def __init__(self, threads: Callable[[int], int]) -> None:
        self.in_flight = self.ended = self.asked = 0
        self.most: dict[int, int] = {}  # in flight, by how many had ended
        self._threads = threads

    def subscribe_topic(self, topic: str, listener: Any) -> None:
        pass

    def run(self, function: Any) -> dict[str, bool]:
        return {}

    def nthreads(self) -> dict[str, int]:
        self.asked += 1
        return {"a worker": self._threads(self.ended)}

    def submit(self, on_worker: Any, function: Any, task: int, number: int, topic: str, **_: Any) -> Future:
        self.in_flight += 1
        self.most[self.ended] = self.in_flight
        return Future(self, number)


def run_with(client: Client, tasks: int, folder: Path, patch: pytest.MonkeyPatch) -> list[int]:
    patch.setattr(dask_cluster, "_client_of", lambda address: contextlib.nullcontext(client))
    cluster = Cluster("tcp://here:1", folder, [str(n) for n in range(tasks)])
    return [number for number, _ in run_tasks(nothing, range(tasks), cluster=cluster)]


def nothing(task: int, progress: Progress) -> None:
    raise AssertionError("no task is run")


def test_workers_that_join_later_get_tasks_and_few_questions_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(lambda ended: 1 if ended < 10 else 50)
    assert sorted(run_with(client, 1000, tmp_path, monkeypatch)) == list(range(1000))
    assert max(client.most[n] for n in client.most if n < 10) == IN_FLIGHT_PER_THREAD
    assert max(client.most.values()) == 50 * IN_FLIGHT_PER_THREAD
    assert client.asked < 30


def test_fewer_tasks_are_in_flight_after_workers_have_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(lambda ended: 50 if ended < 150 else 1)
    assert sorted(run_with(client, 1000, tmp_path, monkeypatch)) == list(range(1000))
    assert max(client.most.values()) == 50 * IN_FLIGHT_PER_THREAD
    assert max(client.most[n] for n in client.most if n > 300) == IN_FLIGHT_PER_THREAD
