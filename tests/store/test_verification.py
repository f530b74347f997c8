"""Verification: any change to a store's files is reported with the file's name; an intact store is ok."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import zpatch as zp
from zpatch.errors import NotAStoreError
from zpatch.records.names import MANIFEST, MANIFEST_TABLE
from zpatch.store.lock import take_lock
from zpatch.store.store import open_store
from zpatch.store.store_writer import StoreWriter
from zpatch.store.verification import VerificationReport, sealed_files

# One file of each sort; the image has one shard.
OWN = {MANIFEST, MANIFEST_TABLE, ".lock"}
FILES = [
    "zarr.json",
    "sub-01/zarr.json",
    "sub-01/seg/zarr.json",
    "sub-01/seg/0/zarr.json",
    "sub-01/seg/0/c/0/0/0",
    "sub-01/seg/nifti/zarr.json",
    "sub-01/seg/nifti/c/0",
    "sub-01/seg/index/zarr.json",
    "sub-01/seg/index/values/zarr.json",
    "sub-01/seg/index/values/c/0",
    "sub-01/seg/index/row_start/c/0",
    "sub-01/seg/index/chunk_id/c/0",
    "sub-01/seg/index/count/c/0",
]

every_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture
def copy(cohort_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))


def found(report: VerificationReport) -> dict[str, str]:
    assert report.ok == (not report.damages)
    return {damage.file: damage.what for damage in report.damages}


def flip(file: Path, position: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)


def test_an_intact_store_is_ok(cohort_store: Path) -> None:
    files = [f for f in cohort_store.rglob("*") if f.is_file() and f.name not in OWN]
    for quick in (False, True):
        report = zp.verify(cohort_store, quick=quick)
        assert report.ok
        assert report.quick == quick
        assert report.damages == report.leftovers == report.missing_subjects == ()
        assert (report.images, report.files) == (8, len(files))
        assert report.bytes == sum(f.stat().st_size for f in files)


def test_every_file_but_manifest_table_and_lock_is_sealed(cohort_store: Path) -> None:
    files = {f.relative_to(cohort_store).as_posix() for f in cohort_store.rglob("*") if f.is_file()}
    assert dict(sealed_files(open_store(cohort_store))).keys() == files - OWN
    assert set(FILES) < files


@every_file
@pytest.mark.parametrize("quick", [False, True])
def test_a_deleted_file_is_named(copy: Path, name: str, quick: bool) -> None:
    (copy / name).unlink()
    assert found(zp.verify(copy, quick=quick)) == {name: "it is missing"}


@every_file
@pytest.mark.parametrize("quick", [False, True])
def test_a_truncated_file_is_named(copy: Path, name: str, quick: bool) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size - 1)
    assert found(zp.verify(copy, quick=quick)) == {name: f"it has {size - 1} bytes instead of {size}"}


@every_file
@pytest.mark.parametrize("mask", [1, 128])
def test_a_flipped_bit_is_named(copy: Path, name: str, mask: int) -> None:
    flip(copy / name, (copy / name).stat().st_size // 2, mask)
    assert found(zp.verify(copy)) == {name: "its contents have changed"}


def test_a_quick_verification_compares_the_contents_of_documents_only(copy: Path) -> None:
    flip(copy / "sub-01/seg/0/c/0/0/0", 50)
    assert zp.verify(copy, quick=True).ok
    flip(copy / "sub-01/seg/zarr.json", 50)
    assert found(zp.verify(copy, quick=True)) == {"sub-01/seg/zarr.json": "its contents have changed"}


def test_swapped_files_of_equal_length_are_named(copy: Path) -> None:
    names = [f"sub-01/seg/index/{name}/c/0" for name in ("chunk_id", "count")]
    contents = [(copy / name).read_bytes() for name in names]
    assert len(contents[0]) == len(contents[1])
    for name, other in zip(names, reversed(contents), strict=True):
        (copy / name).write_bytes(other)
    assert found(zp.verify(copy)) == dict.fromkeys(names, "its contents have changed")


def test_swapped_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in "ab":  # incompressible voxels: shards of equal length, each with valid checksums
        voxels = np.random.default_rng(ord(name)).integers(0, 255, (8, 8, 8), dtype=np.uint8)
        nib.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "source" / f"{name}.nii")
    zp.convert(tmp_path / "source", tmp_path / "store", codec="none")
    shards = [tmp_path / "store" / name / "image" / "0" / "c" / "0" / "0" / "0" for name in "ab"]
    contents = [shard.read_bytes() for shard in shards]
    assert len(contents[0]) == len(contents[1])
    for shard, other in zip(shards, reversed(contents), strict=True):
        shard.write_bytes(other)
    assert set(found(zp.verify(tmp_path / "store"))) == {f"{name}/image/0/c/0/0/0" for name in "ab"}


def put_a_link(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("moved")))


def put_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def put_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("put", [put_a_link, put_a_folder, put_a_pipe])
@pytest.mark.parametrize("name", ["sub-01/seg/0/c/0/0/0", "sub-01/seg/zarr.json"])
def test_an_irregular_file_is_named(copy: Path, put: Callable[[Path], None], name: str) -> None:
    put(copy / name)
    assert found(zp.verify(copy)) == {name: "it is no regular file"}


def test_a_deleted_image_and_a_deleted_subject_are_named_file_by_file(copy: Path) -> None:
    store = open_store(copy)
    shutil.rmtree(copy / "sub-01" / "t1")
    shutil.rmtree(copy / "sub-02")
    expected = {name for name in dict(sealed_files(store)) if name.startswith(("sub-01/t1/", "sub-02/"))}
    assert found(zp.verify(copy)) == dict.fromkeys(expected, "it is missing")


def test_a_damaged_manifest_is_named_by_its_line(copy: Path) -> None:
    flip(copy / MANIFEST, 10)
    [(file, what)] = found(zp.verify(copy)).items()
    assert file == MANIFEST
    assert "manifest.jsonl, line 1" in what


def test_a_deleted_manifest_is_named(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    assert MANIFEST in found(zp.verify(copy))


def test_a_damaged_number_of_the_format_is_damage_and_no_newer_store(copy: Path) -> None:
    document = copy / "zarr.json"
    document.write_text(document.read_text().replace('"format": 1', '"format": 9'))
    assert [str(damage) for damage in zp.verify(copy).damages] == ["zarr.json: its contents have changed"]


@pytest.mark.parametrize("make", ["nothing", "a folder"])
def test_a_path_that_is_not_a_store_cannot_be_verified(tmp_path: Path, make: str) -> None:
    if make == "a folder":
        (tmp_path / "thing").mkdir()
    with pytest.raises(NotAStoreError, match="thing"):
        zp.verify(tmp_path / "thing")


def test_leftovers_are_reported_and_harmless(copy: Path) -> None:
    for name in (".staging/abc", "sub-09/t1", "sub-01/t2"):
        (copy / name).mkdir(parents=True)
    report = zp.verify(copy)
    assert report.ok
    assert set(report.leftovers) == {".staging", "sub-09", "sub-01/t2"}
    assert len(zp.Cohort(copy)) == 4


def test_an_image_that_lost_its_line_is_a_leftover(copy: Path) -> None:
    lines = (copy / MANIFEST).read_text().splitlines(keepends=True)
    (copy / MANIFEST).write_text("".join(lines[:-1]))
    report = zp.verify(copy)
    assert report.ok
    assert report.leftovers == ("sub-04/t1",)


def test_expected_subjects_that_were_never_committed_are_named(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "store", {"expected_subjects": ["sub-01", "sub-02"]}):
        pass
    report = zp.verify(tmp_path / "store")
    assert report.missing_subjects == ("sub-01", "sub-02")
    assert not report.ok


def test_progress_adds_up_to_the_bytes_of_all_files(cohort_store: Path) -> None:
    amounts: list[int] = []
    report = zp.verify(cohort_store, progress=amounts.append)
    assert sum(amounts) == report.bytes


def test_a_report_is_plain_json_and_a_damage_prints_as_a_line(copy: Path) -> None:
    (copy / "sub-01" / "zarr.json").unlink()
    report = zp.verify(copy)
    assert json.loads(json.dumps(report.to_json())) == {
        "store": str(copy),
        "ok": False,
        "quick": False,
        "images": 8,
        "files": report.files,
        "bytes": report.bytes,
        "damages": [{"file": "sub-01/zarr.json", "what": "it is missing"}],
        "missing_subjects": [],
        "leftovers": [],
        "writer": None,
    }
    assert str(report.damages[0]) == "sub-01/zarr.json: it is missing"


def test_a_verification_beside_a_writer_says_that_one_is_at_work(
    cohort_store: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    store = shutil.copytree(cohort_store, tmp_path / "store")
    (store / ".staging" / "half").mkdir(parents=True)
    lock = take_lock(store)
    try:
        report = zp.verify(store)
        code, _, stderr = run("verify", store, "--quick")
    finally:
        lock.close()
    assert report.writer == f"process {os.getpid()} on {socket.gethostname()}"
    assert code == 0
    assert (
        f"{report.writer} is writing to this store: what it has not committed yet is not verified" in stderr
    )
    assert "leftover" not in stderr
    assert zp.verify(store).writer is None
    assert "leftover" in run("verify", store)[2]
