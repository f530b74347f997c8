"""The queue: a stream that is a function of (seed, epoch), with any workers, in bounded memory."""

from __future__ import annotations

import collections
import contextlib
import gc
import hashlib
import math
import multiprocessing
import os
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import streams
import torch
from streams import (
    SAMPLERS,
    Item,
    item,
    items,
    small_subjects,
    stop_forkserver,
    stream,
    subjects_of_all_kinds,
)
from torch.utils.data import DataLoader

import zpatch as zp
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import OptionError, QueueError
from zpatch.loading.batch_feed import BatchFeed
from zpatch.loading.batch_slots import HANDED_OUT, slots_needed
from zpatch.loading.shared_slots import WATCH_BYTES
from zpatch.loading.worker import Result
from zpatch.sampling.patch_sampler import PatchSampler
from zpatch.sampling.randomness import rng as address_rng

# Torch says so where there are more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

WORKERS = [0, 2]
PAD_MODES = ["constant", "edge", "reflect", "symmetric", "wrap"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, None]

NUMPY_TYPE = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> list[zp.Subject]:
    """A subject of each source and type of voxels."""
    return subjects_of_all_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(autouse=True)
def no_forkserver_is_left_behind(nothing_is_left_behind: None) -> Iterator[None]:
    yield
    stop_forkserver()


@pytest.fixture
def read_before(cohort: zp.Cohort) -> zp.Cohort:
    """The cohort after this process has read from it: maps are open, and threads run."""
    for subject in cohort:
        for image in subject.images.values():
            image.read_group([zp.PatchLocation((1, 2, 3), (20, 20, 20))] * 4, scheduler="threads")
    torch.randn(200, 200) @ torch.randn(200, 200)
    return cohort


# The stream


MIXED = zp.MixedSampler([(1, zp.UniformSampler(4)), (1, zp.LabelSampler(4, "seg", {1: 1, 2: 2}))])
GRID = zp.GridSampler(patch_size=8)


@pytest.mark.parametrize(
    ("sampler", "options", "expected"),
    [
        (MIXED, {"patches_per_volume": 3}, ("3b66ab7038bf", 30)),
        (MIXED, {"patches_per_volume": 3, "rank": 0, "world_size": 2}, ("a6e0bc222eda", 18)),
        (MIXED, {"patches_per_volume": 3, "rank": 1, "world_size": 2}, ("70ca027cbb36", 18)),
        (
            zp.UniformSampler(4),
            {"patches_per_volume": 4, "rank": 1, "world_size": 3, "uneven": "drop"},
            ("cab91413e041", 8),
        ),
        (
            zp.UniformSampler(4),
            {"patches_per_volume": 2, "shuffle_subjects": False, "subject_sampler": [0, 1, 1, 4, 0]},
            ("c30ce221a450", 20),
        ),
        (GRID, {"rank": 0, "world_size": 2}, ("804b80c528a8", 25)),
        (GRID, {"rank": 1, "world_size": 2}, ("f5d23955d3cf", 25)),
    ],
)
def test_streams_without_weights_stay_as_they_are_so_that_saved_states_resume(
    sampler: PatchSampler, options: dict[str, Any], expected: tuple[str, int]
) -> None:
    """The digests were recorded before queues had weights; those of the grid need several passes."""
    subjects = [*small_subjects(2), *small_subjects(1, size=8)] if sampler is GRID else small_subjects(5)
    with zp.Queue(subjects, sampler, max_length=6, seed=3, **options) as queue:
        found = [(patch.subject, patch.location.index) for _ in range(2) for patch in queue]
    assert (hashlib.blake2b(repr(found).encode(), digest_size=6).hexdigest(), len(found)) == expected


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_stream_is_the_same_for_any_number_of_workers(
    read_before: zp.Cohort, sampler: PatchSampler
) -> None:
    options: dict[str, Any] = {
        "max_length": 7,
        "patches_per_volume": 5,
        "transform": streams.noisy,
        "seed": 3,
    }
    alone = stream(read_before, sampler, epochs=[0, 1], **options)
    assert len(alone) > 14
    for workers in (1, 2, 3):
        assert stream(read_before, sampler, epochs=[0, 1], num_workers=workers, **options) == alone


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_the_stream_is_the_same_for_each_start_method(
    read_before: zp.Cohort, start_method: str, sampler: str, full: bool
) -> None:
    if not full and (start_method, sampler) not in (("spawn", "grid"), ("forkserver", "label")):
        pytest.skip("each sampler with each start method needs --full")
    options: dict[str, Any] = {"max_length": 7, "patches_per_volume": 5, "transform": streams.noisy}
    mapped = read_before.map(streams.normalised)
    alone = stream(mapped, SAMPLERS[sampler], **options)
    for workers in (1, 2, 3) if full else (1,):
        options |= {"num_workers": workers, "start_method": start_method}
        assert stream(mapped, SAMPLERS[sampler], **options) == alone


@pytest.mark.parametrize("transform", [None, streams.noisy], ids=["plain", "noisy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stream_of_any_voxels_is_the_same_for_any_number_of_workers(
    all_kinds: list[zp.Subject], dtype: torch.dtype | None, transform: Any
) -> None:
    options: dict[str, Any] = {
        "max_length": 9,
        "patches_per_volume": 3,
        "transform": transform,
        "dtype": dtype,
        "shuffle_subjects": False,
    }
    alone = stream(all_kinds, zp.UniformSampler((8, 9, 10)), **options)
    for workers in (1, 3):
        sampler = zp.UniformSampler((8, 9, 10))
        assert stream(all_kinds, sampler, num_workers=workers, **options) == alone


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_the_stream_of_any_voxels_is_the_same_for_each_start_method(
    all_kinds: list[zp.Subject], start_method: str, full: bool
) -> None:
    if not full and start_method == "forkserver":
        pytest.skip("a worker of a forkserver gets its subjects as a spawned one does; both need --full")
    options: dict[str, Any] = {"max_length": 9, "patches_per_volume": 2, "transform": streams.noisy}
    options |= {"shuffle_subjects": False}
    alone = stream(all_kinds, zp.UniformSampler((8, 9, 10)), **options)
    options |= {"num_workers": 1, "start_method": start_method}
    assert stream(all_kinds, zp.UniformSampler((8, 9, 10)), **options) == alone


@pytest.mark.filterwarnings("ignore:some patches differ:UserWarning")
@pytest.mark.parametrize("workers", WORKERS)
def test_a_transform_that_changes_nothing_changes_nothing(all_kinds: list[zp.Subject], workers: int) -> None:
    """With a transform, values are computed at another place."""
    for dtype in DTYPES:
        options: dict[str, Any] = {"patches_per_volume": 2, "dtype": dtype, "num_workers": workers}
        plain = stream(all_kinds, zp.UniformSampler(8), **options)
        assert stream(all_kinds, zp.UniformSampler(8), transform=streams.unchanged, **options) == plain


def test_epochs_differ_and_follow_each_other(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler(8), patches_per_volume=3)
    first, second = (items(queue) for _ in range(2))
    assert set(first).isdisjoint(second)
    queue.set_epoch(1)
    assert items(queue) == second


@pytest.mark.parametrize("workers", WORKERS)
def test_an_epoch_that_was_received_to_the_last_patch_is_done(cohort: zp.Cohort, workers: int) -> None:
    """As in ``for step, patch in zip(range(len(queue)), queue)``, which never asks for one more."""
    with zp.Queue(cohort, zp.UniformSampler(8), patches_per_volume=3, num_workers=workers) as queue:
        found = [item(patch) for _ in range(3) for _, patch in zip(range(12), queue, strict=False)]
    assert found == stream(cohort, zp.UniformSampler(8), epochs=[0, 1, 2], patches_per_volume=3)


@pytest.mark.parametrize("workers", WORKERS)
def test_set_epoch_repeats_an_epoch_after_a_loop_that_was_left(cohort: zp.Cohort, workers: int) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), max_length=5, num_workers=workers) as queue:
        queue.set_epoch(4)
        whole = items(queue)
        queue.set_epoch(4)
        for number, patch in enumerate(queue):
            assert item(patch) == whole[number]
            if number == 7:
                break
        queue.set_epoch(4)
        assert items(queue) == whole


@pytest.mark.parametrize("workers", WORKERS)
def test_set_epoch_during_an_iteration_chooses_the_one_after_it(cohort: zp.Cohort, workers: int) -> None:
    options: dict[str, Any] = {"patches_per_volume": 3, "num_workers": workers}
    whole = {epoch: stream(cohort, zp.UniformSampler(8), [epoch], **options) for epoch in (0, 5, 7)}
    with zp.Queue(cohort, zp.UniformSampler(8), **options) as queue:
        found, places = [], []
        for number, patch in enumerate(queue):
            if number == 4:
                queue.set_epoch(7)
            found.append(item(patch))
            state = queue.state_dict()
            places.append((state["epoch"], state["consumed"]))
        assert found == whole[0]
        assert places == [*((0, number) for number in range(1, 12)), (7, 0)]
        state = queue.state_dict()
        assert (state["epoch"], state["consumed"]) == (7, 0)
        for number, patch in enumerate(queue):
            assert item(patch) == whole[7][number]
            if number == 3:
                queue.set_epoch(5)
                break
        state = queue.state_dict()
        assert (state["epoch"], state["consumed"]) == (5, 0)
        assert items(queue) == whole[5]


@pytest.mark.parametrize("workers", WORKERS)
def test_iterations_that_are_abandoned_hold_no_slot(cohort: zp.Cohort, workers: int) -> None:
    options: dict[str, Any] = {"max_length": 3, "num_workers": workers}
    with zp.Queue(cohort, zp.UniformSampler(8), **options) as queue:
        held = []
        for _ in range(9):
            held.append(iter(queue))
            next(held[-1])
        queue.set_epoch(1)
        whole = items(queue)
        assert_no_slot_is_lost(queue)
        held.pop()
        with pytest.raises(QueueError, match="another iteration of it was begun"):
            next(held[0])
    assert whole == stream(cohort, zp.UniformSampler(8), epochs=[1], max_length=3)


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


@pytest.mark.parametrize("workers", WORKERS)
def test_a_subject_may_give_more_patches_than_are_read_together(cohort: zp.Cohort, workers: int) -> None:
    options: dict[str, Any] = {"patches_per_volume": 70, "num_workers": workers}
    patches = stream(cohort[:1], zp.UniformSampler(4), max_length=40, **options)
    assert len(patches) == len(set(patches)) == 70
    ordered = stream(cohort[:1], zp.UniformSampler(4), shuffle_patches=False, **options)
    assert sorted(patches) == sorted(ordered)


def test_locations_are_drawn_by_the_sampler_at_the_address_of_the_subject(cohort: zp.Cohort) -> None:
    options: dict[str, Any] = {"shuffle_patches": False, "patches_per_volume": 3, "seed": 9}
    queue = zp.Queue(cohort, zp.UniformSampler(8), **options)
    queue.set_epoch(2)
    found = [(patch.subject, patch.location) for patch in queue]
    wanted = []
    for number in queue.plan(2).visits.subjects.tolist():
        rng = address_rng(9, 2, number)
        locations = queue.patch_sampler.locations(cohort[number], 3, rng)  # type: ignore[operator, call-arg]
        wanted += [(cohort[number].name, location) for location in locations]
    assert found == wanted


@pytest.mark.parametrize("workers", WORKERS)
def test_without_shuffling_patches_are_in_the_order_of_subjects_and_draws(
    cohort: zp.Cohort, workers: int
) -> None:
    options: dict[str, Any] = {"shuffle_subjects": False, "patches_per_volume": 3, "num_workers": workers}
    names = [name for name, *_ in stream(cohort, shuffle_patches=False, **options)]
    assert names == [name for name in cohort.names for _ in range(3)]


def test_without_shuffling_patches_those_of_a_subject_are_consecutive(cohort: zp.Cohort) -> None:
    names = [name for name, *_ in stream(cohort, shuffle_patches=False, patches_per_volume=3)]
    assert names == [name for name in dict.fromkeys(names) for _ in range(3)]


def test_the_order_of_subjects_changes_from_epoch_to_epoch(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler(8))
    orders = {tuple(queue.plan(epoch).visits.subjects) for epoch in range(20)}
    assert len(orders) > 5
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("padding_mode", [None, "reflect"])
def test_a_grid_in_a_queue_gives_every_patch_of_every_subject_once(
    cohort: zp.Cohort, padding_mode: str | None, workers: int
) -> None:
    template = zp.GridSampler(patch_size=20, patch_overlap=4, padding_mode=padding_mode)
    with zp.Queue(cohort, template, max_length=6, num_workers=workers) as queue:
        seen = sorted((patch.subject, patch.location.index) for patch in queue)
        count = len(queue)
    grids = [zp.GridSampler(subject, 20, 4, padding_mode) for subject in cohort]
    wanted = [
        (s.name, place.index) for s, grid in zip(cohort, grids, strict=True) for place in grid.locations
    ]
    assert seen == sorted(wanted)
    assert count == len(wanted)


@pytest.mark.parametrize("transform", [None, streams.unchanged], ids=["plain", "unchanged"])
@pytest.mark.parametrize("mode", PAD_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, None], ids=str)
def test_patches_of_a_padded_grid_equal_the_patches_of_the_sampler(
    cohort: zp.Cohort, dtype: torch.dtype | None, mode: str, transform: Any, full: bool
) -> None:
    """One image has a slope and an intercept; the fill is a value, after both."""
    if not full and (PAD_MODES.index(mode) + (dtype is None) + (transform is None)) % 2:
        pytest.skip("all three together need --full")  # each pair of them runs
    options: dict[str, Any] = {"patch_size": (24, 20, 90), "patch_overlap": 4}
    options |= {"padding_mode": mode, "fill": 3}
    cohort = cohort.select(["sub-03", "sub-01", "sub-02"])  # the float image first, as it takes most
    options_of_queue: dict[str, Any] = {"num_workers": 2, "dtype": dtype, "transform": transform}
    with zp.Queue(cohort, zp.GridSampler(**options), shuffle_subjects=False, **options_of_queue) as queue:
        for patch in queue:
            subject = cohort[patch.subject]
            [wanted] = zp.GridSampler(subject, **options).read(subject, [patch.location])
            for name in wanted:
                found = patch[name].data
                if dtype is None:
                    found = found * patch[name].slope + patch[name].inter
                assert torch.equal(found, wanted[name].data.to(found.dtype))


@pytest.mark.parametrize("fill", [0.5, -1, 1e6, float("nan")])
def test_a_fill_that_stored_voxels_cannot_represent_is_the_same_with_a_transform(fill: float) -> None:
    sampler = zp.GridSampler(patch_size=(8, 8, 16), padding_mode="constant", fill=fill)
    subjects = [zp.Subject(t1=zp.ScalarImage(np.ones((8, 8, 8), np.uint8)))]
    for workers in WORKERS:
        for transform in (None, streams.unchanged):
            with zp.Queue(subjects, sampler, num_workers=workers, transform=transform) as queue:
                [patch] = queue
            padding = patch.t1.data[..., :4]
            np.testing.assert_array_equal(padding.numpy(), np.full((1, 8, 8, 4), fill, np.float32))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_subject_sampler_takes_over_the_order(cohort: zp.Cohort, workers: int) -> None:
    options: dict[str, Any] = {"shuffle_subjects": False, "shuffle_patches": False, "patches_per_volume": 1}
    options |= {"subject_sampler": [2, 0], "num_workers": workers}
    names = [name for name, *_ in stream(cohort, epochs=range(3), **options)]
    assert names == ["sub-03", "sub-01"] * 3
    queue = zp.Queue(cohort, zp.UniformSampler(4), **options)
    assert len(queue) == 2


def test_a_subject_that_a_subject_sampler_leaves_out_is_not_read(damaged_first: zp.Cohort) -> None:
    options: dict[str, Any] = {"subject_sampler": [2, 1], "shuffle_subjects": False, "num_workers": 1}
    names = {name for name, *_ in stream(damaged_first, transform=streams.unchanged, **options)}
    assert names == {"sub-02", "sub-03"}


@pytest.fixture
def damaged_first(cohort: zp.Cohort) -> zp.Cohort:
    """The cohort with a first subject that cannot be read."""
    return cohort.map(broken_first)


def broken_first(subject: zp.Subject) -> zp.Subject:
    return subject.with_images(t1=subject.t1.map(broken)) if subject.name == "sub-01" else subject


def broken(array: Any) -> Any:
    return array.map_blocks(_break, dtype=array.dtype, meta=np.empty(0, array.dtype))


def _break(block: Any) -> Any:
    raise ArithmeticError("never to be read")


@pytest.mark.parametrize("workers", WORKERS)
def test_the_global_generators_are_left_alone(cohort: zp.Cohort, workers: int) -> None:
    def state() -> tuple[Any, ...]:
        _, keys, *rest = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), keys.tolist(), rest, random.getstate()  # type: ignore[union-attr]

    before = state()
    for _ in range(2):
        stream(cohort, transform=streams.noisy, num_workers=workers)
    assert state() == before


@pytest.mark.parametrize("workers", WORKERS)
def test_the_global_generators_do_not_change_the_stream(cohort: zp.Cohort, workers: int) -> None:
    before = stream(cohort, transform=streams.noisy, num_workers=workers)
    torch.rand(3)
    np.random.random(3)  # noqa: NPY002
    random.random()
    assert stream(cohort, transform=streams.noisy, num_workers=workers) == before


# Values and types


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_equal_the_images_at_the_locations_of_the_patches(
    all_kinds: list[zp.Subject], dtype: torch.dtype | None, workers: int
) -> None:
    by_name = {subject.name: subject for subject in all_kinds}
    options: dict[str, Any] = {"patches_per_volume": 2, "num_workers": workers, "dtype": dtype}
    with zp.Queue(all_kinds, zp.UniformSampler((8, 9, 10)), **options) as queue:
        for patch in queue:
            image = by_name[patch.subject].t1
            wanted = image.read(patch.location)
            found = (
                patch.t1.data.float() if patch.t1.data.dtype == torch.bfloat16 else patch.t1.data
            ).numpy()
            if dtype is None:
                found = found.astype(wanted.dtype) * patch.t1.slope + patch.t1.inter
            else:
                assert (patch.t1.slope, patch.t1.inter) == (1, 0)
                assert patch.t1.data.dtype == (torch.complex64 if image.dtype.kind == "c" else dtype)
                wanted = wanted.astype(found.dtype)
                if dtype == torch.bfloat16 and image.dtype.kind != "c":
                    wanted = torch.from_numpy(wanted).bfloat16().float().numpy()
            np.testing.assert_array_equal(found, wanted, err_msg=patch.subject)
            np.testing.assert_array_equal(
                patch.t1.affine[:3, 3], (image.affine @ [*patch.location.index, 1])[:3]
            )


@pytest.mark.parametrize("workers", WORKERS)
def test_without_a_dtype_images_keep_their_stored_type_where_torch_computes_with_it(
    all_kinds: list[zp.Subject], workers: int
) -> None:
    wider = {"uint16": torch.int32, "uint32": torch.int64}
    options: dict[str, Any] = {"patches_per_volume": 1, "num_workers": workers, "dtype": None}
    with zp.Queue(all_kinds, zp.UniformSampler(8), **options) as queue:
        found = {patch.subject: patch for patch in queue}
    for name in ("bool", "uint8", "int8", "uint16", "int32", "uint32", "float16", "float32", "float64"):
        assert found[name].t1.data.dtype == wider.get(name, getattr(torch, name))
    for name, slope, inter in (("nifti", 0.5, -7), ("scaled", 0.125, -3)):
        assert found[name].t1.data.dtype == torch.int16
        assert (found[name].t1.slope, found[name].t1.inter) == (slope, inter)
    assert found["cut"].t1.data.dtype == torch.float32  # bounds are no slope and intercept


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_label_maps_stay_integers_in_a_type_that_torch_computes_with(
    all_kinds: list[zp.Subject], dtype: torch.dtype | None, workers: int
) -> None:
    by_name = {subject.name: subject for subject in all_kinds}
    with zp.Queue(all_kinds, zp.UniformSampler(8), 9, 2, workers, dtype=dtype) as queue:
        for patch in queue:
            labels = patch.seg.data
            assert labels.dtype == torch.int32
            assert patch.seg.kind == "label"
            wanted = by_name[patch.subject].seg.read(patch.location)
            np.testing.assert_array_equal((labels + 1 - 1).numpy(), wanted)
            assert (labels == int(labels.max())).any()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_patch_has_memory_of_its_own(workers: int) -> None:
    subjects = small_subjects(3)
    with zp.Queue(subjects, zp.UniformSampler(6), 4, 5, workers) as queue:
        queue.set_epoch(0)
        held = list(queue)
        queue.set_epoch(0)
        for patch in queue:  # spoils what it gets
            for image in patch.images.values():
                image.data.zero_()
    assert items(held) == stream(subjects, zp.UniformSampler(6), max_length=4, patches_per_volume=5)
    assert subjects[0].t1.data.any()


# Transforms


@pytest.mark.parametrize(
    "transform",
    [streams.halved, streams.with_mask, streams.without_labels, streams.in_bfloat16, streams.noisy],
)
def test_a_transform_may_change_shapes_types_and_images(transform: Any) -> None:
    options: dict[str, Any] = {"max_length": 4, "patches_per_volume": 3, "transform": transform}
    subjects, sampler = small_subjects(4), zp.UniformSampler((6, 7, 8))
    plain = {found[:2]: found for found in stream(subjects, sampler, max_length=4, patches_per_volume=3)}
    with zp.Queue(subjects, sampler, **options) as queue:
        alone = list(queue)
    for patch in alone:
        assert item(patch) != plain[patch.subject, patch.location.index]
    assert stream(subjects, sampler, num_workers=2, **options) == items(alone)
    if transform is streams.halved:
        assert {tuple(patch.t1.data.shape) for patch in alone} == {(1, 3, 7, 8)}
        assert {tuple(patch.seg.data.shape) for patch in alone} == {(6, 7, 8)}
    if transform is streams.with_mask:
        assert {tuple(patch) for patch in alone} == {("t1", "seg", "mask")}
        assert {patch.mask.data.dtype for patch in alone} == {torch.bool}
    if transform is streams.without_labels:
        assert {tuple(patch) for patch in alone} == {("t1",)}
    if transform is streams.in_bfloat16:
        assert {patch.t1.data.dtype for patch in alone} == {torch.bfloat16}


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("transform", [streams.doubled_but_the_first, streams.grown_in_bfloat16])
def test_patches_that_outgrow_their_slots_arrive_whole_with_one_warning(
    transform: Any, start_method: str, full: bool
) -> None:
    if not full and (start_method == "spawn") != (transform is streams.grown_in_bfloat16):
        pytest.skip("each transform with each start method needs --full")
    options: dict[str, Any] = {"max_length": 4, "patches_per_volume": 3, "transform": transform}
    options |= {"shuffle_subjects": False}
    subjects, sampler = small_subjects(4), zp.UniformSampler((6, 7, 8))
    alone = stream(subjects, sampler, epochs=[0, 1], **options)
    assert len({len(t1[-1]) for _, _, (t1, _) in alone}) == 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        options |= {"num_workers": 2, "start_method": start_method}
        assert stream(subjects, sampler, epochs=[0, 1], **options) == alone
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 1, texts
    assert re.search("differ from the first one in images, shapes or types, .* slower way", texts[0])


def test_patches_that_fit_their_slots_cause_no_warning() -> None:
    with zp.Queue(
        small_subjects(4), zp.UniformSampler(6), 4, 3, 2, transform=streams.halved
    ) as queue:  # warnings are errors here
        assert len(list(queue)) == 12


@pytest.mark.parametrize("workers", WORKERS)
def test_a_random_transform_differs_from_patch_to_patch_and_from_epoch_to_epoch(workers: int) -> None:
    flat = [zp.Subject(name="flat", t1=zp.ScalarImage(np.zeros((6, 6, 6), np.int16)))]
    options: dict[str, Any] = {"patches_per_volume": 5, "num_workers": workers}
    found = stream(flat, zp.UniformSampler(6), epochs=[0, 1], transform=streams.noisy, **options)
    assert len({voxels for *_, (t1,) in found for voxels in [t1[-1]]}) == 10
    other = stream(flat, zp.UniformSampler(6), transform=streams.noisy, seed=1, **options)
    assert set(other).isdisjoint(found)


@pytest.mark.parametrize("generator", ["torch", "numpy", "random"])
def test_each_of_the_three_generators_is_seeded(generator: str) -> None:
    transform = {"torch": streams.noisy_torch, "numpy": streams.noisy_numpy, "random": streams.noisy_random}
    options: dict[str, Any] = {"patches_per_volume": 3, "transform": transform[generator]}
    subjects = small_subjects(2)
    first = stream(subjects, zp.UniformSampler(6), **options)
    torch.manual_seed(77)
    np.random.seed(77)  # noqa: NPY002
    random.seed(77)
    assert stream(subjects, zp.UniformSampler(6), num_workers=1, **options) == first
    assert len({t1[-1] for _, _, (t1, _) in first}) == len(first)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as torch may use in a training program with two processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("workers", WORKERS)
def test_a_transform_computes_in_one_thread_in_every_process(workers: int) -> None:
    """With more threads sums of floats are rounded differently."""
    options: dict[str, Any] = {"patches_per_volume": 2, "transform": streams.threads}
    with zp.Queue(small_subjects(2), zp.UniformSampler(6), num_workers=workers, **options) as queue:
        assert [patch.t1.data.tolist() for patch in queue] == [[1]] * 4
    assert torch.get_num_threads() == 2
    with (
        pytest.raises(QueueError),
        zp.Queue(
            small_subjects(2), zp.UniformSampler(6), transform=streams.Failing("sub-01"), num_workers=workers
        ) as queue,
    ):
        list(queue)
    assert torch.get_num_threads() == 2


@pytest.mark.filterwarnings("ignore:some patches differ:UserWarning")
@pytest.mark.parametrize("grown", [False, True], ids=["in slots", "grown"])
def test_a_transform_may_rename_the_subject_of_a_patch(grown: bool) -> None:
    options: dict[str, Any] = {"max_length": 4, "patches_per_volume": 3, "shuffle_subjects": False}
    options["transform"] = streams.grown_and_renamed if grown else streams.renamed
    alone = stream(small_subjects(4), zp.UniformSampler(6), **options)
    assert len({subject for subject, *_ in alone}) == 12
    assert stream(small_subjects(4), zp.UniformSampler(6), num_workers=2, **options) == alone


@pytest.mark.parametrize("workers", WORKERS)
def test_a_gradient_that_a_transform_leaves_is_dropped(workers: int) -> None:
    options: dict[str, Any] = {"patches_per_volume": 3, "transform": streams.weighed, "num_workers": workers}
    with zp.Queue(small_subjects(2), zp.UniformSampler(6), **options) as queue:
        singly = list(queue)
        queue.set_epoch(0)
        [batch] = zp.SubjectsLoader(queue, 6)
    assert not any(patch.t1.data.requires_grad for patch in singly)
    assert not batch.t1.data.requires_grad
    assert torch.equal(batch.t1.data, torch.stack([patch.t1.data for patch in singly]))


# The buffer


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    ("workers", "max_length", "per_volume", "group"),
    [(0, 100, 10, 10), (0, 100, 70, 32), (0, 4, 70, 4), (2, 100, 10, 10), (3, 9, 10, 9), (1, 1, 1, 1)],
)
def test_max_memory_is_the_buffer_and_the_patches_in_flight_and_handed_out(
    workers: int, max_length: int, per_volume: int, group: int, batch_size: int
) -> None:
    """Patches as delivered: 8 x 9 x 10 of float32 and uint8, each image of a batch rounded up to 64 bytes."""
    subjects = small_subjects(3)
    with zp.Queue(subjects, zp.UniformSampler((8, 9, 10)), max_length, per_volume, workers) as queue:
        loader = zp.SubjectsLoader(queue, batch_size)
        patches = max_length + group * (2 * workers + 1)
        slots = slots_needed(queue.options, group, batch_size)
        assert (slots - 1 - HANDED_OUT) * batch_size - patches <= math.isqrt(max_length) + batch_size - 1
        slot = {1: 2880 + 768, 8: 8 * (2880 + 720)}[batch_size]
        assert queue.max_memory == WATCH_BYTES + slots * slot
        next(iter(loader))
        assert feed_of(queue).block.nbytes == queue.max_memory


def test_max_memory_counts_wider_label_maps_and_the_largest_subject() -> None:
    def subject(channels: int) -> zp.Subject:
        image = zp.ScalarImage(np.zeros((channels, 6, 6, 6), dtype=np.int16))
        return zp.Subject(t1=image, seg=zp.LabelMap(np.zeros((6, 6, 6), dtype=np.uint16)))

    queue = zp.Queue([subject(1), subject(3)], zp.UniformSampler(4), 5, 2, dtype=torch.float16)
    assert queue.max_memory == WATCH_BYTES + (5 + 2 + 2 + 4) * 4**3 * (3 * 2 + 4)
    assert queue.max_memory_pretty == "40.1 KiB"


def test_max_memory_follows_from_the_first_patch_after_a_transform() -> None:
    options: dict[str, Any] = {"max_length": 5, "patches_per_volume": 2, "transform": streams.halved}
    queue = zp.Queue(small_subjects(3), zp.UniformSampler(8), **options)
    assert queue.max_memory == WATCH_BYTES + (5 + 2 + 2 + 4) * (4 * 8 * 8 * 4 + 8**3)


def feed_of(queue: zp.Queue) -> BatchFeed:
    assert queue._feed is not None
    return queue._feed


def assert_no_slot_is_lost(queue: zp.Queue) -> None:
    """Each slot is free, of a batch that is being filled, or leased."""
    slots = feed_of(queue).slots
    filled = [batch.slot for batch in slots._batches.values() if batch.slot is not None]
    assert slots.leased == queue._slots - len(slots._free) - len(filled)
    assert len({*slots._free, *filled}) == len(slots._free) + len(filled)
    assert slots.waiting == sum(
        patch is not None
        for batch in slots._batches.values()
        if not batch.is_dropped
        for patch in batch.patches
    )


class Watched(BatchFeed):
    """A feed that notes what arrives."""

    received: list[int]

    def _take_in(self, result: Result) -> None:
        super()._take_in(result)
        self.received += [result.task.serial] * len(result.patches)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of the run of each patch that queues have received."""
    received: list[int] = []
    monkeypatch.setattr(Watched, "received", received, raising=False)
    monkeypatch.setattr("zpatch.loading.patch_queue.BatchFeed", Watched)
    return received


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("max_length", [1, 5, 12, 40])
def test_no_more_than_max_length_patches_wait(
    watched: list[int], max_length: int, batch_size: int, workers: int
) -> None:
    """And those that are read together with the last of them."""
    with zp.Queue(small_subjects(9), zp.UniformSampler(6), max_length, 5, workers) as queue:
        for _ in range(3):
            for _ in zp.SubjectsLoader(queue, batch_size):
                assert feed_of(queue).slots.waiting < max_length + max(queue._group, batch_size)
                assert_no_slot_is_lost(queue)


def test_the_first_batch_needs_a_part_of_the_buffer(watched: list[int]) -> None:
    with zp.Queue(small_subjects(60), zp.UniformSampler(6), 300, 10) as queue:
        next(iter(zp.SubjectsLoader(queue, 8)))
    assert len(watched) < 150


def test_the_next_epoch_is_read_while_the_buffer_drains(watched: list[int]) -> None:
    max_length, per_epoch = 40, 160
    with zp.Queue(small_subjects(32), zp.UniformSampler(6), max_length, 5, 2) as queue:
        for epoch in range(4):
            awaited = []
            before = len(watched)
            for _ in queue:
                awaited.append(len(watched) - before)
                before = len(watched)
            # As many patches wait over the change of epochs, and never again do many arrive at once.
            ahead = len(watched) - per_epoch * (epoch + 1)
            assert ahead >= max_length // 2 - 2, ahead
            assert epoch == 0 or max(awaited) <= 15, awaited
    assert watched[: 2 * per_epoch].count(1) == per_epoch  # and nothing of what was read ahead is read anew
    assert watched[: 2 * per_epoch].count(2) == per_epoch


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_epochs_that_are_abandoned_or_chosen_give_their_streams_and_leak_no_slot(
    workers: int, batch_size: int, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, chance = small_subjects(4), random.Random(workers)
    options: dict[str, Any] = {"max_length": 5, "patches_per_volume": 3}
    whole = [stream(subjects, zp.UniformSampler(6), epochs=[epoch], **options) for epoch in range(9)]
    with zp.Queue(subjects, zp.UniformSampler(6), num_workers=workers, **options) as queue:
        queue.batch_size = batch_size
        epoch = 0
        for _ in range(400 if full else 80):
            match chance.randrange(3):
                case 0:  # the next epoch, or again one that was abandoned
                    epoch = queue.position.epoch
                case 1:
                    epoch = chance.randrange(8)
                case 2:
                    epoch = min(epoch + 1, 7)
            if epoch > 7:
                epoch = 0
            queue.set_epoch(epoch)
            stop = chance.choice([0, 1, 5, 11, 12, 13])
            found = []
            for patch in queue:
                found.append(item(patch))
                if len(found) >= stop:
                    break
            assert found == whole[epoch][: max(1, stop)]
            assert_no_slot_is_lost(queue)
        # When nothing is read ahead any more, and all patches arrived, all slots are free.
        monkeypatch.setattr(queue, "upcoming", lambda plan: None)
        queue.set_epoch(8)
        assert items(queue) == whole[8]
        assert feed_of(queue).slots.leased == 0
        assert sorted(feed_of(queue).slots._free) == list(range(queue._slots))


@pytest.mark.parametrize("workers", [1, 2])
def test_without_reading_ahead_all_slots_are_free_between_two_epochs(workers: int) -> None:
    options: dict[str, Any] = {"subject_sampler": [0, 2, 1, 2], "shuffle_subjects": False}
    with zp.Queue(small_subjects(3), zp.UniformSampler(6), 4, 7, workers, **options) as queue:
        for stop in (28, 3, 28, 1, 12, 28):
            for number, _ in enumerate(queue, 1):
                if number == stop < 28:
                    break
            if stop == 28:
                assert feed_of(queue).slots.leased == 0
                assert sorted(feed_of(queue).slots._free) == list(range(queue._slots))


def test_epochs_of_one_patch_run_ahead_no_further_than_their_tasks() -> None:
    options: dict[str, Any] = {"max_length": 8, "patches_per_volume": 1}
    subjects = small_subjects(1)
    with zp.Queue(subjects, zp.UniformSampler(6), num_workers=2, **options) as queue:
        found = [item(patch) for _ in range(12) for patch in queue]
        assert feed_of(queue)._begun <= 12 + 4 + 8
        assert len(feed_of(queue)._runs) <= 4 + 8 + 1
    assert found == stream(subjects, zp.UniformSampler(6), epochs=range(12), **options)


@pytest.mark.parametrize("workers", WORKERS)
def test_patches_that_get_no_slot_arrive_all_the_same(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the distances of a shuffle are unusually uneven."""
    options: dict[str, Any] = {"max_length": 30, "patches_per_volume": 5}
    wanted = stream(small_subjects(20), zp.UniformSampler(6), epochs=[0, 1], **options)
    monkeypatch.setattr("zpatch.loading.patch_queue.slots_needed", lambda *_, **__: 4)
    with zp.Queue(small_subjects(20), zp.UniformSampler(6), num_workers=workers, **options) as queue:
        found = [
            (name, place.index, streams.voxel_bytes(data))
            for _ in range(2)
            for batch in zp.SubjectsLoader(queue, 8, reuse="next")
            for name, place, data in zip(batch.subjects, batch.patch_location, batch.t1.data, strict=True)
        ]
    assert found == [(name, index, images[0][-1]) for name, index, images in wanted]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("in_place", [False, True], ids=["patches", "batches"])
@pytest.mark.parametrize("transform", [None, streams.noisy], ids=["plain", "noisy"])
def test_memory_does_not_grow_from_epoch_to_epoch(
    cohort: zp.Cohort, transform: Any, in_place: bool, full: bool
) -> None:
    """At most a MiB an epoch in each process, the shared slots not counted."""
    epochs, warm = (20, 5) if full else (10, 4)
    gc.collect()
    gc.freeze()  # a full collection writes to all of the heap that workers share with this process
    with zp.Queue(cohort, zp.UniformSampler(16), 40, 40, 2, transform=transform) as queue:
        used = []
        for _ in range(warm + epochs):
            for part in zp.SubjectsLoader(queue, 5) if in_place else queue:
                assert part.t1.data.shape[-4:] == (1, 16, 16, 16)
            workers = multiprocessing.active_children()
            processes = [psutil.Process(), *(psutil.Process(worker.pid) for worker in workers)]
            used.append([process.memory_full_info().uss for process in processes])
    growth = (np.array(used[-1]) - np.array(used[warm - 1])) / epochs
    assert growth.shape == (3,)
    assert growth.max() < 2**20, growth


# Workers


def test_workers_live_on_from_epoch_to_epoch(cohort: zp.Cohort) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), num_workers=2) as queue:
        pids = []
        for _ in range(2):
            list(queue)
            pids.append({child.pid for child in multiprocessing.active_children()})
    assert pids[0] == pids[1]
    assert len(pids[0]) == 2


def test_a_queue_that_is_not_iterated_starts_nothing(cohort: zp.Cohort) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), num_workers=2) as queue:
        assert (len(queue), queue.max_memory > 0, queue.state_dict()["consumed"]) == (40, True, 0)
        iter(queue)
        assert multiprocessing.active_children() == []


def test_two_queues_run_side_by_side(cohort: zp.Cohort) -> None:
    options: dict[str, Any] = {"max_length": 5, "patches_per_volume": 3}
    wanted = [stream(cohort, zp.UniformSampler(8), seed=seed, **options) for seed in (0, 1)]
    with (
        zp.Queue(cohort, zp.UniformSampler(8), num_workers=1, seed=0, **options) as one,
        zp.Queue(cohort, zp.UniformSampler(8), num_workers=2, seed=1, **options) as other,
    ):
        pairs = [(item(a), item(b)) for a, b in zip(one, other, strict=True)]
    assert [list(found) for found in zip(*pairs, strict=True)] == wanted


@pytest.mark.parametrize("workers", WORKERS)
def test_a_closed_queue_starts_again(cohort: zp.Cohort, workers: int) -> None:
    with zp.Queue(cohort, zp.UniformSampler(8), num_workers=workers) as queue:
        first = items(queue)
        queue.close()
        queue.close()
        queue.set_epoch(0)
        assert items(queue) == first


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_the_reader_is_pickled_once_for_all_workers(start_method: str, full: bool) -> None:
    if not full and start_method == "forkserver":
        pytest.skip("a worker of a forkserver gets its reader as a spawned one does; both need --full")
    counted = streams.Counted()
    options: dict[str, Any] = {"num_workers": 2, "start_method": start_method, "transform": counted}
    with zp.Queue(small_subjects(2), zp.UniformSampler(6), **options) as queue:
        assert len(list(queue)) == 20
        assert counted.pickled == 1
        assert len(memory_files()) == 1  # nor is it kept: that is the file of the slots


def memory_files() -> set[int]:
    """The inodes of the nameless files that queues have open."""
    inodes = set()
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            if "zpatch-queue" in os.readlink(f"/proc/self/fd/{handle}"):
                inodes.add(os.fstat(int(handle)).st_ino)
    return inodes


def test_workers_are_forked_on_linux_whatever_pythons_default_is(cohort: zp.Cohort) -> None:
    multiprocessing.set_start_method("spawn", force=True)
    try:
        found = stream(cohort, zp.UniformSampler(8), num_workers=1, transform=lambda patch: patch)
    finally:
        multiprocessing.set_start_method(None, force=True)
    assert found == stream(cohort, zp.UniformSampler(8))


def slot_maps() -> list[str]:
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "zpatch-queue" in line]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_closed_queue_keeps_no_memory_and_its_patches_stay_valid(workers: int) -> None:
    wanted = stream(small_subjects(3), zp.UniformSampler(6), patches_per_volume=4)
    gc.collect()  # what earlier tests left
    assert not slot_maps()
    with zp.Queue(small_subjects(3), zp.UniformSampler(6), 300, 4, workers, dtype=None) as queue:
        loader = zp.SubjectsLoader(queue, 3)
        batches = iter(loader)
        batch = next(batches)
        held = streams.voxel_bytes(batch.t1.data)
        assert slot_maps()
        queue.close()
        assert streams.voxel_bytes(batch.t1.data) == held
        batches.close()  # type: ignore[attr-defined]
        del batch
        assert not slot_maps()
        queue.set_epoch(0)
        singly = list(zp.Queue(small_subjects(3), zp.UniformSampler(6), 300, 4, workers))
        assert items(singly) == wanted


def test_a_worker_that_fails_leaves_no_memory_behind_either() -> None:
    options: dict[str, Any] = {"num_workers": 1, "start_method": "spawn"}
    options["transform"] = lambda patch: patch  # which cannot be sent
    with zp.Queue(small_subjects(3), zp.UniformSampler(6), **options) as queue:
        with pytest.raises(QueueError, match="cannot be sent"):
            list(queue)
        assert not slot_maps()


# With torch's DataLoader


@pytest.mark.filterwarnings("ignore:the loop refers to more:UserWarning")
@pytest.mark.parametrize("workers", WORKERS)
def test_a_plain_dataloader_gives_the_same_patches_as_subjects_loader(
    cohort: zp.Cohort, workers: int
) -> None:
    def three_epochs(loaded: Any, queue: zp.Queue) -> list[zp.PatchBatch]:
        batches = []
        with queue:
            for epoch in range(3):
                queue.set_epoch(epoch)
                batches += list(loaded(queue))
        return batches

    def queue() -> zp.Queue:
        return zp.Queue(cohort, zp.UniformSampler(8), 7, 3, workers, transform=None)

    plain = three_epochs(
        lambda queue: DataLoader(queue, batch_size=5, num_workers=0, collate_fn=zp.collate), queue()
    )
    ours = three_epochs(lambda queue: zp.SubjectsLoader(queue, batch_size=5), queue())
    assert [batch.batch_size for batch in plain] == [5, 5, 2] * 3
    for one, other in zip(plain, ours, strict=True):
        for name in ("t1", "seg"):
            assert torch.equal(one[name].data, other[name].data)
            np.testing.assert_array_equal(one[name].affine, other[name].affine)
        assert one.patch_location == other.patch_location
        assert one.subjects == other.subjects


def test_a_dataloader_with_workers_is_refused(cohort: zp.Cohort) -> None:
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
        ({"timeout": 0}, "timeout must be .*0"),
        ({"subject_sampler": [4], "shuffle_subjects": False}, "subject_sampler .*4 "),
        ({"subject_sampler": [-1], "shuffle_subjects": False}, "subject_sampler .*-1 "),
        ({"subject_sampler": [], "shuffle_subjects": False}, "subject_sampler gives no subject"),
        ({"subject_sampler": iter([0]), "shuffle_subjects": False}, "subject_sampler .*each epoch"),
        (
            {"subject_sampler": [0], "shuffle_subjects": False, "rank": 0, "world_size": 2},
            "subject_sampler .*rank and world_size",
        ),
        ({"rank": 0}, "rank and world_size go together"),
        ({"world_size": 2}, "rank and world_size go together"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1 of 2, not 2"),
        ({"rank": 0, "world_size": 5}, "4 subjects cannot be dealt out to 5 ranks"),
        ({"uneven": "trim"}, "uneven must be one of pad, drop, error"),
        ({"max_length": 2.5}, "max_length must be an integer, not 2.5"),
        ({"patches_per_volume": 2.5}, "patches_per_volume must be an integer, not 2.5"),
        ({"num_workers": 1.5}, "num_workers must be an integer, not 1.5"),
        ({"seed": 1.5}, "seed must be an integer, not 1.5"),
    ],
)
@pytest.mark.parametrize("workers", WORKERS)
def test_invalid_options_are_refused(
    cohort: zp.Cohort, options: dict[str, Any], text: str, workers: int
) -> None:
    with pytest.raises(OptionError, match=text):
        zp.Queue(cohort, zp.UniformSampler(8), **{"num_workers": workers, **options})


def test_an_epoch_below_zero_is_refused(cohort: zp.Cohort) -> None:
    with pytest.raises(OptionError, match="an epoch is at least 0, not -1"):
        zp.Queue(cohort, zp.UniformSampler(8)).set_epoch(-1)


def test_a_queue_without_subjects_is_refused() -> None:
    with pytest.raises(OptionError, match="at least one subject"):
        zp.Queue([], zp.UniformSampler(8))


def test_an_argument_that_is_no_list_of_subjects_is_refused_with_the_right_call(cohort_store: Path) -> None:
    [subject] = small_subjects(1)
    for subjects, text in (
        (subject, r"'sub-00' is a single one; say Queue\(\[subject\], ...\)"),
        (str(cohort_store), r"is a path; say Queue\(zpatch.Cohort\('.*'\), ...\)"),
        (cohort_store, r"is a path; say Queue\(zpatch.Cohort\('.*'\), ...\)"),
        (iter([subject]), r"not list_iterator; say Queue\(list\(subjects\), ...\)"),
    ):
        with pytest.raises(OptionError, match=f"a queue needs a list of subjects, .*{text}"):
            zp.Queue(subjects, zp.UniformSampler(8))  # type: ignore[arg-type]


def test_a_grid_that_does_not_fit_a_subject_is_refused_at_once(cohort: zp.Cohort) -> None:
    with pytest.raises(ValueError, match=r"patch of 99 voxels does not fit axis I of 'sub-01'.*padding_mode"):
        zp.Queue(cohort, zp.GridSampler(patch_size=99))


def test_subjects_may_be_any_sequence(cohort: zp.Cohort, tmp_path: Path) -> None:
    wanted: Sequence[Item] = stream(cohort, zp.UniformSampler(8))
    assert stream(list(cohort), zp.UniformSampler(8)) == wanted
    assert stream(tuple(cohort), zp.UniformSampler(8), num_workers=1) == wanted
    close_shards(tmp_path)


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_transform_that_cannot_be_sent_to_a_worker_is_an_error(
    cohort: zp.Cohort, start_method: str
) -> None:
    options: dict[str, Any] = {"num_workers": 1, "start_method": start_method}
    advice = "(?i)lambda|pickle"
    with pytest.raises(QueueError, match=advice) as told:
        next(iter(zp.Queue(cohort, zp.UniformSampler(8), transform=lambda patch: patch, **options)))
    assert "use start_method='fork'" in str(told.value)
    with pytest.raises(QueueError, match=advice):
        next(iter(zp.Queue(cohort.map(lambda subject: subject), zp.UniformSampler(8), **options)))
    assert multiprocessing.active_children() == []


def test_forked_workers_accept_a_transform_that_cannot_be_pickled(cohort: zp.Cohort) -> None:
    plain = stream(cohort, zp.UniformSampler(8))
    mapped = cohort.map(lambda subject: subject)
    assert stream(mapped, zp.UniformSampler(8), num_workers=1, transform=lambda patch: patch) == plain
