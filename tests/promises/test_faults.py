"""Whatever interrupts a conversion, the same command again gives the store of an undisturbed one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import psutil
import pytest
from processes import eventually, is_running, local_cluster
from record import Some

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.digests import unsealed
from zpatch.errors import SourceError
from zpatch.records.names import LOCK, MANIFEST, MANIFEST_TABLE, ROOT_DOCUMENT, STAGING
from zpatch.store.store_writer import StoreWriter

SUBJECTS = ("sub-01", "sub-02", "sub-03")
OPTIONS = ("--chunk", "8", "-q")

# The calls by which a program changes a file system, except for writing bytes.
STEPS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate")


# Sources


def save(path: Path, seed: int, shape: tuple[int, ...] = (12, 14, 20), dtype: Any = np.int16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 4 if path.name.startswith("seg") else 900, shape)
    nib.Nifti1Image(voxels.astype(dtype), np.eye(4), dtype=dtype).to_filename(path)
    return path


def make_subject(source: Path, subject: str, seed: int = 0) -> None:
    seed += 10 * sum(subject.encode())
    save(source / subject / "t1.nii.gz", seed)
    save(source / subject / "seg.nii.gz", seed + 1, dtype=np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three subjects with an image and a label map, one also with a series."""
    for subject in SUBJECTS:
        make_subject(tmp_path / "source", subject)
    save(tmp_path / "source" / "sub-02" / "bold.nii.gz", 5, (6, 7, 9, 3))
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "cohort.zarr"
    close_shards(tmp_path)


# The contents of a store


def contents(store: Path) -> dict[str, Any]:
    """The bytes of every file, the values of the manifest, and the root document without its time.

    A network has one name in Python and another on the command line, so its name is left out.
    """
    special = {LOCK, MANIFEST, MANIFEST_TABLE, ROOT_DOCUMENT}
    found: dict[str, Any] = {
        str(file.relative_to(store)): file.read_bytes()
        for file in store.rglob("*")
        if file.is_file() and str(file.relative_to(store)) not in special
    }
    for line in (store / MANIFEST).read_bytes().splitlines():
        value = unsealed(line, "line")
        value.get("provenance", {}).update(model=None, model_path=None)
        if value.get("document") != ROOT_DOCUMENT:
            found["line of " + (value.get("document") or f"{value['subject']}/{value['image']}")] = value
    root = json.loads((store / ROOT_DOCUMENT).read_text())
    assert root["attributes"]["zpatch"].pop("created")
    return found | {"root": root}


def assert_whole(store: Path, expected: dict[str, Any]) -> None:
    """The store is that of an undisturbed conversion, without leftovers."""
    found = contents(store)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    report = zp.verify(store)
    assert (report.damages, report.leftovers) == ((), ())
    top = {entry.name for entry in store.iterdir()}
    assert {name for name in top if name.startswith(".") or "partial" in name} <= {LOCK}
    assert not list(store.rglob("*.partial"))


def assert_sound(store: Path) -> None:
    """All committed images are whole; a store without a manifest has none."""
    if (store / MANIFEST).exists():
        assert zp.verify(store).damages == ()


def undisturbed(source: Path, store: Path, *options: str) -> dict[str, Any]:
    """The contents of an undisturbed conversion to another store."""
    other = store.with_name("undisturbed.zarr")
    assert zpatch.cli.run(["convert", str(source), str(other), *OPTIONS, "--overwrite", *options]) in (0, 3)
    return contents(other)


def age(store: Path, subject: str, image: str = "t1") -> bytes:
    """The voxels of an image, by which an old and a new version differ."""
    return bytes(zp.Cohort(store)[subject][image].data.tobytes())


# A process that converts in child processes, and harms them


@dataclass
class Ran:
    """How a child ended: its exit code or minus the signal, its stderr, and the number of its steps."""

    code: int
    err: str
    steps: int

    def refusal(self) -> str:
        """The one line of an error."""
        assert self.code == 1, self
        assert len(self.err.splitlines()) == 1, self.err
        assert self.err.startswith("zpatch: error: ")
        return self.err.strip()


class Harm:
    """Runs commands, in children that are harmed; by a server of its own where it has a ``prefix``."""

    def __init__(self, folder: Path, server: forked.ForkServer | None = None) -> None:
        self.folder = folder
        self.server = server or forked.server()

    def __call__(self, *arguments: Any, kill_after_s: float | None = None, **harm: int) -> Ran:
        """Run a command. ``kill_at`` kills it at the step of that number, ``kill_after_s`` after that time;
        ``no_space_at`` lets the file of that number and all later ones fail; ``file_limit`` limits the length
        of files in bytes."""
        (self.folder / "steps").write_text("0")
        with self.server.start(
            run_harmed, [str(argument) for argument in arguments], harm, folder=self.folder
        ) as process:
            if kill_after_s is not None:
                time.sleep(kill_after_s)
                process.kill()
            _, err = process.communicate()
            return Ran(process.wait(), err, int((self.folder / "steps").read_text() or 0))

    def convert(self, source: Path, store: Path, *options: Any, **harm: Any) -> Ran:
        return self("convert", source, store, *OPTIONS, *options, **harm)


@pytest.fixture
def harm(tmp_path: Path) -> Harm:
    (tmp_path / "harm").mkdir()
    return Harm(tmp_path / "harm")


def run_harmed(arguments: list[str], harm: dict[str, int]) -> None:
    """The command line of a child."""
    count = harmed(Path(arguments[2]), **harm)
    code = zpatch.cli.run(arguments)
    Path("steps").write_text(str(next(count) - 1))  # empty if it is killed just now
    sys.exit(code)


STEPS_OF_TABLE = 3  # at the end: two folders, which may be there, and the table, which may be missing


def harmed(store: Path, kill_at: int = 0, no_space_at: int = 0, file_limit: int = 0) -> Iterator[int]:
    count = itertools.count(1)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            if next(count) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return step

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        makes = event == "os.mkdir" or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        inside = makes and not isinstance(args[0], int) and Path(os.fsdecode(args[0])).is_relative_to(store)
        if inside and next(count) >= no_space_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    if no_space_at:
        sys.addaudithook(refuse)
    elif file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    else:
        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
    return count


# kill -9


def killed_everywhere(
    harm: Harm, source: Path, store: Path, steps: Sequence[int], *options: Any, before: Path | None = None
) -> Iterator[tuple[int, Ran]]:
    """Start from ``before`` or from nothing, and kill the conversion at each of some steps."""
    for step in steps:
        shutil.rmtree(store, ignore_errors=True)
        if before:
            shutil.copytree(before, store)
        yield step, harm.convert(source, store, *options, kill_at=step)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_conversion_killed_at_any_step_is_finished_by_the_same_command(
    harm: Harm, source: Path, store: Path, some: Some, part: int
) -> None:
    expected = undisturbed(source, store)
    steps = harm.convert(source, store).steps
    assert steps > 100
    for step, ran in killed_everywhere(harm, source, store, some(range(1 + part, steps + 1, 4), 1)):
        assert ran.code == -signal.SIGKILL, step
        assert_sound(store)
        again = harm.convert(source, store)
        assert (again.code, again.err) == (0, ""), step
        assert_whole(store, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--jobs", "1"), ("--jobs", "2"), ("--spacing", "0.8x1.3x1.7", "--orient", "PIL", "--pyramid")],
    ids=["1 job", "2 jobs", "another grid"],
)
def test_a_conversion_killed_at_any_moment_is_finished_by_the_same_command(
    harm: Harm, source: Path, store: Path, some: Some, options: tuple[str, ...]
) -> None:
    expected = undisturbed(source, store, *options)
    began = time.monotonic()
    assert harm.convert(source, store, *options).code == 0
    took_s = time.monotonic() - began
    moments = random.Random(repr(options))
    for _ in some(range(25), 2):
        shutil.rmtree(store)
        ran = harm.convert(source, store, *options, kill_after_s=moments.uniform(0, took_s))
        assert ran.code in (0, -signal.SIGKILL)
        again = harm.convert(source, store, *options)
        assert (again.code, again.err) == (0, "")
        assert_whole(store, expected)


@pytest.mark.slow
def test_starting_over_killed_at_any_step_is_finished_by_the_same_command(
    harm: Harm, source: Path, store: Path, tmp_path: Path, some: Some
) -> None:
    expected = undisturbed(source, store)
    older = tmp_path / "older.zarr"
    for subject in ("sub-01", "sub-07"):
        make_subject(tmp_path / "others", subject, seed=1)
    zp.convert(tmp_path / "others", older)
    shutil.copytree(older, store)
    steps = harm.convert(source, store, "--overwrite").steps
    first = [*range(1, 75, 2), *range(75, steps + 1, 20)]  # most differences are in clearing
    for step, ran in killed_everywhere(harm, source, store, some(first, 3), "--overwrite", before=older):
        assert ran.code == -signal.SIGKILL, step
        again = harm.convert(source, store, "--overwrite")
        assert (again.code, again.err) == (0, ""), step
        assert_whole(store, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--codec", "zstd"), ("--spacing", "1.5")], ids=["", "another codec", "another spacing"]
)
def test_a_replacement_killed_at_any_step_leaves_the_old_or_the_new_image(
    harm: Harm, source: Path, store: Path, tmp_path: Path, some: Some, options: tuple[str, ...]
) -> None:
    """Only with another spacing the label map changes too: else its replacement is the same bytes."""
    older = tmp_path / "older.zarr"
    only = ("--include", "sub-01")
    assert harm.convert(source, older, *only).code == 0
    old = age(older, "sub-01"), age(older, "sub-01", "seg")
    save(source / "sub-01" / "t1.nii.gz", 99)
    expected = undisturbed(source, store, *only, *options)
    other = store.with_name("undisturbed.zarr")
    new = age(other, "sub-01"), age(other, "sub-01", "seg")
    assert old[0] != new[0]
    assert (old[1] == new[1]) == ("--spacing" not in options)
    shutil.copytree(older, store)
    steps = harm.convert(source, store, *only, *options).steps
    assert_whole(store, expected)
    seen = set()
    for step, ran in killed_everywhere(
        harm, source, store, some(range(1, steps + 1), 3), *only, *options, before=older
    ):
        assert ran.code == -signal.SIGKILL, step
        with StoreWriter.resume(store, {}):
            pass
        assert zp.verify(store).damages == (), step
        found = age(store, "sub-01"), age(store, "sub-01", "seg")
        assert found[0] in (old[0], new[0]), step
        assert found[1] in (old[1], new[1]), step
        seen.add(found)
        again = harm.convert(source, store, *only, *options)
        assert (again.code, again.err) == (0, ""), step
        assert_whole(store, expected)
    assert old in seen


@pytest.mark.slow
def test_a_store_that_is_opened_for_writing_and_killed_again_and_again_loses_nothing(
    harm: Harm, source: Path, store: Path, some: Some
) -> None:
    """Kill the replacement, then its repair, at one step after the other."""
    assert harm.convert(source, store).code == 0
    save(source / "sub-02" / "t1.nii.gz", 99)
    expected = undisturbed(source, store)
    for step in some([*range(160, 0, -9), *range(1, 9)], 4):
        ran = harm.convert(source, store, kill_at=step)
        if ran.code == 0:
            break
        assert ran.code == -signal.SIGKILL
    assert harm.convert(source, store).code == 0
    assert_whole(store, expected)


# Torn, left over


def test_a_manifest_cut_anywhere_is_repaired_by_the_same_command(
    source: Path, store: Path, some: Some
) -> None:
    expected = undisturbed(source, store)
    zp.convert(source, store, chunk=8)
    manifest = (store / MANIFEST).read_bytes()
    ends = [n for n, byte in enumerate(manifest) if byte == ord("\n")]
    cuts = {0, 1, len(manifest) - 1, *ends, *(end + 1 for end in ends), *(end - 5 for end in ends)}
    for cut in some(sorted(cuts), 5):
        os.truncate(store / MANIFEST, 0)
        (store / MANIFEST).write_bytes(manifest[:cut])
        zp.convert(source, store, chunk=8)
        assert_whole(store, expected)


def test_leftovers_of_an_interrupted_writer_are_removed(source: Path, store: Path) -> None:
    expected = undisturbed(source, store)
    zp.convert(source, store, chunk=8, include=["sub-01"])
    for leftover in (".staging/abc/0/c/0", ".staging/replaced/sub-09/t1", ".staging/replaced/sub-01/t1/0"):
        (store / leftover).mkdir(parents=True)
    shutil.copytree(store / "sub-01" / "t1", store / "sub-02" / "t1")  # renamed in, and no line written
    (store / "sub-02" / "zarr.json.partial").write_text("{")
    zp.convert(source, store, chunk=8)
    assert_whole(store, expected)


def test_a_writer_killed_before_its_first_line_leaves_a_folder_that_can_become_a_store(
    source: Path, store: Path
) -> None:
    expected = undisturbed(source, store)
    for files in (
        [LOCK],
        [LOCK, "zarr.json.partial"],
        [LOCK, ROOT_DOCUMENT],
    ):
        zp.convert(source, store, chunk=8, include=["sub-01"], overwrite=True)
        for entry in store.iterdir():
            if entry.name not in files:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name in files:
            (store / name).touch()
        zp.convert(source, store, chunk=8)
        assert_whole(store, expected)


# Ctrl-C, a second writer


def many_subjects(source: Path, folder: Path, count: int = 16) -> Path:
    for number in range(count):
        shutil.copytree(source / "sub-01", folder / f"sub-{number:03}", copy_function=os.link)
    return folder


def command(*arguments: Any) -> forked.Forked:
    """The command line in a new process group, as a terminal starts it."""
    return forked.start("import zpatch.cli; zpatch.cli.main()", *arguments)


def begun(process: forked.Forked, store: Path, subjects: int = 3) -> Callable[[], bool]:
    def is_begun() -> bool:
        manifest = store / MANIFEST
        assert process.poll() is None, process.communicate()
        return manifest.exists() and manifest.read_bytes().count(b'"image"') >= 2 * subjects

    return is_begun


def all_stopped(process: forked.Forked) -> Callable[[], bool]:
    """Whether all threads of a process and its workers are stopped; each stops only after its system call."""

    def are_stopped() -> bool:
        parent = psutil.Process(process.pid)
        processes = (parent, *parent.children(recursive=True))
        threads = [file for one in processes for file in Path(f"/proc/{one.pid}/task").glob("*/stat")]
        with contextlib.suppress(FileNotFoundError):  # the thread ended just now
            return all(file.read_text().rpartition(")")[2].split()[0] == "T" for file in threads)
        return False

    return are_stopped


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(4))
def test_ctrl_c_stops_all_workers_and_the_same_command_finishes(
    source: Path, store: Path, tmp_path: Path, full: bool, round_: int
) -> None:
    if round_ and not full:
        pytest.skip("one moment in the quick run")
    scans = many_subjects(source, tmp_path / "scans", 40)
    with command("convert", scans, store, *OPTIONS, "--jobs", 2) as process:
        eventually(begun(process, store, 2 + 8 * round_), "some subjects")
        workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(workers) == 2
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to every process of the group
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err.strip()) == (130, "", "zpatch: interrupted")
    assert not any(map(is_running, workers))
    assert not (store / STAGING).exists()
    report = zp.verify(store)
    assert (report.damages, report.leftovers) == ((), ())
    assert 0 < len(zp.Cohort(store)) < 40
    assert zpatch.cli.run(["convert", str(scans), str(store), *OPTIONS, "--jobs", "2"]) == 0
    assert_whole(store, undisturbed(scans, store))


def test_a_new_writer_waits_while_the_workers_of_a_killed_one_end(
    source: Path, store: Path, tmp_path: Path
) -> None:
    scans = many_subjects(source, tmp_path / "scans")
    with command("convert", scans, store, *OPTIONS, "--jobs", 2) as first:
        eventually(begun(first, store), "some subjects")
        workers = psutil.Process(first.pid).children(recursive=True)
        for worker in workers:
            worker.suspend()
        first.kill()
        first.wait()
        later = threading.Timer(0.5, lambda: [worker.resume() for worker in workers])
        later.start()
        assert zpatch.cli.run(["convert", str(scans), str(store), *OPTIONS, "--jobs", "2"]) == 0
        later.join()
    assert_whole(store, undisturbed(scans, store))


def test_a_second_writer_is_refused_at_once_and_the_error_names_the_first(
    source: Path, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scans = many_subjects(source, tmp_path / "scans")
    with command("convert", scans, store, *OPTIONS) as first:
        eventually(begun(first, store), "some subjects")
        os.killpg(first.pid, signal.SIGSTOP)
        eventually(all_stopped(first), "all its processes stopped")
        try:
            for option in ((), ("--overwrite",)):
                before = contents(store)
                assert zpatch.cli.run(["convert", str(scans), str(store), *OPTIONS, *option]) == 1
                line = capfd.readouterr().err
                who = (
                    f"process {first.pid} on {os.uname().nodename} is writing to it; wait until it has ended"
                )
                assert line == f"zpatch: error: {store}: {who}\n"
                assert contents(store) == before
        finally:
            os.killpg(first.pid, signal.SIGCONT)
        out, err = first.communicate(timeout=60)
    assert (first.returncode, out, err) == (0, f"{store}\n", "")
    assert_whole(store, undisturbed(scans, store))


# A full disk


def assert_clear(ran: Ran, store: Path, *texts: str) -> None:
    line = ran.refusal()
    assert any(text in line for text in texts), line
    assert str(store) in line


def finishes(run: Callable[..., Ran], source: Path, store: Path, expected: dict[str, Any]) -> None:
    assert_sound(store)
    if (store / MANIFEST).exists():  # otherwise not even its first line could be written
        zp.Cohort(store)
    again = run(source, store)
    assert (again.code, again.err) == (0, "")
    assert_whole(store, expected)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_disk_that_is_full_at_any_new_file_is_an_error_of_one_line_and_a_rerun_finishes(
    harm: Harm, source: Path, store: Path, some: Some, part: int
) -> None:
    expected = undisturbed(source, store)
    files = harm.convert(source, store, no_space_at=10**9).steps
    assert files > 80
    for number in some(range(1 + part, files + 1 - STEPS_OF_TABLE, 4), 1):
        shutil.rmtree(store, ignore_errors=True)
        ran = harm.convert(source, store, no_space_at=number)
        assert_clear(ran, store, "No space left on device")
        finishes(harm.convert, source, store, expected)
    shutil.rmtree(store)
    assert harm.convert(source, store, no_space_at=files + 1 - STEPS_OF_TABLE).code == 0
    assert_whole(store, expected)
    assert not (store / MANIFEST_TABLE).exists()


@pytest.mark.slow
def test_files_that_may_not_grow_are_an_error_of_one_line_and_a_rerun_finishes(
    harm: Harm, source: Path, store: Path, some: Some
) -> None:
    """The manifest is cut in the middle of a line, and the short write raises no error by itself."""
    expected = undisturbed(source, store)
    size = (store.with_name("undisturbed.zarr") / MANIFEST).stat().st_size
    for limit in some(range(200, size, 97), 3):
        shutil.rmtree(store, ignore_errors=True)
        ran = harm.convert(source, store, file_limit=limit)
        assert_clear(ran, store, "File too large")
        finishes(harm.convert, source, store, expected)


@pytest.mark.slow
def test_a_small_disk_that_runs_full_is_an_error_of_one_line_and_on_a_larger_one_a_rerun_finishes(
    source: Path, store: Path, tmp_path: Path, some: Some
) -> None:
    """On a new file system that no other process sees; skipped where mounting is not allowed."""
    expected = undisturbed(source, store)
    files = [file for file in store.with_name("undisturbed.zarr").rglob("*") if file.is_file()]
    files = [file for file in files if file.name != MANIFEST_TABLE]  # which may be missing
    need_kib = 4 * sum(-(-file.stat().st_size // 4096) for file in files)
    disk = tmp_path / "disk"
    disk.mkdir()
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no file systems of one's own here")
    server = forked.ForkServer(apart)
    harm = Harm(tmp_path, server)

    def shell(*command: Any) -> int:
        return server.run(
            "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))", *command
        ).returncode

    try:
        if shell("mount", "-t", "tmpfs", "-o", "size=4k", "none", disk):
            pytest.skip("no file systems of one's own here")
        for size_kib in some(range(4, need_kib - 8, 8), 2):
            shell("sh", "-c", f"rm -rf {disk}/* && mount -o remount,size={size_kib}k {disk}")
            ran = harm.convert(source, disk / store.name)
            assert_clear(ran, disk / store.name, "No space left on device", "cannot be made")
            shell("mount", "-o", "remount,size=100m", disk)
            assert harm("verify", disk / store.name, "-q").code in ((0, 1) if size_kib < 40 else (0,))
            again = harm.convert(source, disk / store.name)
            assert (again.code, again.err) == (0, "")
            assert shell("cp", "-r", disk / store.name, store) == 0
            assert_whole(store, expected)
            shutil.rmtree(store)
    finally:
        server.close()


# Changes between runs


def test_a_run_that_finds_nothing_to_do_writes_nothing(source: Path, store: Path) -> None:
    """Except for the lock, which names its holder."""

    def times() -> dict[Path, tuple[int, int]]:
        return {
            entry: (entry.lstat().st_mtime_ns, entry.lstat().st_ino)
            for entry in [store, *store.rglob("*")]
            if entry.name != LOCK
        }

    first = zp.convert(source, store, chunk=8)
    assert [outcome.subject for outcome in first.outcomes] == list(SUBJECTS)
    before = times()
    for jobs in (1, 2):
        report = zp.convert(source, store, chunk=8, jobs=jobs)
        assert (report.outcomes, report.records, report.failures) == ((), [], [])
        assert report.done == SUBJECTS
        assert times() == before


def test_a_file_that_was_only_touched_or_copied_is_not_converted_again(source: Path, store: Path) -> None:
    zp.convert(source, store, chunk=8)
    expected = contents(store)
    for file in source.rglob("*.nii.gz"):
        os.utime(file, ns=(1, 1))
    assert zp.convert(source, store, chunk=8).done == SUBJECTS
    assert contents(store) == expected


def test_only_changed_cases_are_converted_and_the_store_is_that_of_a_new_conversion(
    source: Path, store: Path
) -> None:
    zp.convert(source, store, chunk=8)
    save(source / "sub-02" / "t1.nii.gz", 99)
    make_subject(source, "sub-04")
    before = {s: (store / s / "t1" / "zarr.json").stat().st_ino for s in ("sub-01", "sub-03")}
    report = zp.convert(source, store, chunk=8)
    assert [outcome.subject for outcome in report.outcomes] == ["sub-02", "sub-04"]
    assert report.done == ("sub-01", "sub-03")
    assert before == {s: (store / s / "t1" / "zarr.json").stat().st_ino for s in ("sub-01", "sub-03")}
    assert_whole(store, undisturbed(source, store))


def test_a_file_of_the_same_length_and_time_counts_as_unchanged(source: Path, store: Path) -> None:
    """Its bytes are not read; they are compared once its time is another."""
    path = source / "sub-01" / "t1.nii"
    save(path, 1).with_name("t1.nii.gz").unlink()
    zp.convert(source, store, chunk=8)
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert zp.convert(source, store, chunk=8).done == SUBJECTS
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert zp.convert(source, store, chunk=8).done == ("sub-02", "sub-03")
    assert_whole(store, undisturbed(source, store))


def test_an_image_that_was_added_later_joins_its_subject(source: Path, store: Path) -> None:
    zp.convert(source, store, chunk=8)
    save(source / "sub-01" / "t2.nii.gz", 7)
    report = zp.convert(source, store, chunk=8)
    assert [outcome.subject for outcome in report.outcomes] == ["sub-01"]
    assert_whole(store, undisturbed(source, store))


def test_an_image_whose_kind_has_changed_is_converted_again(source: Path, store: Path) -> None:
    shutil.rmtree(source / "sub-02")
    zp.convert(source, store, chunk=8)
    zp.convert(source, store, chunk=8, label_patterns=["t1*", "seg*"])
    assert {type(subject.t1) for subject in zp.Cohort(store)} == {zp.LabelMap}
    assert_whole(store, undisturbed(source, store, "--label-pattern", "t1*", "--label-pattern", "seg*"))


def test_changed_splits_and_metadata_are_updated_in_the_store(source: Path, store: Path) -> None:
    def listed(**ages: int) -> Path:
        lines = ["subject,t1,seg,split,age"]
        for subject in SUBJECTS:
            age = ages.get(subject.replace("-", ""), 30)
            split = "train" if age == 30 else "test"
            lines.append(f"{subject},{subject}/t1.nii.gz,{subject}/seg.nii.gz,{split},{age}")
        (source / "cases.csv").write_text("\n".join(lines) + "\n")
        return source / "cases.csv"

    zp.convert(listed(), store, chunk=8)
    assert zp.convert(listed(), store, chunk=8).done == SUBJECTS
    zp.convert(listed(sub02=31), store, chunk=8)
    subject = zp.Cohort(store)["sub-02"]
    assert (subject.split, subject.metadata) == ("test", {"age": 31})
    assert_whole(store, undisturbed(source / "cases.csv", store))


def test_images_of_removed_sources_stay_in_the_store(source: Path, store: Path) -> None:
    zp.convert(source, store, chunk=8)
    expected = contents(store)
    shutil.rmtree(source / "sub-03")
    (source / "sub-01" / "seg.nii.gz").unlink()
    report = zp.convert(source, store, chunk=8)
    assert (report.done, report.outcomes) == (("sub-01", "sub-02"), ())
    assert contents(store) == expected
    assert zp.Cohort(store).names == list(SUBJECTS)


def break_off(path: Path) -> None:
    """Damage that is found only after all voxels: the checksum of gzip data."""
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_case_that_failed_is_converted_once_it_is_repaired(source: Path, store: Path, jobs: int) -> None:
    expected = undisturbed(source, store)
    path = source / "sub-02" / "t1.nii.gz"
    good, status = path.read_bytes(), path.stat()
    break_off(path)
    for _ in range(2):
        report = zp.convert(source, store, chunk=8, jobs=jobs)
        assert [failure.subject for failure in report.failures] == ["sub-02"]
        assert zp.Cohort(store).names == ["sub-01", "sub-03"]
        assert not (store / "sub-02").exists()
    path.write_bytes(good)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = zp.convert(source, store, chunk=8, jobs=jobs)
    assert [record.subject for record in report.records] == ["sub-02"] * 3
    assert_whole(store, expected)


def test_an_image_whose_file_was_broken_later_is_unchanged(source: Path, store: Path) -> None:
    zp.convert(source, store, chunk=8)
    expected = contents(store)
    break_off(source / "sub-02" / "t1.nii.gz")
    report = zp.convert(source, store, chunk=8)
    assert [failure.subject for failure in report.failures] == ["sub-02"]
    assert_whole(store, expected)


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_run_in_which_every_case_fails_leaves_the_older_images_unchanged(
    source: Path, store: Path, overwritten: bool
) -> None:
    zp.convert(source, store, chunk=8, include=["sub-01"])
    expected = contents(store)
    broken = "sub-01" if overwritten else "sub-02"
    break_off(source / broken / "t1.nii.gz")
    with contextlib.suppress(SourceError):
        zp.convert(source, store, chunk=8, include=[broken])
    assert_whole(store, expected)


def test_a_first_run_in_which_every_case_fails_leaves_no_store(source: Path, store: Path) -> None:
    for subject in SUBJECTS:
        break_off(source / subject / "seg.nii.gz")
    with pytest.raises(SourceError, match=r"no case of .*source can be converted: .*\(and 2 more\)"):
        zp.convert(source, store, jobs=2)
    assert not store.exists()


def test_metadata_may_have_the_names_of_fields_of_the_manifest(source: Path, store: Path) -> None:
    columns = ("document", "subject", "image", "check", "files")
    rows = ["\t".join(("participant_id", *columns))]
    rows += ["\t".join((subject, *(f"{column}-1" for column in columns))) for subject in SUBJECTS]
    (source / "participants.tsv").write_text("\n".join(rows) + "\n")
    for file in list(source.rglob("*.nii.gz")):
        suffix = {"t1": "T1w", "seg": "dseg", "bold": "bold"}[file.name.partition(".")[0]]
        target = (
            file.parent / ("func" if suffix == "bold" else "anat") / f"{file.parent.name}_{suffix}.nii.gz"
        )
        target.parent.mkdir(exist_ok=True)
        file.rename(target)
    (source / "dataset_description.json").write_text('{"Name": "a", "BIDSVersion": "1.9.0"}')
    zp.convert(source, store, chunk=8)
    assert zp.Cohort(store).names == list(SUBJECTS)
    assert zp.Cohort(store)["sub-01"].metadata["document"] == "document-1"
    assert zp.convert(source, store, chunk=8).done == SUBJECTS


# Many workers


def test_two_jobs_give_the_same_bytes_as_one(source: Path, store: Path) -> None:
    zp.convert(source, store, chunk=8, jobs=2)
    assert_whole(store, undisturbed(source, store))


def test_a_worker_killed_in_mid_run_changes_no_result(source: Path, store: Path, tmp_path: Path) -> None:
    scans = many_subjects(source, tmp_path / "scans")
    with command("convert", scans, store, *OPTIONS, "--jobs", 2) as process:
        for subjects in (2, 8):
            eventually(begun(process, store, subjects), "some subjects")
            workers = psutil.Process(process.pid).children(recursive=True)
            with contextlib.suppress(IndexError, psutil.NoSuchProcess):
                workers[0].kill()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"{store}\n", "")
    assert_whole(store, undisturbed(scans, store))


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
def test_a_cluster_with_a_killed_worker_gives_the_same_bytes(
    source: Path, store: Path, tmp_path: Path, full: bool, moment: int
) -> None:
    if moment and not full:
        pytest.skip("one moment in the quick run")
    scans = many_subjects(source, tmp_path / "scans")
    killed = threading.Event()

    def kill_one(address: str) -> None:
        manifest = store / MANIFEST
        eventually(lambda: manifest.exists() and manifest.read_bytes().count(b'"image"') > 6 * moment, "some")
        workers = [child for child in psutil.Process().children(recursive=True) if is_worker(child)]
        workers[moment % len(workers)].kill()
        killed.set()

    with local_cluster() as cluster:
        killer = threading.Thread(target=kill_one, args=(cluster.scheduler_address,))
        killer.start()
        report = zp.convert(scans, store, chunk=8, scheduler=cluster.scheduler_address)
        killer.join()
    assert killed.is_set()
    assert len(report.records) == 32
    assert_whole(store, undisturbed(scans, store))


def is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("spawn_main" in part for part in process.cmdline())
    return False
