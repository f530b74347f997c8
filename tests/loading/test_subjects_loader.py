"""The loader: a stream of patches cut into batches."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import streams
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import small_subjects

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.loading.batch_slots import HANDED_OUT

WORKERS = [0, 2]
KEEPS = pytest.mark.filterwarnings("ignore:the loop refers to more:UserWarning")


@pytest.fixture
def patches(cohort: zp.Cohort) -> list[zp.Patch]:
    return list(zp.UniformSampler(8)(cohort[0], 7, rng=0))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_batches_are_the_stream_cut_in_order(patches: list[zp.Patch], batch_size: int) -> None:
    batches = list(zp.SubjectsLoader(patches, batch_size))
    assert [batch.batch_size for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(
        torch.cat([batch.t1.data for batch in batches]), torch.stack([patch.t1.data for patch in patches])
    )
    assert [place for batch in batches for place in batch.patch_location] == [p.location for p in patches]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_the_length_is_the_number_of_batches(
    patches: list[zp.Patch], batch_size: int, drop_last: bool
) -> None:
    loader = zp.SubjectsLoader(patches, batch_size, drop_last=drop_last)
    assert len(list(loader)) == len(loader)


def test_drop_last_leaves_out_only_the_batch_that_is_not_full(patches: list[zp.Patch]) -> None:
    assert [batch.batch_size for batch in zp.SubjectsLoader(patches, 3, drop_last=True)] == [3, 3]
    assert [batch.batch_size for batch in zp.SubjectsLoader(patches[:6], 3, drop_last=True)] == [3, 3]


def test_a_loader_can_be_iterated_again(patches: list[zp.Patch]) -> None:
    loader = zp.SubjectsLoader(patches, 4)
    first, second = ([batch.t1.data for batch in loader] for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_grid_sampler_is_a_dataset_for_it(cohort: zp.Cohort) -> None:
    grid = zp.GridSampler(cohort[0], patch_size=24, patch_overlap=4)
    loader = zp.SubjectsLoader(grid, 3)
    batches = list(loader)
    assert [place for batch in batches for place in batch.patch_location] == grid.locations
    assert len(batches) == len(loader)


# Over a queue


def queue_of(subjects: Any, **options: Any) -> zp.Queue:
    defaults: dict[str, Any] = {"max_length": 5, "patches_per_volume": 3}
    return zp.Queue(subjects, zp.UniformSampler((6, 7, 8)), **{**defaults, **options})


def assert_same(one: zp.PatchBatch, other: zp.PatchBatch) -> None:
    assert list(one) == list(other)
    assert one.subjects == other.subjects
    assert one.patch_location == other.patch_location
    for name in one:
        assert one[name].data.dtype == other[name].data.dtype
        assert torch.equal(one[name].data, other[name].data)
        assert one[name].kind == other[name].kind
        for what in ("affine", "slope", "inter"):
            np.testing.assert_array_equal(getattr(one[name], what), getattr(other[name], what))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("transform", [None, streams.noisy, streams.halved, streams.in_bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, None], ids=str)
def test_batches_of_a_queue_are_its_patches_stacked(
    transform: Any, dtype: torch.dtype | None, workers: int
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "transform": transform, "num_workers": workers}
    subjects = small_subjects(4)
    with queue_of(subjects, **options) as queue:
        singly = [list(queue) for _ in range(2)]
    with queue_of(subjects, **options) as queue:
        for patches in singly:
            for number, batch in enumerate(zp.SubjectsLoader(queue, 5)):
                assert_same(batch, zp.collate(patches[5 * number : 5 * number + 5]))
                assert batch.batch_size == (5 if number < 2 else 2)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("transform", [None, streams.unchanged], ids=["plain", "unchanged"])
def test_subjects_of_other_stored_types_and_scales_make_one_batch_of_values(
    cohort: zp.Cohort, transform: Any, workers: int
) -> None:
    """One of the cohort is float32 on disk with a slope, the others are int16."""
    options: dict[str, Any] = {"patches_per_volume": 8, "max_length": 32, "num_workers": workers}
    with queue_of(cohort, transform=transform, **options) as queue:
        singly = list(queue)
        queue.set_epoch(0)
        [batch] = zp.SubjectsLoader(queue, 32)
    assert set(batch.subjects) == set(cohort.names)
    assert_same(batch, zp.collate(singly))
    assert batch.t1.data.dtype == torch.float32
    for number, (name, place) in enumerate(zip(batch.subjects, batch.patch_location, strict=True)):
        wanted = cohort[name].t1.read(place).astype(np.float32)
        np.testing.assert_array_equal(batch.t1.data[number].numpy(), wanted)


def test_subjects_of_other_stored_types_make_no_batch_without_a_dtype(cohort: zp.Cohort) -> None:
    queue = queue_of(cohort, dtype=None, patches_per_volume=8, max_length=32)
    with pytest.raises(
        OptionError, match=r"one type: 't1' has torch\.(int16 and .*float32|float32 and .*int16)"
    ):
        list(zp.SubjectsLoader(queue, 32))


def test_stored_voxels_have_the_scale_of_each_patch() -> None:
    subjects = [
        zp.Subject(name=f"{slope}", t1=zp.ScalarImage(np.ones((8, 8, 8), np.int16)).rescaled(slope, 5))
        for slope in (0.5, 2)
    ]
    [batch] = zp.SubjectsLoader(queue_of(subjects, dtype=None), 6)
    assert batch.t1.data.dtype == torch.int16
    assert batch.t1.slope.tolist() == [float(name) for name in batch.subjects]
    assert batch.t1.inter.tolist() == [5] * 6


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_are_contiguous_and_so_are_patches(cohort: zp.Cohort, batch_size: int, workers: int) -> None:
    with queue_of(cohort, num_workers=workers) as queue:
        for batch in zp.SubjectsLoader(queue, batch_size):
            assert all(image.data.is_contiguous() for image in batch.images.values())
            batch.t1.data.view(-1)
        queue.set_epoch(0)
        assert all(image.data.is_contiguous() for patch in queue for image in patch.images.values())


def test_contiguous_is_deprecated(patches: list[zp.Patch]) -> None:
    with pytest.warns(DeprecationWarning, match="contiguous= has no effect: batches are contiguous"):
        zp.SubjectsLoader(patches, 2, contiguous=False)


@KEEPS
@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_has_memory_of_its_own(workers: int) -> None:
    with queue_of(small_subjects(4), num_workers=workers) as queue:
        loader = zp.SubjectsLoader(queue, 5)
        held = list(loader)
        queue.set_epoch(0)
        for batch in loader:
            for image in batch.images.values():
                image.data.zero_()
        queue.set_epoch(0)
        for batch, kept in zip(loader, held, strict=True):
            assert_same(batch, kept)


@KEEPS
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_follow_each_other_with_and_without_drop_last(workers: int, drop_last: bool) -> None:
    with queue_of(small_subjects(4), num_workers=workers) as queue:
        singly = [list(queue) for _ in range(3)]
    with queue_of(small_subjects(4), num_workers=workers) as queue:
        loader = zp.SubjectsLoader(queue, 5, drop_last=drop_last)
        assert len(loader) == (2 if drop_last else 3)
        for patches in singly:
            batches = list(loader)
            assert len(batches) == len(loader)
            assert_same(batches[1], zp.collate(patches[5:10]))


@KEEPS
@pytest.mark.parametrize("batch_size", [4, 12, 20])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_loader_that_is_read_to_its_length_gives_the_next_epoch_next(
    batch_size: int, drop_last: bool
) -> None:
    """As in ``for step, batch in zip(range(len(loader)), loader)``, which never asks for one more."""
    queue = queue_of(small_subjects(4))
    loader = zp.SubjectsLoader(queue, batch_size, drop_last=drop_last)
    found = [batch for _ in range(3) for _, batch in zip(range(len(loader)), loader, strict=False)]
    again = zp.SubjectsLoader(queue_of(small_subjects(4)), batch_size, drop_last=drop_last)
    for one, other in zip(found, [batch for _ in range(3) for batch in again], strict=True):
        assert_same(one, other)


def test_a_loader_gives_the_state_of_its_queue_and_takes_it() -> None:
    queue = queue_of(small_subjects(4))
    loader = zp.SubjectsLoader(queue, 5)
    batches = iter(loader)
    next(batches)
    assert loader.state_dict() == queue.state_dict()
    assert loader.state_dict()["consumed"] == 5
    rest = list(batches)
    other = zp.SubjectsLoader(queue_of(small_subjects(4)), 5)
    other.load_state_dict({**loader.state_dict(), "epoch": 0, "consumed": 5})
    for one, again in zip(rest, other, strict=True):
        assert_same(one, again)


# The memory of batches


def test_batches_are_copied_to_the_device(patches: list[zp.Patch]) -> None:
    batch = next(iter(zp.SubjectsLoader(patches, 2, device="meta")))
    assert {image.data.device.type for image in batch.images.values()} == {"meta"}
    batch = next(iter(zp.SubjectsLoader(patches, 2, device=torch.device("cpu"))))
    assert_same(batch, zp.collate(patches[:2]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_pin_memory_without_a_gpu_does_nothing_and_warns_once(patches: list[zp.Patch]) -> None:
    with pytest.warns(UserWarning, match="pin_memory=True does nothing here") as told:
        loader = zp.SubjectsLoader(patches, 2, pin_memory=True)
    assert [warning.filename for warning in told] == [__file__]
    for _ in range(2):  # warnings are errors here
        for number, batch in enumerate(loader):
            assert_same(batch, zp.collate(patches[2 * number : 2 * number + 2]))


@pytest.mark.parametrize("device", [None, "meta"])
def test_contiguous_batches_are_put_into_page_locked_memory_too(
    patches: list[zp.Patch], monkeypatch: pytest.MonkeyPatch, device: str | None
) -> None:
    """Without a GPU: page-locked memory is requested, except for batches that are on the device already."""
    empty, asked = torch.empty, []

    def empty_noted(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = zp.SubjectsLoader(patches, 7, pin_memory=True, device=device)
    monkeypatch.setattr(torch, "empty", empty_noted)
    [batch] = loader
    assert asked.count(True) == len(batch.images)
    assert all(image.data.is_contiguous() for image in batch.images.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pin_memory_puts_every_image_into_page_locked_memory(patches: list[zp.Patch]) -> None:
    batch = next(iter(zp.SubjectsLoader(patches, 2, pin_memory=True)))
    assert all(image.data.is_pinned() for image in batch.images.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("pin_memory", [True, False])
def test_batches_on_a_gpu_equal_those_on_the_cpu(cohort: zp.Cohort, pin_memory: bool, workers: int) -> None:
    with queue_of(cohort, num_workers=workers) as queue:
        plain = list(zp.SubjectsLoader(queue, 5))
        queue.set_epoch(0)
        for number, batch in enumerate(zp.SubjectsLoader(queue, 5, pin_memory=pin_memory, device="cuda")):
            assert batch.t1.data.is_cuda
            assert_same(batch.map_data(torch.Tensor.cpu), plain[number])


# Batches in place


def in_slots(queue: zp.Queue, batch: zp.PatchBatch) -> bool:
    """Whether a batch is a view of the memory that workers write to."""
    assert queue._feed is not None
    memory = torch.from_numpy(queue._feed.block.bytes)
    first, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    return all(first <= image.data.data_ptr() < stop for image in batch.images.values())


@pytest.mark.parametrize("reuse", ["unused", "next"])
@pytest.mark.parametrize("workers", WORKERS)
def test_a_loop_that_looks_at_one_batch_at_a_time_gets_what_workers_wrote(workers: int, reuse: Any) -> None:
    with queue_of(small_subjects(8), num_workers=workers, max_length=20) as queue:
        loader = zp.SubjectsLoader(queue, 5, reuse=reuse)
        for _ in range(3):
            for batch in loader:
                assert in_slots(queue, batch)
                assert queue._feed is not None
                assert queue._feed.slots.leased <= 2


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loop_that_keeps_batches_gets_copies_and_is_told_once(workers: int) -> None:
    with queue_of(small_subjects(8), num_workers=workers) as queue:
        loader = zp.SubjectsLoader(queue, 3)
        with pytest.warns(
            UserWarning, match="refers to more than 3 batches, .* copies; .* reuse='next'"
        ) as told:
            kept = list(loader)
        assert len(told) == 1
        assert [in_slots(queue, batch) for batch in kept] == [True] * HANDED_OUT + [False] * 5
        del kept
        assert all(in_slots(queue, batch) for batch in loader)  # once it does not keep them


class Keeper:
    """Keeps batches, writes to them, drops them, and knows what each must hold."""

    def __init__(self) -> None:
        self.kept: list[tuple[zp.PatchBatch, dict[str, torch.Tensor]]] = []

    def keep(self, batch: zp.PatchBatch, number: int, writes: bool) -> None:
        if writes:
            batch.t1.data.add_(number)
            batch.seg.data.fill_(number % 200)
        self.kept.append((batch, {name: batch[name].data.clone() for name in batch}))

    def check(self) -> None:
        for batch, wanted in self.kept:
            for name, data in wanted.items():
                assert torch.equal(batch[name].data, data)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("transform", [None, streams.noisy], ids=["plain", "noisy"])
@pytest.mark.parametrize(
    ("workers", "start_method"), [(1, "fork"), (2, "fork"), (3, "fork"), (1, "spawn"), (2, "forkserver")]
)
def test_batches_in_place_are_the_stream_for_any_number_of_workers_and_each_start_method(
    nothing_is_left_behind: None, workers: int, start_method: str, transform: Any, full: bool
) -> None:
    if not full and start_method != "fork" and transform is None:
        pytest.skip("each transform with each start method needs --full")
    with queue_of(small_subjects(7), transform=transform) as queue:
        singly = [item for _ in range(2) for item in streams.items(queue)]
    options = {"num_workers": workers, "start_method": start_method, "transform": transform}
    with queue_of(small_subjects(7), **options) as queue:
        found = []
        for _ in range(2):
            for batch in zp.SubjectsLoader(queue, 4):
                assert in_slots(queue, batch)
                for row in range(batch.batch_size):
                    images = {
                        name: dataclasses.replace(
                            image,
                            data=image.data[row],
                            affine=image.affine[row],
                            slope=image.slope[row],
                            inter=image.inter[row],
                        )
                        for name, image in batch.images.items()
                    }
                    patch = zp.Patch(images, batch.patch_location[row], batch.subjects[row])
                    found.append(streams.item(patch))
    streams.stop_forkserver()
    assert found == singly


@KEEPS
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@settings(max_examples=15, deadline=None)
@given(
    most=st.sampled_from([1, 2, 3, 50]),
    writes=st.lists(st.booleans(), min_size=27, max_size=27),
    dropped=st.lists(st.integers(0, 49), min_size=27, max_size=27),
    threads=st.booleans(),
)
def test_a_batch_that_is_kept_or_written_to_never_changes_another_one(
    workers: int, most: int, writes: list[bool], dropped: list[int], threads: bool
) -> None:
    subjects, keeper = small_subjects(9), Keeper()
    singly = stream_of(subjects)
    with queue_of(subjects, num_workers=workers) as queue, ThreadPoolExecutor(1) as pool:
        number = 0
        for epoch in range(3):
            for batch in zp.SubjectsLoader(queue, 3):
                place = number % 9 * 3
                for row, (subject, index, voxels) in enumerate(singly[epoch][place : place + 3]):
                    assert (batch.subjects[row], batch.patch_location[row].index) == (subject, index)
                    assert streams.voxel_bytes(batch.t1.data[row]) == voxels
                keeper.keep(batch, number, writes[number])
                del batch
                while len(keeper.kept) > most:
                    gone = [keeper.kept.pop(dropped[number] % len(keeper.kept))]
                    pool.submit(gone.clear).result() if threads else gone.clear()
                keeper.check()
                number += 1
    keeper.check()  # also when the queue is closed
    assert number == 27


@functools.cache
def _stream_of(count: int) -> list[list[tuple[str, Any, bytes]]]:
    with queue_of(small_subjects(count)) as queue:
        return [
            [(p.subject, p.location.index, streams.voxel_bytes(p.t1.data)) for p in queue] for _ in range(3)
        ]


def stream_of(subjects: list[zp.Subject]) -> list[list[tuple[str, Any, bytes]]]:
    """The patches of three epochs, one by one."""
    return _stream_of(len(subjects))


@pytest.mark.parametrize("workers", WORKERS)
def test_two_loaders_of_one_queue_with_other_batch_sizes_give_the_same_stream(workers: int) -> None:
    singly = stream_of(small_subjects(9))
    with queue_of(small_subjects(9), num_workers=workers) as queue:
        loaders = [zp.SubjectsLoader(queue, size) for size in (4, 7, 1)]
        for epoch, loader in enumerate(loaders):
            found = [
                (subject, place.index, streams.voxel_bytes(data))
                for batch in loader
                for subject, place, data in zip(
                    batch.subjects, batch.patch_location, batch.t1.data, strict=True
                )
            ]
            assert found == singly[epoch]
            assert queue._feed is not None
            assert queue.max_memory == queue._feed.block.nbytes


def test_a_queue_that_is_resumed_within_a_batch_goes_on_with_full_batches() -> None:
    singly = stream_of(small_subjects(9))[0]
    with queue_of(small_subjects(9)) as queue:
        for number, _ in enumerate(queue, 1):
            if number == 7:
                break
        state = queue.state_dict()
    with queue_of(small_subjects(9), num_workers=2) as queue:
        loader = zp.SubjectsLoader(queue, 5)
        loader.load_state_dict(state)
        batches = [(batch.batch_size, batch.patch_location[0].index) for batch in loader]
    assert batches == [(5, singly[7 + 5 * n][1]) for n in range(4)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reuse": "always"}, "reuse must be one of unused, next, not 'always'"),
        ({"transfer": "bytes"}, "transfer must be one of values, stored, not 'bytes'"),
        ({"reuse": "next"}, "reuse='next' is for batches of a Queue"),
        ({"transfer": "stored"}, "transfer='stored' is for batches of a Queue"),
    ],
)
def test_choices_that_do_not_exist_or_do_nothing_are_refused(
    patches: list[zp.Patch], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(OptionError, match=text):
        zp.SubjectsLoader(patches, 2, **options)


def test_a_batch_size_of_zero_is_refused(patches: list[zp.Patch]) -> None:
    with pytest.raises(OptionError, match="batch_size must be at least 1, not 0"):
        zp.SubjectsLoader(patches, 0)
