"""Fixtures for all tests: one small cohort, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import hypothesis
import numpy as np
import pytest
from processes import child_pids, children, close_slides, eventually, shared_memory, without_other_programs
from record import TRIES, Case, Record, Some, passed, some_of

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.records.names import MANIFEST, MANIFEST_TABLE

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

FULL_TIMEOUT_S = 600  # 400 examples of a law, on a slow machine
SLOW_TIMEOUT_S = 1200

hypothesis.settings.register_profile("quick", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, max_examples=400)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run slow tests in their full counts")
    parser.addoption("--record", help="add a line for each test to this file")
    parser.addoption("--record-at", default="", help="the commit to record; what passed at it is left out")
    parser.addoption("--record-keeps", action="store_true", help="leave out what passed at any commit")
    parser.addoption("--matching", default="", help="with --record: a regular expression of tests to run")


def pytest_configure(config: pytest.Config) -> None:
    # Threads of torch that wait in a loop take half the time, as there are more of them than processors.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "quick")
    if file := config.getoption("--record"):
        at, matching = config.getoption("--record-at"), config.getoption("--matching")
        hands_out_tests = not hasattr(config, "workerinput")
        done = passed(Path(file), None if config.getoption("--record-keeps") else at)
        config.pluginmanager.register(Record(Path(file), at, done, matching, writes=hands_out_tests))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only tests marked alone run, modules without them are not imported."""
    ignored = config.getoption("markexpr") == "alone" and collection_path.suffix == ".py"
    return True if ignored and b"mark.alone" not in collection_path.read_bytes() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests may take longer in their full counts."""
    for item in items if config.getoption("--full") else ():
        if not item.get_closest_marker("timeout"):
            is_slow = item.get_closest_marker("slow")
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S if is_slow else FULL_TIMEOUT_S))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # collections, also those of tests, then look at what tests make and not at all modules


def pytest_sessionfinish() -> None:
    forked.close()


@pytest.fixture(scope="session", autouse=True)
def no_syncing(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the quick run no file is synced to the disk: no test can see it, and it takes longer than most."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--full"):
            patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether slow tests run with their full numbers of cases."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def some(full: bool, request: pytest.FixtureRequest) -> Some:
    """Choose cases as `Some` says, and count them for the record."""

    def choose(cases: Sequence[Case], quick: int) -> list[Case]:
        chosen = list(cases) if full else some_of(cases, quick)
        request.node.user_properties.append((TRIES, len(chosen)))
        return chosen

    return choose


@pytest.fixture(scope="session")
def cohort_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of NIfTI files: four small brains with tissue labels, one oblique, one float with slope."""
    from make_cohort import make_cohort  # the process that only hands out tests loads no more than it needs

    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, subjects=4, seed=0, zoom=0.25)
    return folder


@pytest.fixture(scope="session")
def cohort_store(cohort_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort as a store; tests that damage it copy it first."""
    path = tmp_path_factory.mktemp("store") / "cohort.zarr"
    zp.convert(cohort_source, path, chunk=16)
    return path


@pytest.fixture
def cohort(cohort_store: Path) -> zp.Cohort:
    """The small cohort, opened."""
    return zp.Cohort(cohort_store)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """The path of a new output for predictions."""
    yield tmp_path / "out.zarr"
    close_shards(tmp_path)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its exit code, stdout and stderr."""

    def run_it(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = zpatch.cli.run([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run_it


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch in one thread, as its convolution rounds differently with another number of threads."""
    from zpatch.loading import draw_reader

    with draw_reader.one_thread():
        yield


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """Predictions in chunks of 8 voxels and small shards, so that small volumes have many shards."""
    from zpatch.chunks.layout import plan_output_layout
    from zpatch.planning import regions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "plan_output_layout", functools.partial(plan_output_layout, chunk=8))
        patch.setattr(regions, "SHARD_BYTES", 2**16)
        patch.setattr(regions, "SMALLEST_SHARD_BYTES", 2**12)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator for test data."""
    return np.random.default_rng(2024)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves a process, a shared-memory block or an open file below its folder."""
    before = shared_memory()
    yield
    close_shards(tmp_path)  # the bounded caches of open maps and slides are kept on purpose
    close_slides(tmp_path)
    if _left_behind(before, tmp_path):
        gc.collect()
        with contextlib.suppress(AssertionError):
            eventually(lambda: not children(), "the end of all processes", 3)
    assert _left_behind(before, tmp_path) == []


def _left_behind(before: set[str], folder: Path) -> list[str]:
    processes = [f"process {pid}" for pid in children()]
    blocks = {name for name in shared_memory() - before if not name.startswith("sem.")}
    blocks = without_other_programs(blocks, {os.getpid(), *child_pids()}) if blocks else blocks
    return [*processes, *blocks, *_open_files(folder)]


def _open_files(folder: Path) -> list[str]:
    """The files below a folder that this process holds open, without those of cohorts that fixtures hold."""
    start, found = f"{folder}{os.sep}", []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since, such as that of the listing itself
            path = os.readlink(f"/proc/self/fd/{number}")
            is_of_cohort = os.path.basename(path) in (MANIFEST, MANIFEST_TABLE)
            if path.startswith(start) and os.path.isfile(path) and not is_of_cohort:
                found.append(path)
    return found
