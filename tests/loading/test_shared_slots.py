"""Slots of shared memory: one batch in each, seen by every process, and freed with the last of them."""

from __future__ import annotations

import errno
import gc
import itertools
import math
import mmap
import multiprocessing
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import START_METHODS, copy_shared_pickle, numbered, stop_forkserver, write_slots

import zpatch as zp
from zpatch.errors import QueueError
from zpatch.loading.shared_slots import (
    ALIGNMENT,
    WATCH_BYTES,
    ImagePlace,
    ReturnedSlots,
    SharedPickle,
    SlotBlock,
    SlotLayout,
    SlotLease,
    new_memory,
)
from zpatch.sampling.patch import PatchImage

DTYPES = [
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex64,
    torch.bool,
]

dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(0, 5), min_size=0, max_size=6).map(tuple)


@st.composite
def layouts(draw: Any) -> SlotLayout:
    parts = draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4))
    images = [ImagePlace(f"i{n}", "scalar", shape, dtype) for n, (shape, dtype) in enumerate(parts)]
    return SlotLayout.of(images, draw(st.integers(1, 4)))


def slots_of(nbytes: int) -> SlotLayout:
    """A layout of slots of a size."""
    return SlotLayout.of([ImagePlace("t1", "scalar", (nbytes,), torch.uint8)])


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# A layout


@given(layouts())
def test_images_follow_each_other_at_aligned_offsets(layout: SlotLayout) -> None:
    end = 0
    for place in layout.images:
        assert place.offset == end
        assert place.offset % ALIGNMENT == 0
        assert place.nbytes == math.prod(place.shape) * place.dtype.itemsize
        end += -(-layout.rows * place.nbytes // ALIGNMENT) * ALIGNMENT
    assert layout.nbytes == end
    assert layout.with_rows(1).with_rows(layout.rows) == layout


def test_the_layout_of_a_patch_describes_its_images() -> None:
    image = PatchImage(torch.zeros(2, 3, 4, 5, dtype=torch.int16), np.eye(4), "scalar", 0.5, -3.0)
    label = PatchImage(torch.zeros(3, 4, 5, dtype=torch.uint8), np.eye(4), "label")
    patch = zp.Patch({"t1": image, "seg": label}, zp.PatchLocation((1, 2, 3), (3, 4, 5)), "ann")
    layout = SlotLayout.of_patch(patch)
    assert layout.images == (
        ImagePlace("t1", "scalar", (2, 3, 4, 5), torch.int16, 0.5, -3.0, 0),
        ImagePlace("seg", "label", (3, 4, 5), torch.uint8, 1.0, 0.0, 256),
    )
    assert layout.nbytes == 256 + 64


def test_a_layout_and_its_tensors_make_the_patch_again() -> None:
    [patch] = zp.UniformSampler(4)(
        zp.Subject(name="ann", t1=zp.ScalarImage(np.arange(512).reshape(8, 8, 8))), 1, rng=0
    )
    tensors = [image.data for image in patch.images.values()]
    affines = [image.affine for image in patch.images.values()]
    again = SlotLayout.of_patch(patch).patch(tensors, affines, patch.location, "ann")
    assert (again.subject, again.location, list(again)) == ("ann", patch.location, ["t1"])
    assert again.t1 == patch.t1


# A block


@given(layouts(), st.integers(1, 3))
def test_what_is_written_to_a_slot_stays_there_and_touches_no_other(layout: SlotLayout, count: int) -> None:
    block = SlotBlock(count, layout)
    write_slots(block, layout, range(count))
    for slot, row, place in itertools.product(range(count), range(layout.rows), layout.images):
        found = block.tensor(slot, row, place)
        assert found.shape == place.shape
        assert found.dtype == place.dtype
        assert torch.equal(found, numbered(place, 10 * slot + row))
    assert block.watched[:count, 0].tolist() == [100 + slot for slot in range(count)]


def test_the_size_of_a_block_is_its_slots_and_the_watch() -> None:
    block = SlotBlock(7, slots_of(640))
    assert (block.count, block.layout.nbytes, block.nbytes) == (7, 640, WATCH_BYTES + 7 * 640)
    assert block.watched.nbytes == WATCH_BYTES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_are_in_the_order_of_their_axes(dtype: torch.dtype) -> None:
    place = ImagePlace("t1", "scalar", (2, 3, 4, 5), dtype)
    block = SlotBlock(1, SlotLayout.of([place]))
    for tensor in (block.tensor(0, 0, place), new_memory(place.shape, dtype=dtype)):
        assert tensor.shape == (2, 3, 4, 5)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()


@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (3, 4, 5), (2, 2, 3, 4, 5)])
def test_images_of_another_number_of_axes_are_in_the_order_of_their_axes(shape: tuple[int, ...]) -> None:
    place = ImagePlace("t1", "scalar", shape, torch.float32)
    block = SlotBlock(1, SlotLayout.of([place]))
    for tensor in (block.tensor(0, 0, place), new_memory(shape, dtype=place.dtype)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()


@pytest.mark.parametrize("start_method", START_METHODS)
def test_another_process_writes_where_this_one_reads(start_method: str, full: bool) -> None:
    if not full and start_method != "fork":
        pytest.skip("other start methods need --full; queues start workers by them in the quick run")
    layout = SlotLayout.of(
        [
            ImagePlace("t1", "scalar", (1, 3, 4, 5), torch.float32),
            ImagePlace("seg", "label", (1, 3, 4, 5), torch.uint8),
        ],
        rows=2,
    )
    block = SlotBlock(4, layout)
    context: Any = multiprocessing.get_context(start_method)
    process = context.Process(target=write_slots, args=(block, layout, [1, 3]))
    process.start()
    process.join(60)
    stop_forkserver()
    assert process.exitcode == 0
    assert block.watched[:4, 0].tolist() == [0, 101, 0, 103]
    for slot, row, place in itertools.product(range(4), range(2), layout.images):
        written = numbered(place, 10 * slot + row)
        wanted = written if slot in (1, 3) else torch.zeros_like(written)
        assert torch.equal(block.tensor(slot, row, place), wanted)


def test_a_block_is_freed_with_the_last_process_that_has_it_open() -> None:
    place = ImagePlace("t1", "scalar", (1, 4, 4, 4), torch.float32)
    gc.collect()  # what earlier tests left
    before = open_descriptors()
    block = SlotBlock(2, SlotLayout.of([place]))
    tensor = block.tensor(1, 0, place)
    tensor.fill_(3)
    del block
    gc.collect()
    assert (tensor == 3).all()  # a patch that is still held keeps its memory
    del tensor
    gc.collect()
    assert open_descriptors() == before
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if "zpatch-queue" in line]


def test_a_block_costs_memory_only_where_something_was_written() -> None:
    block = SlotBlock(2**10, slots_of(2**20))  # a GiB
    assert os.fstat(block._file.handle).st_blocks * 512 <= WATCH_BYTES


def test_a_slot_of_several_patches_takes_those_that_make_one_batch() -> None:
    def layout(
        dtype: torch.dtype = torch.int16, slope: float = 1, name: str = "t1", side: int = 4
    ) -> SlotLayout:
        return SlotLayout.of([ImagePlace(name, "scalar", (1, side, 4, 4), dtype, slope)])

    block = SlotBlock(2, layout().with_rows(3))
    assert block.placed(layout(slope=2)) == layout(slope=2).with_rows(3)
    for other in (layout(torch.uint8), layout(name="t2"), layout(side=3), SlotLayout(())):
        assert block.placed(other) is None
    single = SlotBlock(2, layout())
    assert single.placed(layout(torch.uint8)) == layout(torch.uint8)  # whatever is no larger
    assert single.placed(layout(side=5)) is None


# Leases


def test_a_slot_is_returned_with_the_last_tensor_that_refers_to_its_lease() -> None:
    place = ImagePlace("t1", "scalar", (1, 2, 2, 2), torch.float32)
    block, returned = SlotBlock(2, SlotLayout.of([place], rows=3)), ReturnedSlots()
    lease = SlotLease(1, returned)
    one, other = (block.leased_tensor(1, 3, place, lease) for _ in range(2))
    del lease
    part = one[1, 0].view(-1)[2:]
    del one
    assert list(returned.take()) == []
    del other
    assert list(returned.take()) == []
    block.tensor(1, 1, place).fill_(7)
    assert part.tolist() == [7] * 6
    del part
    assert list(returned.take()) == [1]


def test_a_lease_that_is_ended_returns_its_slot_once() -> None:
    place = ImagePlace("t1", "scalar", (1, 2, 2, 2), torch.float32)
    block, returned = SlotBlock(2, SlotLayout.of([place])), ReturnedSlots()
    lease = SlotLease(1, returned)
    tensor = block.leased_tensor(1, 1, place, lease)
    lease.end()
    assert list(returned.take()) == [1]
    del lease, tensor
    assert list(returned.take()) == []


def test_slots_are_kept_until_the_events_of_their_copies() -> None:
    class Event:
        is_done = False

        def query(self) -> bool:
            return self.is_done

    returned, events = ReturnedSlots(), [Event(), Event()]
    returned.append(5)
    pending = iter(events)
    returned.event = lambda: next(pending)
    returned.append(6)
    returned.append(7)
    assert list(returned.take()) == [5]
    events[1].is_done = True
    assert list(returned.take()) == []  # in order: copies of one stream are
    events[0].is_done = True
    assert list(returned.take()) == [6, 7]


# A shared pickle


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_shared_pickle_is_read_by_each_process_that_it_is_sent_to(start_method: str, full: bool) -> None:
    if not full and start_method != "fork":
        pytest.skip("other start methods need --full; queues start workers by them in the quick run")
    before = open_descriptors()
    shared, blocks = (
        SharedPickle(list(range(10**5))),
        [SlotBlock(1, slots_of(64)) for _ in range(2)],
    )  # more than a pipe holds
    context: Any = multiprocessing.get_context(start_method)
    processes = [context.Process(target=copy_shared_pickle, args=(shared, block)) for block in blocks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.close()
    assert [block.watched[0, :2].tolist() for block in blocks] == [[10**5, sum(range(10**5))]] * 2
    assert shared.read() == list(range(10**5))
    stop_forkserver()
    del shared, blocks
    gc.collect()
    assert open_descriptors() <= before + 1  # Python's resource tracker


def test_a_shared_pickle_is_a_copy_of_the_time_it_was_made() -> None:
    values = [1]
    shared = SharedPickle(values)
    values.append(2)
    assert shared.read() == [1]


# Too little memory


def refuse(number: int) -> Any:
    def refused(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("step", ["memfd_create", "ftruncate"])
@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "smaller max_length or patch_size"),
        (errno.ENOMEM, "smaller max_length or patch_size"),
        (errno.EMFILE, "num_workers=0 needs none"),
    ],
)
def test_too_little_memory_is_an_error_with_the_size_and_advice(
    monkeypatch: pytest.MonkeyPatch, step: str, number: int, advice: str
) -> None:
    monkeypatch.setattr(os, step, refuse(number))
    before = open_descriptors()
    with pytest.raises(QueueError, match=f"10.0 MiB of shared memory .*{os.strerror(number)}.*{advice}"):
        SlotBlock(10, slots_of(2**20))
    assert open_descriptors() == before


def test_no_room_to_map_the_block_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", refuse(errno.ENOMEM))
    before = open_descriptors()
    with pytest.raises(QueueError, match=r"shared memory cannot be allocated .*smaller max_length"):
        SlotBlock(10, slots_of(2**20))
    gc.collect()
    assert open_descriptors() == before


@pytest.mark.parametrize("count", [2**27, 10**12, 10**15])  # from what a process cannot address
def test_more_memory_than_there_can_be_is_the_same_error(count: int) -> None:
    with pytest.raises(QueueError, match=r"shared memory cannot be allocated .*smaller max_length"):
        SlotBlock(count, slots_of(2**20))


def test_where_the_system_has_no_files_in_memory_a_temporary_one_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    place = ImagePlace("t1", "scalar", (1, 4, 4, 4), torch.float32)
    block = SlotBlock(2, SlotLayout.of([place]))
    write_slots(block, block.layout, [1])
    assert torch.equal(block.tensor(1, 0, place), numbered(place, 10))
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    before = open_descriptors()
    with pytest.raises(QueueError, match=r"No space left on device.*smaller max_length"):
        SlotBlock(2, SlotLayout.of([place]))
    assert open_descriptors() == before


def test_where_space_cannot_be_set_aside_either_a_temporary_file_serves_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under macOS."""
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "posix_fallocate")
    place = ImagePlace("t1", "scalar", (1, 4, 4, 4), torch.float32)
    block = SlotBlock(2, SlotLayout.of([place]))
    write_slots(block, block.layout, [1])
    assert torch.equal(block.tensor(1, 0, place), numbered(place, 10))
    assert SharedPickle("dear worker").read() == "dear worker"
    monkeypatch.setattr(os, "ftruncate", refuse(errno.ENOSPC))
    before = open_descriptors()
    with pytest.raises(QueueError, match=r"No space left on device.*smaller max_length"):
        SlotBlock(2, SlotLayout.of([place]))
    assert open_descriptors() == before
