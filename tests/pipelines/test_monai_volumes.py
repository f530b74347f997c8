"""Transforms of MONAI of each voxel by itself give MONAI's voxels, on volumes and on patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from against_monai import assert_as_monai, in_memory

import zpatch as zp
from zpatch.compat.transforms import from_monai
from zpatch.errors import OptionError
from zpatch.pipelines.monai_volumes import POINTWISE


def transforms_of(monai: Any) -> dict[str, Any]:
    keys = ["two", "t1"]
    return {
        "ThresholdIntensityd": monai.ThresholdIntensityd(keys, 100, above=False, cval=100),
        "ShiftIntensityd": monai.ShiftIntensityd(keys, 10),
        "MapLabelValued": monai.MapLabelValued("seg", [1, 2, 3], [3, 0, 7]),
        "LabelToMaskd": monai.LabelToMaskd("seg", [1, 3]),
        "LabelFilterd": monai.LabelFilterd("seg", [2]),
        "AsDiscreted": monai.AsDiscreted("seg", to_onehot=4),
        "AsDiscreted, threshold": monai.AsDiscreted("two", threshold=50),
        "Activationsd": monai.Activationsd("two", sigmoid=True),
        "RepeatChanneld": monai.RepeatChanneld("t1", 3),
        "RemoveRepeatedChanneld": monai.RemoveRepeatedChanneld("two", 2),
        "SignalFillEmptyd": monai.SignalFillEmptyd("two", 1.0),
        "ConvertToMultiChannelBasedOnBratsClassesd": monai.ConvertToMultiChannelBasedOnBratsClassesd("seg"),
        "EnsureTyped": monai.EnsureTyped(["two", "t1", "seg"]),
        "EnsureTyped, of a type": monai.EnsureTyped(keys, dtype=torch.float16),
        "CastToTyped": monai.CastToTyped(["t1", "seg"], dtype=[np.float32, np.uint8]),
        "ToTensord": monai.ToTensord(keys),
        "LoadImaged": monai.Identityd(keys),  # an image of zpatch is loaded
        "EnsureChannelFirstd": monai.EnsureChannelFirstd(keys, channel_dim=0),
        "Identityd": monai.Identityd(keys),
        "ToMetaTensord": monai.ToMetaTensord("x", allow_missing_keys=True),
        "FromMetaTensord": monai.Identityd(keys),  # on volumes
        "ToDeviced": monai.ToDeviced(keys, "cpu"),
        "ToNumpyd": monai.Identityd(keys),  # on volumes
        "ScaleIntensityRanged": monai.ScaleIntensityRanged(keys, 0, 10, 0, 1),
        "MaskIntensityd": monai.MaskIntensityd(keys, mask_key="seg"),
        "MaskIntensityd, chosen": monai.MaskIntensityd("t1", mask_key="seg", select_fn=lambda x: x == 2),
        "ConcatItemsd": monai.ConcatItemsd(keys, "all"),
        "CopyItemsd": monai.CopyItemsd(keys, 2, ["a", "b", "c", "d"]),
        "SelectItemsd": monai.SelectItemsd(["t1", "seg"]),
        "DeleteItemsd": monai.DeleteItemsd("two"),
    }


NAMES = tuple(transforms_of(pytest.importorskip("monai.transforms", reason="MONAI is not installed")))


@pytest.mark.parametrize("name", NAMES)
def test_voxels_and_images_are_those_that_monai_makes(monai: Any, oblique: zp.Subject, name: str) -> None:
    transform = transforms_of(monai)[name]
    found = assert_as_monai(transform, oblique, atol=1e-6)
    assert set(found.images) == set(transform(in_memory(oblique)))
    assert {image.kind for key, image in found.images.items() if key == "seg"} <= {"label"}


@pytest.mark.parametrize("name", NAMES)
def test_on_patches_after_a_random_transform_they_are_the_same(
    monai: Any, oblique: zp.Subject, name: str
) -> None:
    transform = transforms_of(monai)[name]
    whole = from_monai(transform).of_subject(oblique)
    pipeline = from_monai(monai.Compose([monai.RandFlipd("t1", prob=0), transform]))
    assert not pipeline.steps
    sampler = zp.UniformSampler(8)
    for mine, patch in zip(sampler(whole, 4, rng=1), sampler(oblique, 4, rng=1), strict=True):
        changed = pipeline(patch)
        assert set(changed.images) == set(mine.images)
        for key, image in mine.images.items():
            torch.testing.assert_close(
                changed[key].data.double(), image.data.double(), rtol=1e-5, atol=1e-4, msg=key
            )


def test_each_transform_is_tried() -> None:
    assert {name.partition(",")[0] for name in NAMES} == {*POINTWISE}


def test_images_load_as_they_are(monai: Any, oblique: zp.Subject) -> None:
    keys = list(oblique.images)
    steps = [monai.LoadImaged(keys), monai.EnsureChannelFirstd(keys), monai.EnsureTyped(keys)]
    assert from_monai(monai.Compose(steps)).of_subject(oblique).images == oblique.images


def test_labels_that_their_type_cannot_hold_are_an_error(monai: Any, oblique: zp.Subject) -> None:
    made = from_monai(monai.MapLabelValued("seg", [1], [300])).of_subject(oblique)
    with pytest.raises(OptionError, match="gives the label map 'seg' values that uint8 cannot represent"):
        made.seg.data  # noqa: B018
    [shifted] = zp.UniformSampler(4)(from_monai(monai.ShiftIntensityd("t1", 1)).of_subject(oblique), 1, rng=0)
    assert shifted.t1.data.shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: m.MaskIntensityd("t1", mask_data=np.ones((1, 2, 2, 2))), "mask_key must name an image"),
        (lambda m: m.ConcatItemsd(["t1", "t1"], "x", dim=1), "only channels are joined"),
        (lambda m: m.DeleteItemsd(["t.*"], use_re=True), "use_re is not supported"),
        (lambda m: m.ThresholdIntensityd("x", 1), "'x' is no image of the subject"),
    ],
)
def test_what_cannot_be_had_is_said(monai: Any, oblique: zp.Subject, make: Any, says: str) -> None:
    with pytest.raises(OptionError, match=f"of subject 'oblique': .*{says}"):
        from_monai(make(monai)).of_subject(oblique)
