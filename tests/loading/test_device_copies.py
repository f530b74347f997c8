"""Batches on a device: one copy from page-locked memory, whose slot is used again when the copy is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from streams import small_subjects

import zpatch as zp
from zpatch.loading import subjects_loader
from zpatch.loading.device_copies import with_values


class Work:
    """Copies that a device was given and does later, in order."""

    def __init__(self) -> None:
        self.done = 0
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run(self, upto: int) -> None:
        for target, memory in self.queued[self.done : upto]:
            target.copy_(memory)
        self.done = max(self.done, upto)


class Event:
    """Done at the third time that it is asked, unless the work is done before."""

    def __init__(self, work: Work) -> None:
        self.work, self.upto, self.asked = work, len(work.queued), 0

    def query(self) -> bool:
        self.asked += 1
        if self.asked >= 3:
            self.work.run(self.upto)
        return self.work.done >= self.upto


class SlowStreams:
    """The streams of a device in this process, which copies as late as it may."""

    error = 0
    made: list[SlowStreams]

    def __init__(self, device: torch.device | None = None) -> None:
        self.work, self.is_beside, self.locked = Work(), False, set[int]()
        self.made.append(self)

    def page_lock(self, memory: torch.Tensor) -> int:
        if not self.error:
            assert memory.data_ptr() not in self.locked
            self.locked.add(memory.data_ptr())
        return self.error

    def release(self, memory: torch.Tensor) -> None:
        self.locked.remove(memory.data_ptr())

    def event(self) -> Event:
        return Event(self.work)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.is_beside = True
        yield
        self.is_beside = False

    def copy(self, memory: torch.Tensor) -> torch.Tensor:
        assert self.is_beside
        target = torch.full_like(memory, 255)
        self.work.queued.append((target, memory))
        return target

    def join(self, moved: torch.Tensor) -> None:
        assert not self.is_beside


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[SlowStreams]:
    """The streams that loaders make."""
    monkeypatch.setattr(SlowStreams, "made", [], raising=False)
    monkeypatch.setattr(subjects_loader, "CudaStreams", SlowStreams)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return SlowStreams.made


def queue_of(**options: Any) -> zp.Queue:
    return zp.Queue(small_subjects(6), zp.UniformSampler(6), 7, 4, **options)


def stream_of(**options: Any) -> list[zp.Patch]:
    with queue_of(**options) as queue:
        return [patch for _ in range(3) for patch in queue]


@pytest.mark.parametrize("transfer", ["values", "stored"])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_is_one_copy_and_no_slot_is_written_to_before_it_is_done(
    slow: list[SlowStreams], workers: int, transfer: Any
) -> None:
    wanted = stream_of()
    with queue_of(num_workers=workers) as queue:
        loader = zp.SubjectsLoader(queue, 5, pin_memory=True, device="cpu", transfer=transfer)
        [streams] = slow
        place = 0
        for _ in range(3):
            for batch in loader:
                streams.work.run(len(streams.work.queued))  # as what uses the batch waits for the copy
                for row in range(batch.batch_size):
                    patch = wanted[place + row]
                    if transfer == "values":
                        assert torch.equal(batch.t1.data[row], patch.t1.data)
                    assert torch.equal(batch.seg.data[row], patch.seg.data)
                    assert batch.patch_location[row] == patch.location
                place += batch.batch_size
        assert place == len(wanted)
        assert len(streams.work.queued) == 3 * 5
        assert len(streams.locked) == 1


def test_a_copy_that_is_late_still_gets_its_batch(slow: list[SlowStreams]) -> None:
    """The memory is not used again before the device has done the copy, however late."""
    wanted = stream_of()
    with queue_of() as queue:
        batches = [b for _ in range(3) for b in zp.SubjectsLoader(queue, 5, pin_memory=True, device="cpu")]
    for made in slow:
        made.work.run(len(made.work.queued))
    found = torch.cat([batch.t1.data for batch in batches])
    assert torch.equal(found, torch.stack([patch.t1.data for patch in wanted]))


def test_memory_is_unlocked_with_the_queue(slow: list[SlowStreams]) -> None:
    queue = queue_of()
    loader = zp.SubjectsLoader(queue, 5, pin_memory=True)
    [streams] = slow
    batches = iter(loader)
    next(batches)
    assert len(streams.locked) == 1
    batches.close()  # type: ignore[attr-defined]
    queue.close()
    assert not streams.locked


def test_memory_that_cannot_be_locked_is_a_warning_with_what_to_look_at(
    slow: list[SlowStreams], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowStreams, "error", 2)
    with queue_of() as queue, pytest.warns(UserWarning, match=r"cannot be page-locked .*error 2.*ulimit -l"):
        next(iter(zp.SubjectsLoader(queue, 5, pin_memory=True)))


@pytest.mark.parametrize("workers", [0, 2])
def test_stored_voxels_get_their_values_where_they_arrive(workers: int) -> None:
    """In the stored type where that is smaller, and the same values but for how the device rounds."""
    voxels = np.arange(12**3, dtype=np.int16).reshape(12, 12, 12)
    subjects = [
        zp.Subject(
            name=f"{number}",
            t1=zp.ScalarImage(voxels + number).rescaled(0.5 + number, -3),
            t2=zp.ScalarImage(voxels.astype(np.float64)),
            seg=zp.LabelMap((voxels % 3).astype(np.uint16)),
        )
        for number in range(4)
    ]
    options: dict[str, Any] = {"max_length": 7, "patches_per_volume": 3}
    with zp.Queue(subjects, zp.UniformSampler(6), **options) as queue:
        wanted = [batch.map_data(torch.clone) for batch in zp.SubjectsLoader(queue, 5)]
    with zp.Queue(subjects, zp.UniformSampler(6), num_workers=workers, **options) as queue:
        plain = queue.max_memory
        loader = zp.SubjectsLoader(queue, 5, device="cpu", transfer="stored")
        for batch, values in zip(loader, wanted, strict=True):
            assert batch.t1.data.dtype == batch.t2.data.dtype == torch.float32
            torch.testing.assert_close(batch.t1.data, values.t1.data, rtol=1e-6, atol=1e-4)
            assert torch.equal(batch.t2.data, values.t2.data)
            assert torch.equal(batch.seg.data, values.seg.data)
            assert batch.seg.data.dtype == torch.int32
            assert (batch.t1.slope.tolist(), batch.t1.inter.tolist()) == ([1] * len(values.subjects),) * 1 + (
                [0] * len(values.subjects),
            )
        feed = queue._feed
        assert feed is not None
        assert [place.dtype for place in feed.block.layout.images] == [
            torch.int16,
            torch.float32,
            torch.int32,
        ]
        assert plain > 0


def test_without_a_type_stored_voxels_stay_as_they_are() -> None:
    image = zp.ScalarImage(np.arange(512, dtype=np.int16).reshape(8, 8, 8)).rescaled(2, 1)
    queue = zp.Queue([zp.Subject(t1=image)], zp.UniformSampler(4), 4, 4, dtype=None)
    [batch] = zp.SubjectsLoader(queue, 4, device="cpu", transfer="stored")
    assert batch.t1.data.dtype == torch.int16
    assert batch.t1.slope.tolist() == [2] * 4
    assert with_values(batch, None) is batch
    assert with_values(batch, torch.float64).t1.data.dtype == torch.float64
