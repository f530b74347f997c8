"""Transforms of TorchIO and MONAI on patches: what the library makes of voxels and affine, and nothing lost.

The tests of TorchIO run with the generation that is installed; ``test_compat_torchio2`` runs them once more,
with TorchIO 2, if that is installed in a separate folder.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import small_subjects, stream

import zpatch as zp
from zpatch.compat.transforms import from_monai, from_torchio, is_torchio_2, on_tensors
from zpatch.errors import OptionError
from zpatch.geometry.affines import crop_affine
from zpatch.sampling.patch import PatchImage

SHAPE = (1, 12, 10, 8)
AFFINE = np.array([[-1.5, 0.1, 0, 3], [0, 2, 0, 4.123456789012345], [0.2, 0, 1.25, 5], [0, 0, 0, 1]])
LABEL_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.fixture
def torchio() -> Any:
    return pytest.importorskip("torchio", reason="TorchIO is not installed")


@pytest.fixture
def monai() -> Any:
    pytest.importorskip("monai.data", reason="MONAI is not installed")
    return pytest.importorskip("monai.transforms")


@pytest.fixture
def patch() -> zp.Patch:
    return patch_of(torch.uint8)


def patch_of(label_dtype: torch.dtype) -> zp.Patch:
    generator = torch.Generator().manual_seed(1)
    images = {
        "t1": PatchImage(torch.rand(SHAPE, generator=generator), AFFINE),
        "seg": PatchImage(torch.randint(0, 2, SHAPE, generator=generator).to(label_dtype), AFFINE, "label"),
        "weights": PatchImage(torch.rand(SHAPE, generator=generator), AFFINE, "sampling"),
    }
    return zp.Patch(images, zp.PatchLocation((3, 4, 5), SHAPE[1:]), "sub-01")


def assert_equal(found: zp.Patch, expected: zp.Patch) -> None:
    """The same patch, in every bit."""
    assert (found.location, found.subject) == (expected.location, expected.subject)
    assert list(found.images) == list(expected.images)
    for name, image in found.images.items():
        wanted = expected[name]
        assert image.kind == wanted.kind
        assert type(image.data) is torch.Tensor
        assert image.data.dtype == wanted.data.dtype
        assert torch.equal(image.data, wanted.data)
        assert image.affine.dtype == np.float64
        np.testing.assert_array_equal(image.affine, wanted.affine)


def unchanged(anything: Any) -> Any:
    return anything


# TorchIO


def flip(torchio: Any) -> Any:
    if is_torchio_2(torchio):
        return torchio.Flip(axes=(0,))
    return torchio.RandomFlip(axes=0, flip_probability=1)


def rotation(torchio: Any) -> Any:
    """A random one."""
    if is_torchio_2(torchio):
        return torchio.Affine(degrees=(-20, 20))
    return torchio.RandomAffine(degrees=20)


def noise(torchio: Any) -> Any:
    return torchio.Noise() if is_torchio_2(torchio) else torchio.RandomNoise()


def torchio_subject(torchio: Any, patch: zp.Patch) -> Any:
    """What a user of TorchIO would have instead of the patch."""
    images = {}
    for name, image in patch.images.items():
        make = torchio.LabelMap if image.kind == "label" else torchio.ScalarImage
        if is_torchio_2(torchio):
            images[name] = make(image.data, affine=image.affine)
        else:
            images[name] = make(tensor=image.data, affine=image.affine)
    return torchio.Subject(**images)


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_torchio_gets_and_gives_back_a_patch_without_loss(torchio: Any, dtype: torch.dtype) -> None:
    assert_equal(from_torchio(unchanged, on="patch")(patch_of(dtype)), patch_of(dtype))


@pytest.mark.parametrize("transform", [flip, rotation, noise])
def test_torchio_transforms_a_patch_as_it_transforms_a_subject(
    torchio: Any, patch: zp.Patch, transform: Any
) -> None:
    patch = zp.Patch({name: patch[name] for name in ("t1", "seg")}, patch.location, patch.subject)
    torch.manual_seed(7)
    expected = transform(torchio)(torchio_subject(torchio, patch))
    torch.manual_seed(7)
    found = from_torchio(transform(torchio), on="patch")(patch)
    for name in patch:
        assert torch.equal(found[name].data, expected[name].data.to(patch[name].data.dtype))
        np.testing.assert_array_equal(found[name].affine, np.array(expected[name].affine))
    assert not torch.equal(found.t1.data, patch.t1.data)


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_a_label_map_keeps_its_type_through_torchio(torchio: Any, dtype: torch.dtype) -> None:
    patch = patch_of(dtype)
    rotated = from_torchio(rotation(torchio), on="patch")(patch)
    assert rotated.seg.data.dtype == dtype
    assert rotated.seg.kind == "label"
    assert set(rotated.seg.data.unique().tolist()) <= set(patch.seg.data.unique().tolist())


def test_a_transform_of_torchio_that_changes_shapes_moves_the_affine(torchio: Any, patch: zp.Patch) -> None:
    cropped = from_torchio(torchio.CropOrPad((6, 10, 8)), on="patch")(patch)
    for name, image in cropped.images.items():
        assert torch.equal(image.data, patch[name].data[:, 3:9])
        np.testing.assert_allclose(image.affine, crop_affine(AFFINE, (3, 0, 0)), rtol=1e-12)
    assert cropped.location == patch.location


def test_intensities_alone_get_noise_from_torchio(torchio: Any, patch: zp.Patch) -> None:
    noisy = from_torchio(noise(torchio), on="patch")(patch)
    assert not torch.equal(noisy.t1.data, patch.t1.data)
    for name in ("seg", "weights"):
        assert torch.equal(noisy[name].data, patch[name].data)
    assert [image.kind for image in noisy.images.values()] == ["scalar", "label", "sampling"]


def test_images_that_a_transform_of_torchio_adds_or_removes_are_added_or_removed(
    torchio: Any, patch: zp.Patch
) -> None:
    def one_for_another(subject: Any) -> Any:
        return torchio.Subject(mask=subject["seg"], t1=subject["t1"])

    found = from_torchio(one_for_another, on="patch")(patch)
    assert list(found) == ["mask", "t1"]
    assert found.mask.kind == "label"
    assert torch.equal(found.mask.data, patch.seg.data)


def test_a_transform_that_gives_no_subject_is_an_error(torchio: Any, patch: zp.Patch) -> None:
    with pytest.raises(TypeError, match="a TorchIO transform gives a Subject, not NoneType"):
        from_torchio(lambda subject: None, on="patch")(patch)


def test_a_queue_with_random_torchio_transforms_is_the_same_for_any_number_of_workers(torchio: Any) -> None:
    transform = from_torchio(torchio.Compose([rotation(torchio), noise(torchio)]), on="patch")
    assert_same_stream_for_any_workers(transform)


# MONAI


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_monai_gets_and_gives_back_a_patch_without_loss(monai: Any, dtype: torch.dtype) -> None:
    assert_equal(from_monai(monai.Identityd(["t1", "seg"]), on="patch")(patch_of(dtype)), patch_of(dtype))


def test_monai_transforms_a_patch_as_it_transforms_metatensors(monai: Any, patch: zp.Patch) -> None:
    from monai.data import MetaTensor

    transform = monai.Flipd(["t1", "seg"], spatial_axis=0)
    affine = torch.from_numpy(AFFINE)
    expected = transform({name: MetaTensor(patch[name].data, affine=affine) for name in ("t1", "seg")})
    found = from_monai(transform, on="patch")(patch)
    for name in ("t1", "seg"):
        assert torch.equal(found[name].data, expected[name].as_tensor())
        np.testing.assert_array_equal(found[name].affine, expected[name].affine.numpy())
        assert torch.equal(found[name].data, patch[name].data.flip(1))
    assert_equal(zp.Patch({"weights": found.weights}, patch.location, "sub-01"),
                 zp.Patch({"weights": patch.weights}, patch.location, "sub-01"))  # fmt: skip


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_a_label_map_keeps_its_type_through_monai(monai: Any, dtype: torch.dtype) -> None:
    patch = patch_of(dtype)
    affine = monai.RandAffined(["t1", "seg"], prob=1, rotate_range=0.5, mode=["bilinear", "nearest"])
    found = from_monai(affine)(patch)
    assert found.seg.data.dtype == dtype
    assert set(found.seg.data.unique().tolist()) <= set(patch.seg.data.unique().tolist())
    assert not torch.equal(found.t1.data, patch.t1.data)


def test_a_transform_of_monai_that_changes_shapes_moves_the_affine(monai: Any, patch: zp.Patch) -> None:
    cropped = from_monai(monai.CenterSpatialCropd(["t1", "seg"], (6, 10, 8)), on="patch")(patch)
    for name in ("t1", "seg"):
        assert torch.equal(cropped[name].data, patch[name].data[:, 3:9])
        np.testing.assert_allclose(cropped[name].affine, crop_affine(AFFINE, (3, 0, 0)), rtol=1e-12)
    assert cropped.weights.data.shape == SHAPE


def test_lazy_transforms_of_monai_are_carried_out(monai: Any, patch: zp.Patch) -> None:
    lazy = monai.Flipd(["t1"], spatial_axis=1, lazy=True)
    assert torch.equal(from_monai(lazy, on="patch")(patch).t1.data, patch.t1.data.flip(2))


def test_images_that_a_transform_of_monai_adds_or_removes_are_added_or_removed(
    monai: Any, patch: zp.Patch
) -> None:
    steps = [monai.ConcatItemsd(["t1", "weights"], name="both"), monai.DeleteItemsd(["t1", "weights"])]
    found = from_monai(monai.Compose(steps), on="patch")(patch)
    assert list(found) == ["seg", "both"]
    assert found.both.kind == "scalar"
    assert torch.equal(found.both.data, torch.cat([patch.t1.data, patch.weights.data]))
    np.testing.assert_array_equal(found.both.affine, AFFINE)


def test_what_monai_gives_beside_images_is_left_behind(monai: Any, patch: zp.Patch) -> None:
    crop = monai.CropForegroundd(["t1", "seg"], source_key="seg", allow_smaller=True)
    assert list(from_monai(crop, on="patch")(patch)) == ["t1", "seg", "weights"]


def test_a_transform_of_monai_acts_on_subjects_or_on_patches(monai: Any) -> None:
    chain = monai.Compose([monai.NormalizeIntensityd(["t1"]), monai.RandFlipd(["t1"], 0.5)])
    assert [step.name for step in from_monai(chain).steps] == ["NormalizeIntensityd"]
    assert not hasattr(from_monai(chain, on="patch"), "steps")
    with pytest.raises(OptionError, match="on must be 'subject' or 'patch', not 'volume'"):
        from_monai(chain, on="volume")


def test_a_crop_of_monai_gives_one_patch_or_an_error(monai: Any, patch: zp.Patch) -> None:
    one = monai.RandSpatialCropSamplesd(["t1", "seg"], (6, 6, 6), num_samples=1, random_size=False)
    assert from_monai(one, on="patch")(patch).t1.data.shape == (1, 6, 6, 6)
    two = monai.RandSpatialCropSamplesd(["t1", "seg"], (6, 6, 6), num_samples=2, random_size=False)
    with pytest.raises(TypeError, match="gives one dictionary, not 2 patches; say num_samples=1 there"):
        from_monai(two, on="patch")(patch)


def test_a_queue_with_random_monai_transforms_is_the_same_for_any_number_of_workers(monai: Any) -> None:
    steps = [
        monai.RandFlipd(["t1", "seg"], prob=0.5),
        monai.OneOf(
            [monai.RandGaussianNoised(["t1"], prob=1), monai.RandScaleIntensityd(["t1"], 0.5, prob=1)]
        ),
        monai.RandRotate90d(["t1", "seg"], prob=0.5),
    ]
    assert_same_stream_for_any_workers(from_monai(monai.Compose(steps)))


def test_a_random_transform_of_monai_is_seeded_anywhere_in_a_pipeline(torchio: Any, monai: Any) -> None:
    class Wrapped:
        """As TorchIO 2's MonaiAdapter in one of its pipelines."""

        def __init__(self) -> None:
            self.steps = {"noise": [monai.RandGaussianNoise(prob=1)]}

        def __call__(self, subject: Any) -> Any:
            [noise] = self.steps["noise"]
            data = noise(subject["t1"].data).as_tensor()
            subject["t1"].set_data(data)
            return subject

    assert_same_stream_for_any_workers(from_torchio(Wrapped(), on="patch"))


# Functions of tensors


def test_a_function_of_tensors_is_applied_to_all_but_label_maps(patch: zp.Patch) -> None:
    found = on_tensors(torch.neg)(patch)
    for name in ("t1", "weights"):
        assert torch.equal(found[name].data, -patch[name].data)
    assert torch.equal(found.seg.data, patch.seg.data)


def test_a_function_of_tensors_is_applied_to_the_images_that_are_named(patch: zp.Patch) -> None:
    found = on_tensors(lambda data: 1 - data, images=["seg"])(patch)
    assert torch.equal(found.seg.data, 1 - patch.seg.data)
    assert torch.equal(found.t1.data, patch.t1.data)
    with pytest.raises(KeyError, match="no image 't2' in the patch"):
        on_tensors(torch.neg, images=["t2"])(patch)


def test_a_function_of_tensors_may_give_an_array(patch: zp.Patch) -> None:
    found = on_tensors(lambda data: np.square(data.numpy()), images=["t1"])(patch)
    assert torch.equal(found.t1.data, patch.t1.data**2)


def test_a_random_array_transform_of_monai_is_a_function_of_tensors(monai: Any) -> None:
    assert_same_stream_for_any_workers(on_tensors(monai.RandGaussianNoise(prob=1), images=["t1"]))


# All of them


def assert_same_stream_for_any_workers(transform: Any) -> None:
    options: dict[str, Any] = {"max_length": 5, "patches_per_volume": 4, "transform": transform}
    serial = stream(small_subjects(3), zp.UniformSampler(6), [0, 1], **options)
    assert stream(small_subjects(3), zp.UniformSampler(6), [0, 1], num_workers=2, **options) == serial
    options["transform"] = None
    assert stream(small_subjects(3), zp.UniformSampler(6), [0, 1], **options) != serial
    ones = np.ones((6, 6, 6))
    same = zp.Subject(t1=zp.ScalarImage(ones), seg=zp.LabelMap(ones.astype(np.uint8)))
    options |= {"transform": transform, "patches_per_volume": 8}
    voxels = {images[0][-1] for _, _, images in stream([same], zp.UniformSampler(6), **options)}
    assert len(voxels) == 8  # no two calls draw the same numbers


def adapters() -> list[Any]:
    found = [on_tensors(torch.neg)]
    for make in (from_torchio, from_monai):
        try:
            found.append(make(unchanged))
        except OptionError:
            continue
    return found


@pytest.mark.parametrize("transform", adapters())
def test_adapters_get_values_where_voxels_are_stored_with_a_slope(transform: Any) -> None:
    stored = PatchImage(torch.arange(8, dtype=torch.int16).reshape(1, 2, 2, 2), AFFINE, "scalar", 0.5, -1.0)
    found = transform(zp.Patch({"t1": stored}, zp.PatchLocation((0, 0, 0), (2, 2, 2)), "sub-01")).t1
    assert (found.slope, found.inter) == (1, 0)
    assert found.data.dtype == torch.float32
    assert found.data.abs().flatten().tolist() == [abs(n / 2 - 1) for n in range(8)]


@pytest.mark.parametrize("transform", adapters())
def test_adapters_travel_to_worker_processes(transform: Any, patch: zp.Patch) -> None:
    assert_equal(pickle.loads(pickle.dumps(transform))(patch), transform(patch))


def test_generators_of_monai_are_seeded_in_worker_processes_too(monai: Any, patch: zp.Patch) -> None:
    transform = from_monai(monai.Compose([monai.RandGaussianNoised(["t1"], prob=1)]))
    drawn = []
    for adapter in (transform, pickle.loads(pickle.dumps(transform))):
        np.random.seed(5)  # noqa: NPY002
        drawn.append([adapter(patch).t1.data for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1])


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8),
    st.sampled_from(LABEL_DTYPES),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64]),
)
def test_labels_are_returned_exactly_or_refused(
    values: list[int], dtype: torch.dtype, between: torch.dtype
) -> None:
    labels = torch.tensor(values, dtype=torch.int64).to(dtype).reshape(-1, 1, 1, 1)
    patch = zp.Patch({"seg": PatchImage(labels, AFFINE, "label")}, zp.PatchLocation((0, 0, 0), (1, 1, 1)), "")
    try:
        found = on_tensors(lambda data: data.to(between), images=["seg"])(patch)
    except OptionError:
        assert max(map(abs, labels.flatten().tolist())) > 2 / torch.finfo(between).eps
    else:
        assert found.seg.data.dtype == dtype
        assert torch.equal(found.seg.data, labels)


def test_fractions_in_a_label_map_are_an_error(patch: zp.Patch) -> None:
    with pytest.raises(
        OptionError, match=r"gives the label map 'seg' values that torch.uint8 cannot represent"
    ):
        on_tensors(lambda data: data / 2, images=["seg"])(patch)


def test_labels_that_floats_cannot_represent_are_an_error() -> None:
    labels = torch.full((1, 2, 2, 2), 2**24 + 1, dtype=torch.int32)
    patch = zp.Patch({"seg": PatchImage(labels, AFFINE, "label")}, zp.PatchLocation((0, 0, 0), (2, 2, 2)), "")
    with pytest.raises(OptionError, match="cannot represent all labels above 16777216; renumber them"):
        on_tensors(torch.Tensor.float, images=["seg"])(patch)


@pytest.mark.parametrize(("library", "adapter"), [("torchio", from_torchio), ("monai", from_monai)])
def test_a_missing_library_is_a_clear_error(
    library: str, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OptionError, match=f"install it with 'pip install {library}'"):
        adapter(unchanged)
