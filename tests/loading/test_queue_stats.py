"""Where a queue says that the time goes. Bottlenecks are injected as sleeps that are long on any machine."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from streams import items, small_subjects, stream

import zpatch as zp
from zpatch.chunks.mapped_shards import MappedShard, close_shards
from zpatch.errors import OptionError, QueueError
from zpatch.loading.queue_stats import FOR_SLOTS, FOR_TASKS, IDLE_SINCE, IterationCounts, WorkerRow
from zpatch.loading.shared_slots import MOST_WORKERS, ROW
from zpatch.work_counts import Work, count, during

SHARES = ("fetching", "decoding", "padding", "transform", "waiting_for_slots", "waiting_for_tasks")
FASTER_DISK, MORE_WORKERS = "faster storage or more workers will help", "more workers or a cheaper transform"


def slow(patch: zp.Patch) -> zp.Patch:
    time.sleep(0.04)
    return patch


def slow_at_the_corner(patch: zp.Patch) -> zp.Patch:
    """One in eight patches of a grid takes long."""
    if patch.location.index == (0, 0, 0):
        time.sleep(0.2)
    return patch


class SlowArray:
    """An array of another library, on a slow disk."""

    def __init__(self, voxels: np.ndarray[Any, Any]) -> None:
        self.voxels, self.shape, self.dtype, self.ndim = voxels, voxels.shape, voxels.dtype, voxels.ndim

    def __getitem__(self, box: Any) -> np.ndarray[Any, Any]:
        time.sleep(0.04)
        return self.voxels[box]


def stats_of(
    subjects: Any, sampler: Any, *, batch_size: int = 4, epochs: int = 1, pause_s: float = 0, **options: Any
) -> zp.QueueStats:
    """The statistics of the last of some epochs of a queue with real workers."""
    options = {"num_workers": 2, "max_length": 16, "patches_per_volume": 8} | options
    with zp.Queue(subjects, sampler, **options) as queue:
        for _ in range(epochs):
            for _ in zp.SubjectsLoader(queue, batch_size):
                time.sleep(pause_s)
        return queue.stats()


def assert_sound(stats: zp.QueueStats) -> None:
    assert sum(getattr(stats, name) for name in SHARES) == pytest.approx(1)
    assert all(0 <= getattr(stats, name) <= 1 for name in SHARES)
    assert 0 < stats.waited_s <= stats.elapsed_s
    assert 0 <= stats.mean_fill <= stats.most_fill


# Bottlenecks


def test_a_slow_disk_is_named(cohort_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = MappedShard._opened

    def slowly(shard: MappedShard) -> Any:
        time.sleep(0.15)
        return opened(shard)

    close_shards(cohort_store)
    monkeypatch.setattr(MappedShard, "_opened", slowly)
    stats = stats_of(zp.Cohort(cohort_store), zp.UniformSampler(16))
    assert_sound(stats)
    assert stats.fetching > 0.5
    assert FASTER_DISK in stats.advice


def test_a_slow_array_of_another_library_counts_as_a_slow_disk() -> None:
    voxels = np.zeros((24, 24, 24), np.int16)
    subjects = [zp.Subject(name=f"{n}", t1=zp.ScalarImage(SlowArray(voxels))) for n in range(3)]
    stats = stats_of(subjects, zp.UniformSampler(8))
    assert_sound(stats)
    assert stats.fetching > 0.5
    assert FASTER_DISK in stats.advice


def test_a_slow_transform_is_named() -> None:
    stats = stats_of(small_subjects(4), zp.UniformSampler(8), transform=slow)
    assert_sound(stats)
    assert stats.transform > 0.5
    assert stats.waiting > 0.5
    assert MORE_WORKERS in stats.advice


def test_slow_training_is_named() -> None:
    stats = stats_of(small_subjects(4), zp.UniformSampler(8), epochs=2, pause_s=0.15)
    assert_sound(stats)
    assert stats.waiting < 0.1
    assert stats.waiting_for_tasks > 0.5
    assert stats.batches_waited_s > stats.waited_s
    assert "the queue keeps up; a faster training step will help" in stats.advice


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_too_few_slots_are_named_and_more_of_them_help() -> None:
    """With one patch in each task, three of four workers wait for the slow one, as training does."""
    subjects, sampler = small_subjects(6, size=16), zp.GridSampler(None, 8)
    options = {"num_workers": 4, "shuffle_patches": False, "transform": slow_at_the_corner, "batch_size": 1}
    few = stats_of(subjects, sampler, max_length=1, **options)
    assert_sound(few)
    assert few.waiting_for_slots > 0.5
    assert "a larger max_length (now 1), with more patches_per_volume, will help" in few.advice
    many = stats_of(subjects, sampler, max_length=64, **options)
    assert many.waited_s < 0.8 * few.waited_s


def test_without_workers_the_same_stages_are_those_of_this_process() -> None:
    stats = stats_of(small_subjects(2), zp.UniformSampler(8), num_workers=0, transform=slow, pause_s=0.1)
    assert_sound(stats)
    assert stats.workers == 0
    assert stats.transform > stats.decoding
    assert 0.1 < stats.waiting_for_tasks < 0.7  # training itself
    assert stats.waiting_for_slots < 0.1
    assert "mostly for the transform: num_workers above 0 will help" in stats.advice


# What is counted


@pytest.mark.parametrize("workers", [0, 2])
def test_each_patch_batch_and_byte_is_counted_once_in_each_epoch(workers: int) -> None:
    subjects = small_subjects(3)
    with zp.Queue(subjects, zp.UniformSampler(6), 8, 5, workers) as queue:
        for epoch in range(3):
            for batch in zp.SubjectsLoader(queue, 4):
                nbytes = sum(image.data[0].nbytes for image in batch.images.values())
            stats = queue.stats()
            assert (stats.epoch, stats.patches, stats.batches) == (epoch, 15, 4)
            assert stats.nbytes == 15 * nbytes
            assert (stats.workers, stats.max_length) == (workers, 8)


@pytest.mark.parametrize("compiled", [True, False])
def test_chunks_are_new_once_in_a_process(
    cohort_store: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    from zpatch.chunks import gather

    if not compiled:
        monkeypatch.setattr(gather, "_compiled", None)
    close_shards(cohort_store)
    monkeypatch.setattr("zpatch.chunks.mapped_shards._checked_chunks.get", lambda seen, make: make())
    cohort = zp.Cohort(cohort_store)
    image = cohort[0].t1
    chunks = np.prod([-(-n // 16) for n in image.spatial_shape])
    with zp.Queue([zp.Subject(name="one", t1=image)], zp.GridSampler(None, 16)) as queue:
        list(queue)
        first = queue.stats()
        list(queue)
        second = queue.stats()
    assert first.new_chunks == chunks
    stored_bytes = cohort.store.records[cohort.names[0], "t1"].stored_bytes
    assert first.fetched_bytes == pytest.approx(stored_bytes, rel=0.1)
    assert (second.new_chunks, second.fetched_bytes) == (0, 0)
    assert second.known_chunks == first.new_chunks + first.known_chunks


def test_padding_is_counted() -> None:
    stats = stats_of(small_subjects(2), zp.GridSampler(None, 8, 4, padding_mode="reflect"), num_workers=0)
    assert stats.padding > 0


def test_the_stream_is_the_same_with_and_without_on_stats() -> None:
    options: dict[str, Any] = {"max_length": 8, "patches_per_volume": 4, "num_workers": 2}
    subjects = small_subjects(3)
    assert stream(subjects, **options, on_stats=print) == stream(subjects, **options)


def counting_one(patch: zp.Patch) -> zp.Patch:
    count(Work.REJECTED)
    return patch


def test_what_is_counted_in_a_worker_arrives() -> None:
    assert stats_of(small_subjects(2), zp.UniformSampler(4), transform=counting_one).rejected >= 16


# Which iteration


def test_before_the_first_iteration_there_are_no_stats() -> None:
    queue = zp.Queue(small_subjects(1), zp.UniformSampler(4))
    with pytest.raises(QueueError, match="was not iterated yet"):
        queue.stats()


@pytest.mark.parametrize("workers", [0, 1])
def test_stats_are_of_the_iteration_that_runs_or_of_the_last_one(workers: int) -> None:
    found: list[zp.QueueStats] = []
    queue = zp.Queue(small_subjects(3), zp.UniformSampler(4), 6, 4, workers, on_stats=found.append)
    patches = iter(queue)
    next(patches)
    assert queue.stats().patches == 1
    next(patches)
    patches.close()  # type: ignore[attr-defined]
    broken_off = queue.stats()
    assert (broken_off.patches, found) == (2, [])
    time.sleep(0.01)
    assert queue.stats() == broken_off  # it is over
    list(queue)
    assert [stats.patches for stats in found] == [12]
    assert queue.stats() == found[0]
    queue.close()
    assert queue.stats() == found[0]


def test_an_epoch_that_is_resumed_counts_what_is_left() -> None:
    found: list[zp.QueueStats] = []
    options = {"max_length": 6, "patches_per_volume": 4, "on_stats": found.append}
    queue = zp.Queue(small_subjects(3), zp.UniformSampler(4), **options)
    patches = iter(queue)
    [next(patches) for _ in range(5)]
    resumed = zp.Queue(small_subjects(3), zp.UniformSampler(4), **options)
    resumed.load_state_dict(queue.state_dict())
    assert len(items(resumed)) == 7
    assert [stats.patches for stats in found] == [7]


def test_on_stats_is_called_as_the_last_batch_is_handed_out() -> None:
    """Some loops, as Lightning's, do not ask for more than there are."""
    found: list[zp.QueueStats] = []
    queue = zp.Queue(small_subjects(2), zp.UniformSampler(4), 6, 5, on_stats=found.append)
    batches = iter(zp.SubjectsLoader(queue, 4, drop_last=True))
    next(batches)
    assert not found
    next(batches)
    assert [(stats.patches, stats.batches) for stats in found] == [(8, 2)]


def test_an_error_in_on_stats_reaches_the_loop() -> None:
    def fails(stats: zp.QueueStats) -> None:
        raise ZeroDivisionError

    with zp.Queue(small_subjects(1), zp.UniformSampler(4), on_stats=fails) as queue:
        with pytest.raises(ZeroDivisionError):
            list(queue)
        assert queue.stats().patches == 10


def test_wrong_options_are_refused() -> None:
    with pytest.raises(OptionError, match="on_stats must be a function"):
        zp.Queue(small_subjects(1), zp.UniformSampler(4), on_stats="print")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=f"num_workers must be at most {MOST_WORKERS}"):
        zp.Queue(small_subjects(1), zp.UniformSampler(4), num_workers=MOST_WORKERS + 1)


# Rows


def test_waiting_is_for_slots_while_training_waits_and_for_tasks_otherwise() -> None:
    rows = np.zeros((3, ROW), np.int64)
    counts, row = IterationCounts(rows, 1, 8, 0), WorkerRow(rows, 0)
    with row.task(0):
        pass
    with counts.waiting(0):
        time.sleep(0.05)
        with row.task(0):
            pass
    time.sleep(0.03)
    with row.task(0), during(Work.TRANSFORM):
        time.sleep(0.04)
    for_slots, for_tasks = rows[0, [FOR_SLOTS, FOR_TASKS]] / 1e9
    assert 0.05 <= for_slots < 0.05 + 0.03  # the rest of the wait, after the second task, is also for slots
    assert for_tasks >= 0.03
    assert rows[0, 2 + Work.TRANSFORM] >= 0.04e9
    time.sleep(0.02)
    assert counts.stats().waiting_for_tasks > 0
    assert rows[0, FOR_TASKS] / 1e9 == for_tasks  # what has not ended is not written yet
    assert rows[1].tolist() == [0] * ROW  # a worker writes its own row only
    assert rows[0, IDLE_SINCE] > 0


@given(
    st.lists(st.integers(0, 10**6), min_size=len(SHARES), max_size=len(SHARES)),
    st.integers(0, 3),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_any_figures_make_a_table_that_ends_in_one_sentence(
    times: list[int], workers: int, waiting: float, patches: int
) -> None:
    total = sum(times) or 1
    stats = dataclasses.replace(
        zp.QueueStats(
            epoch=0, patches=patches, batches=min(patches, 2), nbytes=64 * patches, elapsed_s=2.0,
            waited_s=2 * waiting, batches_waited_s=0.1, workers=workers, fetching=0, decoding=0, padding=0,
            transform=0, waiting_for_slots=0, waiting_for_tasks=0, mean_fill=1.5, most_fill=3, max_length=8,
            new_chunks=1, known_chunks=2, fetched_bytes=3, rejected=0, exhausted=0,
        ),
        **{name: taken / total for name, taken in zip(SHARES, times, strict=True)},
    )  # fmt: skip
    lines = str(stats).splitlines()
    assert len(lines) == 6
    assert lines[-1] == stats.advice
    assert ". " not in stats.advice
    assert json.loads(json.dumps(stats.to_json()))["advice"] == stats.advice
    if patches:
        assert stats.advice.startswith(f"training waits {waiting:.0%} of the time")


def never(patch: zp.Patch) -> bool:
    return False


@pytest.mark.parametrize("workers", [0, 2])
def test_locations_that_a_sampler_rejects_are_counted(workers: int) -> None:
    sampler = zp.UniformSampler(4, accept=never, max_rejections=3)
    with zp.Queue(small_subjects(2), sampler, patches_per_volume=2, num_workers=workers) as queue:
        assert len(list(queue)) == 4
        stats = queue.stats()
    assert stats.rejected == 3 * stats.exhausted
    assert stats.exhausted == 4 if not workers else stats.exhausted >= 4  # of the next epoch, too
    assert f"{stats.rejected} locations rejected ({stats.exhausted} patches taken all the same)" in str(stats)
