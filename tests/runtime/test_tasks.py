"""Running tasks: each task gives one result, even if workers are killed, and no process outlives its run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from processes import DEADLINE_S, children, eventually, is_running, local_cluster

from zpatch.errors import OptionError, WorkerError
from zpatch.runtime import dask_cluster
from zpatch.runtime.dask_graphs import run_graph, thread_count
from zpatch.runtime.task_contract import Cluster, Progress
from zpatch.runtime.tasks import _Reported, read_ahead, run_tasks

LONG_S = 100.0

both = pytest.mark.parametrize("jobs", [1, 2])


# Tasks


def double(number: int, progress: Progress) -> int:
    for _ in range(3):
        progress(number)
    return 2 * number


def identify(number: int, progress: Progress) -> tuple[int, int]:
    time.sleep(0.05)
    return number, os.getpid()


def fail_at_three(number: int, progress: Progress) -> int:
    if number == 3:
        raise ArithmeticError("three is too hard")
    return number


def die_once(marker: Path, progress: Progress) -> str:
    """Kill the worker, but only the first one that runs this."""
    if marker.suffix == ".deadly":
        with contextlib.suppress(FileExistsError):
            marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return marker.name


def die_always(name: str, progress: Progress) -> str:
    if name.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return name


def wait_long(marker: Path, progress: Progress) -> None:
    marker.write_text(str(os.getpid()))
    time.sleep(LONG_S)


def mark_and_wait(marker: Path, progress: Progress) -> str:
    """Note the process that runs the task, and wait for the file ``go``."""
    with (marker.parent / "runs").open("a") as runs:
        runs.write(f"{marker.name} {os.getpid()}\n")
    until = time.monotonic() + LONG_S
    while not (marker.parent / "go").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return marker.name


def run(
    function: Callable[..., Any],
    tasks: Sequence[Any],
    *,
    scheduler: str | None = None,
    folder: Path | None = None,
    timeout_s: float = 60,
    **options: Any,
) -> list[tuple[int, Any]]:
    if scheduler is not None:
        assert folder is not None
        names = [f"task-{number}" for number in range(len(tasks))]
        options["cluster"] = Cluster(scheduler, folder, names, timeout_s)
    return list(run_tasks(function, tasks, **options))


# Local


@both
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_each_task_gives_its_number_and_its_result_once(jobs: int, count: int) -> None:
    found = run(double, range(10, 10 + count), jobs=jobs)
    assert sorted(found) == [(n, 2 * (10 + n)) for n in range(count)]


def test_one_job_runs_in_this_process_one_task_after_the_other() -> None:
    assert run(identify, range(3)) == [(n, (n, os.getpid())) for n in range(3)]


def test_one_task_needs_no_other_process() -> None:
    assert run(identify, [5], jobs=4) == [(0, (5, os.getpid()))]


def test_two_jobs_run_in_two_other_processes() -> None:
    pids = {pid for _, (_, pid) in run(identify, range(8), jobs=2)}
    assert len(pids) == 2
    assert os.getpid() not in pids


@both
def test_progress_adds_up_and_amounts_are_never_zero(jobs: int) -> None:
    amounts: list[int] = []
    run(double, range(1, 9), jobs=jobs, progress=amounts.append)
    assert sum(amounts) == 3 * sum(range(1, 9))
    assert min(amounts) > 0


def test_progress_looks_at_tasks_in_flight_only_and_counts_no_attempt_twice() -> None:
    class Amounts(list[int]):
        def __getitem__(self, number: Any) -> Any:
            looked_at.append(number)
            return super().__getitem__(number)

    looked_at: list[int] = []
    amounts, reported = Amounts([0] * 1000), []
    progress = _Reported(amounts, reported.append)
    for now, in_flight in ([(3, 4), (4, 1)], [3, 4]), ([(3, 0), (4, 2)], [3, 4]), ([(3, 5)], [3]), ([], [3]):
        for number, amount in now:
            amounts[number] = amount
        progress.update(in_flight)
    assert reported == [5, 1, 1]
    assert looked_at == [3, 4, 3, 4, 3, 3]


def test_progress_of_a_task_is_reported_before_its_result() -> None:
    amounts: list[int] = []
    done = 0
    for number, _ in run_tasks(double, range(1, 9), jobs=2, progress=amounts.append):
        done += 3 * (number + 1)
        assert sum(amounts) >= done


@both
def test_an_exception_of_a_task_is_raised_unchanged_and_ends_the_run(jobs: int) -> None:
    with pytest.raises(ArithmeticError, match="three is too hard"):
        run(fail_at_three, range(6), jobs=jobs)
    assert children() == []


def test_a_task_whose_worker_is_killed_is_run_again_and_no_result_is_lost_or_repeated(
    tmp_path: Path,
) -> None:
    tasks = [tmp_path / (f"{n}.deadly" if n in (2, 5, 6) else f"{n}.mild") for n in range(10)]
    found = run(die_once, tasks, jobs=2)
    assert sorted(found) == [(n, task.name) for n, task in enumerate(tasks)]


def test_a_worker_killed_from_outside_costs_only_a_rerun(tmp_path: Path) -> None:
    tasks = [tmp_path / str(n) for n in range(6)]
    victims: list[int] = []

    def kill_one() -> None:
        lines = eventually(lambda: (tmp_path / "runs").exists() and (tmp_path / "runs").read_text(), "a run")
        victims.append(int(lines.split()[1]))
        os.kill(victims[0], signal.SIGKILL)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = run(mark_and_wait, tasks, jobs=2)
    killer.join()
    assert sorted(found) == [(n, str(n)) for n in range(6)]
    runs = (tmp_path / "runs").read_text().splitlines()
    assert 6 < len(runs) <= 8
    assert victims[0] != os.getpid()


@pytest.mark.parametrize("deadly", [{0}, {3}, {0, 1}, {2, 5}, {7}])
def test_a_task_that_always_kills_its_worker_is_given_up_and_all_others_finish(deadly: set[int]) -> None:
    names = [f"deadly-{n}" if n in deadly else f"mild-{n}" for n in range(8)]
    found = run(die_always, names, jobs=2)
    assert sorted(number for number, _ in found) == list(range(8))
    results = dict(found)
    assert {n for n, result in results.items() if isinstance(result, WorkerError)} == deadly
    assert all(results[n] == names[n] for n in set(range(8)) - deadly)
    text = str(results[min(deadly)])
    assert text == "its worker was killed 4 times, perhaps for want of memory; try fewer jobs="


def test_when_every_task_kills_its_worker_each_is_given_up() -> None:
    found = run(die_always, ["deadly-0", "deadly-1", "deadly-2"], jobs=2)
    assert sorted(number for number, _ in found) == [0, 1, 2]
    assert all(isinstance(result, WorkerError) for _, result in found)


def test_a_run_that_is_left_early_ends_its_workers_at_once(tmp_path: Path) -> None:
    tasks = [tmp_path / "quick", *(tmp_path / f"slow-{n}" for n in range(4))]
    results = run_tasks(quick_or_long, tasks, jobs=2)
    assert next(results) == (0, "quick")
    assert len(children()) == 2
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < DEADLINE_S
    assert children() == []


def quick_or_long(task: Path, progress: Progress) -> str:
    if task.name != "quick":
        wait_long(task, progress)
    return task.name


def test_an_error_of_the_consumer_of_results_leaves_no_process() -> None:
    with pytest.raises(RuntimeError, match="enough"):
        take_one()
    eventually(lambda: not children(), "the end of all workers", DEADLINE_S)


def take_one() -> None:
    with contextlib.closing(
        run_tasks(identify, range(50), jobs=2)  # type: ignore[type-var]
    ) as results:
        for _ in results:
            raise RuntimeError("enough")


# A test that runs in the background may ignore SIGINT, and so do its children.
PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from test_tasks import run, wait_long
run(wait_long, [Path(sys.argv[1], name) for name in "abc"], jobs=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_when_the_parent_is_killed_its_workers_are_gone_within_ten_seconds(
    tmp_path: Path, how: signal.Signals
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as parent:
        try:
            eventually(
                lambda: all((tmp_path / n).exists() and (tmp_path / n).stat().st_size for n in "ab"),
                "two tasks",
            )
            workers = [int((tmp_path / name).read_text()) for name in "ab"]
            assert all(map(is_running, workers))
            parent.send_signal(how)
            parent.wait(DEADLINE_S)
        finally:
            parent.kill()
    eventually(lambda: not any(map(is_running, workers)), "the end of all workers", DEADLINE_S)
    assert not (tmp_path / "c").exists()


# Reading ahead


class Item:
    """An object whose living instances are counted."""

    alive: ClassVar[weakref.WeakSet[Item]] = weakref.WeakSet()
    most = 0

    def __init__(self, number: int) -> None:
        self.number = number
        Item.alive.add(self)
        Item.most = max(Item.most, len(Item.alive))


def made(count: int) -> Iterator[Item]:
    for number in range(count):
        time.sleep(0.01)  # as reading a file takes: by then the consumer has released the last item
        yield Item(number)


def test_reading_ahead_gives_the_same_items_in_the_same_order() -> None:
    assert list(read_ahead(iter(range(100)))) == list(range(100))
    assert list(read_ahead(iter([None, 0, False]))) == [None, 0, False]
    assert list(read_ahead(iter([]))) == []


@pytest.mark.parametrize("pause_s", [0, 0.03])
def test_reading_ahead_keeps_two_items_alive_at_most(pause_s: float) -> None:
    Item.alive, Item.most = weakref.WeakSet(), 0
    numbers = []
    for item in read_ahead(made(8)):
        time.sleep(pause_s)
        numbers.append(item.number)
    assert numbers == list(range(8))
    assert 1 <= Item.most <= 2


def test_the_next_item_is_made_while_the_last_is_in_use() -> None:
    begun = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number in range(3):
            begun[number].set()
            yield number

    for number in read_ahead(items()):
        assert number == 2 or begun[number + 1].wait(DEADLINE_S)


def test_an_error_of_reading_ahead_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ArithmeticError("no more")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ArithmeticError, match="no more"):
        next(ahead)


def test_reading_ahead_that_is_left_early_leaves_no_thread() -> None:
    before = threading.active_count()
    items = read_ahead(iter(range(100)))
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


# Graphs


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_a_graph_is_computed_by_either_scheduler(scheduler: Any) -> None:
    assert run_graph({"a": 1, "b": (lambda a: a + 1, "a")}, "b", scheduler) == 2
    assert thread_count(scheduler) >= 1


def test_a_scheduler_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match="must be 'sync', 'threads' or a distributed"):
        run_graph({}, "a", "magic")  # type: ignore[arg-type]


# A cluster


def test_a_cluster_gives_each_result_once_and_runs_every_task_on_its_workers(tmp_path: Path) -> None:
    with local_cluster() as cluster:
        address = cluster.scheduler_address
        found = run(identify, range(9), scheduler=address, folder=tmp_path)
        assert run(identify, [], scheduler=address, folder=tmp_path) == []
        with pytest.raises(ArithmeticError, match="three is too hard"):
            run(fail_at_three, range(6), scheduler=address, folder=tmp_path)
    assert sorted((number, result) for number, (result, _) in found) == [(n, n) for n in range(9)]
    assert os.getpid() not in {pid for _, (_, pid) in found}
    assert list(tmp_path.iterdir()) == []


def test_progress_of_a_cluster_adds_up_to_that_of_its_tasks(tmp_path: Path) -> None:
    amounts: list[int] = []
    with local_cluster(1) as cluster:
        run(double, range(4), scheduler=cluster.scheduler_address, folder=tmp_path, progress=amounts.append)
    assert sorted(amounts) == [3, 6, 9]


def step_by_step(steps: int, progress: Progress) -> None:
    for _ in range(steps):
        time.sleep(0.1)
        progress(1)


@pytest.mark.slow
@pytest.mark.alone
def test_progress_of_a_cluster_is_reported_while_a_task_runs(tmp_path: Path) -> None:
    told: list[tuple[float, int]] = []
    with local_cluster(1) as cluster:
        run(
            step_by_step,
            [50],
            scheduler=cluster.scheduler_address,
            folder=tmp_path,
            progress=lambda amount: told.append((time.monotonic(), amount)),
        )
    assert sum(amount for _, amount in told) == 50
    assert len(told) >= 4
    assert max(amount for _, amount in told) <= 20
    assert told[-1][0] - told[0][0] > 2


@pytest.mark.slow
def test_a_cluster_without_workers_is_waited_for_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with local_cluster(0) as cluster:
        late = threading.Timer(3, cluster.scale, [1])
        late.start()
        found = run(double, range(3), scheduler=cluster.scheduler_address, folder=tmp_path, timeout_s=60)
        late.join()
    assert sorted(found) == [(0, 0), (1, 2), (2, 4)]
    said = [record.getMessage() for record in caplog.records if record.name == "zpatch"]
    assert said == [f"waiting for workers: the Dask cluster at {cluster.scheduler_address} has none "
                    "(for at most 60 s)"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cluster_that_has_no_workers_or_loses_all_of_them_is_given_up_in_time(
    tmp_path: Path, workers: int, full: bool
) -> None:
    if not full:
        pytest.skip("one that loses a worker is in the quick run; one that has none left needs --full")

    def kill_all() -> None:
        runs = tmp_path / "runs"
        eventually(lambda: runs.exists() and len(runs.read_text().splitlines()) >= 2, "both at work")
        cluster.scale(0)

    tasks = [tmp_path / str(n) for n in range(6)]
    with local_cluster(workers) as cluster:
        killer = threading.Thread(target=kill_all)
        if workers:
            killer.start()
        began = time.monotonic()
        with pytest.raises(WorkerError, match=r"had no worker for 2 s \(cluster_timeout\); start"):
            run(mark_and_wait, tasks, scheduler=cluster.scheduler_address, folder=tmp_path, timeout_s=2)
        assert time.monotonic() - began < 45
        if workers:
            killer.join()


SCHEDULER = "from distributed.cli.dask_scheduler import main; main()"
WORKER = "from distributed.cli.dask_worker import main; main()"


@pytest.mark.slow
def test_a_scheduler_that_dies_in_mid_run_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    options = ["--scheduler-file", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    scheduler = subprocess.Popen(
        [sys.executable, "-c", SCHEDULER, *options, "--port", "0", "--no-dashboard"],
        **quiet,  # type: ignore[call-overload]
    )
    worker = subprocess.Popen([sys.executable, "-c", WORKER, *options, "--no-dashboard"], **quiet)  # type: ignore[call-overload]

    def kill_it() -> None:
        eventually(lambda: (tmp_path / "runs").exists(), "a task at work")
        scheduler.kill()

    try:
        eventually(file.exists, "a scheduler")
        killer = threading.Thread(target=kill_it)
        killer.start()
        began = time.monotonic()
        tasks = [tmp_path / str(n) for n in range(4)]
        with pytest.raises(WorkerError, match=r"the Dask scheduler at .* has ended; start it, then") as e:
            run(mark_and_wait, tasks, scheduler=str(file), folder=tmp_path)
        assert "\n" not in str(e.value)
        assert time.monotonic() - began < 60
        killer.join()
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def test_a_cluster_is_found_by_its_scheduler_file(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    with local_cluster(1) as cluster:
        file.write_text(json.dumps(cluster.scheduler.identity(), default=str))
        found = run(double, range(3), scheduler=str(file), folder=tmp_path)
    assert sorted(found) == [(0, 0), (1, 2), (2, 4)]


def test_killing_a_worker_of_a_cluster_loses_and_repeats_no_result(tmp_path: Path) -> None:
    tasks = [tmp_path / str(n) for n in range(12)]

    def kill_one() -> None:
        lines = eventually(lambda: (tmp_path / "runs").exists() and (tmp_path / "runs").read_text(), "a run")
        os.kill(int(lines.split()[1]), signal.SIGKILL)
        (tmp_path / "go").touch()

    with local_cluster() as cluster:
        killer = threading.Thread(target=kill_one)
        killer.start()
        found = run(mark_and_wait, tasks, scheduler=cluster.scheduler_address, folder=tmp_path)
        killer.join()
    assert sorted(found) == [(n, str(n)) for n in range(12)]
    assert len((tmp_path / "runs").read_text().splitlines()) > 12


@pytest.mark.slow
def test_a_task_that_always_kills_its_worker_on_a_cluster_is_given_up_and_all_others_finish(
    tmp_path: Path, full: bool
) -> None:
    if not full:
        pytest.skip("five workers start one after the other, which needs --full; jobs do it in the quick run")
    names = [f"deadly-{n}" if n == 2 else f"mild-{n}" for n in range(6)]
    with local_cluster() as cluster:
        found = run(die_always, names, scheduler=cluster.scheduler_address, folder=tmp_path)
    assert sorted(number for number, _ in found) == list(range(6))
    results = dict(found)
    assert isinstance(results.pop(2), WorkerError)
    assert results == {n: name for n, name in enumerate(names) if n != 2}


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:9", "nowhere.json", "carrier-pigeon://home", ""])
def test_a_scheduler_that_does_not_answer_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_TIMEOUT_S", 1)
    with pytest.raises(OptionError, match="no Dask scheduler answers at ") as caught:
        run(double, range(3), scheduler=where, folder=tmp_path)
    assert repr(where) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_workers_that_do_not_see_the_folder_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_cluster(1) as cluster:
        monkeypatch.chdir(tmp_path)  # so that a relative path is another folder than for the workers
        (tmp_path / "store").mkdir()
        with pytest.raises(OptionError, match=r"workers tcp://.* do not see store; use a file system that"):
            run(double, range(3), scheduler=cluster.scheduler_address, folder=Path("store"))
    assert list((tmp_path / "store").iterdir()) == []


def test_without_distributed_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(OptionError, match=r"scheduler= needs dask.distributed; pip install 'zpatch\[dist"):
        run(double, range(3), scheduler="tcp://127.0.0.1:9", folder=tmp_path)
