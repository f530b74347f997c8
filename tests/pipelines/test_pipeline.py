"""Pipelines act on subjects first, then on patches, and keep what passes over volumes have found."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.pipelines.pipeline import (
    PatchStep,
    Pipeline,
    SubjectStep,
    followed_by,
    in_order,
    no_margin,
    one_of,
)

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


def test_what_a_pass_found_is_kept_for_the_same_voxels_only() -> None:
    passes: list[str] = []

    def act(subject: zp.Subject, remember: Any) -> zp.Subject:
        def find() -> float:
            passes.append(subject.name)
            return float(subject.t1.data.mean())

        return subject.with_images(t1=subject.t1.rescaled(1, -remember("mean", find)))

    pipeline = Pipeline((SubjectStep("centre", act),))
    arrays = [np.full((4, 4, 4), value, np.float32) for value in (1, 2, 3)]
    for make in (
        lambda array: zp.ScalarImage(array),
        lambda array: zp.ScalarImage(array).map(lambda a: a * 1),
        lambda array: zp.ScalarImage(da.from_array(array)),
        lambda array: zp.ScalarImage(array).voxelwise(np.negative),
    ):
        subjects = [zp.Subject(t1=make(array), name=f"{n}") for n, array in enumerate(arrays)]
        passes.clear()
        for _ in range(2):
            for subject in subjects:
                assert not pipeline.of_subject(subject).t1.data.any()
        assert passes == ["0", "1", "2"]


def test_voxels_are_hashed_only_where_something_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = zp.Subject(t1=zp.ScalarImage(np.ones((4, 4, 4), np.float32)))
    monkeypatch.setattr(zp.Image, "identity", lambda self: pytest.fail("the voxels were hashed"))
    Pipeline((SubjectStep("nothing", lambda subject, remember: subject),)).of_subject(subject)


def test_each_transform_leaves_what_those_after_it_read() -> None:
    def half(patch_size: Any, affine: Any) -> Any:
        return tuple(n // 2 for n in patch_size)

    assert in_order([half, no_margin, half])((8, 4, 2), np.eye(4)) == (4 + 8, 2 + 4, 1 + 2)
    assert one_of([half, no_margin])((8, 4, 2), np.eye(4)) == (4, 2, 1)
    assert in_order([no_margin, no_margin]) is no_margin
