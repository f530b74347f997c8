"""Normalised images: the values that numpy computes of the whole volume, with statistics of the store."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reading import both_loops, stored
from reading import loop as loop

import zpatch as zp
from zpatch.errors import DamageError, OptionError
from zpatch.images import normalization
from zpatch.images.normalization import computed_statistics, lacks_statistics
from zpatch.sources.voxel_sources import ShardSource

STATISTICS = {"mean": 12.5, "std": 4.0, "percentile_0_5": -3.0, "percentile_99_5": 20.0}


def zscored(values: NDArray[Any], of: NDArray[Any]) -> NDArray[Any]:
    return (values - of.mean(dtype=np.float64)) / of.std(dtype=np.float64)


def clipped(values: NDArray[Any], of: NDArray[Any]) -> NDArray[Any]:
    low, high = np.percentile(of, [0.5, 99.5])
    return (np.clip(values, low, high) - low) / (high - low)


EXPECTED = {"zscore": zscored, "clip": clipped}

every_mode = pytest.mark.parametrize("mode", list(EXPECTED))


@pytest.fixture(scope="module")
def volumes() -> dict[str, NDArray[Any]]:
    """Voxels (I, J, K) by the name of their subject, with a background of zeros."""
    rng = np.random.default_rng(0)
    volumes: dict[str, NDArray[Any]] = {}
    for number, code in enumerate(["i2", "u1", "f4", "f8", "i4", "u2"]):
        volume = rng.normal(90 + 10 * number, 20, (9, 10, 11)).clip(1).astype(code)
        volume[:, :3] = 0
        volumes[f"sub-{code}"] = volume
    return volumes


@pytest.fixture(scope="module")
def cohort(volumes: dict[str, NDArray[Any]], tmp_path_factory: pytest.TempPathFactory) -> zp.Cohort:
    """The volumes as a store."""
    folder = tmp_path_factory.mktemp("normalization")
    for name, volume in volumes.items():
        (folder / "source" / name).mkdir(parents=True)
        nib.Nifti1Image(volume, np.eye(4), dtype=volume.dtype).to_filename(
            folder / "source" / name / "ct.nii"
        )
    zp.convert(folder / "source", folder / "store.zarr", chunk=4)
    return zp.Cohort(folder / "store.zarr")


def given_image(code: str = "i2") -> zp.ScalarImage:
    return zp.ScalarImage(np.arange(-30, 30).reshape(3, 4, 5).astype(code))


@both_loops
@every_mode
@pytest.mark.parametrize("foreground", [False, True])
def test_an_image_of_a_store_is_normalised_by_its_own_statistics(
    cohort: zp.Cohort, volumes: dict[str, NDArray[Any]], mode: Any, foreground: bool
) -> None:
    for name, volume in volumes.items():
        image = zp.Normalize(mode, foreground=foreground)(cohort[name].ct)
        expected = EXPECTED[mode](volume, volume[volume != 0] if foreground else volume)
        assert image.dtype == (np.float32 if volume.itemsize < 4 else np.float64)
        assert image.data.dtype == image.dtype
        # Percentiles of floats are as exact as a histogram.
        tolerance = 0.01 if mode == "clip" and volume.dtype.kind == "f" else 1e-5
        np.testing.assert_allclose(image.data[0], expected, rtol=tolerance, atol=tolerance)
        if mode == "clip":
            assert image.data.min() == 0
            assert abs(image.data.max() - 1) < 1e-6


@both_loops
@every_mode
@pytest.mark.parametrize("foreground", [False, True])
def test_an_image_is_normalised_by_the_statistics_of_the_cohort(
    cohort: zp.Cohort, volumes: dict[str, NDArray[Any]], mode: Any, foreground: bool
) -> None:
    normalize = zp.Normalize(mode, statistics=cohort.statistics["ct"], foreground=foreground)
    voxels = np.concatenate([volume.ravel() for volume in volumes.values()]).astype(np.float64)
    voxels = voxels[voxels != 0] if foreground else voxels
    for name, volume in volumes.items():
        expected = EXPECTED[mode](volume, voxels)
        tolerance = 0.01 if mode == "clip" else 1e-4  # percentiles of floats are as exact as a histogram
        np.testing.assert_allclose(
            normalize(cohort[name].ct).data[0], expected, rtol=tolerance, atol=tolerance
        )


@both_loops
@every_mode
def test_patches_of_a_normalised_image_have_the_values_of_the_whole(cohort: zp.Cohort, mode: Any) -> None:
    image = zp.Normalize(mode)(cohort["sub-i2"].ct)
    assert isinstance(image.source, ShardSource)  # as fast to read as the image itself
    boxes = [zp.PatchLocation((1, 2, 3), (5, 5, 5)), zp.PatchLocation((0, 0, 0), (9, 10, 11))]
    for box, patch in zip(boxes, image.read_group(boxes), strict=True):
        np.testing.assert_array_equal(patch, image.data[(slice(None), *box.to_slices())])
    np.testing.assert_array_equal(image.dask.compute(scheduler="sync"), image.data)


@both_loops
@every_mode
def test_values_are_normalised_and_not_stored_voxels(tmp_path: Path, mode: Any) -> None:
    voxels = np.random.default_rng(0).integers(0, 200, (6, 7, 8)).astype(np.int16)
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "sub.nii"
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)
    with path.open("r+b") as file:
        file.seek(112)
        file.write(np.array([-0.25, 40], "<f4").tobytes())
    zp.convert(tmp_path / "source", tmp_path / "store", chunk=4)
    values = voxels * -0.25 + 40.0
    image = zp.Normalize(mode)(zp.Cohort(tmp_path / "store")[0].image)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image.data[0], EXPECTED[mode](values, values), atol=1e-5)


def test_given_statistics_are_used_whatever_the_source() -> None:
    image = given_image()
    np.testing.assert_allclose(
        zp.Normalize(statistics=STATISTICS)(image).data, (image.data - 12.5) / 4, rtol=1e-6
    )
    np.testing.assert_allclose(
        zp.Normalize("clip", statistics=STATISTICS)(image).data,
        (np.clip(image.data, -3, 20) + 3) / 23,
        rtol=1e-6,
    )


def test_statistics_may_be_numbers_of_numpy() -> None:
    numbers = {key: np.float64(value) / 3 for key, value in STATISTICS.items()}
    plain = {key: float(value) for key, value in numbers.items()}
    for mode in ("zscore", "clip"):
        found, expected = (
            zp.Normalize(mode, statistics=given_)(given_image()).data for given_ in (numbers, plain)
        )
        assert found.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@both_loops
@every_mode
def test_a_constant_image_becomes_zero(tmp_path: Path, mode: Any) -> None:
    (tmp_path / "source").mkdir()
    nib.Nifti1Image(np.full((5, 6, 7), 42, np.int16), np.eye(4)).to_filename(tmp_path / "source" / "sub.nii")
    zp.convert(tmp_path / "source", tmp_path / "store", chunk=4)
    image = zp.Normalize(mode)(zp.Cohort(tmp_path / "store")[0].image)
    assert image.dtype == np.float32
    assert image.data.dtype == np.float32
    assert not image.data.any()


@pytest.mark.parametrize("code", ["i2", "u1", "f8"])
def test_a_normalised_image_is_of_floats_even_if_no_value_changes(code: str) -> None:
    image = zp.Normalize(statistics={"mean": 0.0, "std": 1.0})(given_image(code))
    assert image.dtype.kind == image.data.dtype.kind == "f"


def test_a_scaling_may_be_undone_and_floats_stay_floats(tmp_path: Path) -> None:
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = stored(tmp_path / "image", voxels, chunk=2, shard=1, slope=0.5, inter=1.0).rescaled(2, -2)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image.data[0], voxels.T)


@pytest.mark.parametrize(
    ("normalize", "why"),
    [
        (zp.Normalize(), "there is no 'mean' in its statistics; only scalar images of a store have them"),
        (zp.Normalize("clip"), "there is no 'percentile_0_5' in its statistics"),
        (zp.Normalize(foreground=True), "its foreground has no 'mean' in its statistics"),
        (zp.Normalize(statistics={"mean": 3.0}), "there is no 'std' in its statistics"),
        (zp.Normalize(statistics={"mean": None, "std": None}), "there is no 'mean' in its statistics"),
        (zp.Normalize(statistics=STATISTICS, foreground=True), "its foreground has no 'mean'"),
    ],
)
def test_statistics_that_are_missing_are_an_error(normalize: zp.Normalize, why: str) -> None:
    with pytest.raises(OptionError, match=rf"ScalarImage\(.*\) cannot be normalised: {why}"):
        normalize(given_image())


def test_an_image_without_foreground_is_an_error_that_names_the_foreground(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    nib.Nifti1Image(np.zeros((5, 6, 7), np.int16), np.eye(4)).to_filename(tmp_path / "source" / "sub.nii")
    zp.convert(tmp_path / "source", tmp_path / "store", chunk=4)
    with pytest.raises(OptionError, match="cannot be normalised: its foreground has no 'mean'"):
        zp.Normalize(foreground=True)(zp.Cohort(tmp_path / "store")[0].image)


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="mode must be one of zscore, clip, not 'minmax'"):
        zp.Normalize("minmax")  # type: ignore[arg-type]


def test_a_normalised_image_survives_pickling(cohort: zp.Cohort) -> None:
    normalize = pickle.loads(pickle.dumps(zp.Normalize(foreground=True)))
    image = normalize(cohort["sub-i2"].ct)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).data, image.data)


def test_the_text_of_a_normalization_names_its_mode_and_statistics() -> None:
    assert repr(zp.Normalize()) == "Normalize('zscore', each image's own statistics)"
    assert repr(zp.Normalize("clip", statistics={}, foreground=True)) == (
        "Normalize('clip', given statistics, foreground)"
    )


# Statistics that no store has


@both_loops
@every_mode
def test_an_image_without_statistics_is_read_once_to_compute_them(
    volumes: dict[str, NDArray[Any]], cohort: zp.Cohort, mode: Any, tmp_path: Path
) -> None:
    for name, volume in volumes.items():
        array = zarr.create_array(
            tmp_path / name,
            shape=volume.shape[::-1],
            chunks=(4, 5, 6),
            dtype=volume.dtype,
            dimension_names="zyx",
        )
        array[...] = volume.T
        for data in (volume, tmp_path / name):
            image = zp.ScalarImage(data)
            assert lacks_statistics(image)
            with pytest.raises(OptionError, match=r"say compute=True to compute those of other images"):
                zp.Normalize(mode)(image)
            found = zp.Normalize(mode, compute=True)(image)
            tolerance = 0.01 if mode == "clip" and volume.dtype.kind == "f" else 1e-5
            np.testing.assert_allclose(
                found.data[0], EXPECTED[mode](volume, volume), rtol=tolerance, atol=tolerance
            )
            stored = cohort[name].ct.statistics
            computed = computed_statistics(image)
            assert computed.keys() == stored.keys()
            for key in ("count", "min", "max", "nan", "inf", "foreground_box", "percentile_99_5"):
                assert computed[key] == stored[key]
            assert computed["mean"] == pytest.approx(stored["mean"], rel=1e-12)


@given(data=st.data())
def test_computed_statistics_are_those_of_numpy_on_any_number_of_threads(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), *[st.integers(1, 12)] * 3))
    code = data.draw(st.sampled_from(["u1", "i2", "u2", "i4", "u4", "f4", "f8", "i8"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    wide = data.draw(st.sampled_from([3, 100, 2**30]))
    if np.dtype(code).kind == "f":
        array = (rng.normal(5, wide, shape) * rng.integers(0, 2, shape)).astype(code)
    else:
        info = np.iinfo(code)
        array = rng.integers(max(info.min, -wide), min(info.max, wide), shape).astype(code)
    slope, inter = data.draw(st.sampled_from([(1, 0), (-0.5, 3), (2, 10)]))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalization, "BOX_VOXELS", data.draw(st.integers(1, 400)))
        for threads in (1, 3):
            patch.setattr(normalization, "PASS_THREADS", threads)
            patch.setattr(normalization, "thread_count", lambda scheduler: 3)
            image = zp.ScalarImage(array)
            image = image if (slope, inter) == (1, 0) else image.rescaled(slope, inter)
            found.append(computed_statistics(image))
    assert found[0] == found[1]  # to the last bit
    values = array.astype(np.float64) * slope + inter
    assert found[0]["count"] == values.size
    scale = max(abs(values).max(), 1)
    for key, expected in (("min", values.min()), ("max", values.max()), ("mean", values.mean())):
        assert found[0][key] == pytest.approx(expected, rel=1e-9, abs=1e-9 * scale)
    assert found[0]["std"] == pytest.approx(values.std(), rel=1e-6, abs=1e-6 * scale)
    for percent, key in ((0.5, "percentile_0_5"), (99.5, "percentile_99_5")):
        if array.dtype.kind in "iu" and np.ptp(array.astype(np.float64)) < 2**22:
            exact = np.percentile(values, percent)
            assert found[0][key] == pytest.approx(exact, rel=1e-9, abs=1e-9 * scale)
        else:  # between the values beside the percentile, as exact as bins are
            order, at = np.sort(array.astype(np.float64).ravel()), (values.size - 1) * percent / 100
            near = order[[int(at), int(np.ceil(at))] if slope > 0 else [-1 - int(at), -1 - int(np.ceil(at))]]
            low, high = sorted(near * slope + inter)
            margin = 0.005 * abs(near * slope).max() + 1e-9 * scale
            assert low - margin <= found[0][key] <= high + margin


def test_a_pass_reads_each_chunk_once_and_every_voxel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "BOX_VOXELS", 2000)
    for shape, chunks in (
        ((1, 30, 20, 10), (8, 8, 8)),
        ((2, 5, 40, 3), (64, 7, 2)),
        ((1, 1, 1, 9), (4, 4, 4)),
    ):
        seen = np.zeros(shape[1:], int)
        for box in normalization.pass_boxes(shape, chunks):  # type: ignore[arg-type]
            seen[box.to_slices()] += 1
            assert all(i % c == 0 for i, c in zip(box.index_ini, chunks, strict=True) if i)
        assert (seen == 1).all()
    assert list(normalization.pass_boxes((1, 0, 5, 5), (4, 4, 4))) == []


def test_values_that_are_not_finite_are_left_out_of_computed_statistics() -> None:
    array = np.array([1, 2, np.nan, 3, np.inf, -np.inf], np.float32).reshape(1, 2, 3)
    found = computed_statistics(zp.ScalarImage(array))
    assert (found["mean"], found["nan"], found["inf"], found["count"]) == (2, 1, 2, 3)


def test_a_rescaled_image_of_a_store_is_not_normalised_by_the_statistics_of_its_old_values(
    cohort: zp.Cohort, volumes: dict[str, NDArray[Any]]
) -> None:
    image = cohort["sub-i2"].ct.rescaled(2, 5, 0, 100)
    assert image.statistics == {}
    values = np.clip(volumes["sub-i2"], 0, 100) * 2.0 + 5
    found = zp.Normalize(compute=True)(image)
    np.testing.assert_allclose(found.data[0], zscored(values, values), rtol=1e-5, atol=1e-5)


def test_a_file_that_changes_while_its_statistics_are_computed_is_damage(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.int16), np.eye(4)), tmp_path / "a.nii")
    image = zp.ScalarImage(tmp_path / "a.nii")
    with pytest.raises(DamageError, match="was changed while its statistics were computed; run the same"):
        computed_statistics(image, lambda voxels: os.utime(tmp_path / "a.nii", (1, 1)))
