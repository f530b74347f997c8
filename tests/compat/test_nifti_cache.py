"""NIfTI files as images: converted when they are first used, once, whoever asks."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import pytest
import zarr

import zpatch as zp
from zpatch.compat import nifti_cache
from zpatch.compat.nifti_cache import cache_folder, cached_image, save_image
from zpatch.errors import NotAStoreError, OptionError, SourceError, StoreError
from zpatch.records.image_record import Kind

VOXELS = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])

Saved = Any  # nibabel has no types


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ZPATCH_CACHE", str(folder))
    return folder


def save(path: Path, voxels: np.ndarray[Any, Any] = VOXELS, kind: Saved = nib.Nifti1Image) -> Path:
    nib.save(kind(voxels, AFFINE), path)
    return path


PROGRAM = """import sys
from zpatch.compat.nifti_cache import cached_image
print(cached_image(sys.argv[1]).folder)"""


def start(path: Path) -> forked.Forked:
    return forked.start(PROGRAM, path)


@pytest.mark.parametrize("name", ["t1.nii", "t1.nii.gz", "a name, with a comma.nii.gz", "t1.hdr", "t1.img"])
def test_a_nifti_file_is_an_image_of_its_voxels(tmp_path: Path, name: str) -> None:
    pair = Path(name).suffix in (".hdr", ".img")
    path = save(tmp_path / name, kind=nib.Nifti1Pair if pair else nib.Nifti1Image)
    image = cached_image(path)
    assert isinstance(image, zp.ScalarImage)
    assert np.array_equal(image.data[0], VOXELS)
    assert np.array_equal(image.affine, AFFINE)
    assert image.record is not None


@pytest.mark.parametrize(
    ("kind", "class_"), [("scalar", zp.ScalarImage), ("label", zp.LabelMap), ("sampling", zp.SamplingMap)]
)
def test_the_kind_of_an_image_is_the_one_asked_for(tmp_path: Path, kind: Kind, class_: type) -> None:
    path = save(tmp_path / "x.nii.gz", np.ones((4, 4, 4), np.float32))
    image = cached_image(path, kind)
    assert type(image) is class_
    assert np.array_equal(image.data, np.ones((1, 4, 4, 4)))


def test_a_file_is_converted_once_and_the_log_names_the_cache_entry(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "t1.nii.gz")
    with caplog.at_level(logging.INFO):
        first = cached_image(path)
    [entry] = cache.iterdir()
    assert [record.getMessage() for record in caplog.records] == [f"converted {path} once, into {entry}"]
    caplog.clear()
    monkeypatch.setattr(nifti_cache, "run_conversion", pytest.fail)
    monkeypatch.chdir(tmp_path)
    again = cached_image("t1.nii.gz")
    assert again.folder == first.folder
    assert caplog.records == []


def test_the_log_is_seen_without_any_logging_being_set_up(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "t1.nii.gz")
    _, said = start(path).communicate(timeout=60)
    assert said.startswith(f"converted {path} once, into {cache}")
    assert said.count("\n") == 1


def test_a_metaimage_is_an_image_and_is_converted_again_when_its_voxels_change(
    tmp_path: Path, cache: Path
) -> None:
    fields = ("NDims = 3", "DimSize = 4 3 2", "ElementType = MET_UCHAR", "ElementDataFile = a.raw", "")
    (tmp_path / "a.mhd").write_text("\n".join(fields))
    for first in (0, 7):
        (tmp_path / "a.raw").write_bytes(bytes(range(first, first + 24)))
        voxels = cached_image(tmp_path / "a.mhd").data
        assert voxels.T.reshape(-1).tolist() == list(range(first, first + 24))


def test_a_file_that_has_changed_is_converted_again(tmp_path: Path, cache: Path) -> None:
    path = save(tmp_path / "t1.nii")
    assert cached_image(path).data[0, 1, 2, 3] == VOXELS[1, 2, 3]
    save(path, VOXELS + 1)
    os.utime(path, ns=(0, 12345))
    assert cached_image(path).data[0, 1, 2, 3] == VOXELS[1, 2, 3] + 1
    assert len(list(cache.iterdir())) == 2


def test_either_file_of_a_pair_that_has_changed_counts(tmp_path: Path) -> None:
    path = save(tmp_path / "t1.img", kind=nib.Nifti1Pair)
    before = cached_image(path)
    os.utime(path, ns=(0, 12345))
    assert cached_image(tmp_path / "t1.hdr").folder != before.folder


def test_a_conversion_that_was_killed_is_done_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "t1.nii.gz")
    with monkeypatch.context() as patch:
        patch.setattr("zpatch.store.store_writer.append_lines", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_image(path)
    assert list(cache.rglob("zarr.json*"))
    assert np.array_equal(cached_image(path).data[0], VOXELS)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_processes_that_ask_at_once_convert_once(tmp_path: Path) -> None:
    path = save(tmp_path / "t1.nii.gz", np.tile(VOXELS, (12, 12, 12)))
    both = [start(path) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
    assert "".join(err for _, err in said).count("converted") == 1


def test_other_images_are_opened_as_they_are(cohort: zp.Cohort, tmp_path: Path, cache: Path) -> None:
    stored = cohort[0].t1
    assert stored.folder is not None
    opened = cached_image(stored.folder)
    assert np.array_equal(opened.data, stored.data)
    array = zarr.create_array(tmp_path / "a.zarr", shape=(3, 4, 5), dtype="u1", dimension_names="zyx")
    array[:] = 3
    assert isinstance(cached_image(tmp_path / "a.zarr", "label"), zp.LabelMap)
    assert cached_image(tmp_path / "a.zarr").shape == (1, 5, 4, 3)
    with pytest.raises(NotAStoreError, match=r"nowhere\.zarr"):
        cached_image(tmp_path / "nowhere.zarr")
    assert not cache.exists()


def test_a_label_map_of_other_than_whole_numbers_fails_with_its_name(tmp_path: Path) -> None:
    path = save(tmp_path / "seg.nii.gz", np.full((4, 4, 4), 0.5, np.float32))
    advice = "say ScalarImage if this is no label map"  # not an option of the command line
    with pytest.raises(
        SourceError, match=rf"^{path}: label values must be whole numbers, not 0\.5; {advice}$"
    ):
        cached_image(path, "label")
    assert cached_image(path).data.max() == 0.5


def test_a_file_that_is_missing_or_broken_fails_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "t1.nii.gz"
    with pytest.raises(SourceError, match=rf"^{path}: it cannot be read \(No such file"):
        cached_image(path)
    path.write_bytes(b"nothing")
    with pytest.raises(
        SourceError, match=rf"^{path}: it is not a NIfTI file .*; replace it, or leave it out$"
    ):
        cached_image(path)
    whole = save(tmp_path / "whole.nii.gz", np.tile(VOXELS, (4, 4, 4))).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=rf"^{path}: "):
        cached_image(path)


@pytest.mark.parametrize("name", ["t1.nii", "t1.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float16, bool])
def test_a_saved_image_is_a_nifti_file_of_its_voxels(tmp_path: Path, name: str, dtype: Any) -> None:
    voxels = (np.stack([VOXELS, -VOXELS]) % 5).astype(dtype)
    affine = np.array([[0, 2, 0, 5], [3, 0, 0, -7], [0, 0, -4, 9], [0, 0, 0, 1.0]])
    for channels in (voxels, voxels[:1], voxels[::-1, ::2]):
        save_image(tmp_path / "new" / name, channels, affine)
        saved = nib.load(tmp_path / "new" / name)
        assert np.array_equal(saved.affine, affine)
        found = np.asarray(saved.dataobj).reshape(*channels.shape[1:], -1)
        assert np.array_equal(np.moveaxis(found, -1, 0), channels)
        again = cached_image(tmp_path / "new" / name)
        assert np.array_equal(again.data, channels)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_what_is_no_image_or_would_be_no_nifti_file_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"t1\.png: images are saved as NIfTI; use a name that ends in \.nii or"
    ):
        save_image(tmp_path / "t1.png", VOXELS[None], AFFINE)
    with pytest.raises(OptionError, match=r"t1\.nii: an image is \(C, I, J, K\), not \(1, 1, 6, 7, 8\)"):
        save_image(tmp_path / "t1.nii", VOXELS[None, None], AFFINE)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "t1.nii.gz")
    monkeypatch.setenv("ZPATCH_CACHE", str(path / "below"))
    with pytest.raises(StoreError, match="set ZPATCH_CACHE"):
        cached_image(path)


def test_the_environment_decides_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("ZPATCH_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.setenv("ZPATCH_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/zpatch")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "zpatch"
