"""Which files become which images of which subjects, by their folders and names alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zpatch.discovery import Case, discover
from zpatch.errors import SourceError

Found = dict[str, dict[str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


def touch(source: Path, *names: str) -> Path:
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    return source


def found(cases: list[Case]) -> Found:
    """Subject -> image -> kind."""
    return {case.subject: {image.name: image.kind for image in case.images} for case in cases}


def kind_of(source: Path, name: str, **patterns: list[str]) -> str:
    [case] = discover(touch(source, name), **patterns)
    [image] = case.images
    return image.kind


def test_a_folder_is_a_subject_and_its_files_are_the_images(source: Path) -> None:
    touch(source, "sub-02/t1.nii.gz", "sub-01/t1.nii.gz", "sub-01/t2.nii", "sub-01/seg.nii.gz")
    cases = discover(source)
    assert found(cases) == {
        "sub-01": {"seg": "label", "t1": "scalar", "t2": "scalar"},
        "sub-02": {"t1": "scalar"},
    }
    assert [image.path.name for image in cases[0].images] == ["seg.nii.gz", "t1.nii.gz", "t2.nii"]


def test_flat_files_that_share_a_subject_are_its_images(source: Path) -> None:
    touch(source, "a_t1.nii", "a_seg.nii.gz", "b_01_t1.nii", "b_01_t2.nii")
    assert found(discover(source)) == {
        "a": {"t1": "scalar", "seg": "label"},
        "b_01": {"t1": "scalar", "t2": "scalar"},
    }


def test_a_flat_file_on_its_own_is_a_subject_with_the_image_image(source: Path) -> None:
    touch(source, "brain.nii.gz", "heart_ct.nii", "liver_ct.nii", "knee_seg.nii")
    assert found(discover(source)) == {
        "brain": {"image": "scalar"},
        "heart_ct": {"image": "scalar"},
        "liver_ct": {"image": "scalar"},
        "knee_seg": {"image": "label"},
    }


def test_flat_files_and_folders_may_stand_together(source: Path) -> None:
    touch(source, "sub-01/t1.nii", "sub-02_t1.nii", "sub-02_seg.nii", "lone.nii")
    assert found(discover(source)) == {
        "lone": {"image": "scalar"},
        "sub-01": {"t1": "scalar"},
        "sub-02": {"t1": "scalar", "seg": "label"},
    }


@pytest.mark.parametrize("stem", ["seg", "dseg", "label", "labels", "mask", "brain-mask", "T1_SEG", "aseg"])
def test_names_that_end_as_label_maps_do_are_label_maps(source: Path, stem: str) -> None:
    assert kind_of(source, f"sub-01/{stem}.nii.gz") == "label"


@pytest.mark.parametrize("stem", ["t1", "segmented", "masked", "label_0", "unlabelled"])
def test_other_names_are_images(source: Path, stem: str) -> None:
    assert kind_of(source, f"sub-01/{stem}.nii.gz") == "scalar"


@pytest.mark.parametrize("folder", ["labels", "labelsTr", "Labels_manual"])
def test_files_in_folders_called_labels_are_label_maps(source: Path, folder: str) -> None:
    assert kind_of(source, f"{folder}/tissue.nii.gz") == "label"


def test_a_source_folder_called_labels_makes_no_label_maps(tmp_path: Path) -> None:
    assert kind_of(tmp_path / "labels", "sub-01/t1.nii") == "scalar"


@pytest.mark.parametrize("pattern", ["tissue*", "tissue.nii.gz", "tissue", "sub-01/*", "*/tissue.*"])
def test_a_label_pattern_fits_a_stem_a_name_or_a_path(source: Path, pattern: str) -> None:
    assert kind_of(source, "sub-01/tissue.nii.gz", label_patterns=[pattern]) == "label"


def test_label_patterns_take_the_place_of_the_usual_names(source: Path) -> None:
    touch(source, "sub-01/tissue.nii", "sub-01/seg.nii", "sub-01/lesion.nii")
    [case] = discover(source, label_patterns=["tissue", "les*"])
    assert found([case])["sub-01"] == {"tissue": "label", "seg": "scalar", "lesion": "label"}


def test_sampling_patterns_come_before_label_patterns(source: Path) -> None:
    touch(source, "sub-01/mask.nii", "sub-01/seg.nii")
    [case] = discover(source, sampling_patterns=["mask"])
    assert found([case])["sub-01"] == {"mask": "sampling", "seg": "label"}


def test_hidden_files_and_folders_and_other_files_are_passed_over(source: Path) -> None:
    touch(
        source,
        "sub-01/t1.nii",
        "sub-01/._t1.nii",
        "sub-01/.t2.nii",
        "._sub-01/t1.nii",
        ".trash/sub-02/t1.nii",
        "sub-01/t1.json",
        "sub-01/t1.nii.gz.part",
        "readme.txt",
    )
    (source / "sub-01" / "folder.nii").mkdir()
    assert found(discover(source)) == {"sub-01": {"t1": "scalar"}}


def test_a_broken_link_is_a_file_so_that_its_case_fails_and_is_not_forgotten(source: Path) -> None:
    touch(source, "sub-01/t1.nii")
    (source / "sub-01" / "t2.nii").symlink_to(source / "nowhere")
    assert found(discover(source))["sub-01"] == {"t1": "scalar", "t2": "scalar"}


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        ([], [], ["a-1", "a-2", "b-1"]),
        (["a-*"], [], ["a-1", "a-2"]),
        (["a-1", "b-?"], [], ["a-1", "b-1"]),
        ([], ["*-1"], ["a-2"]),
        (["a-*"], ["a-2"], ["a-1"]),
        (["A-*", "b-*"], [], ["b-1"]),
    ],
)
def test_patterns_choose_subjects(
    source: Path, include: list[str], exclude: list[str], kept: list[str]
) -> None:
    touch(source, "a-1/t1.nii", "a-2/t1.nii", "b-1/t1.nii")
    assert list(found(discover(source, include=include, exclude=exclude))) == kept


def test_patterns_that_leave_no_subject_are_an_error(source: Path) -> None:
    touch(source, "a/t1.nii", "b/t1.nii")
    with pytest.raises(SourceError, match="source: --include and --exclude leave none of 2 subjects"):
        discover(source, include=["c"])


def test_a_source_that_is_not_there_is_an_error(source: Path) -> None:
    with pytest.raises(SourceError, match="source: it does not exist; name the folder that holds the NIfTI"):
        discover(source)


def test_a_source_that_is_a_file_is_an_error(source: Path) -> None:
    source.touch()
    with pytest.raises(SourceError, match="source: it is no folder; name the folder that holds the NIfTI"):
        discover(source)


def test_a_source_without_nifti_files_is_an_error(source: Path) -> None:
    touch(source, "sub-01/t1.dcm")
    with pytest.raises(SourceError, match=r"source: no .nii or .nii.gz file in it; name the folder"):
        discover(source)


def test_two_files_for_one_image_are_an_error_that_names_both(source: Path) -> None:
    touch(source, "sub-01/t1.nii", "sub-01/t1.nii.gz")
    with pytest.raises(
        SourceError,
        match=r"'sub-01' has two files for the image 't1': .*t1.nii and .*t1.nii.gz; rename or remove one",
    ):
        discover(source)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["Sub/t1.nii", "sub/t1.nii"], "subject names 'Sub' and 'sub' differ in case only; rename one"),
        (["sub/T1.nii", "sub/t1.nii"], "image (of subject 'sub') names 'T1' and 't1' differ in case only"),
    ],
)
def test_names_that_differ_in_case_only_are_an_error(source: Path, names: list[str], why: str) -> None:
    with pytest.raises(SourceError, match=re.escape(why)):
        discover(touch(source, *names))


@pytest.mark.parametrize("bad", ["_a", "-a", "a b", "ä", "a" * 129, "a\n", "a:b"])
def test_a_name_that_could_not_be_a_folder_everywhere_is_quoted_in_the_error(source: Path, bad: str) -> None:
    with pytest.raises(SourceError, match=re.escape(f"subject name {bad!r} is not usable: it must start")):
        discover(touch(source, f"{bad}/t1.nii"))
    with pytest.raises(SourceError, match=re.escape(f"image name {bad!r} is not usable: it must start")):
        discover(touch(source / "other", f"sub/{bad}.nii"))


def test_a_subject_that_is_not_wanted_may_have_a_bad_name(source: Path) -> None:
    touch(source, "good/t1.nii", "bad name/t1.nii")
    assert list(found(discover(source, exclude=["bad*"]))) == ["good"]


def test_discovery_does_not_open_any_file(source: Path) -> None:
    touch(source, "sub-01/t1.nii")  # an empty file is no NIfTI, and nobody has looked
    assert found(discover(source)) == {"sub-01": {"t1": "scalar"}}
