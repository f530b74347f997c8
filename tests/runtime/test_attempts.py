"""Tasks in flight when a worker dies are run alone, and given up after four deaths; no process is needed."""

from __future__ import annotations

import random

import pytest

from zpatch.errors import WorkerError
from zpatch.runtime.attempts import MAX_DEATHS, Attempts, given_up


def run(
    count: int, jobs: int, deadly: set[int], seed: int = 0
) -> tuple[list[int], list[int], list[set[int]]]:
    """The tasks that finished, the tasks that were given up, and the tasks in flight at each start."""
    finished, lost, flights = [], [], []
    rng = random.Random(seed)
    attempts = Attempts(count)
    while attempts:
        queue, most = attempts.round(jobs)
        in_flight: set[int] = set()
        while queue or in_flight:
            while queue and len(in_flight) < most:
                in_flight.add(queue.popleft())
                flights.append(set(in_flight))
            number = rng.choice(sorted(in_flight))
            if number in deadly:
                lost += attempts.worker_died(in_flight)
                break
            in_flight.remove(number)
            finished.append(number)
    return finished, lost, flights


def test_tasks_start_in_order_and_as_many_as_requested() -> None:
    attempts = Attempts(5)
    queue, most = attempts.round(3)
    assert (list(queue), most) == ([0, 1, 2, 3, 4], 3)
    queue.clear()
    assert not attempts


def test_without_tasks_there_is_nothing_to_start() -> None:
    assert not Attempts(0)


def test_tasks_in_flight_when_a_worker_died_come_first_in_order_and_alone() -> None:
    attempts = Attempts(5)
    queue, _ = attempts.round(3)
    in_flight = [queue.popleft() for _ in range(3)]
    assert attempts.worker_died(reversed(in_flight)) == []
    queue, most = attempts.round(3)
    assert (list(queue), most) == ([0, 1, 2], 1)
    queue.clear()
    queue, most = attempts.round(3)
    assert (list(queue), most) == ([3, 4], 3)


def test_a_suspect_that_dies_again_is_tried_before_the_others_and_given_up_after_four_deaths() -> None:
    attempts = Attempts(2)
    queue, _ = attempts.round(2)
    assert attempts.worker_died([queue.popleft(), queue.popleft()]) == []
    for deaths in range(2, MAX_DEATHS + 1):
        queue, most = attempts.round(2)
        assert (queue[0], most) == (0, 1)
        assert attempts.worker_died([queue.popleft()]) == ([0] if deaths == MAX_DEATHS else [])
        assert attempts.deaths_of(0) == deaths
    assert list(attempts.round(2)[0]) == [1]
    assert attempts.deaths_of(1) == 1


def test_several_deaths_can_be_counted_at_once() -> None:
    assert Attempts(1).worker_died([0], deaths=MAX_DEATHS) == [0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("count", "jobs", "deadly"), [(8, 3, {0, 5}), (3, 2, {0, 1, 2}), (6, 6, {2}), (4, 1, set())]
)
def test_each_task_finishes_or_is_given_up_once_and_only_the_deadly_ones_are(
    count: int, jobs: int, deadly: set[int], seed: int
) -> None:
    finished, lost, flights = run(count, jobs, deadly, seed)
    assert sorted(finished) == sorted(set(range(count)) - deadly)
    assert sorted(lost) == sorted(deadly)
    assert max(map(len, flights)) <= jobs


def test_the_error_of_a_task_given_up_says_how_often_its_worker_died_and_what_to_do() -> None:
    assert isinstance(given_up(), WorkerError)
    assert str(given_up()) == "its worker was killed 4 times, perhaps for want of memory; try fewer jobs="
