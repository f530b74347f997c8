"""Deterministic transforms of TorchIO 1 on lazy images give what the library gives for volumes in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import zpatch as zp
from zpatch.compat.transforms import from_torchio
from zpatch.errors import OptionError
from zpatch.pipelines.torchio1_volumes import STEPS

SHAPE = (40, 37, 33)
AFFINE = np.array([[-1.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 2, 30], [0, 0, 0, 1]])
LANDMARKS = {"t1": np.linspace(0, 100, 13) ** 1.2}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    t1 = rng.gamma(2, 100, SHAPE).astype(np.float32)
    t1[:5] = 0
    return {"t1": t1, "seg": rng.integers(0, 4, SHAPE).astype(np.uint8)}


def ours(arrays: dict[str, Any]) -> zp.Subject:
    images = {
        "t1": zp.ScalarImage(arrays["t1"], affine=AFFINE),
        "seg": zp.LabelMap(arrays["seg"], affine=AFFINE),
    }
    return zp.Subject.of(images, name="a")


def theirs(tio: Any, arrays: dict[str, Any]) -> Any:
    return tio.Subject(
        t1=tio.ScalarImage(tensor=arrays["t1"][None], affine=AFFINE),
        seg=tio.LabelMap(tensor=arrays["seg"][None], affine=AFFINE),
    )


TRANSFORMS: dict[str, list[Callable[[Any], Any]]] = {
    "ToCanonical": [lambda tio: tio.ToCanonical()],
    "ToOrientation": [lambda tio: tio.ToOrientation("PIR"), lambda tio: tio.ToOrientation("LAS")],
    "Resample": [
        lambda tio: tio.Resample(1),
        lambda tio: tio.Resample((2, 3, 1.1)),
        lambda tio: tio.Resample(2, image_interpolation="nearest"),
        lambda tio: tio.Resample("seg"),
        lambda tio: tio.Resample(1.3, include=["t1"]),
    ],
    "CropOrPad": [
        lambda tio: tio.CropOrPad((32, 41, 33)),
        lambda tio: tio.CropOrPad((50, 51, 20), padding_mode="reflect"),
        lambda tio: tio.CropOrPad((32, 50, None), padding_mode="minimum"),
        lambda tio: tio.CropOrPad(36, only_crop=True),
        lambda tio: tio.CropOrPad(36, only_pad=True, padding_mode=7),
        lambda tio: tio.CropOrPad((30.0, 60.0, 50.0), units="mm"),
    ],
    "Crop": [lambda tio: tio.Crop((1, 2, 3)), lambda tio: tio.Crop((1, 2, 3, 4, 5, 6))],
    "Pad": [
        lambda tio: tio.Pad(4),
        lambda tio: tio.Pad((1, 2, 3), padding_mode="minimum"),
        lambda tio: tio.Pad(3, padding_mode="median", include=["t1"]),
        lambda tio: tio.Pad(3, padding_mode="maximum"),
        lambda tio: tio.Pad((0, 5, 3, 1, 2, 2), padding_mode="edge"),
    ],
    "EnsureShapeMultiple": [
        lambda tio: tio.EnsureShapeMultiple(8),
        lambda tio: tio.EnsureShapeMultiple((4, 8, 16), method="crop"),
    ],
    "CopyAffine": [lambda tio: tio.CopyAffine("seg")],
    "ZNormalization": [
        lambda tio: tio.ZNormalization(),
        lambda tio: tio.ZNormalization(masking_method=tio.ZNormalization.mean),
        lambda tio: tio.ZNormalization(masking_method="seg"),
    ],
    "RescaleIntensity": [
        lambda tio: tio.RescaleIntensity((-1, 1)),
        lambda tio: tio.RescaleIntensity((0, 1), percentiles=(0.5, 99.5)),
        lambda tio: tio.RescaleIntensity((0, 1), percentiles=(1, 99), masking_method="seg"),
        lambda tio: tio.RescaleIntensity((0, 255), in_min_max=(0, 500)),
    ],
    "HistogramStandardization": [
        lambda tio: tio.HistogramStandardization(LANDMARKS),
        lambda tio: tio.HistogramStandardization(LANDMARKS, masking_method=tio.ZNormalization.mean),
    ],
    "Clamp": [lambda tio: tio.Clamp(50, 200), lambda tio: tio.Clamp(out_max=100)],
    "Mask": [lambda tio: tio.Mask("seg"), lambda tio: tio.Mask("seg", outside_value=-5, labels=[1, 2])],
    "RemapLabels": [lambda tio: tio.RemapLabels({1: 2, 2: 1}), lambda tio: tio.RemapLabels({7: 1})],
    "RemoveLabels": [
        lambda tio: tio.RemoveLabels([3]),
        lambda tio: tio.RemoveLabels([0, 1], background_label=2),
    ],
    "SequentialLabels": [lambda tio: tio.Compose([tio.RemapLabels({1: 9}), tio.SequentialLabels()])],
    "OneHot": [lambda tio: tio.OneHot(), lambda tio: tio.OneHot(num_classes=6)],
}
CASES = [(name, number) for name, made in TRANSFORMS.items() for number in range(len(made))]


def test_each_step_is_tried() -> None:
    assert list(TRANSFORMS) == list(STEPS)


def assert_same(found: zp.Subject, wanted: Any) -> None:
    for name in ("t1", "seg"):
        image, tensor = found[name], wanted[name].data.numpy()
        assert image.shape == tensor.shape
        np.testing.assert_allclose(image.affine, wanted[name].affine, atol=1e-6)
        if name == "seg":
            np.testing.assert_array_equal(image.data, tensor)
            assert image.dtype == tensor.dtype
        else:
            np.testing.assert_allclose(image.data, tensor, rtol=1e-4, atol=1e-4 * np.abs(tensor).max())


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_transform_gives_what_torchio_gives(
    tio: Any, arrays: dict[str, Any], name: str, number: int
) -> None:
    transform = TRANSFORMS[name][number](tio)
    pipeline = from_torchio(transform)
    assert not pipeline.patches
    found, wanted = pipeline.of_subject(ours(arrays)), transform(theirs(tio, arrays))
    assert_same(found, wanted)
    if found.t1.spatial_shape == found.seg.spatial_shape:
        place = zp.PatchLocation((3, 4, 5), (9, 8, 7))
        for image in ("t1", "seg"):
            box = wanted[image].data.numpy()[(slice(None), *place.to_slices())]
            np.testing.assert_allclose(
                found[image].read(place), box, rtol=1e-4, atol=1e-4 * np.abs(box).max() + 1e-6
            )


def test_a_chain_gives_what_torchio_gives(tio: Any, arrays: dict[str, Any]) -> None:
    chain = tio.Compose(
        [
            tio.ToCanonical(),
            tio.Resample(2),
            tio.CropOrPad(24),
            tio.Clamp(10, 400),
            tio.Compose([tio.ZNormalization(masking_method=tio.ZNormalization.mean)]),
            tio.OneHot(),
        ]
    )
    assert_same(from_torchio(chain).of_subject(ours(arrays)), chain(theirs(tio, arrays)))


def test_a_stored_image_is_normalised_by_its_statistics_without_a_pass(
    tio: Any, cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a pass over the volume")

    monkeypatch.setattr("zpatch.pipelines.torchio1_volumes.moments", refused)
    subject = cohort[0]
    tensor = subject.t1.data.astype(np.float32)
    found = from_torchio(tio.ZNormalization()).of_subject(subject).t1.data
    np.testing.assert_allclose(found, (tensor - tensor.mean()) / tensor.std(ddof=1), rtol=1e-4, atol=1e-4)


def test_a_volume_is_passed_over_once(
    tio: Any, arrays: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from zpatch.pipelines import torchio1_volumes as volumes

    passes, moments = [], volumes.moments
    monkeypatch.setattr(volumes, "moments", lambda values: passes.append(values) or moments(values))
    pipeline = from_torchio(tio.ZNormalization(masking_method="seg"))
    subject = ours(arrays)
    for _ in range(3):
        pipeline.of_subject(subject)
    assert len(passes) == 1
    pipeline.of_subject(subject.with_images(t1=zp.ScalarImage(arrays["t1"] + 1, affine=AFFINE)))
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda tio: tio.Resample(1, image_interpolation="lanczos"),
            "interpolation 'lanczos' is not supported",
        ),
        (lambda tio: tio.CropOrPad(9, mask_name="seg"), "mask_name is not supported"),
        (lambda tio: tio.Crop(20), "nothing is left of"),
        (lambda tio: tio.Pad(2, padding_mode="linear_ramp"), "padding_mode 'linear_ramp' is not supported"),
        (
            lambda tio: tio.ZNormalization(masking_method=lambda x: x > 3),
            "is not supported, which needs the volume",
        ),
        (lambda tio: tio.ZNormalization(masking_method="Left"), "masking_method 'Left' is not supported"),
        (lambda tio: tio.RemapLabels({1: 2}, masking_method="seg"), "masking_method is not supported"),
    ],
)
def test_options_that_need_the_volume_are_refused_with_the_transform_and_the_subject(
    tio: Any, arrays: dict[str, Any], make: Any, words: str
) -> None:
    transform = make(tio)
    with pytest.raises(OptionError, match=f"{type(transform).__name__} of subject 'a': .*{words}"):
        from_torchio(transform).of_subject(ours(arrays))


def test_options_that_change_what_is_done_are_followed(tio: Any) -> None:
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, -1.3, 2.0, 1.0])
    t1 = rng.random((20, 16, 12), np.float32)
    seg = (t1 > 0.5).astype(np.uint8)
    subject = zp.Subject(t1=zp.ScalarImage(t1, affine=affine), seg=zp.LabelMap(seg, affine=affine))
    real = tio.Subject(
        t1=tio.ScalarImage(tensor=t1[None], affine=affine), seg=tio.LabelMap(tensor=seg[None], affine=affine)
    )
    for transform in (
        tio.ToCanonical(orientation="LPS"),
        tio.Resample(1.57, scalars_only=True),
        tio.RescaleIntensity(keep={"t1": "t1_orig"}),
        tio.ZNormalization(keep={"t1": "before"}),
    ):
        wanted = transform(real).get_images_dict(intensity_only=False)
        found = from_torchio(transform).of_subject(subject)
        assert set(found.images) == set(wanted)
        for name, image in found.images.items():
            np.testing.assert_allclose(image.affine, wanted[name].affine, atol=1e-5)
            np.testing.assert_allclose(image.data, wanted[name].numpy(), atol=1e-3)
