"""Fixtures for all tests: one small cohort, and a check that nothing is left behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.loading import draw_reader

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from make_cohort import make_cohort
from processes import shared_memory, without_other_programs

hypothesis.settings.register_profile("quick", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, max_examples=400)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run slow tests in their full counts")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "quick")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether slow tests run with their full numbers of cases."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def cohort_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of NIfTI files: four small brains with tissue labels, one oblique, one float with slope."""
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
    with draw_reader.one_thread():
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
    close_shards(tmp_path)  # the bounded cache of open maps is kept on purpose
    if _left_behind(before, tmp_path):
        gc.collect()
        children = psutil.Process().children(recursive=True)
        psutil.wait_procs([child for child in children if not _is_resource_tracker(child)], timeout=3)
    assert _left_behind(before, tmp_path) == []


def _left_behind(before: set[str], folder: Path) -> list[str]:
    me = psutil.Process()
    children = me.children(recursive=True)
    processes = [str(child) for child in children if not _is_resource_tracker(child)]
    blocks = {name for name in shared_memory() - before if not name.startswith("sem.")}
    blocks = without_other_programs(blocks, {me.pid, *(child.pid for child in children)})
    files = [file.path for file in me.open_files() if Path(file.path).is_relative_to(folder)]
    return [*processes, *blocks, *files]


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return True
