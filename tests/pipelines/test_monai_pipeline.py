"""A pipeline of MONAI is taken apart: volumes, margins, patches, or refused by name."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_monai import in_memory
from distributions import assert_distributed_alike, random_crop

import zpatch as zp
from zpatch.compat.transforms import from_monai
from zpatch.errors import OptionError
from zpatch.pipelines.monai_grids import GRID_STEPS
from zpatch.pipelines.monai_linear import BY_STATISTICS
from zpatch.pipelines.monai_pipeline import MARGINS, ON_PATCHES, REFUSED, SAMPLERS
from zpatch.pipelines.monai_volumes import POINTWISE
from zpatch.sampling.patch import PatchImage

SHAPE, PATCH = (48, 44, 40), 16
MODES = ["bilinear", "nearest"]
# Of points, batches, files and predictions: they are not given images of subjects.
NOT_OF_SUBJECTS = {
    "MapTransform",
    "ApplyTransformToPointsd",
    "CenterScaleCrop",
    "ComputeHoVerMapsd",
    "ConvertBoxToPointsd",
    "CutMixd",
    "CutOutd",
    "ConvertPointsToBoxesd",
    "Decollated",
    "Ensembled",
    "FlattenSequenced",
    "FlattenSubKeysd",
    "GenerateHeatmapd",
    "Invertd",
    "MeanEnsembled",
    "MixUpd",
    "ProbNMSd",
    "SaveClassificationd",
    "SaveImaged",
    "ToCupyd",
    "ToPILd",
    "VoteEnsembled",
    "WriteFileMappingd",
    "TransformPointsImageToWorldd",
    "TransformPointsWorldToImaged",
}


@pytest.fixture(scope="module")
def subject() -> zp.Subject:
    rng = np.random.default_rng(1)
    waves = [np.sin(np.arange(48) / 5), np.cos(np.arange(44) / 7), np.arange(40) / 20]
    smooth = np.add.outer(np.add.outer(waves[0], waves[1]), waves[2])
    t1 = (smooth * 100 + rng.normal(0, 5, SHAPE) + 300).astype(np.float32)
    return zp.Subject(t1=zp.ScalarImage(t1), seg=zp.LabelMap((t1 > 300).astype(np.uint8)), name="a")


def patches(subject: zp.Subject, transform: Any, count: int = 40, **options: Any) -> list[zp.Patch]:
    sampler = zp.UniformSampler(PATCH)
    with zp.Queue([subject], sampler, patches_per_volume=count, transform=transform, **options) as queue:
        return list(queue)


def test_each_dictionary_transform_of_monai_has_its_place(monai: Any) -> None:
    known = {*GRID_STEPS, *BY_STATISTICS, *POINTWISE, *MARGINS, *ON_PATCHES, *REFUSED, *SAMPLERS}
    found = {
        made.__name__
        for made in vars(monai).values()
        if isinstance(made, type) and issubclass(made, monai.MapTransform)
    }
    assert found - known - NOT_OF_SUBJECTS == set()
    assert known - found == set()


def test_the_table_in_the_documentation_says_the_same() -> None:
    text = (Path(zp.__file__).parent.parent / "docs" / "how-to" / "from-monai.md").read_text()
    table = text.partition("## Transforms")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", table, re.MULTILINE))
    del rows["transform"]
    expected = dict.fromkeys((*GRID_STEPS, *BY_STATISTICS, *POINTWISE), "volume")
    expected |= dict.fromkeys(MARGINS, "margin") | dict.fromkeys(ON_PATCHES, "patch")
    expected |= {name: f"refused: a sampler does it, {sampler}" for name, sampler in SAMPLERS.items()}
    assert rows == expected | {name: f"refused: {why}" for name, why in REFUSED.items()}


EXACT = {
    "RandGaussianSmoothd": lambda m: m.RandGaussianSmoothd("t1", *[(1.5, 1.5)] * 3, prob=1),
    "GaussianSmoothd": lambda m: m.GaussianSmoothd("t1", (0.5, 1.0, 2.0)),
    "RandGaussianSharpend": lambda m: m.RandGaussianSharpend(
        "t1", *[(1.0, 1.0)] * 3, *[(0.5, 0.5)] * 3, (3.0, 3.0), prob=1
    ),
    "GaussianSharpend": lambda m: m.GaussianSharpend("t1", 2.0, 1.0, alpha=2.0),
    "MedianSmoothd": lambda m: m.MedianSmoothd("t1", (2, 1, 0)),
    "SavitzkyGolaySmoothd": lambda m: m.SavitzkyGolaySmoothd("t1", 5, 2, axis=2),
    "SobelGradientsd": lambda m: m.SobelGradientsd("t1", 3, spatial_axes=0),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_filtered_patch_with_its_margin_is_that_of_the_volume(
    monai: Any, subject: zp.Subject, name: str
) -> None:
    transform = EXACT[name](monai)
    whole = transform(in_memory(subject))["t1"].as_tensor()
    for patch in patches(subject, from_monai(transform), 12):
        box = (slice(None), *patch.location.to_slices())
        torch.testing.assert_close(patch.t1.data, whole[box], rtol=1e-4, atol=2e-2)
        assert patch.location.size == (PATCH,) * 3


RANDOM = {
    "RandFlipd": lambda m: m.RandFlipd("t1", 0.5, 0),
    "RandAxisFlipd": lambda m: m.RandAxisFlipd("t1", 0.5),
    "RandRotate90d": lambda m: m.RandRotate90d("t1", 0.5, spatial_axes=(1, 2)),
    "RandGaussianNoised": lambda m: m.RandGaussianNoised("t1", 1, 0, 30),
    "RandRicianNoised": lambda m: m.RandRicianNoised("t1", 1, 0, 30),
    "RandScaleIntensityd": lambda m: m.RandScaleIntensityd("t1", 0.3, 1),
    "RandShiftIntensityd": lambda m: m.RandShiftIntensityd("t1", 30, prob=1),
    "RandAffined": lambda m: m.RandAffined(
        "t1", prob=1, rotate_range=(0.2, 0.1, 0.3), scale_range=0.1, shear_range=0.1, translate_range=3
    ),
    "Rand3DElasticd": lambda m: m.Rand3DElasticd("t1", (2, 3), (5, 20), prob=1, rotate_range=0.1),
    "RandRotated": lambda m: m.RandRotated("t1", 0.2, 0.1, 0.3, prob=1),
    "RandZoomd": lambda m: m.RandZoomd("t1", 1, 0.8, 1.2, mode="trilinear"),
    "RandSimulateLowResolutiond": lambda m: m.RandSimulateLowResolutiond("t1", 1),
    "RandGaussianSmoothd": lambda m: m.RandGaussianSmoothd("t1", prob=1),
    "RandGaussianSharpend": lambda m: m.RandGaussianSharpend("t1", prob=1),
    "OneOf": lambda m: m.OneOf([m.RandGaussianSmoothd("t1", prob=1), m.RandZoomd("t1", 1, mode="trilinear")]),
}


@pytest.mark.parametrize("name", RANDOM)
def test_patches_have_the_distribution_of_those_of_the_transformed_volume(
    monai: Any, subject: zp.Subject, name: str
) -> None:
    transform = RANDOM[name](monai)
    transform.set_random_state(seed=4)
    rng = np.random.default_rng(3)
    wanted, volume = [], in_memory(subject)
    for _ in range(60):
        whole = transform(dict(volume))["t1"].as_tensor()
        wanted.append(random_crop(whole, PATCH, rng))
    found = [patch.t1.data for patch in patches(subject, from_monai(transform), 120)]
    assert_distributed_alike(found, wanted)


AFTER_A_CROP = {
    "RandScaleIntensityFixedMeand": lambda m: m.RandScaleIntensityFixedMeand("t1", factors=0.5, prob=1),
    "RandStdShiftIntensityd": lambda m: m.RandStdShiftIntensityd("t1", 0.5, 1),
    "RandAdjustContrastd": lambda m: m.RandAdjustContrastd("t1", 1, (0.5, 3)),
    "RandHistogramShiftd": lambda m: m.RandHistogramShiftd("t1", 10, 1),
    "RandBiasFieldd": lambda m: m.RandBiasFieldd("t1", prob=1),
    "RandCoarseDropoutd": lambda m: m.RandCoarseDropoutd("t1", 3, 4, prob=1),
    "RandCoarseShuffled": lambda m: m.RandCoarseShuffled("t1", 3, 4, prob=1),
}


@pytest.mark.parametrize("name", AFTER_A_CROP)
def test_what_uses_numbers_of_a_patch_gives_what_it_gives_after_a_random_crop(
    monai: Any, subject: zp.Subject, name: str
) -> None:
    transform = AFTER_A_CROP[name](monai)
    transform.set_random_state(seed=4)
    plain = {patch.location: patch for patch in patches(subject, None, seed=5)}
    found = patches(subject, from_monai(transform), seed=5)
    wanted = [transform({"t1": plain[patch.location].t1.data})["t1"] for patch in found]
    assert_distributed_alike([patch.t1.data for patch in found], wanted, (torch.mean, torch.std))


def test_an_affine_patch_has_no_voxel_from_beyond_its_margin(monai: Any) -> None:
    """With zeros beyond the border of what is read, and none in the volume."""
    ones = zp.Subject(t1=zp.ScalarImage(np.ones((96, 96, 96), np.float32)), name="a")
    options = {"rotate_range": 0.6, "scale_range": 0.3, "translate_range": (6, 0, 2), "shear_range": 0.2}
    transform = monai.RandAffined("t1", prob=1, padding_mode="zeros", **options)
    pipeline = from_monai(transform)
    margin = pipeline.margin(ones, (8, 16, 4))
    inner = [(m, 96 - n - m) for m, n in zip(margin, (8, 16, 4), strict=True)]
    rng = np.random.default_rng(0)
    for seed in range(40):
        index = tuple(int(rng.integers(low, high + 1)) for low, high in inner)
        location = zp.PatchLocation(index, (8, 16, 4))
        wide = _read(ones, location.widened(margin, (96,) * 3))
        np.random.seed(seed)  # noqa: NPY002
        changed = pipeline.on_patch(wide, location).t1.data
        assert torch.equal(changed.round(decimals=4), torch.ones(1, 8, 16, 4))


def _read(subject: zp.Subject, location: zp.PatchLocation) -> zp.Patch:
    voxels = torch.from_numpy(subject.t1.read(location))
    return zp.Patch({"t1": PatchImage(voxels, subject.t1.affine)}, location, subject.name)


def test_the_stream_is_the_same_for_any_workers(monai: Any, subject: zp.Subject) -> None:
    steps = [
        monai.NormalizeIntensityd("t1", nonzero=True),
        monai.RandAffined(["t1", "seg"], prob=1, rotate_range=0.2, mode=MODES),
        monai.RandFlipd(["t1", "seg"], 0.5),
    ]
    transform = from_monai(monai.Compose(steps))
    alone, workers = (patches(subject, transform, 6, num_workers=count, seed=1) for count in (0, 2))
    for one, other in zip(alone, workers, strict=True):
        assert torch.equal(one.t1.data, other.t1.data)
        assert torch.equal(one.seg.data, other.seg.data)
        assert one.seg.data.dtype == torch.uint8


def test_a_tutorial_pipeline_runs_but_for_its_crop(monai: Any, subject: zp.Subject) -> None:
    keys = ["t1", "seg"]
    before = [
        monai.LoadImaged(keys),
        monai.EnsureChannelFirstd(keys),
        monai.EnsureTyped(keys),
        monai.ScaleIntensityRanged("t1", 0, 600, 0, 1, clip=True),
        monai.CropForegroundd(keys, "t1", allow_smaller=True),
        monai.Orientationd(keys, "RAS", labels=None),
        monai.Spacingd(keys, (1.5, 1.5, 2.0), mode=("bilinear", "nearest")),
    ]
    crop = monai.RandCropByPosNegLabeld(keys, "seg", (PATCH,) * 3, num_samples=4)
    after = [monai.RandAffined(keys, prob=1, rotate_range=0.1, mode=MODES), monai.NormalizeIntensityd("t1")]
    says = (
        r"RandCropByPosNegLabeld takes patches, .*: give the queue zp.MixedSampler\(...\), and from_monai\("
    )
    with pytest.raises(OptionError, match=says):
        from_monai(monai.Compose([*before, crop, *after]))
    pipeline = from_monai(monai.Compose(before)).then(from_monai(monai.Compose(after), on="patch"))
    sampler = zp.LabelSampler(PATCH, "seg", {1: 1})
    with zp.Queue([subject], sampler, patches_per_volume=4, transform=pipeline) as queue:
        for patch in queue:
            assert patch.t1.data.mean().abs() < 1e-3
            assert patch.t1.data.std() == pytest.approx(1, abs=0.02)
            np.testing.assert_allclose(
                np.linalg.norm(patch.seg.affine[:3, :3], axis=0), [1.5, 1.5, 2.0], rtol=0.02
            )


def test_what_follows_a_pipeline_gets_patches_without_their_margin(monai: Any, subject: zp.Subject) -> None:
    seen = []

    def look(patch: zp.Patch) -> zp.Patch:
        seen.append(patch.t1.data.shape)
        return patch

    pipeline = from_monai(monai.RandGaussianSmoothd("t1")).then(look)
    pipeline = pipeline.then(from_monai(monai.RandFlipd("t1", 0.5)))
    assert min(pipeline.margin(subject, (PATCH,) * 3)) > 4
    patches(subject, pipeline, 3)
    assert seen == [(1, PATCH, PATCH, PATCH)] * 4  # the first one twice: it tells the size of slots


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_needs_the_volume_is_refused_by_name_with_what_to_do(monai: Any, name: str) -> None:
    made = object.__new__(getattr(monai, name))
    with pytest.raises(OptionError, match=rf"{name} .*from_monai\({name}\(...\), on='patch'\)"):
        from_monai(made)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_random_crops_are_samplers_here(monai: Any, name: str) -> None:
    with pytest.raises(OptionError, match=rf"{name} takes patches, .*{SAMPLERS[name]}"):
        from_monai(object.__new__(getattr(monai, name)))


def test_errors_say_where_a_transform_belongs(monai: Any, subject: zp.Subject) -> None:
    flip = monai.RandFlipd("t1")
    with pytest.raises(OptionError, match="Spacingd needs the whole volume, as RandFlipd leaves it"):
        from_monai(monai.Compose([flip, monai.Spacingd("t1", 2.0)]))
    with pytest.raises(OptionError, match=r"NormalizeIntensityd needs .* by chance"):
        from_monai(monai.OneOf([monai.NormalizeIntensityd("t1"), flip]))
    with pytest.raises(
        OptionError, match="RandFlip takes one array; use RandFlipd, with the names of images"
    ):
        from_monai(monai.RandFlip())
    with pytest.raises(OptionError, match="neg is not known here, and may need the whole volume"):
        from_monai(torch.neg)
    for odd in (monai.RandAffined("t1", spatial_size=9), monai.RandRotated("t1", 1, keep_size=False),
                monai.RandZoomd("t1", keep_size=False)):  # fmt: skip
        with pytest.raises(OptionError, match=r"gives (other sizes of patches|patches of other sizes)"):
            from_monai(odd)
    pipeline = from_monai(monai.NormalizeIntensityd("t1"))
    with pytest.raises(OptionError, match="NormalizeIntensityd acts on subjects, and cannot follow"):
        from_monai(flip).then(pipeline)
    with pytest.raises(OptionError, match="NormalizeIntensityd acts on subjects, not on patches"):
        pipeline(next(zp.UniformSampler(4)(subject, 1, rng=0)))


def test_a_subclass_that_inherits_what_a_transform_does_is_known(monai: Any) -> None:
    class Mine(monai.NormalizeIntensityd):  # type: ignore[misc, name-defined]
        """The same, with a name of its own."""

    class Other(monai.NormalizeIntensityd):  # type: ignore[misc, name-defined]
        def __call__(self, data: Any) -> Any:
            return data

    assert [step.name for step in from_monai(Mine("t1")).steps] == ["NormalizeIntensityd"]
    with pytest.raises(OptionError, match="Other is not known here"):
        from_monai(Other("t1"))
    assert callable(from_monai(Other("t1"), on="patch"))


def test_a_pipeline_can_be_sent_to_a_process(monai: Any, subject: zp.Subject) -> None:
    steps = [monai.Spacingd("t1", 2.0), monai.NormalizeIntensityd("t1"), monai.RandFlipd("t1", 0.5)]
    sent = pickle.loads(pickle.dumps(from_monai(monai.Compose(steps))))
    assert (
        sent.of_subject(subject).t1.spatial_shape == from_monai(steps[0]).of_subject(subject).t1.spatial_shape
    )
    assert [step.name for step in sent.patches] == ["RandFlipd"]


def corners_at_the_ends() -> zp.Subject:
    """Labels in a corner of each end of a volume, which a patch around them reaches over."""
    labels = np.zeros((96, 48, 48), np.uint8)
    labels[16:18, 16:32, 16:32] = labels[-18:-16, 16:32, 16:32] = 1
    numbers = np.arange(labels.size, dtype=np.float32).reshape(labels.shape)
    return zp.Subject(t1=zp.ScalarImage(numbers), seg=zp.LabelMap(labels), name="ends")


@pytest.mark.parametrize("flip_first", [False, True])
def test_flips_beside_a_margin_keep_the_patch_at_the_border(monai: Any, flip_first: bool) -> None:
    """The margin is narrower on one side there: a flip must not move the patch."""
    keys = ["t1", "seg"]
    steps = [monai.RandAffined(keys, prob=0.0, rotate_range=(0.3, 0.3, 0.3)), monai.RandFlipd(keys, 1.0, 0)]
    transform = from_monai(monai.Compose(steps[::-1] if flip_first else steps))
    subject, sampler = corners_at_the_ends(), zp.LabelSampler(32, "seg", {1: 1})
    with zp.Queue([subject], sampler, patches_per_volume=40, transform=transform) as queue:
        for patch in queue:
            box = (slice(None), *patch.location.to_slices())
            wanted = torch.from_numpy(subject.t1.data[box]).flip(1)
            assert torch.equal(patch.t1.data, wanted)
            assert patch.seg.data.any()


def test_quarter_turns_follow_margins(monai: Any, subject: zp.Subject) -> None:
    keys = ["t1", "seg"]
    smooth, turn = monai.RandGaussianSmoothd("t1", prob=1), monai.RandRotate90d(keys, prob=1)
    found = patches(subject, from_monai(monai.Compose([smooth, turn])), 30)
    assert {tuple(patch.t1.data.shape) for patch in found} == {(1, PATCH, PATCH, PATCH)}
    with pytest.raises(OptionError, match="RandRotate90d turns the margin that RandGaussianSmoothd reads"):
        from_monai(monai.Compose([turn, smooth]))


def test_zooms_after_each_other_read_far_enough(monai: Any) -> None:
    ones = zp.Subject(t1=zp.ScalarImage(np.ones((160, 160, 160), np.float32)), name="ones")
    zoom = monai.RandZoomd("t1", 1, 0.6, 0.6, padding_mode="constant", mode="trilinear")
    pipeline = from_monai(monai.Compose([zoom, zoom]))
    location = zp.PatchLocation((64, 64, 64), (32, 32, 32))
    wide = location.widened(pipeline.margin(ones, location.size), (160, 160, 160))
    assert pipeline.on_patch(_read(ones, wide), location).t1.data.min() > 0.99


def test_some_of_several_with_repetition_reads_as_often(monai: Any, subject: zp.Subject) -> None:
    parts = [monai.RandGaussianSmoothd("t1", prob=1), monai.RandZoomd("t1", 1, mode="trilinear")]
    once = from_monai(monai.SomeOf(parts, num_transforms=2)).margin(subject, (PATCH,) * 3)
    twice = from_monai(monai.SomeOf(parts, num_transforms=2, replace=True)).margin(subject, (PATCH,) * 3)
    assert all(2 * a <= b for a, b in zip(once, twice, strict=True))


def test_dropout_after_a_margin_is_of_the_patch(monai: Any) -> None:
    ones = zp.Subject(t1=zp.ScalarImage(np.ones((96, 96, 96), np.float32)), name="ones")
    drop = monai.RandCoarseDropoutd("t1", holes=4, spatial_size=8, fill_value=0, prob=1)
    move = monai.RandAffined("t1", prob=1, rotate_range=0.5, padding_mode="border")
    dropped = [
        np.mean([float((patch.t1.data == 0).float().mean()) for patch in patches(ones, from_monai(made), 60)])
        for made in (drop, monai.Compose([move, drop]))
    ]
    assert dropped[1] == pytest.approx(dropped[0], rel=0.1)


def test_a_key_that_is_no_image_is_refused_before_patches_are_taken(monai: Any, subject: zp.Subject) -> None:
    with pytest.raises(OptionError, match="RandFlipd of subject 'a': 'zz' is no image of the subject"):
        from_monai(monai.RandFlipd(["zz"], 1, 0)).of_subject(subject)
    assert from_monai(monai.RandFlipd(["zz"], 1, 0, allow_missing_keys=True)).of_subject(subject)


def test_options_that_have_no_lazy_form_are_refused(monai: Any, subject: zp.Subject) -> None:
    spacing = monai.Spacingd("t1", 2.0)
    with pytest.raises(OptionError, match="overrides of a Compose are not supported"):
        from_monai(monai.Compose([spacing], lazy=True, overrides={"t1": {"mode": "nearest"}}))
    for transform, says in (
        (monai.Resized("t1", 9, mode="trilinear", anti_aliasing=True), "anti_aliasing is not supported"),
        (monai.Spacingd("t1", 2.0, recompute_affine=True), "MONAI refuses it: recompute_affine"),
        (monai.CropForegroundd("t1", "t1", select_fn=lambda x: x > x.mean()), "select_fn must look at each"),
        (monai.MaskIntensityd("t1", mask_key="t1", select_fn=lambda x: x > x.mean()), "select_fn must look"),
        (monai.Activationsd("t1", other=lambda x: x / x.max()), "other must look at each voxel by itself"),
        (monai.MaskIntensityd("t1", mask_key="seg", select_fn=lambda x: x.nothing), "select_fn fails on"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=says):
            from_monai(transform).of_subject(subject)
    taken = monai.CropForegroundd("t1", "t1", select_fn=lambda x: torch.gt(x, 300))
    assert from_monai(taken).of_subject(subject)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "bool"])
def test_labels_of_any_type_are_filtered(monai: Any, dtype: str) -> None:
    labels = np.arange(27).reshape(3, 3, 3).astype(dtype)
    subject = zp.Subject(seg=zp.LabelMap(labels))
    made = from_monai(monai.LabelFilterd("seg", [1, 3])).of_subject(subject).seg
    assert made.dtype == labels.dtype
    np.testing.assert_array_equal(made.data[0], np.where(np.isin(labels, [1, 3]), labels, 0).astype(dtype))
