"""Faults around a queue raise an error with cause and place in time, and leave no process or memory."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import popen_fork, synchronize
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
import streams
from processes import eventually, is_running, shared_memory, without_other_programs
from record import Some
from streams import START_METHODS, Deadly, item, items, small_subjects, stop_forkserver, stream
from torch.utils.data import DataLoader, Dataset

import zpatch as zp
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import PatchSizeError, QueueError

DEADLINE_S = 10
WORKERS = [0, 2]

# Subjects in their order: the first patch, by which slots are sized, is of a subject without faults.
OPTIONS: dict[str, Any] = {"max_length": 5, "patches_per_volume": 3, "shuffle_subjects": False}


@pytest.fixture(autouse=True)
def no_forkserver_is_left_behind(nothing_is_left_behind: None) -> Iterator[None]:
    yield
    stop_forkserver()


def queue_of(subjects: Any = None, **options: Any) -> zp.Queue:
    """A queue of four small subjects."""
    subjects = small_subjects(4) if subjects is None else subjects
    return zp.Queue(subjects, zp.UniformSampler(6), **{**OPTIONS, **options})


# A worker ends

# Torch reports a dead worker by an exception from a signal handler. If the handler interrupts a callback of
# the garbage collector, as hypothesis has one, the exception is lost, and is raised again 5 s later.
lost_in_a_callback = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Of the 12 kinds of death of workers these are enough to see that nothing is broken.
QUICK = {
    ("fork", "KILL"),
    ("fork", "3"),
    ("spawn", "KILL"),
}


@lost_in_a_callback
@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["KILL", "SEGV", "3", "0"])
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_that_ends_in_mid_epoch_is_an_error_that_names_it_and_its_subject(
    tmp_path: Path, start_method: str, way: str, full: bool, some: Some
) -> None:
    if not full and (start_method, way) not in QUICK:
        pytest.skip("each way with each start method needs --full")
    how = f"was killed by SIG{way}" if way.isalpha() else f"ended with code {way}"
    for _ in some(range(10), 1):
        deadly = Deadly(tmp_path / "killed", way)
        with (
            pytest.raises(QueueError) as raised,
            queue_of(num_workers=2, start_method=start_method, transform=deadly) as queue,
        ):
            list(queue)
        seconds, pid = took(deadly)
        assert seconds < DEADLINE_S
        assert f"worker {pid} {how} over subject 'sub-03'" in str(raised.value)
        assert multiprocessing.active_children() == []


def took(deadly: Deadly) -> tuple[float, int]:
    """How long ago a worker ended, and which one."""
    when, pid = deadly.note.read_text().split()
    return time.time() - float(when), int(pid)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_transform_that_exits_is_an_error_that_names_the_subject(tmp_path: Path, workers: int) -> None:
    deadly = Deadly(tmp_path / "killed", "sys.exit")
    with (
        pytest.raises(QueueError, match="subject 'sub-03' failed in epoch 0: SystemExit"),
        queue_of(num_workers=workers, transform=deadly) as queue,
    ):
        list(queue)
    assert took(deadly)[0] < DEADLINE_S


@pytest.mark.parametrize("way", ["0", "KILL"])
def test_a_worker_that_ends_is_noticed_outside_the_main_thread_too(
    tmp_path: Path, way: str, full: bool
) -> None:
    """No signal reports it there, nor for a worker that ends with exit code 0."""
    if not full and way == "KILL":
        pytest.skip("both ways need --full")
    deadly = Deadly(tmp_path / "killed", way)
    with (
        queue_of(num_workers=2, transform=deadly) as queue,
        ThreadPoolExecutor(1) as pool,
        pytest.raises(
            QueueError, match=r"worker \d+ (ended with code 0|was killed .*) over subject 'sub-03'"
        ),
    ):
        pool.submit(list, queue).result()
    assert took(deadly)[0] < DEADLINE_S


@lost_in_a_callback
@pytest.mark.parametrize("through_loader", [True, False], ids=["loader", "queue"])
def test_a_worker_that_is_killed_during_a_training_step_is_an_error(through_loader: bool) -> None:
    killed = 0.0

    def train(patches: Any) -> None:
        nonlocal killed
        for number, _ in enumerate(patches):
            if number == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)  # type: ignore[arg-type]
                killed = time.monotonic()
                time.sleep(0.3)  # the step continues while torch hears of the worker's end

    with (
        queue_of(num_workers=2, patches_per_volume=200, max_length=8, transform=streams.slow) as queue,
        pytest.raises(QueueError, match=r"worker \d+ was killed by SIGKILL"),
    ):
        train(zp.SubjectsLoader(queue, 2) if through_loader else queue)
    assert time.monotonic() - killed < DEADLINE_S


@lost_in_a_callback
def test_workers_that_are_killed_between_two_epochs_are_reported_at_once() -> None:
    with queue_of(num_workers=2) as queue:
        list(queue)
        with pytest.raises(QueueError, match=r"worker \d+ was killed by SIGKILL"):
            kill_workers_and_wait()
        queue.close()
        assert items(queue) == stream(small_subjects(4), zp.UniformSampler(6), epochs=[1], **OPTIONS)


def kill_workers_and_wait() -> None:
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.kill()
    time.sleep(DEADLINE_S)


@lost_in_a_callback
def test_after_a_killed_worker_the_queue_works_again(tmp_path: Path) -> None:
    deadly = Deadly(tmp_path / "killed")
    with queue_of(num_workers=2, transform=deadly) as queue:
        with pytest.raises(QueueError):
            list(queue)
        deadly.subject = "nobody"
        queue.set_epoch(0)
        assert items(queue) == stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)


def test_the_death_of_another_child_does_not_concern_the_queue() -> None:
    with queue_of(num_workers=1, transform=streams.slow) as queue:
        for number, _ in enumerate(queue):
            if number in (2, 5):
                assert subprocess.run(["sh", "-c", "kill -9 $$"]).returncode == -9
                assert subprocess.run(["false"]).returncode == 1


class Fatal(Dataset[int]):
    """Kills the worker that reads it, once the other side has begun to wait."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> int:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
        return number


@lost_in_a_callback
def test_the_death_of_a_worker_of_another_loader_is_the_error_of_torch() -> None:
    with queue_of(num_workers=1) as queue:
        before = items(queue)
        other = iter(DataLoader(Fatal(), num_workers=1))
        with pytest.raises(RuntimeError, match="is killed by signal") as raised:
            time.sleep(DEADLINE_S)
        assert type(raised.value) is RuntimeError
        del other
        queue.set_epoch(0)
        assert items(queue) == before


STILLBORN = """
import os
if __name__ != "__main__":
    os._exit(7)
import numpy as np
import zpatch as zp
image = zp.ScalarImage(np.zeros((64, 64, 64), np.float32))  # takes more than the 64 KiB of a pipe
queue = zp.Queue([zp.Subject(t1=image)], zp.UniformSampler(6), num_workers=1, start_method="spawn")
next(iter(queue))
"""


def test_a_worker_that_ends_before_it_has_its_reader_is_an_error_too(tmp_path: Path) -> None:
    """As if the main module does all its work when it is imported."""
    program = tmp_path / "stillborn.py"
    program.write_text(STILLBORN)
    environment = {**os.environ, "PYTHONPATH": str(Path(zp.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert re.search(r"QueueError: a worker of the queue ended: worker \d+ ended with code 7\n", done.stderr)


# A worker hangs


@lost_in_a_callback
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_that_hangs_is_an_error_that_names_it_and_its_subject(
    tmp_path: Path, start_method: str, full: bool
) -> None:
    if not full and start_method != "fork":
        pytest.skip("start methods that start slowly need --full")
    hanging = Deadly(tmp_path / "hung", "hang")
    options: dict[str, Any] = {"num_workers": 2, "timeout": 1 if start_method == "fork" else 30}
    with (
        pytest.raises(QueueError, match="a worker of the queue gave nothing for") as raised,
        queue_of(transform=hanging, start_method=start_method, **options) as queue,
    ):
        list(queue)
    seconds, pid = took(hanging)
    assert seconds < options["timeout"] + DEADLINE_S
    assert f"for {options['timeout']} s: worker {pid} hung over subject 'sub-03'" in str(raised.value)


def test_a_training_step_longer_than_the_timeout_is_not_a_hang() -> None:
    with queue_of(num_workers=2, timeout=0.3) as queue:
        for number, _ in enumerate(queue):
            if number in (0, 5):
                time.sleep(1)
        assert number == 11


def test_a_slow_worker_that_gives_each_patch_in_time_does_not_hang() -> None:
    with queue_of(num_workers=1, timeout=1, transform=streams.slow, patches_per_volume=30) as queue:
        before = time.monotonic()
        assert len(list(queue)) == 120
    assert time.monotonic() - before > 1


# A patch cannot be read, drawn or transformed


@pytest.fixture
def damaged(cohort_store: Path, tmp_path: Path) -> Iterator[zp.Cohort]:
    """A copy of the cohort in which all voxels of one image were overwritten."""
    copy = tmp_path / "damaged.zarr"
    shutil.copytree(cohort_store, copy)
    cohort = zp.Cohort(copy)
    for key, seal in cohort["sub-03"].t1.record.files.items():  # type: ignore[union-attr]
        if "/c/" in key and not key.startswith("zpatch"):
            (copy / "sub-03" / "t1" / key).write_bytes(b"\x7f" * seal.bytes)
    yield cohort
    gc.collect()  # errors keep the frames that they were raised in
    close_shards(copy)


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("transform", [None, streams.unchanged], ids=["plain", "transformed"])
@pytest.mark.parametrize("workers", WORKERS)
def test_a_damaged_shard_is_an_error_with_subject_and_file(
    damaged: zp.Cohort, workers: int, transform: Any, first: bool
) -> None:
    cohort = damaged.select(["sub-03", "sub-01"]) if first else damaged
    with (
        pytest.raises(QueueError, match="subject 'sub-03' failed in epoch 0: DamageError") as raised,
        queue_of(cohort, num_workers=workers, transform=transform) as queue,
    ):
        list(queue)
    assert str(damaged.store.path / "sub-03" / "t1") in str(raised.value)
    assert "Traceback" in shown(raised.value)


def shown(error: BaseException) -> str:
    """An error as Python shows it, with its cause."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_sampler_that_fails_is_an_error_with_subject_reason_and_traceback(workers: int) -> None:
    with (
        pytest.raises(QueueError, match="subject 'sub-02' failed in epoch 0") as raised,
        zp.Queue(small_subjects(4), streams.Picky(6), num_workers=workers) as queue,
    ):
        list(queue)
    assert "ArithmeticError: no luck here" in str(raised.value)
    assert "in starts" in shown(raised.value)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("transform", [None, streams.unchanged], ids=["plain", "transformed"])
def test_the_error_about_a_patch_that_does_not_fit_has_subject_axis_and_advice(
    workers: int, transform: Any
) -> None:
    with pytest.raises(PatchSizeError, match=r"patch of 99 voxels does not fit axis I of 'sub-00'.*smaller"):
        zp.Queue(small_subjects(1), zp.UniformSampler(99), num_workers=workers, transform=transform)


@pytest.mark.parametrize(
    ("start_method", "subject"),
    [(None, "sub-00"), (None, "sub-02"), ("fork", "sub-00"), ("fork", "sub-02"), ("spawn", "sub-02")],
)
def test_a_transform_that_fails_is_an_error_with_traceback_subject_and_place(
    start_method: str | None, subject: str, full: bool
) -> None:
    if not full and start_method == "spawn":
        pytest.skip("a spawned worker sends its error as a forked one does; both need --full")
    options = {"num_workers": 2, "start_method": start_method} if start_method else {}
    transform = streams.Failing(subject)
    with (
        pytest.raises(
            QueueError, match=f"subject '{subject}' failed in epoch 0: ArithmeticError: no luck"
        ) as raised,
        queue_of(transform=transform, **options) as queue,
    ):
        list(queue)
    text = str(raised.value)
    places = {
        place
        for name, place, _ in stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)
        if name == subject
    }
    place, *_ = re.findall(r"in the transform of the patch at \((\d+), (\d+), (\d+)\)$", text)
    assert tuple(map(int, place)) in places
    trace = shown(raised.value)
    assert re.search(r'Traceback.*File ".*streams.py", line \d+, in __call__', trace, re.DOTALL)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_transform_that_returns_no_patch_is_a_clear_error(workers: int) -> None:
    with (
        pytest.raises(
            QueueError, match=r"'sub-00' failed .* a transform gives a Patch, not NoneType; in the tr"
        ),
        queue_of(num_workers=workers, transform=streams.nothing) as queue,
    ):
        list(queue)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_transform_that_puts_no_tensor_into_a_patch_is_an_error_with_the_subject(workers: int) -> None:
    with (
        pytest.raises(QueueError, match=r"'sub-00' failed .* the data of 't1' must be a tensor, not ndarray"),
        queue_of(num_workers=workers, transform=streams.as_array) as queue,
    ):
        list(queue)


@pytest.mark.parametrize("workers", WORKERS)
def test_after_a_subject_that_failed_the_queue_works_again(workers: int) -> None:
    failing = streams.Failing("sub-01")
    with queue_of(num_workers=workers, transform=failing) as queue:
        for _ in range(3):
            with pytest.raises(QueueError, match="'sub-01' failed in epoch 0"):
                list(queue)
        queue.close()
        failing.subject = "nobody"
        queue.set_epoch(0)
        assert items(queue) == stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)


def test_a_failure_in_an_epoch_that_is_read_ahead_is_an_error_of_that_epoch() -> None:
    with queue_of(num_workers=1, transform=streams.FailingLater(1 + 12 + 2)) as queue:
        assert items(queue) == stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)
        with pytest.raises(QueueError, match="failed in epoch 1: ArithmeticError: no more luck"):
            list(queue)


# Too little memory, or no processes


@pytest.mark.parametrize("step", ["memfd_create", "ftruncate"])
def test_no_space_for_the_block_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with queue_of(num_workers=2) as queue:
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(QueueError, match=r"KiB of shared memory .*No space left.*smaller max_length"):
                list(queue)
        assert multiprocessing.active_children() == []
        assert items(queue) == stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)


def test_more_memory_than_can_exist_is_an_error_with_advice() -> None:
    with (
        pytest.raises(QueueError, match=r"shared memory cannot be allocated .*smaller max_length"),
        queue_of(num_workers=1, max_length=10**15, shuffle_patches=False) as queue,
    ):
        list(queue)


@pytest.mark.parametrize("started", [0, 1])
def test_workers_that_cannot_be_started_are_an_error_and_the_started_ones_end(
    monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    launch, launched = popen_fork.Popen._launch, 0

    def launch_some(self: Any, process: Any) -> None:
        nonlocal launched
        if launched == started:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        launched += 1
        launch(self, process)

    with queue_of(num_workers=2, start_method="fork") as queue:
        with monkeypatch.context() as patch:
            patch.setattr(popen_fork.Popen, "_launch", launch_some)
            with pytest.raises(QueueError, match=r"workers of the queue cannot be started .*num_workers"):
                list(queue)
        eventually(
            lambda: not multiprocessing.active_children(), "the worker that was started ends", DEADLINE_S
        )
        assert items(queue) == stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)


def test_a_full_shared_memory_folder_is_an_error_with_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's locks between processes are files in it."""

    def full(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synchronize.SemLock, "__init__", full)
    with (
        pytest.raises(QueueError, match=r"cannot be started .*No space left.*free some space in /dev/shm"),
        queue_of(num_workers=2) as queue,
    ):
        list(queue)


@pytest.mark.parametrize("step", ["block", "worker"])
def test_a_resumed_epoch_that_cannot_start_keeps_its_position(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)
    with queue_of() as queue:
        state = [queue.state_dict() for _ in queue][4]
    with queue_of(num_workers=1) as queue:
        queue.load_state_dict(state)
        with monkeypatch.context() as patch:
            patch.setattr(
                *{"block": (os, "memfd_create"), "worker": (popen_fork.Popen, "_launch")}[step], full
            )
            with pytest.raises(QueueError, match="No space left"):
                list(queue)
        assert queue.state_dict() == state
        assert items(queue) == whole[5:]


# The loop ends


@pytest.mark.parametrize("through_loader", [True, False], ids=["loader", "queue"])
def test_a_loop_that_is_left_early_leaves_no_process(through_loader: bool) -> None:
    queue = queue_of(num_workers=2, patches_per_volume=100)
    for _ in zp.SubjectsLoader(queue, 2) if through_loader else queue:
        assert len(multiprocessing.active_children()) == 2
        break
    del queue
    assert multiprocessing.active_children() == []


def test_an_exception_in_a_training_step_leaves_no_process() -> None:
    with pytest.raises(ZeroDivisionError), queue_of(num_workers=2, patches_per_volume=100) as queue:
        [patch.t1.data.numel() // 0 for patch in queue]
    assert multiprocessing.active_children() == []


def test_close_ends_the_workers_even_while_an_iterator_is_held() -> None:
    queue = queue_of(num_workers=2, patches_per_volume=100)
    iterator = iter(queue)
    next(iterator)
    queue.close()
    left = multiprocessing.active_children()
    iterator.close()  # type: ignore[attr-defined]
    assert left == []


def test_close_takes_no_longer_than_the_task_of_a_worker() -> None:
    with queue_of(num_workers=2, patches_per_volume=300, max_length=300, transform=streams.slow) as queue:
        next(iter(queue))
        before = time.monotonic()
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loop_that_another_one_interrupts_is_an_error(workers: int) -> None:
    with queue_of(num_workers=workers) as queue:
        first = iter(queue)
        begun = [item(next(first))]
        queue.set_epoch(0)
        whole = items(queue)
        with pytest.raises(QueueError, match="another iteration of it was begun"):
            begun += items(first)
        assert begun == whole[: len(begun)]
        queue.set_epoch(0)
        assert items(queue) == whole


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loop_that_continues_after_close_is_an_error(workers: int) -> None:
    queue = queue_of(num_workers=workers)
    iterator = iter(queue)
    next(iterator)
    queue.close()
    with pytest.raises(QueueError, match="closed"):
        list(iterator)
    assert items(queue) == stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)
    queue.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_patch_stays_valid_after_the_queue_is_closed(workers: int) -> None:
    with queue_of(num_workers=workers) as queue:
        held = list(queue)
    assert items(held) == stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)


# The program ends


class Program:
    """A training program in a new process group."""

    def __init__(self, folder: Path, start_method: str, what: str) -> None:
        paths = os.pathsep.join([str(Path(zp.__file__).parent.parent), *sys.path])
        self.before = shared_memory()
        self.process = forked.start(
            run_program,
            start_method,
            what,
            folder=folder,
            finalizes=True,
            PYTHONPATH=paths,
            OMP_NUM_THREADS="1",
        )
        self.workers: list[int] = json.loads(self.process.read_line() or "[]")
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.pids = {self.process.pid, *self.workers, *(child.pid for child in children)}
        if what != "exit":
            assert self.workers
            assert all(map(is_running, self.pids))

    def ends(self) -> str:
        """Wait for the end of it all; what it said."""
        eventually(lambda: not any(map(is_running, self.pids)), "all processes end", DEADLINE_S)
        _, said = self.process.communicate(DEADLINE_S)
        eventually(lambda: not self.left_in_shared_memory(), "its shared memory is released", DEADLINE_S)
        return said

    def left_in_shared_memory(self) -> set[str]:
        left = without_other_programs(shared_memory() - self.before, self.pids)
        mine = {f"torch_{pid}_" for pid in self.pids}
        return {
            name for name in left if not name.startswith("torch_") or name[: name.rfind("_", 6) + 1] in mine
        }


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str, str], Program]]:
    started: list[Program] = []

    def start(start_method: str, what: str) -> Program:
        started.append(Program(tmp_path, start_method, what))
        return started[-1]

    yield start
    for one in started:
        for pid in one.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with one.process:
            pass


# The signal that kills the parent, and the work of workers at that time.
PARENT_QUICK = {("fork", "TERM"), ("forkserver", "KILL")}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["KILL", "TERM", "INT"])
@pytest.mark.parametrize("start_method", START_METHODS)
def test_workers_end_with_their_parent_however_it_is_killed(
    program: Callable[[str, str], Program], start_method: str, how: str, full: bool, some: Some
) -> None:
    if not full and (start_method, how) not in PARENT_QUICK:
        pytest.skip("each signal with each start method needs --full")
    for turn in some(range(5), 1):
        running = program(start_method, "hang" if turn % 2 == 0 else "train")
        os.kill(running.process.pid, getattr(signal, f"SIG{how}"))
        running.ends()
        assert running.process.returncode in (-getattr(signal, f"SIG{how}"), 1, 130)


@pytest.mark.parametrize("what", ["train", "slowly"])
def test_ctrl_c_ends_it_all_with_one_traceback(
    program: Callable[[str, str], Program], what: str, full: bool
) -> None:
    """As from a terminal: every process of the group gets the signal."""
    if not full and what == "slowly":
        pytest.skip("a program in the middle of a step needs --full")
    running = program("fork", what)
    os.killpg(running.process.pid, signal.SIGINT)
    said = running.ends()
    assert said.count("Traceback") == 1, said
    assert said.rstrip().endswith("KeyboardInterrupt")


def test_a_program_that_ends_without_closing_its_queue_prints_nothing(
    program: Callable[[str, str], Program], full: bool
) -> None:
    for start_method in START_METHODS if full else ("fork",):
        running = program(start_method, "exit")
        assert running.ends() == ""
        assert running.process.returncode == 0


def run_program(start_method: str, what: str) -> None:
    """Iterate over epochs until interrupted; print the workers' process ids once they run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    transform = Deadly(Path("hung"), "hang") if what == "hang" else streams.slow
    queue = queue_of(num_workers=2, start_method=start_method, transform=transform, patches_per_volume=20)
    patches = iter(queue)
    next(patches)
    sys.stdout.write(json.dumps([worker.pid for worker in multiprocessing.active_children()]) + "\n")
    sys.stdout.flush()
    if what == "exit":
        return
    while True:
        for _ in patches:
            time.sleep(5 if what == "slowly" else 0)
        patches = iter(queue)
