"""Transforms of MONAI that change grids give MONAI's grids and voxels, lazily."""

from __future__ import annotations

import resource
from typing import Any

import dask.array as da
import numpy as np
import pytest
from against_monai import assert_as_monai

import zpatch as zp
from zpatch.compat.transforms import from_monai
from zpatch.errors import OptionError

KEYS = ["two", "t1", "seg"]
MODES = ["bilinear", "bilinear", "nearest"]


def transforms_of(monai: Any) -> dict[str, Any]:
    return {
        "pad": monai.SpatialPadd(KEYS, (30, 10, 20), value=7),
        "pad at the end": monai.SpatialPadd(KEYS, 32, method="end", mode="edge"),
        "border": monai.BorderPadd(KEYS, (1, 2, 3), mode="reflect"),
        "border of six": monai.BorderPadd(KEYS, (1, 0, 3, 2, 0, 5)),
        "divisible": monai.DivisiblePadd(KEYS, 16),
        "pad or crop": monai.ResizeWithPadOrCropd(KEYS, (20, 24, 16)),
        "centre": monai.CenterSpatialCropd(KEYS, (11, -1, 6)),
        "scale": monai.CenterScaleCropd(KEYS, 0.6),
        "box": monai.SpatialCropd(KEYS, roi_start=(1, 2, 3), roi_end=(20, 18, 17)),
        "box around": monai.SpatialCropd(KEYS, roi_center=(9, 9, 9), roi_size=(8, 6, 4)),
        "RAS": monai.Orientationd(KEYS, "RAS", labels=None),
        "LPI": monai.Orientationd(KEYS, "LPI", labels=None),
        "SRA": monai.Orientationd(KEYS, "SRA", labels=None),
        "canonical": monai.Orientationd(KEYS, as_closest_canonical=True, labels=None),
        "flip": monai.Flipd(KEYS, (0, 2)),
        "quarter": monai.Rotate90d(KEYS, 3, spatial_axes=(0, 2)),
        "half": monai.Rotate90d(["t1", "seg"], 2, spatial_axes=(1, 2)),
        "spacing": monai.Spacingd(KEYS, (1.47, 1.53, 1.51), mode=MODES),
        "fine": monai.Spacingd(KEYS, (0.71, 1.03, 0.91), mode=MODES),
        "one axis": monai.Spacingd(KEYS, (-1, -1, 1.04), mode=MODES),
        "zeros": monai.Spacingd(KEYS, (1.73, 1.11, 3.17), mode=MODES, padding_mode="zeros"),
        "reflection": monai.Spacingd(KEYS, (1.73, 1.11, 3.17), mode=MODES, padding_mode="reflection"),
        "diagonal": monai.Spacingd(KEYS, (1.47, 1.53, 1.51), diagonal=True, mode=MODES),
        "aligned": monai.Spacingd(KEYS, (2.0, 2.0, 2.0), align_corners=True, mode=MODES),
        "only coarser": monai.Spacingd(KEYS, (1.2, 1.2, 1.2), min_pixdim=1.0, max_pixdim=1.4, mode=MODES),
        "resized": monai.Resized(KEYS, (20, 30, 11), mode=["trilinear", "trilinear", "nearest-exact"]),
        "longest": monai.Resized(
            KEYS, 40, size_mode="longest", mode=["trilinear", "trilinear", "nearest-exact"]
        ),
        "rotated": monai.Rotated(KEYS, (0.1, 0.2, -0.15), mode=MODES),
        "rotated, larger": monai.Rotated(KEYS, (0.1, 0.0, 0.3), keep_size=False, mode=MODES),
        "affine": monai.Affined(
            KEYS, (0.1, 0.0, 0.2), translate_params=(1.5, 0, -2), scale_params=(1.1, 0.9, 1), mode=MODES
        ),
        "foreground": monai.CropForegroundd(KEYS, "seg", allow_smaller=True),
        "with a margin": monai.CropForegroundd(KEYS, "seg", margin=(1, 4, 9), allow_smaller=False),
        "divisible foreground": monai.CropForegroundd(KEYS, "seg", k_divisible=8, mode="edge"),
        "chosen": monai.CropForegroundd(
            KEYS, "two", select_fn=lambda x: x > 900, channel_indices=1, allow_smaller=True
        ),
        "two images": monai.Orientationd(["t1"], "RAS", labels=None, allow_missing_keys=True),
    }


NAMES = tuple(transforms_of(pytest.importorskip("monai.transforms", reason="MONAI is not installed")))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_each_image_is_on_the_grid_that_monai_makes_and_has_its_voxels(
    monai: Any, oblique: zp.Subject, name: str
) -> None:
    ties = 0.01 if name in ("diagonal", "rotated, larger") else 0
    assert_as_monai(transforms_of(monai)[name], oblique, ties=ties)


def test_transforms_follow_each_other(monai: Any, oblique: zp.Subject) -> None:
    steps = [
        monai.Orientationd(KEYS, "RAS", labels=None),
        monai.CropForegroundd(KEYS, "seg", allow_smaller=True),
        monai.Spacingd(KEYS, (1.6, 1.6, 1.6), mode=MODES),
        monai.SpatialPadd(KEYS, (24, 24, 24)),
    ]
    assert_as_monai(monai.Compose(steps), oblique)


def test_images_are_resampled_to_match_another(monai: Any, oblique: zp.Subject) -> None:
    coarse = oblique.with_images(t1=oblique.t1.resampled((2.0, 3.0, 2.5)), two=None)
    assert_as_monai(monai.ResampleToMatchd(["t1"], "seg", mode="bilinear"), coarse)


def test_a_volume_of_any_size_takes_no_memory(monai: Any) -> None:
    huge = da.zeros((1, 20_000, 20_000, 20_000), chunks=(1, 64, 64, 64), dtype=np.int16)
    subject = zp.Subject(t1=zp.ScalarImage(huge))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = [monai.Orientationd("t1", "LPS", labels=None), monai.Spacingd("t1", 2.0, mode="bilinear")]
    made = from_monai(monai.Compose(steps)).of_subject(subject)
    assert made.spatial_shape == (10_000,) * 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: m.Spacingd(KEYS, 2.0, mode="bilinear"), "'bilinear' makes fractions of a label map"),
        (lambda m: m.Resized(KEYS, (9, 9, 9)), "mode 'area' is not supported here, but 'trilinear'"),
        (lambda m: m.Resized(KEYS, (9, 9, 9), mode="nearest"), "'nearest-exact' for label maps"),
        (lambda m: m.Spacingd("t1", 2.0, mode=3, padding_mode="mirror"), "mode '3' is not supported"),
        (lambda m: m.SpatialPadd("t1", 90, mode="mean"), "padding mode 'mean' is not supported"),
        (lambda m: m.CropForegroundd("t1", "t2"), "source_key 't2' is no image of the subject"),
        (lambda m: m.CropForegroundd("t1", "seg", select_fn=lambda x: x > 9), "leave the subject out"),
        (lambda m: m.Spacingd("t2", 2.0), "'t2' is no image of the subject, which has two, t1, seg"),
        (lambda m: m.CenterSpatialCropd("t2", 2), "'t2' is no image of the subject"),
    ],
)
def test_what_cannot_be_had_is_said(monai: Any, oblique: zp.Subject, make: Any, says: str) -> None:
    with pytest.raises(OptionError, match=f"of subject 'oblique': .*{says}"):
        from_monai(make(monai)).of_subject(oblique)
