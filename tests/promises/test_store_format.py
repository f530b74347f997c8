"""docs/reference/store-format.md is enough to read a store: a reader that follows it agrees with zpatch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import store_reader
from store_reader import read_manifest, read_values, verify

import zpatch as zp
from zpatch.records.names import MANIFEST


@pytest.mark.parametrize("codec", ["lz4", "none", "zstd"])
def test_a_reader_by_the_specification_reads_the_values_of_a_store(
    cohort_source: Path, tmp_path: Path, codec: str
) -> None:
    subjects = ["sub-01"] if codec == "zstd" else ["sub-01", "sub-03"]  # of the last, one has a slope
    store = tmp_path / "cohort.zarr"
    zp.convert(cohort_source, store, chunk=16, codec=codec, pyramid=codec == "none", include=subjects)
    images, _ = read_manifest(store)
    cohort = zp.Cohort(store)
    assert {(name, image) for name in subjects for image in ("t1", "seg")} == set(images)
    assert {record["kind"] for record in images.values()} == {"scalar", "label"}
    for (subject, image), record in images.items():
        expected = cohort[subject][image]
        assert np.allclose(expected.data, read_values(store, record), rtol=1e-6)
        assert np.array_equal(expected.affine, record["affine"])
    assert verify(store) == zp.verify(store).files


def test_a_reader_by_the_specification_reads_coarser_levels_channels_and_several_shards(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    import nibabel as nib

    voxels = rng.integers(-1000, 1000, (70, 20, 66, 1, 2)).astype(np.int16)
    (tmp_path / "scans").mkdir()
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "scans" / "ann.nii.gz")
    store = tmp_path / "cohort.zarr"
    zp.convert(tmp_path / "scans", store, chunk=8, pyramid=True, max_memory="64.3 MiB")
    [record] = read_manifest(store)[0].values()
    image = zp.Cohort(store)["ann"].image
    assert len([key for key in record["files"] if key.startswith("0/c/")]) > 1
    assert np.array_equal(image.data, read_values(store, record))
    assert np.array_equal(image.level(1).data, read_values(store, record, 1))


@pytest.mark.parametrize("part", ["line", "file", "index", "chunk"])
def test_a_reader_by_the_specification_finds_damage(cohort_store: Path, tmp_path: Path, part: str) -> None:
    store = tmp_path / "cohort.zarr"
    shutil.copytree(cohort_store, store)
    images, _ = read_manifest(store)
    record = images["sub-01", "seg"]
    file = store / MANIFEST if part == "line" else store / "sub-01/seg/0/c/0/0/0"
    data = bytearray(file.read_bytes())
    data[{"line": -40, "file": 10, "index": -20, "chunk": 30}[part]] ^= 1
    file.write_bytes(data)
    what = {"line": "a line", "file": "seg/0/c/0/0/0", "index": "the index", "chunk": "a chunk"}[part]
    with pytest.raises(ValueError, match=f"{what}.* was changed"):
        verify(store) if part in ("line", "file") else read_values(store, record)


def test_a_reader_by_the_specification_takes_the_last_line_of_an_image_and_ignores_a_torn_one(
    cohort_source: Path, tmp_path: Path
) -> None:
    store = tmp_path / "cohort.zarr"
    for chunk in (8, 16):
        zp.convert(cohort_source, store, chunk=chunk, include=["sub-01"], overwrite=chunk == 16)
    with (store / MANIFEST).open("ab") as manifest:
        manifest.write(b'{"affine":[[')
    images, _ = read_manifest(store)
    assert {tuple(record["chunks"]) for record in images.values()} == {(16, 16, 16)}
    assert np.array_equal(read_values(store, images["sub-01", "t1"]), zp.Cohort(store)["sub-01"].t1.data)


def test_the_index_of_a_label_map_is_as_the_specification_says(cohort_store: Path) -> None:
    record = read_manifest(cohort_store)[0]["sub-01", "seg"]
    folder = cohort_store / "sub-01" / "seg" / "index"
    values, row_start, chunk_id, count = (
        np.frombuffer((folder / name / "c" / "0").read_bytes(), "<i8")
        for name in ("values", "row_start", "chunk_id", "count")
    )
    voxels = read_values(cohort_store, record)[0].transpose(2, 1, 0)
    grid = [-(-n // 16) for n in voxels.shape]
    found = {}
    for number, place in enumerate(np.ndindex(*grid)):
        box = tuple(slice(16 * p, 16 * p + 16) for p in place)
        for value, voxels_of_it in zip(*np.unique(voxels[box], return_counts=True), strict=True):
            found[int(value), number] = int(voxels_of_it)
    rows = np.repeat(values, np.diff(row_start))
    assert found == {
        (v, c): n for v, c, n in zip(rows.tolist(), chunk_id.tolist(), count.tolist(), strict=True)
    }


def test_the_reader_has_at_most_100_lines_and_imports_nothing_of_zpatch() -> None:
    text = Path(store_reader.__file__).read_text()
    assert len(text.splitlines()) <= 100
    assert "import zpatch" not in text
    assert "from zpatch" not in text


def test_the_specification_names_every_member_of_an_image_record(cohort_store: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "store-format.md").read_text()
    with (cohort_store / MANIFEST).open() as manifest:
        members = {key for line in manifest for key in json.loads(line)}
    assert [key for key in sorted(members - {"check"}) if f"`{key}`" not in page] == []
