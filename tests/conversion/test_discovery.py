"""The convention of a source, kinds and names from file names alone, and the checks of all cases."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from zpatch.conversion import discovery
from zpatch.conversion.cases import Case
from zpatch.conversion.conversion_options import FORMATS, ConvertOptions
from zpatch.errors import OptionError, SourceError

Found = dict[str, dict[str, str]]


def discover(source: Path, **options: Any) -> discovery.Discovery:
    return discovery.discover(source, ConvertOptions(**options))


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


def complaint(source: Path) -> str:
    """Why the cases of a source are refused."""
    discovery = discover(source)
    assert discovery.refused
    return "\n".join(reason for _, reason in discovery.refused)


def kind_of(source: Path, name: str, **patterns: list[str]) -> str:
    [case] = discover(touch(source, name), **patterns).cases
    [image] = case.images
    return image.kind


def test_a_folder_is_a_subject_and_its_files_are_the_images(source: Path) -> None:
    touch(source, "sub-02/t1.nii.gz", "sub-01/t1.nii.gz", "sub-01/t2.nii", "sub-01/seg.nii.gz")
    cases = discover(source).cases
    assert found(cases) == {
        "sub-01": {"seg": "label", "t1": "scalar", "t2": "scalar"},
        "sub-02": {"t1": "scalar"},
    }
    assert [image.path.name for image in cases[0].images] == ["seg.nii.gz", "t1.nii.gz", "t2.nii"]


def test_flat_files_that_share_a_subject_are_its_images(source: Path) -> None:
    touch(source, "a_t1.nii", "a_seg.nii.gz", "b_01_t1.nii", "b_01_t2.nii")
    assert found(discover(source).cases) == {
        "a": {"t1": "scalar", "seg": "label"},
        "b_01": {"t1": "scalar", "t2": "scalar"},
    }


def test_a_flat_file_on_its_own_is_a_subject_with_the_image_image(source: Path) -> None:
    touch(source, "brain.nii.gz", "heart_ct.nii", "liver_ct.nii", "knee_seg.nii")
    assert found(discover(source).cases) == {
        "brain": {"image": "scalar"},
        "heart_ct": {"image": "scalar"},
        "liver_ct": {"image": "scalar"},
        "knee_seg": {"image": "label"},
    }


def test_flat_files_and_folders_may_be_mixed(source: Path) -> None:
    touch(source, "sub-01/t1.nii", "sub-02_t1.nii", "sub-02_seg.nii", "lone.nii")
    assert found(discover(source).cases) == {
        "lone": {"image": "scalar"},
        "sub-01": {"t1": "scalar"},
        "sub-02": {"t1": "scalar", "seg": "label"},
    }


@pytest.mark.parametrize("stem", ["seg", "dseg", "label", "labels", "mask", "brain-mask", "T1_SEG", "aseg"])
def test_names_with_an_ending_of_label_maps_are_label_maps(source: Path, stem: str) -> None:
    assert kind_of(source, f"sub-01/{stem}.nii.gz") == "label"


@pytest.mark.parametrize("stem", ["t1", "segmented", "masked", "label_0", "unlabelled", "GM_probseg"])
def test_other_names_are_images(source: Path, stem: str) -> None:
    assert kind_of(source, f"sub-01/{stem}.nii.gz") == "scalar"


@pytest.mark.parametrize("folder", ["labels", "labelsTr", "Labels_manual"])
def test_files_in_folders_called_labels_are_label_maps(source: Path, folder: str) -> None:
    assert kind_of(source, f"{folder}/tissue.nii.gz") == "label"


def test_a_source_folder_called_labels_makes_no_label_maps(tmp_path: Path) -> None:
    assert kind_of(tmp_path / "labels", "sub-01/t1.nii") == "scalar"


@pytest.mark.parametrize("pattern", ["tissue*", "tissue.nii.gz", "tissue", "sub-01/*", "*/tissue.*"])
def test_a_label_pattern_matches_a_stem_a_name_or_a_path(source: Path, pattern: str) -> None:
    assert kind_of(source, "sub-01/tissue.nii.gz", label_patterns=[pattern]) == "label"


def test_label_patterns_replace_the_usual_names(source: Path) -> None:
    touch(source, "sub-01/tissue.nii", "sub-01/seg.nii", "sub-01/lesion.nii")
    [case] = discover(source, label_patterns=["tissue", "les*"]).cases
    assert found([case])["sub-01"] == {"tissue": "label", "seg": "scalar", "lesion": "label"}


def test_sampling_patterns_take_precedence_over_label_patterns(source: Path) -> None:
    touch(source, "sub-01/mask.nii", "sub-01/seg.nii")
    [case] = discover(source, sampling_patterns=["mask"]).cases
    assert found([case])["sub-01"] == {"mask": "sampling", "seg": "label"}


def test_hidden_files_and_folders_and_other_files_are_ignored(source: Path) -> None:
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
    assert found(discover(source).cases) == {"sub-01": {"t1": "scalar"}}


def test_a_broken_link_counts_as_a_file_so_that_its_case_is_reported_as_failed(source: Path) -> None:
    touch(source, "sub-01/t1.nii")
    (source / "sub-01" / "t2.nii").symlink_to(source / "nowhere")
    assert found(discover(source).cases)["sub-01"] == {"t1": "scalar", "t2": "scalar"}


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
    assert list(found(discover(source, include=include, exclude=exclude).cases)) == kept


def test_patterns_that_leave_no_subject_are_an_error(source: Path) -> None:
    touch(source, "a/t1.nii", "b/t1.nii")
    with pytest.raises(SourceError, match="source: include= and exclude= leave none of 2 subjects"):
        discover(source, include=["c"])


def test_a_missing_source_is_an_error(source: Path) -> None:
    with pytest.raises(SourceError, match="source: it does not exist; name the folder that holds the images"):
        discover(source)


def test_a_source_that_is_a_file_is_an_error(source: Path) -> None:
    source.touch()
    with pytest.raises(SourceError, match="source: it is no folder; name the folder that holds the images"):
        discover(source)


def test_a_source_without_nifti_files_is_an_error(source: Path) -> None:
    touch(source, "sub-01/t1.dcm")
    with pytest.raises(SourceError, match=r"source: no NIfTI, NRRD or MetaImage file in it; name the folder"):
        discover(source)


def test_two_files_for_one_image_are_an_error_that_names_both(source: Path) -> None:
    touch(source, "sub-01/t1.nii", "sub-01/t1.nii.gz")
    assert re.search(
        r"'sub-01' has two files for the image 't1': .*t1.nii and .*t1.nii.gz; rename or remove one",
        complaint(source),
    )


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["Sub/t1.nii", "sub/t1.nii"], "subject names 'Sub' and 'sub' differ in case only; rename one"),
        (["sub/T1.nii", "sub/t1.nii"], "image (of subject 'sub') names 'T1' and 't1' differ in case only"),
    ],
)
def test_names_that_differ_in_case_only_are_an_error(source: Path, names: list[str], why: str) -> None:
    assert why in complaint(touch(source, *names))


@pytest.mark.parametrize("bad", ["_a", "-a", "a b", "ä", "a" * 129, "a\n", "a:b"])
def test_a_name_that_could_not_be_a_folder_everywhere_is_quoted_in_the_error(source: Path, bad: str) -> None:
    said = complaint(touch(source, f"{bad}/t1.nii"))
    assert f"subject name {bad!r} is not usable: it must start" in said
    said = complaint(touch(source / "other", f"sub/{bad}.nii"))
    assert f"image name {bad!r} is not usable: it must start" in said


def test_bad_names_are_refused_together_and_the_good_ones_are_kept(source: Path) -> None:
    touch(
        source, "good/t1.nii", "a b/t1.nii", "ä/t1.nii", "X/t1.nii", "x/t1.nii", "two/t1.nii", "two/t1.nii.gz"
    )
    discovery = discover(source)
    assert list(found(discovery.cases)) == ["good"]
    assert sorted(subject for subject, _ in discovery.refused) == ["X", "a b", "two", "x", "ä"]
    for _, reason in discovery.refused:
        assert str(source) in reason
        assert "; rename" in reason
        assert reason.endswith("in a table: a .csv with columns subject and one for each image")


def test_folders_of_one_name_in_different_folders_are_different_subjects(source: Path) -> None:
    touch(
        source, "siteA/s1/t1.nii", "siteB/s1/t1.nii", "siteB/s1/images/t2.nii", "siteB/s2/t1.nii", "flat.nii"
    )
    discovery = discover(source)
    assert found(discovery.cases) == {
        "flat": {"image": "scalar"},
        "siteA-s1": {"t1": "scalar"},
        "siteB-s1": {"t1": "scalar", "t2": "scalar"},
        "siteB-s2": {"t1": "scalar"},
    }
    assert discovery.notes == (
        "subjects are named by all folders above their files, as 'siteA-s1': some share a name",
    )
    other = touch(source.with_name("other"), "siteA/s1/t1.nii", "siteB/s2/t1.nii")
    assert list(found(discover(other).cases)) == ["s1", "s2"]


@pytest.mark.parametrize("names", [["Dataset001_Brain"], ["Task01_A", "Task02_B"]])
def test_a_folder_of_datasets_says_to_name_one_of_them(source: Path, names: list[str]) -> None:
    for name in names:
        touch(source, f"{name}/imagesTr/a_0000.nii.gz", f"{name}/labelsTr/a.nii.gz", f"{name}/dataset.json")
    count = f"{len(names)} dataset" + "s" * (len(names) > 1)
    why = f"source: it holds {count} ({', '.join(names)}); name one of them, as {source / names[0]}"
    with pytest.raises(SourceError, match=re.escape(why)):
        discover(source)
    assert discover(source, format="glob").format == "glob"


def test_an_excluded_subject_may_have_a_bad_name(source: Path) -> None:
    touch(source, "good/t1.nii", "bad name/t1.nii")
    assert list(found(discover(source, exclude=["bad*"]).cases)) == ["good"]


def test_discovery_does_not_open_any_file(source: Path) -> None:
    touch(source, "sub-01/t1.nii")  # an empty file is not NIfTI, but is not opened
    assert found(discover(source).cases) == {"sub-01": {"t1": "scalar"}}


def test_files_in_images_and_labels_are_flat_files_of_their_stems(source: Path) -> None:
    touch(source, "images/a.nii.gz", "labels/a.nii.gz", "images/b_1.nii", "images/b_2.nii", "labels/b_1.nii")
    assert found(discover(source).cases) == {
        "a": {"image": "scalar", "label": "label"},
        "b_1": {"image": "scalar", "label": "label"},
        "b_2": {"image": "scalar"},
    }


def test_a_file_in_images_is_never_a_label_map(source: Path) -> None:
    assert kind_of(source, "imagesTr/patient_mask.nii") == "scalar"


def test_a_folder_of_labels_or_images_below_a_subject_belongs_to_it(source: Path) -> None:
    touch(source, "sub-01/t1.nii", "sub-01/labels/x.nii.gz", "site/sub-02/images/t1.nii")
    assert found(discover(source).cases) == {
        "sub-01": {"x": "label", "t1": "scalar"},
        "sub-02": {"t1": "scalar"},
    }


def test_a_pair_counts_once_by_its_header_and_a_lone_img_not_at_all(source: Path) -> None:
    touch(source, "sub-01/t1.hdr", "sub-01/t1.img", "sub-01/t2.img")
    [case] = discover(source).cases
    assert [(image.name, image.path.name) for image in case.images] == [("t1", "t1.hdr")]


def test_linked_files_are_taken_and_linked_folders_are_reported_as_left_out(source: Path) -> None:
    touch(source.parent / "elsewhere", "sub-09/t1.nii")
    touch(source, "sub-01/t2.nii")
    (source / "sub-01" / "t1.nii").symlink_to(source.parent / "elsewhere" / "sub-09" / "t1.nii")
    (source / "sub-09").symlink_to(source.parent / "elsewhere" / "sub-09")
    (source / "sub-01" / "loop").symlink_to(source)
    holds = discover(source)
    assert found(holds.cases) == {"sub-01": {"t1": "scalar", "t2": "scalar"}}
    assert holds.notes == ("2 linked folders (sub-01/loop, sub-09) not followed",)


def test_the_error_about_a_source_of_linked_folders_only_says_why(source: Path) -> None:
    touch(source.parent / "elsewhere", "t1.nii")
    source.mkdir()
    (source / "sub-01").symlink_to(source.parent / "elsewhere")
    with pytest.raises(SourceError, match=r"no NIfTI.* in it \(1 linked folder \(sub-01\) not followed\)"):
        discover(source)


LOOKS = {
    "plain subject folders": ("glob", ["sub-01/t1.nii"]),
    "flat files": ("glob", ["a_t1.nii", "a_seg.nii"]),
    "a description": ("bids", ["dataset_description.json", "sub-01/t1.nii"]),
    "a description without subjects": ("glob", ["dataset_description.json", "a/t1.nii"]),
    "modality folders": ("bids", ["sub-01/anat/sub-01_T1w.nii"]),
    "sessions": ("bids", ["sub-01/ses-1/anat/sub-01_ses-1_T1w.nii"]),
    "modality folders of the last subject": ("bids", ["sub-01/notes.txt", "sub-02/dwi/sub-02_dwi.nii"]),
    "folders without a description of theirs": ("glob", ["sub-01/labels/x.nii"]),
    "nnU-Net folders without a description": ("glob", ["imagesTr/a.nii", "labelsTr/a.nii"]),
}


@pytest.mark.parametrize("looks", LOOKS)
def test_the_convention_of_a_folder_is_detected_by_its_files(source: Path, looks: str) -> None:
    expected, files = LOOKS[looks]
    assert discover(touch(source, *files)).format == expected


DATASETS = {
    "nnunet": '{"channel_names": {"0": "CT"}, "labels": {"background": 0}}',
    "msd": '{"modality": {"0": "CT"}, "training": [{"image": "imagesTr/a_0000.nii", "label": "b.nii"}]}',
    "glob": '{"name": "neither"}',
}


@pytest.mark.parametrize("expected", DATASETS)
def test_the_convention_of_a_folder_with_a_dataset_json_is_detected_by_its_contents(
    source: Path, expected: str
) -> None:
    touch(source, "imagesTr/a_0000.nii")
    (source / "dataset.json").write_text(DATASETS[expected])
    assert discover(source).format == expected


def test_a_dataset_json_without_images_beside_it_is_not_read(source: Path) -> None:
    touch(source, "sub-01/t1.nii")
    (source / "dataset.json").write_text("{")
    assert discover(source).format == "glob"


LISTS = {
    "cohort.csv": ("csv", "subject,t1\na,t1.nii\n"),
    "cohort.tsv": ("csv", "subject\tt1\na\tt1.nii\n"),
    "monai.json": ("json", '{"training": [{"image": "a.nii", "label": "b.nii"}]}'),
    "decathlon.json": ("msd", '{"modality": {"0": "MR"}, "training": [{"image": "a.nii"}]}'),
    "plain.json": ("json", '[{"image": "a.nii"}]'),
}


@pytest.mark.parametrize("name", LISTS)
def test_the_format_of_a_list_is_detected_by_its_suffix_and_keys(tmp_path: Path, name: str) -> None:
    expected, text = LISTS[name]
    (tmp_path / name).write_text(text)
    holds = discover(tmp_path / name)
    assert (holds.format, holds.folder) == (expected, tmp_path)


def test_the_dataset_json_of_an_nnunet_folder_stands_for_the_folder(source: Path) -> None:
    touch(source, "imagesTr/a_0000.nii")
    (source / "dataset.json").write_text(DATASETS["nnunet"])
    holds = discover(source / "dataset.json")
    assert (holds.format, holds.folder) == ("nnunet", source)


def test_a_format_may_be_forced(source: Path) -> None:
    touch(source, "sub-01/anat/T1w.nii")
    assert discover(source, format="glob").cases[0].subject == "anat"
    assert discover(source, format="bids").cases[0].subject == "sub-01"


def test_an_unknown_format_is_an_error_that_lists_them(source: Path) -> None:
    with pytest.raises(OptionError, match=f"format must be one of {', '.join(FORMATS)}, not 'dicom'"):
        discover(source, format="dicom")


@pytest.mark.parametrize(
    ("format_", "name", "why"),
    [
        ("csv", "", "it is a folder; name the .csv file that lists the images"),
        ("json", "", "it is a folder; name the .json file that lists the images"),
        ("bids", "list.csv", "it is no folder; name the folder that holds the images"),
        (
            "bids",
            "",
            "no NIfTI, NRRD or MetaImage file in its sub-* folders; name the folder",
        ),
        ("msd", "", "dataset.json: it cannot be read (No such file or directory)"),
        ("nnunet", "", "dataset.json: it cannot be read (No such file or directory)"),
    ],
)
def test_a_format_that_does_not_fit_its_source_is_an_error(
    source: Path, format_: str, name: str, why: str
) -> None:
    touch(source, "a.nii", "list.csv")
    with pytest.raises(SourceError, match=re.escape(why)):
        discover(source / name, format=format_)


def test_a_limit_takes_the_first_of_the_chosen_subjects(source: Path) -> None:
    touch(source, "a-1/t1.nii", "a-2/t1.nii", "b-1/t1.nii", "b-2/t1.nii")
    assert list(found(discover(source, limit=3).cases)) == ["a-1", "a-2", "b-1"]
    assert list(found(discover(source, include=["b-*"], limit=1).cases)) == ["b-1"]
    assert len(discover(source, limit=9).cases) == 4
    with pytest.raises(OptionError, match="limit must be at least 1 subject, not 0"):
        discover(source, limit=0)


def test_a_folder_that_cannot_be_read_is_an_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(source, "a.nii")

    def refuse(folder: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zpatch.conversion.source_files.os.scandir", refuse)
    with pytest.raises(SourceError, match=r"source: it cannot be read \(Permission denied\)"):
        discover(source)


def test_thousands_of_subjects_need_one_listing_each(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(source, *(f"sub-{n:03d}/anat/sub-{n:03d}_T1w.nii" for n in range(200)))
    (source / "participants.tsv").write_text(
        "participant_id\tage\n" + "".join(f"sub-{n:03d}\t{n}\n" for n in range(200))
    )
    looks = []
    real = os.scandir
    monkeypatch.setattr(
        "zpatch.conversion.source_files.os.scandir", lambda folder: looks.append(folder) or real(folder)
    )
    assert [case.meta["age"] for case in discover(source).cases] == list(range(200))
    assert len(looks) <= 2 * 200 + 3
