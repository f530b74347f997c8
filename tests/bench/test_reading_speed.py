"""Measured reads: files are dropped from the page cache, and processes start together."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

import zpatch as zp
from zpatch.bench import reading_speed
from zpatch.bench.reading_speed import ReadingTask
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import WorkerError


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_files_are_dropped_and_what_the_system_keeps_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    page = os.sysconf("SC_PAGE_SIZE")
    file.write_bytes(b"z" * (10 * page + 1))
    pages, kept = reading_speed._drop(file)
    assert pages == 11
    assert 0 <= kept <= 11


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_paths_that_are_no_files_are_left_to_the_reader_to_report(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    for name in ("nowhere", "empty", "link", "pipe", "."):
        assert reading_speed._drop(tmp_path / name) == (0, 0)


def task_of(cohort: zp.Cohort, meeting: Path, number: int = 0, processes: int = 1) -> ReadingTask:
    return ReadingTask(
        store=cohort.store.path,
        subjects=tuple(cohort),
        patch_size=(8, 8, 8),
        group=3,
        seconds=0.01,
        cold=False,
        number=number,
        processes=processes,
        meeting=meeting,
    )


def test_a_task_travels_to_a_spawned_process(cohort: zp.Cohort, tmp_path: Path) -> None:
    task = pickle.loads(pickle.dumps(task_of(cohort, tmp_path)))
    assert reading_speed._measured(task, lambda amount: None).warm > 0
    close_shards(cohort.store.path)


def test_processes_read_different_patches_and_all_subjects_in_turn(cohort: zp.Cohort, tmp_path: Path) -> None:
    streams = [task_of(cohort, tmp_path, number).groups() for number in range(2)]
    groups = [[next(stream) for _ in range(8)] for stream in streams]
    assert [group.subject.name for group in groups[0]] == cohort.names * 2
    drawn = [group.locations for some in groups for group in some]
    assert len(set(drawn)) == 16
    assert all(len(locations) == 3 for locations in drawn)


def test_processes_start_together_and_a_restarted_process_is_an_error(
    cohort: zp.Cohort, tmp_path: Path
) -> None:
    task = task_of(cohort, tmp_path, number=0, processes=2)
    (tmp_path / "warm-1").touch()
    task.meet("warm")
    with pytest.raises(WorkerError, match="was killed, perhaps for want of memory; try fewer jobs="):
        task.meet("warm")
