"""The queue: the stream is a function of (seed, epoch), in bounded memory, and no failure is silent."""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import zpatch as zp
from zpatch.errors import OptionError, QueueError
from zpatch.patch_queue import EpochPlan
from zpatch.samplers import PatchSampler, RandomSampler
from zpatch.shards import close_shards

SAMPLERS = {
    "uniform": zp.UniformSampler(12),
    "label": zp.LabelSampler(12, label_probabilities={1: 1, 2: 2}),
    "weighted": zp.WeightedSampler(12, "seg"),
    "grid": zp.GridSampler(patch_size=(24, 20, 28), patch_overlap=4, padding_mode="reflect"),
}
WORKERS = [0, 2]
Item = tuple[str, tuple[int, int, int], bytes, bytes]


def noisy(patch: zp.Patch) -> zp.Patch:
    """A transform that draws from all three global generators."""
    noise = torch.randn(()) + np.random.normal() + random.random()  # noqa: NPY002
    return patch.with_data(t1=patch.t1.data + noise)


def slow(patch: zp.Patch) -> zp.Patch:
    time.sleep(0.01)
    return patch


@dataclass
class Deadly:
    """Kills the worker that comes to the third subject, and notes when."""

    note: Path

    def __call__(self, patch: zp.Patch) -> zp.Patch:
        if patch.subject == "sub-03":
            self.note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return patch


def in_bfloat16(patch: zp.Patch) -> zp.Patch:
    return patch.with_data(t1=patch.t1.data.bfloat16())


def item(patch: zp.Patch) -> Item:
    t1, seg = (patch[name].data.contiguous().numpy().tobytes() for name in ("t1", "seg"))
    return patch.subject, patch.location.index, t1, seg


def stream(subjects: zp.Cohort, sampler: PatchSampler | None = None, **options: Any) -> list[Item]:
    """Everything that one epoch gives."""
    with zp.Queue(subjects, zp.UniformSampler(12) if sampler is None else sampler, **options) as queue:
        return [item(patch) for patch in queue]


class Picky(RandomSampler):
    """A sampler that fails on one subject."""

    def _starts(self, subject: zp.Subject, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        if subject.name == "sub-02":
            raise ArithmeticError("no luck here")
        return np.zeros((count, 3), dtype=np.int64)


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
    close_shards(copy)


# The stream


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_stream_is_the_same_for_any_number_of_workers(cohort: zp.Cohort, sampler: PatchSampler) -> None:
    options: dict[str, Any] = {"max_length": 7, "patches_per_volume": 5, "transform": noisy, "seed": 3}
    alone = stream(cohort, sampler, **options)
    assert len(alone) > 7
    for workers in (1, 2):
        assert stream(cohort, sampler, num_workers=workers, **options) == alone


def test_the_stream_is_the_same_for_workers_that_are_spawned(cohort: zp.Cohort) -> None:
    options: dict[str, Any] = {"max_length": 7, "patches_per_volume": 5, "transform": noisy}
    assert stream(cohort, num_workers=2, start_method="spawn", **options) == stream(cohort, **options)


@pytest.mark.parametrize("workers", WORKERS)
def test_voxels_are_those_of_the_images_at_the_patches_locations(cohort: zp.Cohort, workers: int) -> None:
    with zp.Queue(cohort, zp.UniformSampler((8, 9, 10)), num_workers=workers) as queue:
        for patch in queue:
            for name, image in patch.images.items():
                wanted = cohort[patch.subject][name].read(patch.location)
                np.testing.assert_array_equal(image.data.numpy(), wanted)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_transform_may_give_any_type_that_torch_has(cohort: zp.Cohort, workers: int) -> None:
    with zp.Queue(cohort, zp.UniformSampler(4), transform=in_bfloat16, num_workers=workers) as queue:
        assert {patch.t1.data.dtype for patch in queue} == {torch.bfloat16}


def test_epochs_differ_and_follow_each_other(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler(8), patches_per_volume=3)
    first, second = ([item(patch) for patch in queue] for _ in range(2))
    assert set(first).isdisjoint(second)
    queue.set_epoch(1)
    assert [item(patch) for patch in queue] == second


@pytest.mark.parametrize("workers", WORKERS)
def test_set_epoch_repeats_an_epoch_after_a_loop_that_was_left(cohort: zp.Cohort, workers: int) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), max_length=5, num_workers=workers) as queue:
        queue.set_epoch(4)
        whole = [item(patch) for patch in queue]
        queue.set_epoch(4)
        for number, patch in enumerate(queue):
            assert item(patch) == whole[number]
            if number == 7:
                break
        queue.set_epoch(4)
        assert [item(patch) for patch in queue] == whole


def test_seeds_give_different_streams(cohort: zp.Cohort) -> None:
    assert set(stream(cohort, seed=1)).isdisjoint(stream(cohort, seed=2))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("max_length", [1, 3, 300])
def test_an_epoch_has_exactly_patches_per_volume_of_each_subject(
    cohort: zp.Cohort, max_length: int, workers: int
) -> None:
    options: dict[str, Any] = {
        "max_length": max_length,
        "patches_per_volume": 6,
        "num_workers": workers,
    }
    with zp.Queue(cohort, zp.UniformSampler(8), **options) as queue:
        for _ in range(2):
            counts = collections.Counter(patch.subject for patch in queue)
            assert counts == dict.fromkeys(cohort.names, 6)
        assert len(queue) == queue.patches_per_epoch == 24
        assert queue.num_subjects == 4


def test_a_subject_may_give_more_patches_than_are_read_together(cohort: zp.Cohort) -> None:
    options: dict[str, Any] = {"patches_per_volume": 70, "max_length": 40}
    patches = stream(cohort[:1], zp.UniformSampler(4), **options)
    assert len(patches) == len(set(patches)) == 70
    ordered = stream(cohort[:1], zp.UniformSampler(4), patches_per_volume=70, shuffle_patches=False)
    assert sorted(patches) == sorted(ordered)


def test_without_shuffling_patches_come_in_the_order_of_subjects_and_draws(cohort: zp.Cohort) -> None:
    options: dict[str, Any] = {"shuffle_subjects": False, "patches_per_volume": 3}
    names = [name for name, *_ in stream(cohort, shuffle_patches=False, **options)]
    assert names == [name for name in cohort.names for _ in range(3)]


def test_without_shuffling_patches_each_subject_comes_in_one_piece(cohort: zp.Cohort) -> None:
    names = [name for name, *_ in stream(cohort, shuffle_patches=False, patches_per_volume=3)]
    assert names == [name for name in dict.fromkeys(names) for _ in range(3)]


def test_the_order_of_subjects_changes_from_epoch_to_epoch(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler(8))
    orders = {tuple(queue.plan(epoch).subjects) for epoch in range(20)}
    assert len(orders) > 5
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}


def test_a_grid_in_a_queue_gives_every_patch_of_every_subject_once(cohort: zp.Cohort) -> None:
    template = zp.GridSampler(patch_size=20, patch_overlap=4)
    with zp.Queue(cohort, template, max_length=6, num_workers=2) as queue:
        seen = sorted((patch.subject, patch.location.index) for patch in queue)
    grids = [zp.GridSampler(subject, 20, 4) for subject in cohort]
    wanted = [
        (s.name, place.index) for s, grid in zip(cohort, grids, strict=True) for place in grid.locations
    ]
    assert seen == sorted(wanted)
    assert len(queue) == len(wanted)


def test_a_subject_sampler_takes_over_the_order(cohort: zp.Cohort) -> None:
    options: dict[str, Any] = {"shuffle_subjects": False, "shuffle_patches": False, "patches_per_volume": 1}
    names = [name for name, *_ in stream(cohort, subject_sampler=[2, 0], **options)]
    assert names == ["sub-03", "sub-01"]
    queue = zp.Queue(cohort, zp.UniformSampler(4), subject_sampler=[2, 0], **options)
    assert len(queue) == 2


def test_distributed_samplers_deal_out_the_subjects(cohort: zp.Cohort) -> None:
    seen = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(range(4), num_replicas=2, rank=rank)  # type: ignore[arg-type]
        seen.append({name for name, *_ in stream(cohort, subject_sampler=sampler, shuffle_subjects=False)})
    assert seen[0] | seen[1] == set(cohort.names)
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_global_generators_are_left_alone(cohort: zp.Cohort, workers: int) -> None:
    def state() -> tuple[Any, ...]:
        _, keys, *rest = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), keys.tolist(), rest, random.getstate()  # type: ignore[union-attr]

    before = state()
    for _ in range(2):
        stream(cohort, transform=noisy, num_workers=workers)
    assert state() == before


def test_the_global_generators_do_not_change_the_stream(cohort: zp.Cohort) -> None:
    before = stream(cohort, transform=noisy)
    torch.rand(3)
    np.random.random(3)  # noqa: NPY002
    random.random()
    assert stream(cohort, transform=noisy) == before


# Types


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_images_come_in_the_dtype_asked_for_and_label_maps_stay_integer(
    cohort: zp.Cohort, dtype: torch.dtype, workers: int
) -> None:
    with zp.Queue(cohort, zp.UniformSampler(4), dtype=dtype, num_workers=workers) as queue:
        types = {(patch.t1.data.dtype, patch.seg.data.dtype) for patch in queue}
    assert types == {(dtype, torch.uint8)}


@pytest.mark.parametrize("workers", WORKERS)
def test_label_maps_of_16_bits_come_in_a_type_that_torch_computes_with(workers: int) -> None:
    labels = np.full((8, 8, 8), 65535, dtype=np.uint16)
    subject = zp.Subject(seg=zp.LabelMap(labels))
    with zp.Queue([subject], zp.UniformSampler(4), num_workers=workers) as queue:
        for patch in queue:
            assert (patch.seg.data + 1 == 65536).all()


# The buffer


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    max_length=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_shuffle_holds_at_most_max_length_and_gives_each_patch_once(
    counts: list[int], max_length: int, seed: int
) -> None:
    plan = EpochPlan(seed, 0, range(len(counts)), counts, 32, max_length, shuffle=True)
    total, arrived, given_out = sum(counts), 0, []

    def arriving() -> Iterator[Any]:
        nonlocal arrived
        for number in range(total):
            arrived += 1
            yield number

    for number in plan.shuffled(arriving()):
        given_out.append(number)
        assert arrived - len(given_out) <= max_length
        assert arrived == min(total, len(given_out) + max_length)  # drawn from a full buffer
    assert sorted(given_out) == list(range(total))


def test_the_shuffle_draws_from_all_of_the_buffer() -> None:
    firsts = []
    for seed in range(300):
        plan = EpochPlan(seed, 0, [0], [50], 32, 10, shuffle=True)
        firsts.append(next(plan.shuffled(iter(range(50)))))  # type: ignore[arg-type]
    counts = np.bincount(firsts, minlength=11)  # type: ignore[arg-type]
    assert counts[:10].min() > 10  # 30 expected of each of the ten, and none of the eleventh
    assert counts[10:].sum() == 0


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    group=st.integers(1, 8),
)
def test_the_draws_of_a_plan_are_each_patch_once_in_groups(counts: list[int], group: int) -> None:
    plan = EpochPlan(0, 2, range(len(counts)), counts, group, 5, shuffle=False)
    draws = list(plan.draws())
    wanted = [(subject, number) for subject, count in enumerate(counts) for number in range(count)]
    assert [(d.subject, number) for d in draws for number in range(d.first, d.stop)] == wanted
    assert all(0 < d.stop - d.first <= group and d.epoch == 2 for d in draws)


@pytest.mark.parametrize(
    ("workers", "max_length", "per_volume", "in_flight"),
    [(0, 100, 10, 10), (0, 100, 70, 32), (0, 4, 70, 4), (2, 100, 10, 2 * 2 * 10), (3, 9, 10, 3 * 2 * 9)],
)
def test_max_memory_is_the_buffer_and_what_is_on_its_way(
    cohort: zp.Cohort, workers: int, max_length: int, per_volume: int, in_flight: int
) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler((8, 9, 10)), max_length, per_volume, workers)
    patch = next(iter(zp.Queue(cohort, zp.UniformSampler((8, 9, 10)))))
    patch_bytes = sum(image.data.nbytes for image in patch.images.values())
    assert queue.max_memory == (max_length + in_flight) * patch_bytes


def test_max_memory_counts_wider_label_maps_and_the_largest_subject() -> None:
    def subject(channels: int) -> zp.Subject:
        image = zp.ScalarImage(np.zeros((channels, 6, 6, 6), dtype=np.int16))
        return zp.Subject(t1=image, seg=zp.LabelMap(np.zeros((6, 6, 6), dtype=np.uint16)))

    queue = zp.Queue([subject(1), subject(3)], zp.UniformSampler(4), 5, 2, dtype=torch.float16)
    assert queue.max_memory == (5 + 2) * 4**3 * (3 * 2 + 4)
    assert queue.max_memory_pretty == "4.4 KiB"


# Failures


@pytest.mark.parametrize("workers", WORKERS)
def test_a_sampler_that_fails_is_an_error_with_subject_reason_and_traceback(
    cohort: zp.Cohort, workers: int
) -> None:
    with (
        pytest.raises(QueueError, match="subject 'sub-02' failed in epoch 0") as failure,
        zp.Queue(cohort, Picky(8), num_workers=workers) as queue,
    ):
        list(queue)
    text = str(failure.value)
    assert "ArithmeticError: no luck here" in text
    assert "Traceback" in text
    assert "in _starts" in text


@pytest.mark.parametrize("workers", WORKERS)
def test_a_damaged_shard_is_an_error_with_subject_and_file(damaged: zp.Cohort, workers: int) -> None:
    with (
        pytest.raises(QueueError, match="subject 'sub-03' failed") as failure,
        zp.Queue(damaged, zp.UniformSampler(8), num_workers=workers) as queue,
    ):
        list(queue)
    assert "DamageError" in str(failure.value)
    assert str(damaged.store.path / "sub-03" / "t1") in str(failure.value)


def test_a_patch_that_does_not_fit_a_subject_names_subject_axis_and_way_out(cohort: zp.Cohort) -> None:
    with pytest.raises(QueueError, match=r"patch of 99 voxels does not fit axis I of 'sub-0\d'.*smaller"):
        list(zp.Queue(cohort, zp.UniformSampler(99)))


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_a_worker_that_is_killed_while_the_queue_waits_is_an_error_within_ten_seconds(
    cohort: zp.Cohort, tmp_path: Path, start_method: str
) -> None:
    deadly = Deadly(tmp_path / "killed")
    options: dict[str, Any] = {"num_workers": 2, "start_method": start_method, "timeout": 30}
    with (
        pytest.raises(QueueError, match="worker"),
        zp.Queue(cohort, zp.UniformSampler(4), transform=deadly, **options) as queue,
    ):
        list(queue)
    if start_method == "forkserver":
        multiprocessing.forkserver._forkserver._stop()  # Python keeps it for the next process to be forked
    assert time.time() - float(deadly.note.read_text()) < 10


def test_a_killed_worker_is_noticed_outside_the_main_thread_too(cohort: zp.Cohort, tmp_path: Path) -> None:
    deadly = Deadly(tmp_path / "killed")
    with (
        zp.Queue(cohort, zp.UniformSampler(4), num_workers=2, transform=deadly, timeout=30) as queue,
        ThreadPoolExecutor(1) as pool,
        pytest.raises(QueueError, match="worker"),
    ):
        pool.submit(list, queue).result()
    assert time.time() - float(deadly.note.read_text()) < 10


def test_a_worker_that_is_killed_during_a_training_step_is_an_error_within_ten_seconds(
    cohort: zp.Cohort,
) -> None:
    options: dict[str, Any] = {"patches_per_volume": 200, "max_length": 8, "transform": slow}
    killed = 0.0

    def train(queue: zp.Queue) -> None:
        nonlocal killed
        for number, _ in enumerate(queue):
            if number == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)  # type: ignore[arg-type]
                killed = time.monotonic()
                time.sleep(0.3)  # the step goes on while torch hears of the worker's end

    with (
        zp.Queue(cohort, zp.UniformSampler(4), num_workers=2, **options) as queue,
        pytest.raises(QueueError, match="worker"),
    ):
        train(queue)
    assert time.monotonic() - killed < 10


def test_after_a_killed_worker_the_queue_works_again(cohort: zp.Cohort, tmp_path: Path) -> None:
    deadly = Deadly(tmp_path / "killed")
    with zp.Queue(cohort, zp.UniformSampler(4), num_workers=2, transform=deadly) as queue:
        with pytest.raises(QueueError):
            list(queue)
        queue._draws.transform = None
        queue.set_epoch(0)
        assert [item(patch) for patch in queue] == stream(cohort, zp.UniformSampler(4))


# Ending


def test_a_loop_that_is_left_early_leaves_no_process(cohort: zp.Cohort) -> None:
    for _ in zp.Queue(cohort, zp.UniformSampler(8), max_length=3, patches_per_volume=100, num_workers=2):
        assert len(multiprocessing.active_children()) == 2
        break


def test_close_ends_the_workers_even_while_an_iterator_is_held(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler(8), max_length=3, patches_per_volume=100, num_workers=2)
    iterator = iter(queue)
    next(iterator)
    queue.close()
    left = multiprocessing.active_children()
    iterator.close()  # type: ignore[attr-defined]
    assert left == []


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loop_that_another_one_overtakes_does_not_end_short_in_silence(
    cohort: zp.Cohort, workers: int
) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), max_length=3, num_workers=workers) as queue:
        first = iter(queue)
        begun = [item(next(first))]
        queue.set_epoch(0)
        whole = [item(patch) for patch in queue]
        try:
            begun += [item(patch) for patch in first]
        except QueueError as error:
            assert "iterat" in str(error)  # noqa: PT017
        else:
            assert begun == whole


def test_a_loop_that_goes_on_after_close_says_so(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler(8), max_length=3, num_workers=2)
    iterator = iter(queue)
    next(iterator)
    queue.close()
    with pytest.raises(QueueError, match="closed"):
        list(iterator)


def test_a_closed_queue_starts_again(cohort: zp.Cohort) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), num_workers=1) as queue:
        first = [item(patch) for patch in queue]
        queue.close()
        queue.set_epoch(0)
        assert [item(patch) for patch in queue] == first


def test_workers_live_on_from_epoch_to_epoch(cohort: zp.Cohort) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), num_workers=2) as queue:
        pids = []
        for _ in range(2):
            list(queue)
            pids.append({child.pid for child in multiprocessing.active_children()})
    assert pids[0] == pids[1]


# With torch's DataLoader


def test_a_plain_dataloader_gives_the_same_patches_as_the_loader(cohort: zp.Cohort) -> None:
    def queue() -> zp.Queue:
        return zp.Queue(cohort, zp.UniformSampler(8), patches_per_volume=3)

    plain = list(DataLoader(queue(), batch_size=5, num_workers=0, collate_fn=zp.collate))
    ours = list(zp.SubjectsLoader(queue(), batch_size=5))
    assert [len(batch) for batch in plain] == [5, 5, 2]
    for one, other in zip(plain, ours, strict=True):
        assert torch.equal(one.t1.data, other.t1.data)
        assert one.patch_location == other.patch_location
        assert one.subjects == other.subjects


def test_a_dataloader_with_workers_of_its_own_is_refused(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler(8))
    loader = DataLoader(queue, batch_size=2, num_workers=2, collate_fn=zp.collate)
    batches = iter(loader)
    with pytest.raises(QueueError, match=r"give DataLoader num_workers=0.*Queue\(num_workers="):
        next(batches)
    batches._shutdown_workers()  # type: ignore[attr-defined]  # or torch waits 5 s for each of them


# Options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_length": 0}, "max_length must be at least 1, not 0"),
        ({"patches_per_volume": 0}, "patches_per_volume must be at least 1, not 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, not -1"),
        ({"subject_sampler": [0]}, "say shuffle_subjects=False with it"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float16, .*, not torch.int8"),
        ({"start_method": "teleport"}, "start_method must be .*fork.*spawn.*'teleport'"),
        ({"timeout": -1}, "timeout must be .*-1"),
        ({"subject_sampler": [4], "shuffle_subjects": False}, "subject_sampler .*4 "),
    ],
)
@pytest.mark.parametrize("workers", WORKERS)
def test_options_that_mean_nothing_are_refused(
    cohort: zp.Cohort, options: dict[str, Any], text: str, workers: int
) -> None:
    with pytest.raises(OptionError, match=text):
        list(zp.Queue(cohort, zp.UniformSampler(8), **{"num_workers": workers, **options}))


def test_an_epoch_below_zero_is_refused(cohort: zp.Cohort) -> None:
    with pytest.raises(OptionError, match="an epoch is at least 0, not -1"):
        zp.Queue(cohort, zp.UniformSampler(8)).set_epoch(-1)


def test_a_queue_without_subjects_is_refused() -> None:
    with pytest.raises(OptionError, match="at least one subject"):
        zp.Queue([], zp.UniformSampler(8))


def test_a_transform_that_cannot_be_sent_to_a_spawned_worker_says_so(cohort: zp.Cohort) -> None:
    options: dict[str, Any] = {"num_workers": 1, "start_method": "spawn", "transform": lambda patch: patch}
    with pytest.raises(QueueError, match=re.compile("lambda|pickle", re.IGNORECASE)):
        next(iter(zp.Queue(cohort, zp.UniformSampler(8), **options)))
