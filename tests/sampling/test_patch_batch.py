"""Batches: patches of one shape and type, stacked in order, each copied once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from streams import small_subjects

import zpatch as zp
from zpatch.errors import OptionError


@pytest.fixture
def patches() -> list[zp.Patch]:
    return list(zp.UniformSampler((4, 5, 6))(small_subjects(1)[0], 3, rng=0))


def test_a_batch_stacks_patches_in_their_order(patches: list[zp.Patch]) -> None:
    batch = zp.collate(patches)
    assert batch.t1.data.shape == (3, 1, 4, 5, 6)
    assert batch.batch_size == 3
    for number, patch in enumerate(patches):
        assert torch.equal(batch.t1.data[number], patch.t1.data)
        assert torch.equal(batch.seg.data[number], patch.seg.data)
        np.testing.assert_array_equal(batch.t1.affine[number], patch.t1.affine)
    assert batch.patch_location == [patch.location for patch in patches]
    assert batch.subjects == ["sub-00"] * 3
    assert batch.seg.kind == "label"


def test_a_batch_drops_gradients(patches: list[zp.Patch]) -> None:
    grown = [patch.with_data(t1=(patch.t1.data * 1.0).requires_grad_()) for patch in patches]
    batch = zp.collate(grown)
    assert not batch.t1.data.requires_grad
    assert torch.equal(batch.t1.data, zp.collate(patches).t1.data.float())


def test_the_memory_of_a_batch_is_in_the_order_of_its_axes(patches: list[zp.Patch]) -> None:
    assert all(image.data.is_contiguous() for patch in patches for image in patch.images.values())
    assert zp.collate(patches).t1.data.is_contiguous()
    turned = [patch.with_data(t1=patch.t1.data.permute(0, 3, 2, 1)) for patch in patches]
    assert zp.collate(turned).t1.data.is_contiguous()


def test_a_batch_and_a_patch_are_mappings_of_images_and_these_of_tensors(patches: list[zp.Patch]) -> None:
    for one in (patches[0], zp.collate(patches)):
        assert isinstance(one, Mapping)
        assert list(one) == list(one.keys()) == ["t1", "seg"]
        assert len(one) == 2
        assert "t1" in one
        assert "t2" not in one
        assert one.get("t2") is None
        assert dict(one.items()) == {"t1": one.t1, "seg": one.seg}
        assert list(one["t1"]) == ["data", "affine"]
        assert one["t1"]["data"] is one.t1.data
        assert torch.equal(one["t1"]["affine"], torch.from_numpy(one.t1.affine))
        with pytest.raises(KeyError):
            one["t1"]["shape"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_collates_patches_by_itself(workers: int) -> None:
    grid = zp.GridSampler(small_subjects(1)[0], 5)
    plain, named = (
        list(torch.utils.data.DataLoader(grid, 4, num_workers=workers, collate_fn=collate_fn))
        for collate_fn in (None, zp.collate)
    )
    assert [batch.patch_location for batch in plain] == [batch.patch_location for batch in named]
    assert all(torch.equal(a.t1.data, b.t1.data) for a, b in zip(plain, named, strict=True))


def test_patches_with_other_images_do_not_make_a_batch() -> None:
    [one, other] = small_subjects(2)
    bare = zp.Subject(name=other.name, t1=other.t1)
    mixed = [next(zp.UniformSampler(4)(subject, 1, rng=0)) for subject in (one, bare)]
    with pytest.raises(OptionError, match="same images in each patch: 'sub-01' has t1, 'sub-00' has t1, seg"):
        zp.collate(mixed)


def test_patches_of_other_shapes_do_not_make_a_batch() -> None:
    mixed = [next(zp.UniformSampler(size)(small_subjects(1)[0], 1, rng=0)) for size in (4, 5)]
    with pytest.raises(OptionError, match=r"one shape: 't1' has \(1, 4, 4, 4\), \(1, 5, 5, 5\)"):
        zp.collate(mixed)


def test_a_batch_moves_to_a_device(patches: list[zp.Patch]) -> None:
    batch = zp.collate(patches)
    moved = batch.to("meta")
    assert {image.data.device.type for image in moved.images.values()} == {"meta"}
    assert (moved.patch_location, moved.subjects) == (batch.patch_location, batch.subjects)
    assert torch.equal(batch.to(torch.device("cpu"), non_blocking=True).t1.data, batch.t1.data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to pin memory for")
def test_a_dataloader_pins_a_batch(patches: list[zp.Patch]) -> None:
    [batch] = torch.utils.data.DataLoader(patches, batch_size=3, collate_fn=zp.collate, pin_memory=True)
    assert batch.t1.data.is_pinned()
