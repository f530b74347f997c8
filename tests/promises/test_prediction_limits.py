"""Under a limit, all processes of a prediction together hold no more, with the interpreter and libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import zpatch as zp

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.predict.limits import RUNS, LimitedRun, peak_of

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc"),
    pytest.mark.alone,
    pytest.mark.timeout(300),
]

MIB = 2**20
QUICK = (13, 24)  # a long volume, and two jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits")


def store_of(shape: tuple[int, int, int], folder: Path) -> Path:
    """A store of one subject of noise, made once."""
    path = folder / "x".join(map(str, shape))
    if not path.exists():
        path.mkdir()
        voxels = np.random.default_rng(0).integers(0, 1000, shape, dtype=np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path / "ann_t1.nii")
        zp.convert(path, path / "store")
    return path / "store"


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_all_processes_together_hold_at_most_the_limit(folder: Path, run: LimitedRun, full: bool) -> None:
    if not full and RUNS.index(run) not in QUICK:
        pytest.skip("all runs need --full")
    peak = peak_of(run, store_of(run.shape, folder), folder / "out.zarr")
    assert not peak.refused
    assert 0.4 * run.limit_mib * MIB < peak.bytes <= run.limit_mib * MIB
