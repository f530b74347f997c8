"""Subjects and cohorts: images by name, subjects by name or index, all from the manifest alone."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import zpatch as zp
from zpatch.digests import sealed_line
from zpatch.epochs.stream_position import subjects_digest
from zpatch.errors import DamageError, OptionError, SourceError, UnknownNameError
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import MANIFEST
from zpatch.store.store import open_store

NAMES = ["sub-01", "sub-02", "sub-03", "sub-04"]


@pytest.fixture
def subject() -> zp.Subject:
    return zp.Subject(
        t1=zp.ScalarImage(np.ones((2, 3, 4))), seg=zp.LabelMap(np.zeros((2, 3, 4), np.uint8)), name="anna"
    )


@pytest.fixture
def split_store(cohort_store: Path, tmp_path: Path) -> Path:
    """The cohort with splits and metadata: two subjects for training, one for testing, one in no split."""
    store = Path(shutil.copytree(cohort_store, tmp_path / "split.zarr"))
    splits = {"sub-01": "train", "sub-02": "test", "sub-03": "train"}
    with (store / MANIFEST).open("a") as manifest:
        for record in open_store(store).records.values():
            changed = dataclasses.replace(
                record, split=splits.get(record.subject), meta={"age": int(record.subject[-1]) * 10}
            )
            manifest.write(sealed_line(changed.to_json()) + "\n")
    return store


def test_a_subject_has_its_images_by_attribute_and_by_item(subject: zp.Subject) -> None:
    assert subject.t1 is subject["t1"] is subject.images["t1"]
    assert list(subject.images) == ["t1", "seg"]
    assert {"t1", "seg", "images", "spatial_shape"} <= set(dir(subject))
    assert subject.name == "anna"
    assert subject.spatial_shape == (2, 3, 4)
    assert repr(subject) == "Subject('anna': t1, seg)"


def test_a_subject_iterates_over_the_names_of_its_images(subject: zp.Subject) -> None:
    assert list(subject) == ["t1", "seg"]
    assert len(subject) == 2
    assert "t1" in subject
    assert "t2" not in subject
    assert {name: subject[name] for name in subject} == subject.images


def test_the_images_of_a_subject_cannot_be_changed_by_accident(subject: zp.Subject) -> None:
    with pytest.raises(TypeError):
        subject.images["t2"] = subject.t1  # type: ignore[index]


def test_metadata_and_split_are_as_given_and_otherwise_empty(subject: zp.Subject) -> None:
    assert (subject.metadata, subject.split) == ({}, None)
    meta = {"age": 30}
    other = zp.Subject(t1=subject.t1, metadata=meta, split="train")
    meta["age"] = 31
    assert (other.metadata, other.split) == ({"age": 30}, "train")


def test_an_unknown_image_is_an_error_with_the_nearest_names(subject: zp.Subject) -> None:
    with pytest.raises(
        UnknownNameError, match=r"no image 't2' in subject 'anna'; did you mean 't1'\? \(it has: t1, seg\)"
    ):
        subject["t2"]
    with pytest.raises(AttributeError, match="no image 't2' in subject 'anna'; did you mean 't1'"):
        _ = subject.t2
    assert not hasattr(subject, "_private")
    with pytest.raises(KeyError):
        subject["t2"]


def test_images_of_different_shapes_have_no_common_spatial_shape() -> None:
    subject = zp.Subject(t1=zp.ScalarImage(np.ones((2, 3, 4))), t2=zp.ScalarImage(np.ones((2, 3, 5))))
    why = r"'subject' differ in shape \(t1 \(2, 3, 4\), t2 \(2, 3, 5\)\); put them on one grid"
    with pytest.raises(OptionError, match=why):
        _ = subject.spatial_shape


def test_images_of_different_channels_have_a_common_spatial_shape() -> None:
    subject = zp.Subject(t1=zp.ScalarImage(np.ones((2, 3, 4))), rgb=zp.ScalarImage(np.ones((3, 2, 3, 4))))
    assert subject.spatial_shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("images", "error", "why"),
    [
        ({}, OptionError, "subject 'anna' has no images; give it some, as in t1=ScalarImage"),
        (
            {"t1": np.ones((2, 3, 4))},
            OptionError,
            "t1= must be a ScalarImage, LabelMap or SamplingMap, not nd",
        ),
        ({"t 1": None}, SourceError, "image name 't 1' is not usable"),
    ],
)
def test_a_subject_of_no_images_is_an_error(images: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        zp.Subject(name="anna", **images)


def test_a_cohort_is_a_sequence_of_subjects(cohort: zp.Cohort) -> None:
    assert len(cohort) == 4
    assert cohort.names == NAMES
    assert [subject.name for subject in cohort] == NAMES
    assert [cohort[n].name for n in range(4)] == NAMES
    assert cohort[-1].name == "sub-04"
    assert cohort["sub-03"].name == "sub-03"
    assert [subject.name for subject in reversed(cohort)] == NAMES[::-1]
    assert "sub-01" in cohort
    assert "sub-11" not in cohort
    assert 1 not in cohort
    assert repr(cohort).endswith("cohort.zarr': 4 subjects)")


@pytest.mark.parametrize("part", [slice(1, 3), slice(None, None, 2), slice(None, None, -1), slice(2, 2)])
def test_a_slice_of_a_cohort_is_a_cohort(cohort: zp.Cohort, part: slice) -> None:
    assert isinstance(cohort[part], zp.Cohort)
    assert cohort[part].names == NAMES[part]
    assert [subject.name for subject in cohort[part]] == NAMES[part]
    assert cohort.names == NAMES


def test_a_selection_is_in_the_order_of_its_names(cohort: zp.Cohort) -> None:
    assert cohort.select(["sub-03", "sub-01"]).names == ["sub-03", "sub-01"]


def test_an_index_past_the_end_is_an_index_error(cohort: zp.Cohort) -> None:
    for index in (4, -5):
        with pytest.raises(IndexError):
            cohort[index]


def test_an_unknown_subject_is_an_error_with_the_nearest_names(cohort: zp.Cohort) -> None:
    why = r"no subject 'sub-11' in store .*cohort.zarr; did you mean 'sub-01'.*\(it has: sub-01, sub-02, sub"
    with pytest.raises(UnknownNameError, match=why):
        cohort["sub-11"]
    with pytest.raises(UnknownNameError, match="no subject 'nobody' in"):
        cohort.select(["sub-01", "nobody"])


def test_a_part_of_a_cohort_has_no_other_subjects(cohort: zp.Cohort) -> None:
    part = cohort[:2]
    assert "sub-04" not in part
    with pytest.raises(UnknownNameError, match=r"no subject 'sub-04' in .*\(it has: sub-01, sub-02\)"):
        part["sub-04"]


def test_splits_are_cohorts(split_store: Path) -> None:
    cohort = zp.Cohort(split_store)
    assert cohort.splits == {"train": ["sub-01", "sub-03"], "test": ["sub-02"]}
    assert cohort.split("train").names == ["sub-01", "sub-03"]
    assert cohort.split("train")[0].split == "train"
    assert cohort[1:].split("train").names == ["sub-03"]
    assert cohort["sub-04"].split is None


def test_an_unknown_split_is_an_error_with_the_nearest_names(split_store: Path) -> None:
    why = r"no split 'trian' in store .*; did you mean 'train'\? \(it has: train, test\)"
    with pytest.raises(UnknownNameError, match=why):
        zp.Cohort(split_store).split("trian")


def test_a_cohort_without_splits_has_none(cohort: zp.Cohort) -> None:
    with pytest.raises(UnknownNameError, match=r"no split 'train' in .*\(it has: none\)"):
        cohort.split("train")


def test_metadata_are_by_subject(split_store: Path) -> None:
    cohort = zp.Cohort(split_store)
    assert cohort.metadata == {name: {"age": 10 * (n + 1)} for n, name in enumerate(NAMES)}
    assert cohort["sub-02"].metadata == {"age": 20}
    assert cohort[:1].metadata == {"sub-01": {"age": 10}}


def test_statistics_are_those_of_all_voxels_of_all_subjects(tmp_path: Path, rng: np.random.Generator) -> None:
    volumes = [rng.integers(0, 900, (5, 6, 7 + n)).astype(np.int16) for n in range(3)]
    for number, volume in enumerate(volumes):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"s{number}_ct.nii")
        nib.save(nib.Nifti1Image((volume > 500).astype(np.uint8), np.eye(4)), tmp_path / f"s{number}_seg.nii")
    zp.convert(tmp_path, tmp_path / "a.zarr")
    found = zp.Cohort(tmp_path / "a.zarr").statistics
    voxels = np.concatenate([volume.ravel() for volume in volumes]).astype(float)
    for stats, values in ((found["ct"], voxels), (found["ct"]["foreground"], voxels[voxels != 0])):
        assert (stats["count"], stats["min"], stats["max"]) == (values.size, values.min(), values.max())
        np.testing.assert_allclose([stats["mean"], stats["std"]], [values.mean(), values.std()])
        percentiles = [stats[f"percentile_{name}"] for name in ("0_5", "50", "99_5")]
        np.testing.assert_allclose(percentiles, np.percentile(values, [0.5, 50, 99.5]))
    assert found["seg"]["labels"] == {"0": int((voxels <= 500).sum()), "1": int((voxels > 500).sum())}


def test_images_have_the_class_of_their_kind(cohort: zp.Cohort) -> None:
    for subject in cohort:
        assert {name: type(image) for name, image in subject.images.items()} == {
            "t1": zp.ScalarImage,
            "seg": zp.LabelMap,
        }


def test_a_cohort_opens_from_the_manifest_alone(
    cohort_store: Path, cohort: zp.Cohort, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.zarr"
    bare.mkdir()
    for name in ("zarr.json", MANIFEST):
        shutil.copy(cohort_store / name, bare)
    opened = zp.Cohort(bare)
    assert opened.names == NAMES
    for subject, whole in zip(opened, cohort, strict=True):
        assert subject.spatial_shape == whole.spatial_shape
        for name, image in subject.images.items():
            assert (image.shape, image.dtype) == (whole[name].shape, whole[name].dtype)
            assert image.statistics == whole[name].statistics
            np.testing.assert_array_equal(image.affine, whole[name].affine)
    with pytest.raises(DamageError, match=r"sub-01/t1/0/c/0/0/0: it is missing"):
        opened[0].t1.read(zp.PatchLocation((0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize("name", ["name", "split", "metadata", "images", "spatial_shape", "self"])
def test_an_image_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "source" / "sub").mkdir(parents=True)
    voxels = np.full((2, 3, 4), 7, np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "source" / "sub" / f"{name}.nii")
    zp.convert(tmp_path / "source", tmp_path / "store")
    [subject] = zp.Cohort(tmp_path / "store")
    assert subject.name == "sub"
    assert list(subject.images) == [name]
    np.testing.assert_array_equal(subject[name].data[0], voxels)


def test_subjects_and_cohorts_survive_pickling(cohort: zp.Cohort, subject: zp.Subject) -> None:
    copy = pickle.loads(pickle.dumps(cohort["sub-02"]))
    assert copy.name == "sub-02"
    np.testing.assert_array_equal(copy.t1.data, cohort["sub-02"].t1.data)
    assert pickle.loads(pickle.dumps(cohort[1:3])).names == ["sub-02", "sub-03"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(subject)).t1.data, subject.t1.data)


def test_a_hand_built_subject_may_mix_sources(cohort: zp.Cohort) -> None:
    stored = cohort["sub-01"].t1
    mixed = zp.Subject(t1=stored, ones=zp.ScalarImage(np.ones(stored.spatial_shape)))
    [patch] = zp.UniformSampler(5)(mixed, 1, rng=0)
    np.testing.assert_array_equal(patch.t1.data, stored.read(patch.location))
    assert (patch.ones.data == 1).all()


# Images changed as they are read


def test_a_subject_with_other_images_keeps_its_name_split_and_metadata(cohort: zp.Cohort) -> None:
    subject = zp.Subject(
        t1=zp.ScalarImage(np.ones((2, 3, 4))), seg=zp.LabelMap(np.zeros((2, 3, 4), np.uint8)), name="anna",
        split="train", metadata={"age": 30},
    )  # fmt: skip
    more = zp.ScalarImage(np.zeros((2, 3, 4)))
    changed = subject.with_images(t2=more, seg=None)
    assert list(changed.images) == ["t1", "t2"]
    assert changed.t2 is more
    assert changed.t1 is subject.t1
    assert (changed.name, changed.split, changed.metadata) == ("anna", "train", {"age": 30})
    assert list(subject.images) == ["t1", "seg"]
    assert subject.with_images(t1=more).t1 is more
    assert list(subject.with_images(nobody=None).images) == ["t1", "seg"]


def test_an_image_may_be_called_name_or_split_when_it_is_added(subject: zp.Subject) -> None:
    more = zp.ScalarImage(np.zeros((2, 3, 4)))
    changed = subject.with_images(name=more, split=more, metadata=more)
    assert changed.name == "anna"
    assert changed["name"] is changed["split"] is changed["metadata"] is more


def test_removing_all_images_of_a_subject_is_an_error(subject: zp.Subject) -> None:
    with pytest.raises(OptionError, match="subject 'anna' has no images"):
        subject.with_images(t1=None, seg=None)
    with pytest.raises(OptionError, match="t2= must be a ScalarImage"):
        subject.with_images(t2=np.zeros((2, 3, 4)))  # type: ignore[arg-type]


def normalized(subject: zp.Subject) -> zp.Subject:
    return subject.with_images(t1=zp.Normalize()(subject.t1))


def doubled(subject: zp.Subject) -> zp.Subject:
    return subject.with_images(t1=subject.t1.rescaled(2, 0), seg=None)


def test_a_mapped_cohort_changes_each_subject_when_it_is_accessed(cohort: zp.Cohort) -> None:
    asked: list[str] = []

    def noting(subject: zp.Subject) -> zp.Subject:
        asked.append(subject.name)
        return normalized(subject)

    mapped = cohort.map(noting)
    assert asked == []
    assert (len(mapped), mapped.names) == (4, NAMES)
    t1 = mapped["sub-02"].t1
    assert asked == ["sub-02"]
    plain = cohort["sub-02"].t1.data.astype(np.float64)
    np.testing.assert_allclose(t1.data, (plain - plain.mean()) / plain.std(), atol=1e-5)
    assert [subject.name for subject in mapped] == NAMES
    assert asked == ["sub-02", *NAMES]
    np.testing.assert_array_equal(cohort["sub-02"].t1.data, plain)  # the cohort itself is unchanged


def test_changes_of_a_cohort_are_made_one_after_the_other(cohort: zp.Cohort) -> None:
    mapped = cohort.map(normalized).map(doubled)
    [subject] = mapped[:1]
    assert list(subject.images) == ["t1"]
    np.testing.assert_allclose(subject.t1.data, 2 * normalized(cohort[0]).t1.data, rtol=1e-6)


def test_parts_of_a_mapped_cohort_are_mapped(split_store: Path) -> None:
    mapped = zp.Cohort(split_store).map(doubled)
    parts = [
        mapped.split("train"),
        mapped[1:],
        mapped.select(["sub-04"]),
        mapped.matching(["sub-0*"], ["sub-02"]),
    ]
    for part in parts:
        for subject in part:
            assert list(subject.images) == ["t1"]
    assert mapped.split("train").names == ["sub-01", "sub-03"]
    assert mapped["sub-01"].split == "train"
    assert mapped["sub-01"].metadata == {"age": 10}


def test_a_mapped_cohort_survives_pickling(cohort: zp.Cohort) -> None:
    copy = pickle.loads(pickle.dumps(cohort.map(normalized)))
    np.testing.assert_array_equal(copy[1].t1.data, normalized(cohort[1]).t1.data)


def test_patches_of_a_mapped_cohort_are_those_of_the_changed_images(cohort: zp.Cohort) -> None:
    mapped = cohort.map(
        lambda s: s.with_images(twice=s.t1.map(lambda array: array * 2), norm=zp.Normalize()(s.t1))
    )
    for patch in zp.UniformSampler(8)(mapped[0], 3, rng=0):
        np.testing.assert_array_equal(patch.twice.data, patch.t1.data * 2)
        np.testing.assert_array_equal(patch.norm.data, mapped[0].norm.read(patch.location))
        np.testing.assert_array_equal(patch.seg.data, cohort[0].seg.read(patch.location))


def test_statistics_of_a_mapped_cohort_are_those_of_the_store(cohort: zp.Cohort) -> None:
    assert cohort.map(normalized).statistics == cohort.statistics


# Choosing subjects without parsing their records.


def without_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zpatch.records.image_record.ImageRecord.from_json", lambda *args: pytest.fail("a record was parsed")
    )


def test_where_chooses_by_split_metadata_and_labels_without_parsing_records(
    split_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = zp.Cohort(split_store)
    without_records(monkeypatch)
    assert cohort.where(split="train").names == ["sub-01", "sub-03"]
    assert cohort.where(split=["train", "test"]).names == ["sub-01", "sub-02", "sub-03"]
    assert cohort.where(age=lambda age: age > 15).names == ["sub-02", "sub-03", "sub-04"]
    assert cohort.where(split="train", age=[20, 30]).names == ["sub-03"]
    assert cohort.where(age=20).where(split="train").names == []
    assert cohort.where(labels={"seg": [1]}).names == NAMES
    assert cohort.where(labels={"seg": [77]}).names == []
    assert cohort[2:].where(split="train").names == ["sub-03"]
    assert cohort.where().names == NAMES


def test_where_with_labels_is_what_the_voxels_say(cohort: zp.Cohort) -> None:
    values = {name: set(np.unique(cohort[name].seg.data).tolist()) for name in cohort.names}
    for label in set().union(*values.values()):
        expected = [name for name in cohort.names if label in values[name]]
        assert cohort.where(labels={"seg": [label]}).names == expected


@pytest.mark.parametrize(
    ("chosen", "error", "text"),
    [
        ({"split": "trian"}, UnknownNameError, "train"),
        ({"labels": {"sge": [1]}}, UnknownNameError, "seg"),
        ({"labels": {"t1": [1]}}, OptionError, "the labels of 't1' are not known"),
        ({"agee": 3}, UnknownNameError, "age"),
    ],
)
def test_where_refuses_what_no_subject_has(
    split_store: Path, chosen: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        zp.Cohort(split_store).where(**chosen)


def test_the_table_has_a_plain_row_for_each_image(split_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = zp.Cohort(split_store)
    images = [(subject, name, image) for subject in cohort for name, image in subject.images.items()]
    without_records(monkeypatch)
    rows = cohort.table
    assert [(row["subject"], row["image"]) for row in rows] == [(s.name, name) for s, name, _ in images]
    for row, (subject, _, image) in zip(rows, images, strict=True):
        assert (row["channels"], row["i"], row["j"], row["k"]) == image.shape
        assert (row["kind"], row["split"], row["age"]) == (image.kind, subject.split, subject.metadata["age"])
        assert (row["spacing_i"], row["spacing_j"], row["spacing_k"]) == pytest.approx(image.spacing)
        assert (row["labels"] is None) == (image.kind != "label")
        assert all(isinstance(value, str | int | float | list | None) for value in row.values())


def test_a_cohort_is_told_from_another_without_parsing_records(
    cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = subjects_digest(list(cohort))
    assert subjects_digest(cohort.map(lambda subject: subject)) == expected
    without_records(monkeypatch)
    assert subjects_digest(cohort) == expected
    assert subjects_digest(cohort[1:]) != expected


def test_a_queue_of_many_alike_subjects_parses_the_records_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        place = tmp_path / "source" / f"sub-{number:02}"
        place.mkdir(parents=True)
        image = nib.Nifti1Image(np.full((9, 9, 9 + (number == 7)), number, np.int16), np.eye(4))
        image.to_filename(place / "t1.nii.gz")
    zp.convert(tmp_path / "source", tmp_path / "store")
    parsed: list[Any] = []
    original = ImageRecord.from_json.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        ImageRecord,
        "from_json",
        classmethod(lambda cls, value, where: parsed.append(value["subject"]) or original(cls, value, where)),
    )
    with zp.Queue(zp.Cohort(tmp_path / "store"), zp.UniformSampler(8), patches_per_volume=1) as queue:
        queue.state_dict()
        assert queue.max_memory > 0
        assert set(parsed) == {"sub-00", "sub-07"}
        assert len(list(queue)) == 12
