"""Pipelines act on subjects first, then on patches, and keep what passes over volumes have found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.pipelines.pipeline import PatchStep, Pipeline, SubjectStep, followed_by

SUBJECT = zp.Subject(t1=zp.ScalarImage(np.ones((8, 8, 8), np.float32)), name="a")


def doubled(subject: zp.Subject, remember: Any) -> zp.Subject:
    factor = remember("factor", lambda: 2)
    return subject.with_images(t1=subject.t1.rescaled(factor, 0))


def negative(patch: zp.Patch) -> zp.Patch:
    return patch.with_data(t1=-patch.t1.data)


def test_subjects_come_before_patches() -> None:
    pipeline = followed_by(
        [SubjectStep("Double", doubled), PatchStep("Negate", negative, lambda size, spacing: (1, 2, 3))]
    )
    assert pipeline.margin(SUBJECT, (4, 4, 4)) == (1, 2, 3)
    with zp.Queue([SUBJECT], zp.UniformSampler(4), patches_per_volume=2, transform=pipeline) as queue:
        for patch in queue:
            assert patch.t1.data.shape == (1, 4, 4, 4)
            assert patch.t1.data.unique().tolist() == [-2]
    with pytest.raises(OptionError, match="Double needs the whole volume, as Negate leaves it"):
        followed_by([PatchStep("Negate", negative), SubjectStep("Double", doubled)])


def test_a_pipeline_without_steps_changes_nothing() -> None:
    patch = next(zp.UniformSampler(4)(SUBJECT, 1, rng=0))
    assert Pipeline().of_subject(SUBJECT) is SUBJECT
    assert Pipeline().margin(SUBJECT, (4, 4, 4)) == (0, 0, 0)
    assert Pipeline()(patch) is patch


def test_a_patch_that_changes_its_extent_cannot_be_cropped() -> None:
    def halved(patch: zp.Patch) -> zp.Patch:
        return patch.with_data(t1=patch.t1.data[:, ::2])

    step = PatchStep("Halve", halved, lambda size, spacing: (2, 0, 0))
    with pytest.raises(Exception, match="so that its margin cannot be cropped; keep the extent of patches"):
        list(zp.Queue([SUBJECT], zp.UniformSampler(4), patches_per_volume=1, transform=followed_by([step])))
