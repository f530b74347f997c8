"""Random transforms of TorchIO 1 act on patches with a margin, or are refused by name."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from distributions import assert_distributed_alike, random_crop

import zpatch as zp
from zpatch.compat import torchio1
from zpatch.compat.transforms import from_torchio
from zpatch.errors import OptionError, QueueError
from zpatch.pipelines.torchio1_places import MARGINS, ON_PATCHES, REFUSED
from zpatch.pipelines.torchio1_volumes import STEPS

SHAPE, PATCH = (48, 44, 40), 16


@pytest.fixture(scope="module")
def subject() -> zp.Subject:
    rng = np.random.default_rng(1)
    smooth = np.add.outer(
        np.add.outer(np.sin(np.arange(48) / 5), np.cos(np.arange(44) / 7)), np.arange(40) / 20
    )
    t1 = (smooth * 100 + rng.normal(0, 5, SHAPE) + 300).astype(np.float32)
    return zp.Subject(t1=zp.ScalarImage(t1), seg=zp.LabelMap((t1 > 300).astype(np.uint8)), name="a")


def volume_of(tio: Any, subject: zp.Subject) -> Any:
    return tio.Subject(
        t1=tio.ScalarImage(tensor=torch.from_numpy(subject.t1.data)),
        seg=tio.LabelMap(tensor=torch.from_numpy(subject.seg.data)),
    )


def patches(subject: zp.Subject, transform: Any, count: int = 40, **options: Any) -> list[zp.Patch]:
    sampler = zp.UniformSampler(PATCH)
    with zp.Queue([subject], sampler, patches_per_volume=count, transform=transform, **options) as queue:
        return list(queue)


def test_each_transform_of_torchio_has_its_place(tio: Any) -> None:
    known = {*STEPS, *ON_PATCHES, *MARGINS, *REFUSED, "To", "Compose", "OneOf"}
    abstract = {"Transform", "FourierTransform", "IntensityTransform", "SpatialTransform", "LabelTransform"}
    drawn = {
        name.removeprefix("Random") for name in known if name.startswith("Random")
    }  # RandomBlur makes a Blur
    for name in vars(tio.transforms):
        made = getattr(tio.transforms, name)
        if isinstance(made, type) and issubclass(made, tio.Transform):
            assert name in known | abstract | drawn, name


def test_the_table_in_the_documentation_says_the_same() -> None:
    text = (Path(zp.__file__).parent.parent / "docs" / "how-to" / "from-torchio.md").read_text()
    table = text.partition("### TorchIO 1\n")[2].partition("\n### ")[0]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", table, re.MULTILINE))
    del rows["transform"]
    expected = dict.fromkeys(STEPS, "volume") | dict.fromkeys(MARGINS, "margin")
    expected |= dict.fromkeys((*ON_PATCHES, "To"), "patch")
    assert rows == expected | {name: f"refused: {why}" for name, why in REFUSED.items()}


def test_blur_of_a_patch_with_its_margin_is_that_of_the_volume(tio: Any, subject: zp.Subject) -> None:
    blur = tio.RandomBlur(std=(1.5, 1.5))
    whole = blur(volume_of(tio, subject)).t1.data
    for patch in patches(subject, from_torchio(blur)):
        box = (slice(None), *patch.location.to_slices())
        torch.testing.assert_close(patch.t1.data, whole[box], rtol=1e-4, atol=1e-2)
        assert torch.equal(patch.seg.data, torch.from_numpy(subject.seg.data)[box])
        assert patch.location.size == (PATCH,) * 3
        np.testing.assert_array_equal(patch.t1.affine[:3, 3], patch.location.index)


def test_an_affine_transform_leaves_hardly_a_voxel_of_a_patch_at_the_pad_value(
    tio: Any, subject: zp.Subject
) -> None:
    affine = tio.RandomAffine(scales=0.1, degrees=10, default_pad_value=-1)
    padded = [float((patch.t1.data == -1).float().mean()) for patch in patches(subject, from_torchio(affine))]
    alone = [
        float((patch.t1.data == -1).float().mean())
        for patch in patches(subject, from_torchio(affine, on="patch"))
    ]
    torch.manual_seed(0)
    volumes = [float((affine(volume_of(tio, subject)).t1.data == -1).float().mean()) for _ in range(20)]
    assert np.mean(padded) <= 1.5 * np.mean(volumes) + 0.01
    assert np.mean(alone) > 4 * np.mean(padded)


@pytest.mark.parametrize(
    "name",
    [
        "RandomAffine",
        "RandomNoise",
        "RandomGamma",
        "RandomAnisotropy",
        "RandomFlip",
        "RandomBlur",
        "RandomLabelsToImage",
    ],
)
def test_patches_have_the_distribution_of_those_of_the_transformed_volume(
    tio: Any, subject: zp.Subject, name: str
) -> None:
    options = {"RandomLabelsToImage": {"label_key": "seg", "image_key": "t1"}}
    transform = getattr(tio, name)(**options.get(name, {}))
    rng = np.random.default_rng(3)
    torch.manual_seed(4)
    wanted = []
    for _ in range(60):
        whole = transform(volume_of(tio, subject)).t1.data
        wanted.append(random_crop(whole, PATCH, rng))
    found = [patch.t1.data for patch in patches(subject, from_torchio(transform), 120)]
    assert_distributed_alike(found, wanted)


def test_a_bias_field_spans_the_patch_as_documented(tio: Any, subject: zp.Subject) -> None:
    transform = tio.RandomBiasField()
    plain = {patch.location: patch.t1.data for patch in patches(subject, None, seed=5)}
    found = {patch.location: patch.t1.data for patch in patches(subject, from_torchio(transform), seed=5)}
    torch.manual_seed(4)
    wanted = [transform(voxels) / voxels for voxels in plain.values()]
    fields = [voxels / plain[location] for location, voxels in found.items()]
    assert_distributed_alike(fields, wanted, (torch.mean, torch.std))


def test_the_stream_of_a_margin_is_the_same_for_any_workers(tio: Any, subject: zp.Subject) -> None:
    transform = from_torchio(tio.Compose([tio.ZNormalization(masking_method="seg"), tio.RandomAffine()]))
    alone, workers = (patches(subject, transform, 6, num_workers=count, seed=1) for count in (0, 2))
    for one, other in zip(alone, workers, strict=True):
        assert torch.equal(one.t1.data, other.t1.data)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_needs_the_volume_is_refused_by_name_with_what_to_do(tio: Any, name: str) -> None:
    cls = getattr(tio, name, None)
    if cls is None:
        pytest.skip(f"this TorchIO has no {name}")
    arguments: dict[str, Any] = {
        "Resize": (8,), "ToReferenceSpace": (None,), "Lambda": (torch.neg,), "MonaiAdapter": (abs,)
    }  # fmt: skip
    made = cls.__new__(cls) if name in ("ToReferenceSpace", "MonaiAdapter") else cls(*arguments.get(name, ()))
    made.probability = 1
    with pytest.raises(OptionError, match=rf"{name} .*from_torchio\({name}\(...\), on='patch'\)"):
        from_torchio(made)
    assert callable(from_torchio(made, on="patch"))


def test_a_volume_transform_after_a_random_one_is_refused_and_a_pointwise_one_is_not(tio: Any) -> None:
    with pytest.raises(OptionError, match=r"ZNormalization needs the whole volume, as RandomNoise leaves it"):
        from_torchio(tio.Compose([tio.RandomNoise(), tio.ZNormalization()]))
    pipeline = from_torchio(
        tio.Compose([tio.ToCanonical(), tio.RandomNoise(), tio.Clamp(0, 1), tio.OneHot()])
    )
    assert [step.name for step in pipeline.steps] == ["ToCanonical"]
    assert [step.name for step in pipeline.patches] == ["RandomNoise", "Clamp", "OneHot"]


def test_one_of_several_and_transforms_by_chance_act_on_patches(tio: Any, subject: zp.Subject) -> None:
    both = from_torchio(tio.OneOf({tio.RandomBlur(2): 1, tio.RandomAffine(): 1}))
    alone = [
        from_torchio(one).margin(subject, (PATCH,) * 3) for one in (tio.RandomBlur(2), tio.RandomAffine())
    ]
    assert both.margin(subject, (PATCH,) * 3) == tuple(np.max(alone, axis=0).tolist())
    with pytest.raises(OptionError, match="applied to some volumes only; let it be applied to all"):
        from_torchio(tio.ZNormalization(p=0.5))
    with pytest.raises(OptionError, match="CropOrPad needs the whole volume"):
        from_torchio(tio.OneOf([tio.CropOrPad(8), tio.RandomNoise()]))
    assert [step.name for step in from_torchio(tio.Clamp(0, 1, p=0.5)).patches] == ["Clamp"]


def test_a_pipeline_can_be_sent_to_a_process(tio: Any, subject: zp.Subject) -> None:
    moving = tio.OneOf([tio.RandomBlur(2), tio.RandomAffine()])
    pipeline = from_torchio(tio.Compose([tio.ZNormalization(), tio.RandomFlip(), moving]))
    sent = pickle.loads(pickle.dumps(pipeline))
    assert sent.margin(subject, (PATCH,) * 3) == pipeline.margin(subject, (PATCH,) * 3)
    assert [step.name for step in sent.patches] == [step.name for step in pipeline.patches]


def test_a_pipeline_is_not_called_with_patches_of_subjects_that_it_did_not_see(
    tio: Any, subject: zp.Subject
) -> None:
    pipeline = from_torchio(tio.ZNormalization())
    patch = next(zp.UniformSampler(PATCH)(subject, 1, rng=0))
    with pytest.raises(
        OptionError, match="ZNormalization acts on subjects, not on patches: give the transform"
    ):
        pipeline(patch)


def test_the_sampler_draws_from_the_transformed_subject(tio: Any, subject: zp.Subject) -> None:
    transform = tio.Compose([tio.RemapLabels({1: 5}), tio.CropOrPad((20, 60, 20))])
    sampler = zp.LabelSampler(PATCH, "seg", {5: 1})
    with zp.Queue([subject], sampler, patches_per_volume=8, transform=from_torchio(transform)) as queue:
        for patch in queue:
            assert patch.seg.data[0, PATCH // 2, PATCH // 2, PATCH // 2] == 5
            assert all(i + PATCH <= n for i, n in zip(patch.location.index, (20, 60, 20), strict=True))


def test_a_dataset_gives_the_transformed_volume(tio: Any, subject: zp.Subject) -> None:
    transform = tio.Compose([tio.ZNormalization(), tio.RandomFlip(axes=0, flip_probability=1)])
    dataset = torchio1.SubjectsDataset([subject], transform=transform)
    wanted = transform(volume_of(tio, subject))
    torch.testing.assert_close(dataset[0].t1.data.float(), wanted.t1.data, rtol=1e-4, atol=1e-4)
    assert torch.equal(dataset[0].seg.data, wanted.seg.data)
    plain = torchio1.SubjectsDataset([subject], transform=tio.CropOrPad((30, 30, 30)))[0]
    assert plain.spatial_shape == plain.t1.shape[1:] == (30, 30, 30)
    grid = torchio1.GridSampler(plain, PATCH)
    aggregator = torchio1.GridAggregator(grid)
    for batch in torchio1.SubjectsLoader(grid, batch_size=4):
        aggregator.add_batch(batch["t1"][torchio1.DATA], batch[torchio1.LOCATION])
    torch.testing.assert_close(aggregator.get_output_tensor(), plain.t1.data)


def test_a_margin_and_context_do_not_go_together(tio: Any, tmp_path: Path) -> None:
    nib.Nifti1Image(np.ones((80, 16, 16), np.float32), np.eye(4)).to_filename(tmp_path / "a.nii")
    zp.convert(tmp_path, tmp_path / "store", pyramid=True)
    sampler, transform = zp.UniformSampler(8, context=(2,)), from_torchio(tio.RandomBlur())
    with pytest.raises(QueueError, match="a transform that moves voxels does not go with context="):
        list(zp.Queue(zp.Cohort(tmp_path / "store"), sampler, patches_per_volume=1, transform=transform))
