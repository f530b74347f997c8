"""Fixtures of the tests of the benchmark."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bench_stores import MakeStore

import zpatch as zp


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Convert volumes (I, J, K) to a store, each to a subject with one image ``t1``."""

    def make(*volumes: np.ndarray[Any, Any], spacing: float = 1, **options: Any) -> Path:
        for number, voxels in enumerate(volumes):
            folder = tmp_path / "scans" / f"sub-{number}"
            folder.mkdir(parents=True)
            nib.Nifti1Image(voxels, np.diag([1, 1, spacing, 1])).to_filename(folder / "t1.nii")
        zp.convert(tmp_path / "scans", tmp_path / "made.zarr", **options)
        return tmp_path / "made.zarr"

    return make


@pytest.fixture
def store_copy(cohort_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))
