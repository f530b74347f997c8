"""Normalised images: the values that numpy computes of the whole volume, with statistics of the store."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from reading import both_loops, stored
from reading import loop as loop

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.images.voxel_sources import ShardSource

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
