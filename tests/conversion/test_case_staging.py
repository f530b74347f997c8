"""Memory and files of a conversion: slabs share memory, and shards are on the disk before they count."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import zpatch as zp
from zpatch.conversion.conversion_options import BASE_BYTES, ConvertOptions
from zpatch.errors import StoreError
from zpatch.records.names import MANIFEST
from zpatch.store import staged_image
from zpatch.store.store_writer import StoreWriter
from zpatch.volume_files.volume_file import VolumeFile


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize("pyramid", [False, True])
def test_all_slabs_of_a_file_share_the_memory_of_two(
    pyramid: bool, source: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = rng.integers(-500, 500, (128, 128, 60), dtype=np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(source / "ct.nii.gz")
    addresses = []
    read = VolumeFile._read_voxels

    def noted(*args: Any) -> Any:
        found = read(*args)
        addresses.append(found.__array_interface__["data"][0])
        return found

    monkeypatch.setattr(VolumeFile, "_read_voxels", noted)
    live = ConvertOptions(pyramid=pyramid).live_slabs
    limit = BASE_BYTES + live * 2**18  # slabs of 8 planes
    zp.convert(source, tmp_path / "store", chunk=8, max_memory=limit, pyramid=pyramid)
    assert len(addresses) == 8
    assert len(set(addresses)) == 2


def test_every_shard_is_on_the_disk_before_its_image_is_entered(
    source: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.readlink(f"/proc/self/fd/{handle}")))
    missing: list[list[str]] = []
    commit = StoreWriter.commit

    def noted(writer: StoreWriter, images: Any) -> None:
        missing.append([str(folder / key) for folder, record in images for key in record.files])
        missing[-1] = [file for file in missing[-1] if file not in synced]
        commit(writer, images)

    monkeypatch.setattr(StoreWriter, "commit", noted)
    voxels = rng.integers(-500, 500, (100, 90, 80), dtype=np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(source / "ct.nii.gz")
    zp.convert(source, tmp_path / "store", pyramid=True)
    assert missing == [[]]


def test_a_shard_that_does_not_reach_the_disk_fails_the_conversion(
    source: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> None:
        if path.parent.name == "0" and path.name == "0":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(staged_image, "sync", failing)
    voxels = rng.integers(-500, 500, (40, 40, 40), dtype=np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(source / "ct.nii.gz")
    with pytest.raises(StoreError, match="Input/output error"):
        zp.convert(source, tmp_path / "store")
    assert b'"image"' not in (tmp_path / "store" / MANIFEST).read_bytes()
