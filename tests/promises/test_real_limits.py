"""Stages run where the system gives them no more memory than they state: one that takes more is killed.

A control group of Linux holds all processes of a stage. What counts is what they write to; pages of files and
libraries are taken back by the system. What a stage needs before it begins, with the interpreter and
libraries, is measured on a small input. These tests take minutes, and run with --full only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from record import Some

import zpatch as zp

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.predict.limits import RUNS, LimitedRun

MIB = 2**20
GROUPS = Path("/sys/fs/cgroup/memory")
POLL_S = 0.01
NOISE = 2 * MIB  # by which the measure of the small input differs from one time to the next
SLACK = 4 * MIB  # pages of libraries that must be there while they are used
PAGE_TABLES = 512  # bytes of memory for which the kernel holds one more, in each process that maps it
TIMES = 30


def can_limit() -> bool:
    """Whether this process may make control groups."""
    group = GROUPS / f"zpatch-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        group.rmdir()
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.skipif(not can_limit(), reason="no control groups of memory can be made here"),
    pytest.mark.alone,
    pytest.mark.slow,
]


class Ran(NamedTuple):
    """How a command ended, and the most memory that its processes held besides pages of files."""

    code: int
    out: str
    err: str
    peak: int


@contextlib.contextmanager
def group_of(limit: int | None) -> Iterator[Path]:
    group = GROUPS / f"zpatch-{uuid.uuid4().hex}"
    group.mkdir()
    try:
        if limit is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        until = time.monotonic() + 10
        while group.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):  # its last process is still ending
                group.rmdir()
            time.sleep(POLL_S)


def run(*command: Any, limit: int | None = None) -> Ran:
    """Run a command, all of whose processes together get ``limit`` bytes."""
    with group_of(limit) as group:
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        environment = {**os.environ, "PYTHONPATH": str(Path(zp.__file__).parents[1])}
        with subprocess.Popen(
            ["sh", "-c", enter, "sh", *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        ) as process:  # fmt: skip
            peak = 0
            while process.poll() is None:
                peak = max(peak, held(group))
                time.sleep(POLL_S)
            out, err = process.communicate()
        return Ran(process.returncode, out, err, peak)


def held(group: Path) -> int:
    """What its processes hold: anonymous memory, and shared memory, which v1 counts as mapped files."""
    figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(figures["total_rss"]) + int(figures.get("total_shmem", 0))


def zpatch(*arguments: Any, limit: int | None = None) -> Ran:
    return run(Path(sys.executable).with_name("zpatch"), *arguments, limit=limit)


def scans(folder: Path, shape: Sequence[int], count: int = 1) -> Path:
    """Noise as compressed NIfTI files, made once."""
    for number in range(count):
        file = folder / f"sub-{number}" / "t1.nii.gz"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(number).integers(0, 900, shape, dtype=np.int16)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
    return folder


@pytest.fixture(autouse=True)
def only_in_full(full: bool) -> None:
    if not full:
        pytest.skip("real limits need --full")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scans(tmp_path_factory.mktemp("small"), (24, 24, 24))


CONVERSIONS = [
    (shape, *options)
    for shape in ((256, 256, 200), (128, 512, 160), (400, 300, 100))
    for options in (
        (), ("--codec", "zstd"), ("--codec", "none"), ("--chunk", 64), ("--pyramid",), ("--orient", "RAS"),
        ("--max-memory", "80 MiB"), ("--max-memory", "96 MiB", "--pyramid"), ("--jobs", 2),
        ("--jobs", 2, "--pyramid"),
    )
]  # fmt: skip


@pytest.mark.timeout(1200)
def test_conversions_are_done_in_what_their_plans_state(tmp_path: Path, small: Path, some: Some) -> None:
    assert len(CONVERSIONS) == TIMES
    sources = scans(small, (24, 24, 24), 2)
    bases = {
        jobs: zpatch("convert", sources, tmp_path / f"small-{jobs}", "-q", "--jobs", jobs).peak
        for jobs in (1, 2)
    }
    for number, (shape, *options) in enumerate(some(CONVERSIONS, 1)):
        source, store = scans(tmp_path / "x".join(map(str, shape)), shape, 2), tmp_path / f"store-{number}"
        plan = zpatch("convert", source, store, *options, "--dry-run", "--json")
        assert plan.code == 0, plan.err
        stated = json.loads(plan.out)["peak_bytes"]
        limit = bases[2 if "--jobs" in options else 1] + stated + NOISE
        ran = zpatch("convert", source, store, "-q", *options, limit=limit + SLACK)
        assert (ran.code, ran.err) == (0, ""), (shape, options)
        assert ran.peak <= limit, (shape, options)


@pytest.mark.timeout(2400)
def test_predictions_are_done_in_the_memory_they_are_given(tmp_path: Path, some: Some) -> None:
    for number, one in enumerate(some(RUNS, 1)):
        folder = tmp_path / "x".join(map(str, one.shape))
        if not folder.exists():
            zp.convert(scans(folder, one.shape), folder / "store")
        ran = predict(one, folder / "store", tmp_path / f"out-{number}")
        assert (ran.code, ran.err) == (0, ""), str(one)
        assert ran.peak <= one.limit_mib * MIB


def predict(one: LimitedRun, store: Path, output: Path) -> Ran:
    root = Path(__file__).parents[2]
    command = ["predict", store, output, "-q", "--model", f"benchmarks.predict.networks:{one.network}"]
    command += ["--patch-size", one.patch, "--overlap", one.overlap, "--jobs", one.jobs, "--device", "cpu"]
    limit = ("--max-memory", f"{one.limit_mib} MiB")
    with contextlib.chdir(root):
        return zpatch(*command, *one.options, *limit, limit=one.limit_mib * MIB)


QUEUE = """
import sys
import zpatch as zp

store, size, workers, length = sys.argv[1], *map(int, sys.argv[2:])
cohort = zp.Cohort(store)
options = {"patches_per_volume": 8, "max_length": length, "num_workers": workers}
queue = zp.Queue(cohort, zp.UniformSampler(size), **options)
with queue:
    for epoch in range(2):
        queue.set_epoch(epoch)
        for batch in zp.SubjectsLoader(queue, 2):
            batch.t1.data.sum()
print(queue.max_memory)
"""


@pytest.mark.timeout(1200)
def test_queues_feed_in_what_they_state(tmp_path: Path, small: Path, some: Some) -> None:
    large = tmp_path / "large"
    zp.convert(scans(tmp_path / "scans", (140, 140, 140), 4), large)
    zp.convert(scans(small, (24, 24, 24), 4), tmp_path / "tiny")
    cases = list(itertools.product((32, 48, 64, 96, 128), (1, 2), (8, 16, 32)))
    assert len(cases) == TIMES
    for size, workers, length in some(cases, 1):
        base = run(sys.executable, "-c", QUEUE, tmp_path / "tiny", 8, workers, length)
        stated = run(sys.executable, "-c", QUEUE, large, size, workers, length)
        batches = 2 * 2 * size**3 * 4  # of the loop itself: the one that it has, and the next one
        limit = base.peak + int(stated.out) + batches + NOISE
        tables = (1 + workers) * int(stated.out) // PAGE_TABLES  # shared memory is mapped by each process
        ran = run(sys.executable, "-c", QUEUE, large, size, workers, length, limit=limit + tables + SLACK)
        assert (ran.code, ran.err) == (0, ""), (size, workers, length)
        assert ran.peak <= limit, (size, workers, length)


@pytest.mark.timeout(1200)
def test_a_verification_takes_the_same_memory_for_any_store(tmp_path: Path, small: Path, some: Some) -> None:
    zp.convert(small, tmp_path / "tiny")
    base = zpatch("verify", tmp_path / "tiny", "-q").peak
    sizes = [(64 + 16 * n, 128, 100) for n in range(TIMES)]
    for number, shape in enumerate(some(sizes, 1)):
        store = tmp_path / f"store-{number}"
        zp.convert(scans(tmp_path / f"scans-{number}", shape), store, codec="none")
        limit = base + NOISE
        ran = zpatch("verify", store, "-q", limit=limit + SLACK)
        assert (ran.code, ran.err) == (0, ""), shape
        assert ran.peak <= limit
