"""Jobs in a file: each as it was written, read a few at a time, and refused if the file is another."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.errors import ModelError, SourceError, StoreError
from zpatch.prediction import stored_jobs
from zpatch.prediction.stored_jobs import JOBS_TOGETHER, StoredJobs

COUNTS = [0, 1, JOBS_TOGETHER - 1, JOBS_TOGETHER, JOBS_TOGETHER + 1, 3 * JOBS_TOGETHER]


def written(folder: Path, jobs: Any) -> StoredJobs:
    """The jobs as another process gets them."""
    loaded: StoredJobs = cloudpickle.loads(cloudpickle.dumps(StoredJobs.write(folder / "jobs", jobs)))
    return loaded


@pytest.mark.parametrize("count", COUNTS)
def test_jobs_are_those_that_were_written_in_their_order(tmp_path: Path, count: int) -> None:
    jobs = [f"job {number}" for number in range(count)]
    loaded = written(tmp_path, jobs)
    assert (len(loaded), list(loaded), loaded[:]) == (count, jobs, jobs)
    with pytest.raises(IndexError):
        loaded[count]


@given(at=st.integers(-200, 199))
def test_any_job_is_found_by_its_number(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    assert written(tmp_path_factory.mktemp("jobs"), range(200))[at] == range(200)[at]


def test_only_the_part_of_a_job_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = written(tmp_path, range(10 * JOBS_TOGETHER))
    read: list[int] = []
    monkeypatch.setattr(stored_jobs, "digest", lambda data: read.append(len(data)) or loaded._parts[4].digest)
    for number in (4 * JOBS_TOGETHER, 5 * JOBS_TOGETHER - 1, 4 * JOBS_TOGETHER):
        assert loaded[number] == number
    assert read == [loaded._parts[4].bytes]
    assert read[0] < (tmp_path / "jobs").stat().st_size / 5


def test_what_jobs_share_is_written_once_for_all_that_are_together(tmp_path: Path) -> None:
    shared = "x" * 10_000
    written(tmp_path, [(shared, number) for number in range(JOBS_TOGETHER)])
    assert (tmp_path / "jobs").stat().st_size < 2 * len(shared)


def test_the_file_is_for_its_user_alone_and_new(tmp_path: Path) -> None:
    written(tmp_path, range(3))
    assert stat.S_IMODE((tmp_path / "jobs").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        written(tmp_path, range(3))


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_other_bytes_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    loaded = written(tmp_path, range(3))
    evil = cloudpickle.dumps((Evil(tmp_path / "ran"),))
    loaded._parts = [dataclasses.replace(part, bytes=len(evil)) for part in loaded._parts]
    (tmp_path / "jobs").write_bytes(evil)
    with pytest.raises(StoreError, match="was changed after it was written"):
        loaded[0]
    assert not (tmp_path / "ran").exists()


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("no luck here")


def fail() -> None:
    raise ImportError("no module named mine")


class Unknown:
    def __reduce__(self) -> Any:
        return fail, ()


def test_what_cannot_be_sent_or_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"an input cannot be sent .*no luck here"):
        StoredJobs.write(tmp_path / "not", [Unpicklable()])  # type: ignore[list-item]
    with pytest.raises(ModelError, match=r"cannot be loaded in another process \(no module named mine"):
        written(tmp_path, [Unknown()])[0]
