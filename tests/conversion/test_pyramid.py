"""Coarser levels: averages or most frequent labels, at the right positions."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
from zpatch.conversion import conversion_options
from zpatch.conversion.pyramid import halve, plan_levels
from zpatch.errors import OptionError

shapes = st.tuples(st.integers(1, 2), *(st.integers(1, 7) for _ in range(3)))


def groups(voxels: NDArray[Any]) -> NDArray[Any]:
    """The up to eight fine voxels (…, n) of each coarse voxel; an odd last plane counts twice."""
    padded = np.pad(voxels, [(0, 0), *((0, n % 2 if n > 1 else 0) for n in voxels.shape[1:])], mode="edge")
    c, z, y, x = padded.shape
    a, b, d = (2 if n > 1 else 1 for n in (z, y, x))
    split = padded.reshape(c, z // a, a, y // b, b, x // d, d)
    return split.transpose(0, 1, 3, 5, 2, 4, 6).reshape(c, z // a, y // b, x // d, a * b * d)


@given(shapes, st.integers(0, 2**31))
def test_images_are_averaged(shape: tuple[int, ...], seed: int) -> None:
    voxels = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    found = halve(voxels, majority=False)
    np.testing.assert_array_equal(found, np.rint(groups(voxels).mean(axis=-1)))
    assert found.dtype == voxels.dtype


@given(shapes, st.integers(0, 2**31))
def test_the_most_frequent_label_is_kept_and_the_smallest_of_equally_frequent_ones(
    shape: tuple[int, ...], seed: int
) -> None:
    voxels = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    found = halve(voxels, majority=True)
    for place, group in zip(np.ndindex(*found.shape), groups(voxels).reshape(found.size, -1), strict=True):
        counts = Counter(group.tolist())
        assert found[place] == min(v for v, n in counts.items() if n == max(counts.values()))


@given(st.tuples(*(st.integers(1, 400) for _ in range(3))))
def test_levels_halve_until_no_side_is_over_64_voxels(shape: tuple[int, ...]) -> None:
    chunks = tuple(min(n, 32) for n in shape)
    shards = tuple(-(-n // c) * c for n, c in zip(shape, chunks, strict=True))
    levels = plan_levels(shape, chunks, shards)
    for above, level in zip([shape, *(level.shape for level in levels)][: len(levels)], levels, strict=True):
        assert max(above) > 64
        assert level.shape == tuple(-(-n // 2) for n in above)
        assert all(s % c == 0 for s, c in zip(level.shards, level.chunks, strict=True))
    assert max(([shape, *(level.shape for level in levels)])[-1]) <= 64


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


def test_a_pyramid_of_turned_volumes_is_refused(cohort_source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="orient= and pyramid= cannot be combined"):
        zp.convert(cohort_source, tmp_path / "a.zarr", pyramid=True, orient="RAS")
