"""Transforms of MONAI by numbers of the volume give MONAI's voxels, from the store or a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from against_monai import assert_as_monai

import zpatch as zp
from zpatch.compat.transforms import from_monai
from zpatch.errors import OptionError
from zpatch.pipelines.monai_linear import BY_STATISTICS

KEYS = ["two", "t1"]


def transforms_of(monai: Any) -> dict[str, Any]:
    by, percentiles = monai.NormalizeIntensityd, monai.ScaleIntensityRangePercentilesd
    return {
        "NormalizeIntensityd": by(KEYS),
        "NormalizeIntensityd, where not 0": by(KEYS, nonzero=True),
        "NormalizeIntensityd, of each channel": by("two", nonzero=True, channel_wise=True),
        "NormalizeIntensityd, given": by(KEYS, subtrahend=3, divisor=5),
        "NormalizeIntensityd, given for each channel": by("two", [3, 4], [5, 6], channel_wise=True),
        "NormalizeIntensityd, only one given": by(KEYS, divisor=7.0),
        "ScaleIntensityd": monai.ScaleIntensityd(KEYS),
        "ScaleIntensityd, of each channel": monai.ScaleIntensityd("two", -1, 3, channel_wise=True),
        "ScaleIntensityd, open": monai.ScaleIntensityd("t1", minv=None, maxv=3),
        "ScaleIntensityd, by a factor": monai.ScaleIntensityd("two", None, None, factor=0.2),
        "ScaleIntensityRanged": monai.ScaleIntensityRanged(KEYS, -20, 200, 0, 1),
        "ScaleIntensityRanged, clipped": monai.ScaleIntensityRanged(KEYS, -20, 200, -1, 1, clip=True),
        "ScaleIntensityRanged, to 0 to 1": monai.ScaleIntensityRanged(KEYS, -20, 200),
        "ScaleIntensityRanged, to integers": monai.ScaleIntensityRanged(
            "t1", 0, 500, 0, 200, clip=True, dtype=np.uint8
        ),
        "ScaleIntensityRangePercentilesd": percentiles(KEYS, 1, 99, 0, 1),
        "ScaleIntensityRangePercentilesd, clipped": percentiles(
            "two", 5, 95, -1, 1, clip=True, channel_wise=True
        ),
        "ScaleIntensityRangePercentilesd, relative": percentiles("t1", 5, 95, -1, 1, relative=True),
        "ClipIntensityPercentilesd": monai.ClipIntensityPercentilesd(KEYS, 2, 97),
        "ClipIntensityPercentilesd, below": monai.ClipIntensityPercentilesd(
            "two", 20, None, channel_wise=True
        ),
    }


NAMES = tuple(transforms_of(pytest.importorskip("monai.transforms", reason="MONAI is not installed")))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_that_monai_makes_of_the_volume(monai: Any, oblique: zp.Subject, name: str) -> None:
    found = assert_as_monai(transforms_of(monai)[name], oblique, atol=1e-5)
    assert found.seg.kind == "label"


def test_each_transform_is_tried() -> None:
    assert {name.partition(",")[0] for name in NAMES} == {*BY_STATISTICS, "ScaleIntensityRanged"}


@pytest.mark.filterwarnings("ignore:Divide by zero")
def test_equal_values_and_values_that_are_all_0_are_as_in_monai(monai: Any) -> None:
    for value in (0, 5):
        subject = zp.Subject(t1=zp.ScalarImage(np.full((4, 5, 6), value, np.float32)))
        for nonzero in (False, True):
            assert_as_monai(monai.NormalizeIntensityd("t1", nonzero=nonzero), subject)
        assert_as_monai(monai.ScaleIntensityd("t1", 0.5, 2), subject)
        assert_as_monai(monai.ScaleIntensityRanged("t1", 3, 3, 1, 2), subject)


def test_numbers_are_of_the_volume_after_the_transforms_before(monai: Any, oblique: zp.Subject) -> None:
    steps = [
        monai.Spacingd(["t1", "seg"], (1.93, 2.17, 2.37), mode=["bilinear", "nearest"]),
        monai.CropForegroundd(["t1", "seg"], "seg", allow_smaller=True),
        monai.NormalizeIntensityd("t1"),
    ]
    assert_as_monai(monai.Compose(steps), oblique, atol=1e-3)


def test_stored_statistics_are_those_of_the_stored_volume_only(monai: Any, cohort_store: Any) -> None:
    subject = zp.Cohort(cohort_store)[0]
    name = next(name for name, image in subject.images.items() if image.kind == "scalar")
    assert {"mean", "std"} <= subject[name].statistics.keys()
    one = zp.Subject.of({name: subject[name]}, name="one")
    steps = [monai.Spacingd(name, (2.3, 1.9, 2.7), mode="bilinear"), monai.NormalizeIntensityd(name)]
    assert_as_monai(monai.Compose(steps), one)
    assert_as_monai(monai.NormalizeIntensityd(name), one)
    assert_as_monai(monai.Compose([monai.Orientationd(name, "LPS", labels=None), steps[1]]), one)


def test_arrays_of_numbers_need_channels_and_sharpness_is_refused(monai: Any, oblique: zp.Subject) -> None:
    with pytest.raises(OptionError, match="need channel_wise=True, one for each channel"):
        from_monai(monai.NormalizeIntensityd("two", [3, 4], [5, 6])).of_subject(oblique)
    with pytest.raises(OptionError, match="sharpness_factor is not supported"):
        from_monai(monai.ClipIntensityPercentilesd("two", 1, 99, 2.0)).of_subject(oblique)
    with pytest.raises(OptionError, match="'t2' is no image of the subject, which has two, t1, seg"):
        from_monai(monai.NormalizeIntensityd("t2")).of_subject(oblique)
