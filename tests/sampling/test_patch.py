"""Patches: images by name, affines at the patch's corner, and types for torch."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import DTypeLike, NDArray

import zpatch as zp
from zpatch.errors import UnknownNameError
from zpatch.sampling.patch import to_tensor


@pytest.fixture
def volume(rng: np.random.Generator) -> NDArray[np.int16]:
    """(I, J, K)."""
    return rng.integers(-1000, 1000, (9, 10, 11), dtype=np.int16)


@pytest.fixture
def subject(volume: NDArray[np.int16]) -> zp.Subject:
    affine = [[0, -2, 0, 5], [1, 0, 0.5, 6], [0, 0, 3, 7], [0, 0, 0, 1]]
    seg = (volume > 0).astype(np.uint8)
    return zp.Subject(name="ann", t1=zp.ScalarImage(volume, affine=affine), seg=zp.LabelMap(seg))


@pytest.fixture
def patches(subject: zp.Subject) -> list[zp.Patch]:
    return list(zp.UniformSampler((4, 5, 6))(subject, 3, rng=0))


def test_a_patch_gives_its_images_by_attribute_and_by_item(patches: list[zp.Patch]) -> None:
    patch = patches[0]
    assert patch.t1 is patch["t1"]
    assert list(patch) == ["t1", "seg"]
    assert (patch.t1.kind, patch.seg.kind, patch.subject) == ("scalar", "label", "ann")


def test_an_unknown_image_of_a_patch_is_an_error_with_the_nearest_name(patches: list[zp.Patch]) -> None:
    with pytest.raises(UnknownNameError, match=r"no image 'sge' in the patch; did you mean 'seg'\?"):
        patches[0]["sge"]
    with pytest.raises(AttributeError, match=r"no 'sge' here .*t1, seg"):
        patches[0].sge  # noqa: B018


def test_a_patch_holds_the_voxels_of_its_location(patches: list[zp.Patch], volume: NDArray[np.int16]) -> None:
    for patch in patches:
        np.testing.assert_array_equal(patch.t1.data[0].numpy(), volume[patch.location.to_slices()])


def test_the_affine_of_a_patch_puts_its_corner_where_the_volume_puts_it(
    patches: list[zp.Patch], subject: zp.Subject
) -> None:
    for patch in patches:
        corner = subject.t1.affine @ [*patch.location.index, 1]
        np.testing.assert_allclose(patch.t1.affine @ [0, 0, 0, 1], corner)
        np.testing.assert_array_equal(patch.t1.affine[:3, :3], subject.t1.affine[:3, :3])


def test_a_patch_has_memory_of_its_own(subject: zp.Subject, volume: NDArray[np.int16]) -> None:
    before = volume.copy()
    for patch in zp.UniformSampler(4)(subject, 2, rng=0):
        patch.t1.data.zero_()
        assert patch.t1.data.untyped_storage().nbytes() < volume.nbytes
    np.testing.assert_array_equal(volume, before)


def test_with_data_changes_one_image_and_leaves_the_patch_as_it_was(patches: list[zp.Patch]) -> None:
    changed = patches[0].with_data(t1=torch.zeros(1, 4, 5, 6))
    assert changed.t1.data.sum() == 0
    assert patches[0].t1.data.any()
    assert changed.seg is patches[0].seg
    assert changed.location == patches[0].location


def test_with_data_of_an_unknown_image_is_refused(patches: list[zp.Patch]) -> None:
    with pytest.raises(UnknownNameError, match="no image 't9' in the patch"):
        patches[0].with_data(t9=torch.zeros(1))


def test_map_data_changes_every_image(patches: list[zp.Patch]) -> None:
    doubled = patches[0].map_data(lambda data: data * 2)
    for name in patches[0]:
        assert torch.equal(doubled[name].data, patches[0][name].data * 2)


def test_a_patch_and_a_batch_survive_pickling(patches: list[zp.Patch]) -> None:
    for value in (patches[0], zp.collate(patches)):
        copy = pickle.loads(pickle.dumps(value))
        assert torch.equal(copy.t1.data, value.t1.data)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (np.uint16, torch.int32),
        (np.uint32, torch.int64),
        (np.uint64, torch.int64),
        (np.uint8, torch.uint8),
        (np.int16, torch.int16),
        (np.float32, torch.float32),
        (np.float64, torch.float64),
    ],
)
def test_voxels_have_a_type_that_torch_computes_with(stored: DTypeLike, computed: torch.dtype) -> None:
    limits: Any = np.iinfo if np.issubdtype(stored, np.integer) else np.finfo
    top = min(int(limits(stored).max), 2**62)
    tensor = to_tensor(np.array([0, top], dtype=stored))
    assert tensor.dtype == computed
    assert (tensor + tensor.new_zeros(())).tolist() == [0, top]
