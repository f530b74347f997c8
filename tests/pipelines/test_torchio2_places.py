"""Transforms of TorchIO 2 give its grids and voxels, lazily; random ones act on patches with a margin."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributions import assert_distributed_alike, random_crop

import zpatch as zp
from zpatch.compat.transforms import from_torchio, is_torchio_2
from zpatch.errors import OptionError
from zpatch.pipelines.torchio2_places import MARGINS, ON_PATCHES, REFUSED, STEPS

PATCH = 16


@pytest.fixture(scope="module")
def tio2() -> Any:
    """TorchIO 2."""
    torchio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    if not is_torchio_2(torchio):
        pytest.skip("the TorchIO that is installed is not TorchIO 2")
    return torchio


def in_memory(tio2: Any, subject: zp.Subject) -> Any:
    classes = {"scalar": tio2.ScalarImage, "label": tio2.LabelMap}
    return tio2.Subject(
        **{
            name: classes[image.kind](
                torch.from_numpy(image.data.astype(np.float32)), affine=image.affine
            )
            for name, image in subject.images.items()
        }
    )  # fmt: skip


def transforms_of(tio2: Any) -> dict[str, Any]:
    return {
        "Reorient": tio2.Reorient("LPI"),
        "Resample": tio2.Resample((1.47, 1.53, 2.51)),
        "Resample, of one number": tio2.Resample(1.71),
        "Resample, to an image": tio2.Resample("t1"),
        "CropOrPad": tio2.CropOrPad((20, 30, 11)),
        "CropOrPad, in mm": tio2.CropOrPad((20.0, None, 30.0), units="mm", padding_mode="replicate"),
        "Crop": tio2.Crop(cropping=(1, 2, 3)),
        "Pad": tio2.Pad(padding=(1, 2, 3, 4, 5, 6), fill=7),
        "Pad, reflected": tio2.Pad(padding=3, padding_mode="reflect"),
        "Pad, with the mean": tio2.Pad(padding=2, padding_mode="mean", include=["two"]),
        "EnsureShapeMultiple": tio2.EnsureShapeMultiple(8),
        "EnsureShapeMultiple, cropped": tio2.EnsureShapeMultiple((8, 4, 16), method="crop"),
        "CopyAffine": tio2.CopyAffine("t1"),
        "Standardize": tio2.Standardize(),
        "Standardize, masked": tio2.Standardize(masking_method="seg", include=["t1"]),
        "Normalize": tio2.Normalize(),
        "Normalize, by percentiles": tio2.Normalize(out_min=0, percentile_low=2, percentile_high=95.0),
        "Normalize, from a range": tio2.Normalize(in_min=10, in_max=500.0, masking_method="seg"),
        "HistogramStandardization": tio2.HistogramStandardization(torch.linspace(0, 100, 13)),
        "Clamp": tio2.Clamp(out_min=20, out_max=300),
        "Mask": tio2.Mask(masking_method="seg", labels=[1, 3], outside_value=-5.0, include=["t1"]),
        "RemapLabels": tio2.RemapLabels({1: 2, 2: 1}),
        "RemoveLabels": tio2.RemoveLabels([2], background_label=1),
        "SequentialLabels": tio2.SequentialLabels(),
        "OneHot": tio2.OneHot(num_classes=4),
    }


NAMES = (
    "Reorient",
    "Resample",
    "Resample, of one number",
    "Resample, to an image",
    "CropOrPad",
    "CropOrPad, in mm",
    "Crop",
    "Pad",
    "Pad, reflected",
    "Pad, with the mean",
    "EnsureShapeMultiple",
    "EnsureShapeMultiple, cropped",
    "CopyAffine",
    "Standardize",
    "Standardize, masked",
    "Normalize",
    "Normalize, by percentiles",
    "Normalize, from a range",
    "HistogramStandardization",
    "Clamp",
    "Mask",
    "RemapLabels",
    "RemoveLabels",
    "SequentialLabels",
    "OneHot",
)
INNER = {"Resample"}  # at the border it mixes zeros into values


@pytest.mark.parametrize("name", NAMES)
def test_each_image_is_what_torchio_makes_of_the_volume(tio2: Any, oblique: zp.Subject, name: str) -> None:
    transforms = transforms_of(tio2)
    assert {each.partition(",")[0] for each in transforms} == {*STEPS}
    assert tuple(transforms) == NAMES
    wanted = transforms[name](in_memory(tio2, oblique)).images
    found = from_torchio(transforms[name]).of_subject(oblique)
    for key, image in found.images.items():
        voxels = wanted[key].data.numpy()
        assert image.shape == voxels.shape
        np.testing.assert_allclose(image.affine, np.asarray(wanted[key].affine.data), atol=1e-5)
        cut = (slice(None), *[slice(2, -2)] * 3) if name.partition(",")[0] in INNER else ()
        if image.kind == "label":  # where two voxels are about equally near, it may get the other one
            assert np.mean(image.data != voxels) <= (0.02 if cut else 0)
            continue
        atol = 1e-5 * max(1.0, float(np.abs(voxels).max()))
        np.testing.assert_allclose(image.data.astype(float)[cut], voxels[cut], rtol=1e-4, atol=atol)


RANDOM = {
    "Affine": lambda t: t.Affine(scales=(0.9, 1.1), degrees=(-10, 10), translation=(-3, 3)),
    "Spatial": lambda t: t.Spatial(degrees=(-10, 10)),
    "Anisotropy": lambda t: t.Anisotropy(downsampling=(1.5, 4)),
    "Blur": lambda t: t.Blur(std=(0, 2)),
    "Flip": lambda t: t.Flip(axes=(0, 1, 2)),
    "Noise": lambda t: t.Noise(std=(0, 30)),
    "Gamma": lambda t: t.Gamma(log_gamma=(-0.1, 0.1)),
    "LabelsToImage": lambda t: t.LabelsToImage(label_key="seg", image_key="t1"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_patches_have_the_distribution_of_those_of_the_transformed_volume(tio2: Any, name: str) -> None:
    waves = np.add.outer(
        np.add.outer(np.sin(np.arange(48) / 5), np.cos(np.arange(44) / 7)), np.arange(40) / 20
    )
    rng = np.random.default_rng(3)
    t1 = (waves * 100 + rng.normal(0, 5, waves.shape) + 300).astype(np.float32)
    seg = zp.LabelMap((t1 > 300).astype(np.uint8))
    subject = zp.Subject(t1=zp.ScalarImage(t1), seg=seg, name="a")
    transform = RANDOM[name](tio2)
    torch.manual_seed(4)
    wanted, volume = [], in_memory(tio2, subject)
    for _ in range(60):
        whole = transform(volume).t1.data
        wanted.append(random_crop(whole, PATCH, rng))
    options = {"patches_per_volume": 120, "transform": from_torchio(transform)}
    with zp.Queue([subject], zp.UniformSampler(PATCH), **options) as queue:
        found = [patch.t1.data for patch in queue]
    assert_distributed_alike(found, wanted)


def test_each_transform_of_torchio_has_its_place(tio2: Any) -> None:
    known = {*STEPS, *ON_PATCHES, *MARGINS, *REFUSED, "To", "Compose", "OneOf", "SomeOf"}
    abstract = {"Transform", "IntensityTransform", "SpatialTransform"}
    found = {
        made.__name__
        for made in vars(tio2.transforms).values()
        if isinstance(made, type) and issubclass(made, tio2.Transform)
    }
    assert found - abstract == known


def test_the_table_in_the_documentation_says_the_same() -> None:
    text = (Path(zp.__file__).parent.parent / "docs" / "how-to" / "from-torchio.md").read_text()
    table = text.partition("### TorchIO 2\n")[2].partition("\n### ")[0]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", table, re.MULTILINE))
    del rows["transform"]
    expected = dict.fromkeys(STEPS, "volume") | dict.fromkeys(MARGINS, "margin")
    expected |= dict.fromkeys((*ON_PATCHES, "To"), "patch")
    assert rows == expected | {name: f"refused: {why}" for name, why in REFUSED.items()}


def test_what_is_drawn_at_random_for_volumes_or_cannot_be_had_is_said(tio2: Any, oblique: zp.Subject) -> None:
    for transform, says in (
        (tio2.Normalize(out_max=(0.5, 1.0)), "out_max is drawn at random for each volume"),
        (tio2.Resample((1.0, 2.0)), "its spacing is drawn at random"),
        (tio2.CropOrPad(9, location="random"), "leave it to the sampler"),
        (tio2.HistogramStandardization(torch.linspace(0, 1, 5)), "5 landmarks for 13 quantiles"),
        (tio2.Standardize(masking_method=lambda x: x > 0), "masking_method .* is not supported"),
    ):
        with pytest.raises(OptionError, match=says):
            from_torchio(transform).of_subject(oblique)
    for transform, says in (
        (tio2.Standardize(p=0.5), "applied to some volumes only"),
        (tio2.ElasticDeformation(max_displacement=3.0), "ElasticDeformation has control points that span"),
        (tio2.Spatial(max_displacement=3.0), "Spatial on patches may turn, scale and move"),
        (tio2.Affine(degrees=torch.distributions.Normal(0, 1)), "which has no largest value"),
        (tio2.Compose([tio2.Noise(std=1), tio2.Standardize()]), "needs the whole volume, as Noise leaves it"),
    ):
        with pytest.raises(OptionError, match=says):
            from_torchio(transform)
    both = tio2.SomeOf([tio2.Blur(std=(0, 2)), tio2.Affine(degrees=tio2.Choice([5, 10]))], num_transforms=2)
    alone = [from_torchio(part).margin(oblique, (8, 8, 8)) for part in both.transforms]
    assert from_torchio(both).margin(oblique, (8, 8, 8)) == tuple(np.sum(alone, axis=0).tolist())


def test_a_pipeline_can_be_sent_to_a_process(tio2: Any, oblique: zp.Subject) -> None:
    steps = [tio2.Resample(2), tio2.Mask(masking_method="seg"), tio2.Standardize(), tio2.Flip()]
    sent = pickle.loads(pickle.dumps(from_torchio(tio2.Compose(steps))))
    np.testing.assert_array_equal(
        sent.of_subject(oblique).t1.data, from_torchio(tio2.Compose(steps)).of_subject(oblique).t1.data
    )
