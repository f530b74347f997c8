"""Each convention: the cases, images, kinds, splits and metadata of its folders and lists."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import zpatch as zp
from zpatch.conversion import discovery as discovery_module
from zpatch.conversion.cases import Case
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.discovery import Discovery
from zpatch.errors import SourceError

PARTICIPANTS = "participants.tsv"


def discover(source: Path, **options: Any) -> Discovery:
    return discovery_module.discover(source, ConvertOptions(**options))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def touch(source: Path, *names: str) -> Path:
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    return source


def write(source: Path, name: str, content: Any) -> Path:
    """A list: text as it is, else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content)
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text(text, encoding="utf-8")
    return source / name


def found(discovery: Discovery) -> dict[str, dict[str, str]]:
    """Subject -> image -> kind."""
    return {case.subject: {image.name: image.kind for image in case.images} for case in discovery.cases}


def paths(case: Case, source: Path) -> dict[str, str]:
    """Image -> path below the source."""
    return {image.name: image.path.relative_to(source).as_posix() for image in case.images}


def splits(discovery: Discovery) -> dict[str, str | None]:
    return {case.subject: case.split for case in discovery.cases}


def refused(source: Path, why: str, **options: Any) -> None:
    """The source is refused, or all of its cases."""
    try:
        said = [reason for _, reason in discover(source, **options).refused]
    except SourceError as error:
        said = [str(error)]
    assert said
    for reason in said:
        assert why in reason
        assert "\n" not in reason


# BIDS


def test_bids_images_are_named_by_their_suffixes(source: Path) -> None:
    touch(source, *(f"sub-01/anat/sub-01_{suffix}.nii.gz" for suffix in ("T1w", "T2w", "FLAIR", "T2starw")))
    touch(source, "sub-01/func/sub-01_task-rest_bold.nii.gz", "sub-01/dwi/sub-01_dwi.nii.gz")
    touch(source, "sub-01/anat/sub-01_T1w.json", "code/x.nii", "sourcedata/sub-01/t1.nii")
    (source / "models").symlink_to(source / "code")
    names = ["t1", "t2", "flair", "t2starw", "bold", "dwi"]
    discovery = discover(source)
    assert found(discovery) == {"sub-01": dict.fromkeys(names, "scalar")}
    assert discovery.notes == ()


def test_bids_sessions_are_cases(source: Path) -> None:
    touch(
        source,
        "sub-01/ses-01/anat/sub-01_ses-01_T1w.nii",
        "sub-01/ses-02/anat/sub-01_ses-02_T1w.nii",
        "sub-02/anat/sub-02_T1w.nii",
    )
    assert found(discover(source)) == {
        "sub-01_ses-01": {"t1": "scalar"},
        "sub-01_ses-02": {"t1": "scalar"},
        "sub-02": {"t1": "scalar"},
    }


def test_bids_files_of_one_suffix_are_named_by_the_entities_that_differ(source: Path) -> None:
    touch(
        source,
        "sub-01/anat/sub-01_acq-mprage_run-1_T1w.nii",
        "sub-01/anat/sub-01_acq-mprage_run-2_T1w.nii",
        "sub-01/anat/sub-01_acq-tse_T2w.nii",
    )
    assert list(found(discover(source))["sub-01"]) == ["t1_run-1", "t1_run-2", "t2"]


def test_a_bids_image_name_means_the_same_in_every_case(source: Path) -> None:
    touch(
        source,
        "sub-01/anat/sub-01_acq-highres_T1w.nii",
        "sub-01/anat/sub-01_acq-fast_T1w.nii",
        "sub-02/anat/sub-02_acq-fast_T1w.nii",
        "sub-03/anat/sub-03_T1w.nii",
    )
    names = {subject: list(images) for subject, images in found(discover(source)).items()}
    assert names == {
        "sub-01": ["t1_acq-fast", "t1_acq-highres"],
        "sub-02": ["t1_acq-fast"],
        "sub-03": ["t1"],
    }


def test_label_maps_of_bids_derivatives_join_the_raw_images(source: Path) -> None:
    touch(
        source,
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_desc-lesion_mask.nii.gz",
        "derivatives/fs/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz",
        "derivatives/fs/sub-01/ses-1/sub-01_ses-1_seg.nii.gz",
    )
    [case] = discover(source).cases
    assert paths(case, source) == {
        "t1": "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "dseg": "derivatives/fs/sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz",
        "seg": "derivatives/fs/sub-01/ses-1/sub-01_ses-1_seg.nii.gz",
        "mask": "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_desc-lesion_mask.nii.gz",
    }
    assert [image.kind for image in case.images] == ["scalar", "label", "label", "label"]


def test_label_maps_of_two_pipelines_are_named_by_the_pipeline(source: Path) -> None:
    touch(source, "sub-01/anat/sub-01_T1w.nii")
    touch(source, *(f"derivatives/{name}/sub-01/anat/sub-01_dseg.nii" for name in ("FastSurfer 2", "synth")))
    assert list(found(discover(source))["sub-01"]) == [
        "t1",
        "dseg_pipeline-fastsurfer-2",
        "dseg_pipeline-synth",
    ]


def test_derived_images_that_are_on_no_raw_grid_are_reported_as_left_out(source: Path) -> None:
    touch(
        source,
        "sub-01/anat/sub-01_T1w.nii",
        "derivatives/prep/sub-01/anat/sub-01_space-MNI152NLin6Asym_dseg.nii",
        "derivatives/prep/sub-01/anat/sub-01_desc-preproc_T1w.nii",
        "derivatives/prep/sub-01/anat/sub-01_label-GM_probseg.nii",
        "derivatives/prep/sub-01/anat/sub-01_space-orig_dseg.nii",
        "derivatives/prep/sub-01/func/sub-01_task-rest_space-T1w_mask.nii",
    )
    discovery = discover(source)
    assert found(discovery) == {"sub-01": {"t1": "scalar", "dseg": "label"}}
    [note] = discovery.notes
    assert note.startswith("4 derived images (derivatives/prep/sub-01/anat/sub-01_desc-preproc_T1w.nii, ")
    assert "convert a pipeline's own folder" in note


def test_label_maps_in_the_space_of_the_raw_images_are_on_their_grid(source: Path) -> None:
    touch(source, "sub-1/anat/sub-1_space-MNI_T1w.nii", "derivatives/x/sub-1/anat/sub-1_space-MNI_mask.nii")
    assert found(discover(source)) == {"sub-1": {"t1": "scalar", "mask": "label"}}


def test_derivatives_on_their_own_give_all_of_their_images(source: Path) -> None:
    names = ["sub-01_desc-preproc_T1w.nii", "sub-01_space-MNI_desc-preproc_T1w.nii", "sub-01_dseg.nii"]
    images = {"dseg": "label", "t1": "scalar", "t1_space-MNI": "scalar"}
    touch(source / "prep", *(f"sub-01/anat/{name}" for name in names))
    assert found(discover(source / "prep")) == {"sub-01": images}
    touch(source / "all", "dataset_description.json", *(f"derivatives/prep/sub-01/{name}" for name in names))
    assert found(discover(source / "all")) == {"sub-01": images}


def test_bids_files_with_names_that_break_the_rules_keep_their_names(source: Path) -> None:
    touch(source, "sub-01/anat/T1.nii", "sub-01/anat/sub-01_ses-1.nii", "sub-01/anat/sub-01_T1w_seg.nii")
    assert found(discover(source)) == {
        "sub-01": {"t1": "scalar", "seg": "label"},
        "sub-01_ses-1": {"image": "scalar"},
    }


def test_participants_are_metadata_of_all_sessions(source: Path) -> None:
    touch(source, *(f"sub-01/ses-{n}/anat/sub-01_ses-{n}_T1w.nii" for n in (1, 2)), "sub-02/anat/T1w.nii")
    write(source, PARTICIPANTS, "participant_id\tage\tsex\tcode\tsplit\nsub-01\t34.5\tF\t007\ttrain\n")
    first, second, third = discover(source).cases
    assert first.meta == second.meta == {"age": 34.5, "sex": "F", "code": "007"}
    assert (first.split, second.split, third.split, third.meta) == ("train", "train", None, {})


def test_missing_values_of_participants_are_none_and_bare_labels_are_understood(source: Path) -> None:
    touch(source, "sub-01/anat/sub-01_T1w.nii")
    write(source, PARTICIPANTS, "\ufeffparticipant_id\tage\tsite\n01\tn/a\tNaN\n")
    assert discover(source).cases[0].meta == {"age": None, "site": None}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name\tage\nsub-01\t3\n", "participants.tsv: no column participant_id (it has: name, age); add it"),
        ("participant_id\tage\nsub-01\t3\t4\n", "participants.tsv, line 2: 3 cells under 2 columns"),
        ("participant_id\tage\nsub-01\t3\nsub-01\t4\n", "participants.tsv, line 3: sub-01 has a row already"),
    ],
)
def test_a_bad_participants_table_is_an_error_with_its_line(source: Path, text: str, why: str) -> None:
    touch(source, "sub-01/anat/sub-01_T1w.nii")
    write(source, PARTICIPANTS, text)
    refused(source, why)


# nnU-Net


def nnunet(source: Path, channels: Any = None, **more: Any) -> Path:
    channels = {"0": "CT contrast", "1": "ADC"} if channels is None else channels
    write(source, "dataset.json", {"channel_names": channels, "file_ending": ".nii.gz", **more})
    (source / "imagesTr").mkdir(exist_ok=True)
    return source


def test_nnunet_images_are_named_by_their_channels(source: Path) -> None:
    touch(
        nnunet(source),
        *("imagesTr/la_003_0000.nii.gz", "imagesTr/la_003_0001.nii.gz", "labelsTr/la_003.nii.gz"),
        *("imagesTs/la_009_0000.nii.gz", "imagesTr/notes.txt"),
    )
    discovery = discover(source)
    assert discovery.format == "nnunet"
    assert found(discovery) == {
        "la_003": {"ct-contrast": "scalar", "adc": "scalar", "seg": "label"},
        "la_009": {"ct-contrast": "scalar"},
    }
    assert splits(discovery) == {"la_003": "train", "la_009": "test"}


def test_nnunet_channels_of_one_name_or_of_no_usable_one_get_their_numbers(source: Path) -> None:
    channels = {"0": "noNorm", "1": "noNorm", "2": "相位", "3": "T1"}
    touch(nnunet(source, channels), *(f"imagesTr/a_000{n}.nii.gz" for n in range(4)))
    assert list(found(discover(source))["a"]) == ["nonorm-0", "nonorm-1", "channel-2", "t1"]


def test_nnunet_cases_may_be_listed_by_dataset_json(source: Path) -> None:
    listed = {"a": {"images": ["../raw/a_ct.nii.gz", "/data/adc.nii.gz"], "label": "a.nii.gz"}}
    [case] = discover(nnunet(source, dataset=listed)).cases
    assert [(image.name, str(image.path)) for image in case.images] == [
        ("ct-contrast", f"{source}/../raw/a_ct.nii.gz"),
        ("adc", "/data/adc.nii.gz"),
        ("seg", f"{source}/a.nii.gz"),
    ]


def test_a_folder_of_nnunet_1_is_understood_too(source: Path) -> None:
    listed = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    write(source, "dataset.json", {"modality": {"0": "MRI"}, "training": listed, "test": []})
    touch(source, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert found(discover(source)) == {"a": {"mri": "scalar", "seg": "label"}}
    assert discover(touch(source, "imagesTr/a.nii.gz")).format == "msd"


@pytest.mark.parametrize(
    ("channels", "name", "why"),
    [
        ({"0": "CT"}, "a.nii.gz", "a.nii.gz: its name does not end in a channel as in case_0000.nii.gz"),
        ({"0": "CT"}, "a_0001.nii.gz", "a_0001.nii.gz: channel 1 has no name in dataset.json (it names 0)"),
        (["CT"], "a_0000.nii.gz", "dataset.json: no channel_names of the form {'0': 'CT'}; add them"),
        ({"first": "CT"}, "a_0000.nii.gz", "dataset.json: no channel_names of the form"),
        ({"0": "CT"}, "a.png", "source: no NIfTI, NRRD or MetaImage file in its imagesTr and imagesTs"),
    ],
)
def test_an_oddity_in_an_nnunet_folder_is_an_error(source: Path, channels: Any, name: str, why: str) -> None:
    touch(nnunet(source, channels), f"imagesTr/{name}")
    refused(source, why)


def test_an_nnunet_case_that_is_listed_badly_is_an_error(source: Path) -> None:
    refused(
        nnunet(source, dataset={"a": {"images": "a.nii"}}), "dataset.json: dataset['a'] is not of the form"
    )


def test_a_case_in_training_and_in_test_is_an_error(source: Path) -> None:
    touch(nnunet(source), "imagesTr/a_0000.nii.gz", "imagesTs/a_0000.nii.gz")
    refused(source, "2 cases are called 'a' (also ")


# Medical Decathlon


def test_a_decathlon_task_is_read_from_its_lists(source: Path) -> None:
    document = {
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "edema"},
        "numTraining": 1,
        "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
        "test": ["./imagesTs/BRATS_485.nii.gz"],
    }
    write(source, "dataset.json", document)
    touch(source, "imagesTr/BRATS_001.nii.gz", "imagesTr/._BRATS_001.nii.gz", "imagesTr/unlisted.nii.gz")
    discovery = discover(source)
    assert discovery.format == "msd"
    assert found(discovery) == {
        "BRATS_001": {"image": "scalar", "label": "label"},
        "BRATS_485": {"image": "scalar"},
    }
    assert splits(discovery) == {"BRATS_001": "train", "BRATS_485": "test"}
    assert discovery.cases[0].meta == {"modality": ["FLAIR", "T1w"]}
    assert paths(discovery.cases[1], source) == {"image": "imagesTs/BRATS_485.nii.gz"}


# JSON datalists


def subjects(source: Path, *entries: Any) -> list[str]:
    return list(found(discover(write(source, "list.json", {"training": list(entries)}))))


def test_a_datalist_has_images_labels_folds_and_metadata(source: Path) -> None:
    document = {
        "name": "not a list",
        "numbers": [1, 2],
        "training": [
            {"image": "a.nii.gz", "label": "a_gt.nii.gz", "fold": 0, "age": 61},
            {"image": "b.nii.gz", "label": "b_gt.nii.gz", "fold": 3, "tags": ["x"], "prior": "p/b.nii.gz"},
            {"image": "c.nii.gz", "label": None},
        ],
        "validation": [{"image": "d.nii.gz", "label": "d_gt.nii.gz"}],
        "test": ["e.nii.gz"],
        "unlabelled": [{"image": "f.nii.gz", "label": 7}],
    }
    discovery = discover(write(source, "list.json", document))
    assert found(discovery) == {
        "a": {"image": "scalar", "label": "label"},
        "b": {"image": "scalar", "label": "label", "prior": "scalar"},
        "c": {"image": "scalar"},
        "d": {"image": "scalar", "label": "label"},
        "e": {"image": "scalar"},
        "f": {"image": "scalar"},
    }
    assert splits(discovery) == {
        "a": "fold-0",
        "b": "fold-3",
        "c": "train",
        "d": "validation",
        "e": "test",
        "f": "unlabelled",
    }
    assert [case.meta for case in discovery.cases] == [
        {"fold": 0, "age": 61},
        {"fold": 3, "tags": ["x"]},
        {},
        {},
        {},
        {"label": 7},
    ]


def test_a_bare_list_is_a_datalist_without_splits(source: Path) -> None:
    discovery = discover(write(source, "list.json", [{"image": "a.nii"}, {"t1": "b.nii"}, "c.nii"]))
    assert splits(discovery) == {"a": None, "b": None, "c": None}


def test_a_case_of_a_datalist_may_name_itself(source: Path) -> None:
    entries = [
        {"subject": "s1", "image": "x/a.nii"},
        {"case": 2, "id": 7, "image": "y/a.nii"},
        {"image": "z/a.nii"},
    ]
    assert subjects(source, *entries) == ["s1", "2", "z"]


def test_cases_of_a_datalist_are_named_by_the_shared_start_of_their_files(source: Path) -> None:
    entries = [{"image": f"imagesTr/la_{n}_0000.nii.gz", "label": f"labelsTr/la_{n}.nii.gz"} for n in (1, 2)]
    assert subjects(source, *entries, "imagesTs/la_9_0000.nii.gz") == ["la_1", "la_2", "la_9"]


def test_cases_of_a_datalist_are_named_by_their_first_file_if_files_share_no_start(source: Path) -> None:
    assert subjects(source, *({"image": f"img{n}.nii", "label": f"seg{n}.nii"} for n in (1, 2))) == [
        "img1",
        "img2",
    ]


def test_cases_of_a_datalist_are_named_by_their_folders_if_files_have_the_same_names(source: Path) -> None:
    assert subjects(source, *({"image": f"x/s{n}/t1.nii", "label": f"x/s{n}/seg.nii"} for n in (1, 2))) == [
        "s1",
        "s2",
    ]


def test_cases_of_a_datalist_are_named_by_their_paths_if_nothing_else_differs(
    source: Path,
) -> None:
    entries = ["../p/x/t1.nii", "../q/x/t1.nii", "/q/y/t1.nii"]
    assert subjects(source, *entries) == ["p_x_t1", "q_x_t1", "q_y_t1"]


@pytest.mark.parametrize(
    ("lists", "names"),
    [
        ([["a_t1.nii", "a_t1ce.nii"], ["b_t1.nii", "b_t1ce.nii"]], ["t1", "t1ce"]),
        ([["a_0000.nii", "a_0001.nii"], ["b_0000.nii", "b_0001.nii"]], ["image-0000", "image-0001"]),
        ([["a/ct.nii", "a/mr.nii"], ["b/ct.nii", "b/mr.nii"]], ["ct", "mr"]),
        ([["a_t1.nii", "a_t2.nii"], ["b_t1.nii", "b_flair.nii"]], ["image-0", "image-1"]),
        ([["x/a.nii", "y/a.nii"], ["x/b.nii", "y/b.nii"]], ["image-0", "image-1"]),
        (
            [["a_t1.nii", "x/a_t1.nii", "a_t2.nii"], ["b_t1.nii", "x/b_t1.nii", "b_t2.nii"]],
            ["image-0", "image-1", "image-2"],
        ),
    ],
)
def test_images_of_a_list_are_named_by_the_endings_that_differ_in_every_case(
    source: Path, lists: list[list[str]], names: list[str]
) -> None:
    file = write(source, "list.json", [{"image": texts} for texts in lists])
    assert [list(images) for images in found(discover(file)).values()] == [names, names]


def test_nan_and_infinity_in_json_become_none(source: Path) -> None:
    text = '[{"image": "a.nii", "x": NaN, "y": [-Infinity, 1e999], "z": 1.5}]'
    [case] = discover(write(source, "list.json", text)).cases
    assert case.meta == {"x": None, "y": [None, None], "z": 1.5}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"training": [\n{"image" "a.nii"}]}', "list.json, line 2: no valid JSON (Expecting ':' delimiter)"),
        ("[" * 100_000, "list.json: no usable JSON"),
        ('{"x": ' + "9" * 5000 + "}", "list.json: no usable JSON"),
        ("", "list.json, line 1: no valid JSON"),
        ({"training": []}, "list.json: no list of cases in it (as training, validation or test)"),
        ([], "list.json: no list of cases in it"),
        ("3", "list.json: no list of cases in it"),
        ({"training": [3]}, "list.json: training[0]: 3 is neither a file nor a dict of files; correct it"),
        ({"test": [{"image": 3}]}, "list.json: test[0]: its image is 3, which names no file; correct it"),
        ({"test": [{"image": "a\0b.nii"}]}, "test[0]: 'a\\x00b.nii' cannot be the name of a file"),
        ('[{"image": "\\ud800.nii"}]', "cannot be the name of a file"),
        ([{"image": "a.nii"}, {"image": "a.nii"}], "2 cases are called 'a' (also "),
        ([{"image": "a b.nii"}], "subject name 'a b' is not usable"),
        ([{"image": "a.nii", "my image": "b.nii"}], "image name 'my image' is not usable"),
        ([{"id": "A", "image": "a.nii"}, {"id": "a", "image": "b.nii"}], "differ in case only"),
    ],
)
def test_a_bad_datalist_is_an_error_that_says_where(source: Path, content: Any, why: str) -> None:
    refused(write(source, "list.json", content), why)


# Tables


def test_a_table_has_images_kinds_splits_and_metadata(source: Path) -> None:
    text = (
        "subject,split,t1,seg,label:tissue,sampling:weights,age,site,score\n"
        "a,train,a/t1.nii.gz,a/seg.nii,x/a.hdr,w.nii,61,Ulm,1.5\n"
        "b,,b/t1.img,,,,n/a,007,1e-3\n"
    )
    discovery = discover(write(source, "list.csv", text))
    assert discovery.format == "csv"
    assert found(discovery) == {
        "a": {"t1": "scalar", "seg": "label", "tissue": "label", "weights": "sampling"},
        "b": {"t1": "scalar"},
    }
    first, second = discovery.cases
    assert paths(first, source) == {
        "t1": "a/t1.nii.gz",
        "seg": "a/seg.nii",
        "tissue": "x/a.hdr",
        "weights": "w.nii",
    }
    assert paths(second, source) == {"t1": "b/t1.hdr"}
    assert (first.split, second.split) == ("train", None)
    assert first.meta == {"age": 61, "site": "Ulm", "score": 1.5}
    assert second.meta == {"age": None, "site": "007", "score": 0.001}


@pytest.mark.parametrize("column", ["seg", "my_seg", "label", "labels", "brain_mask"])
def test_a_column_with_a_name_of_label_maps_is_one(source: Path, column: str) -> None:
    file = write(source, "list.csv", f"id,{column}\na,a.nii\n")
    assert found(discover(file)) == {"a": {column: "label"}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.tsv", "case\tt1\tnote\na\ta.nii\tx, y\n"),
        ("list.csv", "case;t1;note\r\na;a.nii;x, y\r\n"),
        ("list.csv", '\ufeff"case" , t1,note\n\na,"a.nii","x, y"\n,,\n'),
        ("list.csv", ",case,t1,note\n0,a,a.nii,'x, y'\n".replace("'", '"')),
    ],
)
def test_tables_are_csv_with_commas_or_semicolons_or_tsv(source: Path, name: str, text: str) -> None:
    [case] = discover(write(source, name, text)).cases
    assert (case.subject, [image.name for image in case.images], case.meta) == ("a", ["t1"], {"note": "x, y"})


def test_a_second_name_column_is_metadata(source: Path) -> None:
    [case] = discover(write(source, "list.csv", "id,subject,t1\n7,a,a.nii\n")).cases
    assert (case.subject, case.meta) == ("a", {"id": 7})


def test_rows_without_images_are_reported_as_left_out(source: Path) -> None:
    discovery = discover(write(source, "list.csv", "subject,t1\na,a.nii\nb,\nc,n/a\n"))
    assert list(found(discovery)) == ["a"]
    assert discovery.notes == ("2 subjects (b, c) left out: no image is named for them",)


@pytest.mark.parametrize(
    "text", ["1_000", "12345678901234567890", "1.2.840.1", "inf", "0x1", "e5", "+7", "٣"]
)
def test_text_that_only_looks_like_a_number_stays_text(source: Path, text: str) -> None:
    [case] = discover(write(source, "list.csv", f"subject,t1,x\na,a.nii,{text}\n")).cases
    assert case.meta == {"x": text}


def test_paths_in_a_list_may_be_absolute_or_leave_its_folder(source: Path) -> None:
    file = write(source, "lists/list.csv", "subject,t1,t2\na,../a.nii,/data/b.nii\n")
    [case] = discover(file).cases
    assert [str(image.path) for image in case.images] == [f"{source}/lists/../a.nii", "/data/b.nii"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name,t1\na,a.nii\n", "list.csv: no column subject, case or id (it has: name, t1); add one"),
        ("", "list.csv: no column subject, case or id (it has: none); add one"),
        (
            "subject,age\na,3\n",
            "list.csv: no column holds files of images (values that end in .nii,",
        ),
        ("subject,t1\na,a.nii\nb,b.nii,3\n", "list.csv, line 3: 3 cells under 2 columns; correct that line"),
        ('subject,t1,x\na,a.nii,"1\n2"\nb,b.nii\n', "list.csv, line 4: 2 cells under 3 columns"),
        ("subject,t1\na,a.nii\n,b.nii\n", "list.csv, line 3: column subject is empty; name the case"),
        ("subject,t1\na,a.nii\na,b.nii\n", "list.csv, line 3: 'a' is on line 2 already; keep one row a case"),
        ("subject,t1,t1\na,a.nii,b.nii\n", "list.csv: two columns are called 't1'; rename one"),
        (
            "subject,t1\na,a.nii\nb,b.mgz\n",
            "list.csv, line 3: column 't1' has 'b.mgz', and files of im",
        ),
        ("subject,t1\na,a.nii\nA,b.nii\n", "subject names 'a' and 'A' differ in case only; rename one"),
        ("subject,t1\na b,a.nii\n", "subject name 'a b' is not usable"),
        ("subject,t 1\na,a.nii\n", "image name 't 1' is not usable"),
        ("subject,seg,label:seg\na,a.nii,b.nii\n", "subject 'a' has two files for the image 'seg'"),
        ("subject,label:x\na,\n", "no row in it (1 subject (a) left out: no image is named for them)"),
        ("subject,t1\n" + "a" * 200_000 + ",a.nii\n", "list.csv, line 2: no valid table (field larger than"),
    ],
)
def test_a_bad_table_is_an_error_that_says_where(source: Path, text: str, why: str) -> None:
    refused(write(source, "list.csv", text), why)


def test_a_table_of_many_columns_takes_time_in_proportion(source: Path) -> None:
    columns = [f"c{number}" for number in range(30_000)]
    start = time.process_time()
    [case] = discover(
        write(source, "list.csv", f"subject,{','.join(columns)}\na{',b.nii' * len(columns)}\n")
    ).cases
    assert time.process_time() - start < 5
    assert len(case.images) == len(columns)


def test_a_list_that_is_not_utf8_is_an_error(source: Path) -> None:
    (source / "list.csv").write_bytes("subject,t1\nJürgen,a.nii\n".encode("latin-1"))
    refused(source / "list.csv", "list.csv: it is not UTF-8 (byte 12); save it as UTF-8")


# All of them

Builder = Callable[[Path, Path], Path]


def as_bids(cohort: Path, source: Path) -> Path:
    for n, folder in enumerate(sorted(cohort.iterdir())):
        name = f"{folder.name}_ses-{n}"
        put(folder / "t1.nii.gz", source / folder.name / f"ses-{n}" / "anat" / f"{name}_T1w.nii.gz")
        put(folder / "seg.nii.gz", source / "derivatives/manual" / folder.name / f"anat/{name}_dseg.nii.gz")
    return source


def as_nnunet(cohort: Path, source: Path) -> Path:
    nnunet(source, {"0": "T1"})
    for folder in sorted(cohort.iterdir()):
        put(folder / "t1.nii.gz", source / "imagesTr" / f"{folder.name}_0000.nii.gz")
        put(folder / "seg.nii.gz", source / "labelsTr" / f"{folder.name}.nii.gz")
    return source


def as_msd(cohort: Path, source: Path) -> Path:
    names = [folder.name for folder in sorted(cohort.iterdir())]
    for name in names:
        put(cohort / name / "t1.nii.gz", source / "imagesTr" / f"{name}.nii.gz")
        put(cohort / name / "seg.nii.gz", source / "labelsTr" / f"{name}.nii.gz")
    listed = [{key: f"./{key}sTr/{name}.nii.gz" for key in ("image", "label")} for name in names]
    write(source, "dataset.json", {"modality": {"0": "T1"}, "training": listed, "test": []})
    return source


def as_json(cohort: Path, source: Path) -> Path:
    folders = [folder.name for folder in sorted(cohort.iterdir())]
    shutil.copytree(cohort, source, dirs_exist_ok=True)
    listed = [{"image": f"../{name}/t1.nii.gz", "label": f"../{name}/seg.nii.gz"} for name in folders]
    return write(source, "lists/fold.json", {"training": listed[:2], "validation": listed[2:]})


def as_csv(cohort: Path, source: Path) -> Path:
    rows = [f"{folder.name},{folder}/t1.nii.gz,{folder}/seg.nii.gz" for folder in sorted(cohort.iterdir())]
    return write(source, "cohort.csv", "\n".join(["subject,t1,label:tissue", *rows]))


def as_pairs(cohort: Path, source: Path) -> Path:
    """Folders of .hdr/.img pairs, which glob finds."""
    for file in cohort.rglob("*.nii.gz"):
        image = nib.load(file)
        pair = nib.Nifti1Pair(np.asanyarray(image.dataobj.get_unscaled()), image.affine, dtype=np.float32)
        (source / file.parent.name).mkdir(exist_ok=True)
        pair.to_filename(source / file.parent.name / f"{file.name.removesuffix('.nii.gz')}.hdr")
    return source


def as_glob(cohort: Path, source: Path) -> Path:
    for folder in cohort.iterdir():
        put(folder / "t1.nii.gz", source / "images" / f"{folder.name}.nii.gz")
        put(folder / "seg.nii.gz", source / "labels" / f"{folder.name}.nii.gz")
    return source


def put(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.symlink_to(file)  # as in a datalad dataset


def header_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data)[:348]


@pytest.mark.parametrize("build", [as_bids, as_nnunet, as_msd, as_json, as_csv, as_glob, as_pairs])
def test_a_cohort_in_each_convention_is_converted_exactly(
    cohort_source: Path, source: Path, tmp_path: Path, build: Builder
) -> None:
    where = build(cohort_source, source)
    discovery = discover(where)
    zp.convert(where, tmp_path / "store", chunk=16)
    cohort = zp.Cohort(tmp_path / "store")
    assert cohort.names == [case.subject for case in discovery.cases]
    assert len(cohort) == len(list(cohort_source.iterdir()))
    for case in discovery.cases:
        subject = cohort[case.subject]
        assert (subject.split, subject.metadata) == (case.split, case.meta)
        assert sorted(image.kind for image in case.images) == ["label", "scalar"]
        for source_image in case.images:
            image, original = subject[source_image.name], nib.load(source_image.path)
            np.testing.assert_array_equal(image.data[0], np.asanyarray(original.dataobj))
            np.testing.assert_array_equal(image.affine, original.affine)
            assert isinstance(image, zp.LabelMap) == (source_image.kind == "label")
    for exported in zp.export(tmp_path / "store", tmp_path / "out"):
        [image] = [
            image.path
            for case in discovery.cases
            for image in case.images
            if (case.subject, f"{image.name}.nii.gz") == (exported.parent.name, exported.name)
        ]
        if image.suffix == ".gz":  # a pair is exported as one file, with another header
            assert header_bytes(exported) == header_bytes(image)


def test_patterns_change_kinds_in_every_convention(source: Path) -> None:
    file = write(source, "list.csv", "subject,t1,prob,seg\na,x/t1.nii,x/p.nii,x/s.nii\n")
    kinds = found(discover(file, label_patterns=["x/t1.*"], sampling_patterns=["prob"]))["a"]
    assert kinds == {"t1": "label", "prob": "sampling", "seg": "label"}
    touch(nnunet(source), "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    kinds = found(discover(source, label_patterns=["adc"], sampling_patterns=["*_0000.*"]))["a"]
    assert kinds == {"ct-contrast": "sampling", "adc": "label", "seg": "label"}


def test_listed_files_that_are_missing_fail_their_case_alone(
    cohort_source: Path, source: Path, tmp_path: Path
) -> None:
    text = f"subject,t1\na,{cohort_source}/sub-01/t1.nii.gz\nb,gone.nii.gz\n"
    report = zp.convert(write(source, "list.csv", text), tmp_path / "store")
    assert [record.subject for record in report.records] == ["a"]
    [failure] = report.failures
    assert failure.subject == "b"
    assert re.search(r"gone.nii.gz: it cannot be read \(No such file", failure.reason)
