"""Clocks that are set back, processors that others use, and processes that are stopped and continue.

A process that is stopped by SIGSTOP, as by Ctrl-Z or with its virtual machine, neither hangs nor has ended.
With --full each is stopped for a minute.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import programs
import psutil
import pytest
import streams
import torch
from processes import eventually, is_running, local_cluster
from streams import items, small_subjects, stream
from test_faults import OPTIONS as CONVERT_OPTIONS
from test_faults import (
    all_stopped,
    assert_whole,
    begun,
    command,
    contents,
    is_worker,
    many_subjects,
    save,
    source,
    store,
    undisturbed,
)
from test_prediction_faults import Commands, commands, processes_below
from test_prediction_scaling import Conv, in_one_process, marked_by, predict
from test_queue_faults import OPTIONS, lost_in_a_callback, queue_of

import zpatch as zp
import zpatch.cli
from zpatch.compat.nifti_cache import cached_image
from zpatch.errors import QueueError
from zpatch.loading import worker_pool
from zpatch.records.names import MANIFEST, UNFINISHED
from zpatch.store import store_writer

assert all((commands, source, store))  # fixtures

ROOT = Path(zp.__file__).parent
MINUTE_S = 60.0

# Where times are looked at. A time of a file is compared with an earlier one for being the same, never for
# being later; and no time of the clock decides anything.
CLOCKS = {"store/store_writer.py"}  # says when a store was made
TIMES_OF_FILES = {
    "volume_files/byte_streams.py",  # writes none into a header
    "chunks/file_mark.py",
    "chunks/mapped_shards.py",
    "compat/nifti_cache.py",
    "conversion/source_files.py",
    "sources/input_files.py",
    "images/opened_image.py",
    "records/image_record.py",
    "records/manifest_table.py",  # of sources, to be compared
    "records/table_builder.py",
}


@pytest.fixture
def stop_s(full: bool) -> float:
    """For how long processes are stopped."""
    return MINUTE_S if full else 0.3


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that are stopped while the block runs."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def continued_after(seconds: float, *pids: int) -> threading.Timer:
    """Stop processes, and let them continue after a time."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(seconds, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids])
    timer.start()
    return timer


# The clock


def test_no_decision_depends_on_the_clock() -> None:
    asks = re.compile(r"\btime\.(time|localtime|gmtime|ctime|strftime)|time\(\)|datetime|\bdate\.")
    modules = {file.relative_to(ROOT).as_posix(): file.read_text() for file in ROOT.rglob("*.py")}
    assert {name for name, text in modules.items() if asks.search(text)} == CLOCKS
    assert {name for name, text in modules.items() if "mtime" in text} == TIMES_OF_FILES
    ordered = re.compile(r"mtime(_ns)?( [<>]|\)? - )|[<>]=? \w+\.(st_)?mtime")
    assert [name for name, text in modules.items() if ordered.search(text)] == []


def older(file: Path, seed: int) -> None:
    """Replace a file by one of the same length and an earlier time, as with a clock that was set back."""
    length = file.stat().st_size
    save(file, seed)
    assert file.stat().st_size == length
    os.utime(file, ns=(10**18, 10**18))


def test_a_file_that_is_replaced_by_an_older_one_counts_as_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZPATCH_CACHE", str(tmp_path / "cache"))
    file = save(tmp_path / "source" / "ann" / "t1.nii", 1)
    before = cached_image(file).data.copy()
    zp.convert(tmp_path / "source", tmp_path / "cohort.zarr")
    older(file, 2)
    after = cached_image(file).data.copy()
    assert not np.array_equal(before, after)
    zp.convert(tmp_path / "source", tmp_path / "cohort.zarr")
    assert np.array_equal(zp.Cohort(tmp_path / "cohort.zarr")["ann"].t1.data, after)


class Backwards(datetime.datetime):
    """A calendar before that of all files."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.datetime(1999, 1, 1, tzinfo=tz)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes back by an hour each time that this process or a forked one looks at it."""
    clock = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    monkeypatch.setattr(store_writer, "datetime", Backwards)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_clock_that_goes_back_changes_nothing(
    tmp_path: Path, store: Path, out: Path, full: bool, backwards: None, jobs: int
) -> None:
    if jobs > 1 and not full:
        pytest.skip("jobs need --full")
    for subject in ("ann", "bob")[:jobs]:
        save(tmp_path / "scans" / subject / "t1.nii", jobs)
    for _ in range(2):
        zp.convert(tmp_path / "scans", store, chunk=8, jobs=jobs)
        cohort = zp.Cohort(store)
        predicted = zp.predict(
            torch.nn.Identity(), cohort, out, image="t1", patch_size=8, overlap_mode="crop", jobs=jobs
        )
    assert zp.verify(store).ok
    assert zp.verify(out).ok
    for subject in cohort:
        assert np.array_equal(predicted[subject.name].prediction.data, subject.t1.data)
    sampler = zp.UniformSampler(6)
    found = stream(small_subjects(4), sampler, **OPTIONS, num_workers=2)
    assert found == stream(small_subjects(4), sampler, **OPTIONS)


# A queue


def test_a_worker_of_a_queue_that_is_stopped_for_a_while_changes_nothing(stop_s: float) -> None:
    expected = stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)
    with queue_of(num_workers=2, transform=streams.slow) as queue:
        patches = iter(queue)
        found = [next(patches)]
        timer = continued_after(stop_s, multiprocessing.active_children()[0].pid or 0)
        began = time.monotonic()
        found += patches
        assert time.monotonic() - began > 0.9 * stop_s
        timer.join()
    assert items(found) == expected


@lost_in_a_callback
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_of_a_queue_that_is_stopped_for_longer_than_the_timeout_is_the_error_that_says_so(
    full: bool, workers: int
) -> None:
    if not full:
        pytest.skip("a worker that hangs is in the quick run")
    with queue_of(num_workers=workers, transform=streams.slow, timeout=3, patches_per_volume=20) as queue:
        patches = iter(queue)
        next(patches)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGSTOP)
        with pytest.raises(QueueError, match="a worker of the queue gave nothing for 3 s: worker"):
            list(patches)
    assert multiprocessing.active_children() == []


def test_a_program_that_is_stopped_with_its_workers_for_longer_than_the_timeout_continues(
    tmp_path: Path, full: bool
) -> None:
    """As by Ctrl-Z: then no worker has hung."""
    timeout, hold_s, watch_s = (20, 15, worker_pool.WATCH_S) if full else (0.6, 0.4, 0.05)
    note = tmp_path / "at-work"
    with forked.start(programs.run_queue, str(note), timeout, hold_s, watch_s, folder=tmp_path) as process:
        eventually(note.exists, "one is awaited")
        os.killpg(process.pid, signal.SIGSTOP)
        eventually(all_stopped(process), "all its processes stopped")
        time.sleep(MINUTE_S if full else 0.8)
        os.killpg(process.pid, signal.SIGCONT)
        out, err = process.communicate(60)
        assert (process.wait(), out, err) == (0, "12\n", "")


# A conversion


def second_is_refused(arguments: list[Any], output: Path, holder: int, error: Callable[[], str]) -> None:
    before = (output / MANIFEST).read_bytes()
    assert zpatch.cli.run([*map(str, arguments)]) == 1
    assert f"{output}: process {holder} on " in error()
    assert (output / MANIFEST).read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("who", ["worker", "writer"])
def test_a_conversion_of_which_a_process_is_stopped_for_a_while_has_the_same_bytes(
    source: Path, store: Path, tmp_path: Path, full: bool, capfd: pytest.CaptureFixture[str], who: str
) -> None:
    if not full:
        pytest.skip("a stopped writer is in the quick run of test_faults")
    scans = many_subjects(source, tmp_path / "scans", 40)
    convert = ["convert", scans, store, *CONVERT_OPTIONS, "--jobs", "2"]
    with command(*convert) as process:
        eventually(begun(process, store), "some subjects")
        with stopped(process.pid if who == "writer" else processes_below(process.pid)[0]):
            for _ in range(3):
                time.sleep(MINUTE_S / 3)
                second_is_refused(convert, store, process.pid, lambda: capfd.readouterr().err)
        out, err = process.communicate(timeout=60)
        assert (process.wait(), out, err) == (0, f"{store}\n", "")
    assert_whole(store, undisturbed(scans, store))


@pytest.mark.slow
def test_a_stopped_worker_of_a_killed_writer_keeps_the_lock_until_it_ends(
    source: Path,
    store: Path,
    tmp_path: Path,
    full: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It may be about to write. When it continues it sees that its parent has ended, and ends."""
    if not full:
        pytest.skip("workers that outlive their writer need --full")
    scans = many_subjects(source, tmp_path / "scans", 40)
    convert = ["convert", scans, store, *CONVERT_OPTIONS, "--jobs", "2"]
    with command(*convert) as process:
        eventually(begun(process, store, 1), "a subject")
        [worker, *_] = processes_below(process.pid)
        with stopped(worker):
            process.kill()
            process.wait()
            second_is_refused(convert, store, process.pid, lambda: capfd.readouterr().err)
            assert is_running(worker)
        eventually(lambda: not is_running(worker), "the end of the worker")
        assert zpatch.cli.run([*map(str, convert)]) == 0
    assert_whole(store, undisturbed(scans, store))


# A prediction


def tall_cohort(folder: Path) -> zp.Cohort:
    """Two subjects, each to be predicted in several shards."""
    for number, subject in enumerate(("ann", "bob")):
        save(folder / "scans" / subject / "t1.nii", number, (40, 36, 160))
    zp.convert(folder / "scans", folder / "cohort.zarr", chunk=16)
    return zp.Cohort(folder / "cohort.zarr")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("who", ["worker", "writer"])
def test_a_prediction_of_which_a_process_is_stopped_for_a_while_has_the_same_bytes(
    commands: Commands,
    source: Path,
    tmp_path: Path,
    out: Path,
    full: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    who: str,
) -> None:
    if not full:
        pytest.skip("processes of predictions are stopped in the full run")
    tall_cohort(tmp_path)
    assert commands.predict(tmp_path / "cohort.zarr", out.with_name("undisturbed.zarr")).code == 0
    commands.forget()
    pid = commands.start_prediction(tmp_path / "cohort.zarr", out, "--jobs", 2)
    eventually(lambda: commands.patches > 60, "some patches")
    again = ["predict", tmp_path / "cohort.zarr", out, "--model", "test_prediction_faults:counting"]
    again += ["--image", "t1", "--patch-size", 20, "--overlap", 8, "--batch-size", 2, "-q"]
    monkeypatch.chdir(tmp_path)  # where it counts
    with stopped(pid if who == "writer" else processes_below(pid)[0]):
        for _ in range(3):
            time.sleep(MINUTE_S / 3)
            second_is_refused(again, out, pid, lambda: capfd.readouterr().err)
    ran = commands.wait()
    assert (ran.code, ran.err) == (0, "")
    assert_whole(out, contents(out.with_name("undisturbed.zarr")))


@pytest.mark.usefixtures("one_thread")
def test_a_worker_that_was_given_up_and_still_writes_does_not_fail_the_subject(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may do so while its folder is removed."""
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(np.ones((9, 9, 9), np.float32)))
    real = shutil.rmtree

    def with_a_late_writer(folder: Any, *args: Any, **options: Any) -> None:
        inside = [place for place in Path(folder).rglob(".ledger") if UNFINISHED in str(folder)]
        monkeypatch.setattr(os, "rmdir", late(inside)) if inside else None
        try:
            real(folder, *args, **options)
        finally:
            monkeypatch.setattr(os, "rmdir", rmdir)

    rmdir = os.rmdir

    def late(places: list[Path]) -> Callable[..., None]:
        def then_rmdir(*args: Any, **options: Any) -> None:
            for place in places:
                if place.exists():
                    (place / "late.partial").touch()
            rmdir(*args, **options)

        return then_rmdir

    monkeypatch.setattr(shutil, "rmtree", with_a_late_writer)
    zp.predict(torch.nn.Identity(), [subject], out, image="t1", patch_size=6, overlap_mode="crop")
    monkeypatch.undo()
    assert zp.verify(out).ok
    assert (zp.Cohort(out)["ann"].prediction.data == 1).all()


# A cluster


def workers_of_this_process() -> list[int]:
    found = [child.pid for child in psutil.Process().children(recursive=True) if is_worker(child)]
    assert len(found) >= 2
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_cluster_of_which_all_workers_are_stopped_for_a_while_converts_the_same_bytes(
    source: Path, store: Path, tmp_path: Path, full: bool
) -> None:
    """For longer than it may be without workers: they are there, and a task is not given up."""
    if not full:
        pytest.skip("clusters need --full")
    scans = many_subjects(source, tmp_path / "scans", 40)
    timers: list[threading.Timer] = []

    def stop_all() -> None:
        manifest = store / MANIFEST
        eventually(lambda: manifest.exists() and manifest.read_bytes().count(b'"image"') > 6, "some subjects")
        timers.append(continued_after(MINUTE_S, *workers_of_this_process()))

    with local_cluster() as cluster:
        stopper = threading.Thread(target=stop_all)
        stopper.start()
        began = time.monotonic()
        address = cluster.scheduler_address
        report = zp.convert(scans, store, chunk=8, scheduler=address, cluster_timeout=10)
        stopper.join()
        timers[0].join()
    assert time.monotonic() - began > MINUTE_S
    assert report.failures == []
    assert_whole(store, undisturbed(scans, store))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("wakes", ["while another does its task", "after the end of the run"])
def test_a_worker_that_a_cluster_has_given_up_and_that_wakes_up_and_writes_changes_nothing(
    out: Path, tmp_path: Path, full: bool, wakes: str
) -> None:
    if not full:
        pytest.skip("clusters need --full")
    import dask
    from distributed import LocalCluster

    cohort, marks = tall_cohort(tmp_path), tmp_path / "marks"
    expected = in_one_process(cohort, out, model=Conv())
    with (
        dask.config.set({"distributed.scheduler.worker-ttl": "1s"}),
        LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50) as cluster,
        contextlib.ExitStack() as started,
    ):
        address = cluster.scheduler_address
        workers = [forked.start(programs.run_cluster_worker, address, folder=tmp_path) for _ in range(2)]
        for worker in workers:
            started.enter_context(worker)
        late = workers[0].pid

        def stop_it() -> None:
            eventually(lambda: marks.exists() and late in marked_by(marks), "it is at work")
            os.kill(late, signal.SIGSTOP)
            eventually(lambda: len(cluster.scheduler.workers) == 1, "it is given up")
            if wakes.startswith("while"):
                os.kill(late, signal.SIGCONT)

        eventually(lambda: len(cluster.scheduler.workers) == 2, "both workers are there")
        stopper = threading.Thread(target=stop_it)
        stopper.start()
        predict(cohort, out, model=Conv(pause_s=0.1, marks=marks), scheduler=address)
        stopper.join()
        if wakes.startswith("after"):
            assert_whole(out, expected)
            before = marked_by(marks)[late]
            os.kill(late, signal.SIGCONT)
            eventually(lambda: marked_by(marks)[late] > before, "it continues", 20)
        eventually(lambda: not is_running(late), "its end")
    report = zp.verify(out)
    assert report.damages == ()
    assert set(report.leftovers) <= {UNFINISHED}
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    assert_whole(out, expected)


# Processors that others use


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_other_processes_on_all_processors_make_no_worker_hang(
    source: Path, store: Path, tmp_path: Path, full: bool
) -> None:
    if not full:
        pytest.skip("a minute of busy processors needs --full")
    expected = stream(small_subjects(4), zp.UniformSampler(6), **OPTIONS)
    scans = many_subjects(source, tmp_path / "scans")
    with contextlib.ExitStack() as others:
        for _ in range(4 * (os.cpu_count() or 1)):
            others.enter_context(forked.start(programs.keep_busy, MINUTE_S))
        for _ in range(5):
            with queue_of(num_workers=2, timeout=5) as queue:
                assert items(queue) == expected
        report = zp.convert(scans, store, chunk=8, jobs=2)
    assert report.failures == []
    assert_whole(store, undisturbed(scans, store))
