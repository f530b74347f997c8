"""The loader: a stream of patches cut into batches."""

from __future__ import annotations

import pytest
import torch

import zpatch as zp
from zpatch.errors import OptionError


@pytest.fixture
def patches(cohort: zp.Cohort) -> list[zp.Patch]:
    return list(zp.UniformSampler(8)(cohort[0], 7, rng=0))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_batches_are_the_stream_cut_in_order(patches: list[zp.Patch], batch_size: int) -> None:
    batches = list(zp.SubjectsLoader(patches, batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
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
    assert [len(batch) for batch in zp.SubjectsLoader(patches, 3, drop_last=True)] == [3, 3]
    assert [len(batch) for batch in zp.SubjectsLoader(patches[:6], 3, drop_last=True)] == [3, 3]


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


def test_batches_of_a_queue_lie_in_the_order_of_the_store(cohort: zp.Cohort) -> None:
    queue = zp.Queue(cohort, zp.UniformSampler((8, 9, 10)), patches_per_volume=2)
    for batch in zp.SubjectsLoader(queue, 4):
        assert batch.t1.data.permute(0, 1, 4, 3, 2).is_contiguous()


def test_batches_go_to_the_device_asked_for(patches: list[zp.Patch]) -> None:
    batch = next(iter(zp.SubjectsLoader(patches, 2, device="meta")))
    assert {image.data.device.type for image in batch.images.values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pin_memory_puts_every_image_into_page_locked_memory(patches: list[zp.Patch]) -> None:
    batch = next(iter(zp.SubjectsLoader(patches, 2, pin_memory=True)))
    assert all(image.data.is_pinned() for image in batch.images.values())


def test_a_batch_of_none_is_refused(patches: list[zp.Patch]) -> None:
    with pytest.raises(OptionError, match="batch_size must be at least 1, not 0"):
        zp.SubjectsLoader(patches, 0)
