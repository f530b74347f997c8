"""What a cohort mixes is said by convert, info and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import zpatch as zp
from zpatch.images.mixtures import ComparedImage, compared_images, mixtures, orientation_of

Run = Callable[..., tuple[int, str, str]]


def save(
    folder: Path, subject: str, *, scale: float = 1, offset: float = 0, labels: int = 2, **grid: Any
) -> None:
    """A T1 of noise from 0 to 1000, and a label map."""
    rng = np.random.default_rng(len(subject))
    shape, affine = grid.get("shape", (8, 9, 10)), np.diag([*grid.get("spacing", (1, 1, 1)), 1.0])
    t1 = nib.Nifti1Image((rng.uniform(0, 1000, shape) * scale + offset).astype(np.float32), affine)
    seg = nib.Nifti1Image(rng.integers(0, labels + 1, shape).astype(np.uint8), affine)
    for name, image in (("t1", t1), ("seg", seg)):
        if "axes" in grid:
            turn = nib.orientations.ornt_transform(
                nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(grid["axes"])
            )
            image = image.as_reoriented(turn)
        (folder / subject).mkdir(parents=True, exist_ok=True)
        image.to_filename(folder / subject / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number in range(4):
        save(folder, f"sub-{number}")
    save(folder, "coarse", spacing=(2, 2, 2.5), shape=(4, 4, 4))
    save(folder, "turned", axes="PIR")
    save(folder, "unit", scale=1e-3)
    save(folder, "below", offset=-500)
    save(folder, "empty", labels=0)
    return folder


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "store"
    zp.convert(source, path)
    return path


MIXED = [
    ("seg", "2 spacings in mm: 1 x 1 x 1 (8 subjects), 2 x 2 x 2.5 (coarse)"),
    ("seg", "2 orientations: RAS (8 subjects), PIR (turned)"),
    ("seg", "3 shapes, from 4 x 4 x 4 to 9 x 10 x 10 voxels (I x J x K)"),
    ("t1", "2 spacings in mm: 1 x 1 x 1 (8 subjects), 2 x 2 x 2.5 (coarse)"),
    ("t1", "2 orientations: RAS (8 subjects), PIR (turned)"),
    ("t1", "3 shapes, from 4 x 4 x 4 to 9 x 10 x 10 voxels (I x J x K)"),
]


def test_spacings_orientations_shapes_and_ranges_are_named_with_their_subjects(store: Path) -> None:
    *found, ranges = mixtures(compared_images(zp.Cohort(store).store.manifest))
    assert found == MIXED
    assert ranges[0] == "t1"
    assert ranges[1].startswith("other intensities in below, unit, as -49")
    assert ranges[1].endswith("are they of one unit?")


def test_subjects_that_are_alike_mix_nothing(store: Path) -> None:
    cohort = zp.Cohort(store).matching(["sub-*"])
    records = [image.record for subject in cohort for image in subject.images.values()]
    assert mixtures(ComparedImage.of(record) for record in records if record) == []
    assert mixtures([]) == []


def test_orientations_are_those_of_nibabel(store: Path) -> None:
    for subject in zp.Cohort(store):
        record = subject.t1.record
        assert record is not None
        assert orientation_of(record) == "".join(nib.aff2axcodes(subject.t1.affine))


def test_convert_says_it_when_it_ends_and_info_whenever_it_is_asked(
    source: Path, store: Path, tmp_path: Path, run: Run
) -> None:
    code, _, stderr = run("convert", source, tmp_path / "store")
    assert code == 0
    _, stdout, _ = run("info", store)
    for image, text in MIXED:
        assert f"note: {image}: {text}" in stderr.splitlines()
        assert f"{image}: {text}" in stdout.splitlines()
    heading = next(line for line in stdout.splitlines() if line.startswith("subject"))
    assert "shape I x J x K" in heading
    assert "axes" in heading
    assert "labels" in heading
    assert "split" not in heading  # no subject has one
    [row] = [line for line in stdout.splitlines() if line.startswith("turned") and " seg " in line]
    assert "9x10x8" in row
    assert "PIR" in row
    assert row.rstrip().endswith("0 1 2")


def test_shapes_of_json_have_the_order_of_the_table(
    store: Path, source: Path, tmp_path: Path, run: Run
) -> None:
    _, stdout, _ = run("info", store, "--json")
    [turned] = [
        image
        for image in json.loads(stdout)["images"]
        if image["subject"] == "turned" and image["image"] == "t1"
    ]
    assert (turned["shape"], turned["shape_axes"], turned["orientation"]) == ([9, 10, 8], "IJK", "PIR")
    assert (turned["stored_shape"], turned["axes"]) == ([8, 10, 9], "zyx")
    _, stdout, _ = run("convert", source, tmp_path / "store", "--dry-run", "--json")
    planned = {(one["subject"], one["image"]): one for one in json.loads(stdout)["images"]}
    assert (planned["turned", "t1"]["shape"], planned["turned", "t1"]["shape_axes"]) == ([9, 10, 8], "IJK")


def test_the_report_lists_it_and_marks_empty_label_maps(store: Path, tmp_path: Path) -> None:
    report = zp.write_report(store, tmp_path / "report.html")
    found = {(problem.subject, problem.image, problem.text) for problem in report.problems}
    assert ("empty", "seg", "it is empty: all of its voxels are 0") in found
    for image, text in MIXED:
        assert ((None, image, f"it has {text}") in found) == ("shapes" not in text)
    assert "it has 2 orientations: RAS (8 subjects), PIR (turned)" in (tmp_path / "report.html").read_text()
