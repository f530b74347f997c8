"""Coarser levels of converted images, at the right positions."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zarr

import zpatch as zp
from zpatch.chunks.levels import halve
from zpatch.conversion import conversion_options


@pytest.mark.parametrize("shape", [(70, 66, 131), (130, 3, 70), (65, 66, 67, 3)])
@pytest.mark.parametrize("shard_bytes", [1, 2**25])
def test_each_stored_level_is_the_finer_one_halved(
    shape: tuple[int, ...],
    shard_bytes: int,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion_options, "SHARD_BYTES", shard_bytes)
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    affine = np.diag([1.0, 2, 3, 1])
    nib.save(nib.Nifti1Image(rng.integers(0, 500, shape).astype(np.int16), affine), source / "t1.nii.gz")
    nib.save(nib.Nifti1Image(rng.integers(0, 3, shape).astype(np.uint8), affine), source / "seg.nii.gz")
    zp.convert(source.parent, tmp_path / "a.zarr", pyramid=True, chunk=16)
    for name, majority in (("t1", False), ("seg", True)):
        group = zarr.open_group(tmp_path / "a.zarr" / "a" / name, mode="r")
        datasets = group.attrs["ome"]["multiscales"][0]["datasets"]  # type: ignore[index, call-overload]
        assert len(datasets) == len(zp.Cohort(tmp_path / "a.zarr")[0][name].record.levels) + 1
        for fine, coarse in itertools.pairwise(datasets):
            above, found = (np.asarray(group[level["path"]][:]) for level in (fine, coarse))
            above, found = (v.reshape((1, *v.shape)[-4:]) for v in (above, found))
            np.testing.assert_array_equal(found, halve(above, majority=majority))
        first, second = datasets[0], datasets[1]
        scale, shift = (t[t["type"]][-3:] for t in second["coordinateTransformations"])
        fine_scale, fine_shift = (t[t["type"]][-3:] for t in first["coordinateTransformations"])
        np.testing.assert_allclose(scale, np.multiply(fine_scale, 2))
        np.testing.assert_allclose(shift, np.add(fine_shift, np.divide(fine_scale, 2)))
    assert zp.verify(tmp_path / "a.zarr").ok


@pytest.mark.parametrize("codes", ["RAS", "PIL", "SRA"])
def test_a_turned_volume_has_the_levels_of_what_is_stored(
    codes: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    source, affine = tmp_path / "source" / "a", np.diag([-1.0, 2, 3, 1])
    source.mkdir(parents=True)
    nib.save(nib.Nifti1Image(rng.integers(0, 9, (70, 3, 131)).astype(np.int16), affine), source / "t1.nii.gz")
    zp.convert(source.parent, tmp_path / "a.zarr", pyramid=True, orient=codes, chunk=16)
    group = zarr.open_group(tmp_path / "a.zarr" / "a" / "t1", mode="r")
    levels = [np.asarray(group[name][:])[None] for name in sorted(group) if name.isdecimal()]
    assert len(levels) == 3
    for above, found in itertools.pairwise(levels):
        np.testing.assert_array_equal(found, halve(above, majority=False))
    assert zp.verify(tmp_path / "a.zarr").ok
