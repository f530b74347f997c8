"""Resampled images of every source: the chunks that are decoded, and the voxels."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from scipy import ndimage

import zpatch as zp
from zpatch.chunks import gather_plan
from zpatch.chunks.scaling import UNSCALED
from zpatch.errors import OptionError, PatchLocationError

AFFINE = np.diag([0.7, 0.9, 1.3, 1.0])
SHAPE = (40, 33, 21)
CHUNK = 16


@pytest.fixture(scope="module")
def volume() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-800, 1200, SHAPE).astype(np.int16)


@pytest.fixture(scope="module")
def stored(volume: NDArray[np.int16], tmp_path_factory: pytest.TempPathFactory) -> zp.Cohort:
    """A store of one subject: an image with slope and intercept, and a label map."""
    folder = tmp_path_factory.mktemp("resampled")
    (folder / "source" / "ann").mkdir(parents=True)
    image = nib.Nifti1Image(volume, AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, folder / "source" / "ann" / "ct.nii.gz")
    nib.save(
        nib.Nifti1Image((volume > 300).astype(np.uint8), AFFINE), folder / "source" / "ann" / "seg.nii.gz"
    )
    zp.convert(folder / "source", folder / "store", chunk=CHUNK)
    return zp.Cohort(folder / "store")


def images(volume: NDArray[np.int16], folder: Path) -> dict[str, zp.ScalarImage]:
    """The same voxels from every kind of source."""
    nib.save(nib.Nifti1Image(volume, AFFINE), folder / "ct.nii")
    array = zarr.create_array(folder / "a.zarr", shape=SHAPE[::-1], chunks=(8, 16, 16), dtype="int16")
    array[:] = volume.T
    lazy = da.from_array(volume, chunks=16)
    return {
        "array": zp.ScalarImage(volume, affine=AFFINE),
        "dask": zp.ScalarImage(lazy, affine=AFFINE),
        "nifti": zp.ScalarImage(folder / "ct.nii"),
        "zarr": zp.ScalarImage(folder / "a.zarr", affine=AFFINE, axes="zyx"),
        "map": zp.ScalarImage(volume - 1, affine=AFFINE).map(lambda voxels: voxels + 1),
    }


def expected(volume: NDArray[Any], image: zp.Image, order: int = 1) -> NDArray[np.float64]:
    """The volume on the grid of an image, by scipy."""
    at = np.stack(np.meshgrid(*map(np.arange, image.spatial_shape), indexing="ij")).reshape(3, -1)
    matrix = np.linalg.solve(AFFINE, image.affine)
    places = matrix[:3, :3] @ at + matrix[:3, 3:]
    found = ndimage.map_coordinates(volume.astype(np.float64), places, order=order, mode="nearest")
    return np.asarray(found).reshape(image.spatial_shape)


def test_every_source_is_resampled_alike(volume: NDArray[np.int16], tmp_path: Path) -> None:
    for name, image in images(volume, tmp_path).items():
        found = image.resampled((1, 1.2, 0.8))
        assert found.dtype == (np.float64 if image.dtype.itemsize > 2 else np.float32), name
        assert np.abs(found.data[0] - expected(volume, found)).max() < 1e-5 * 2000, name
        turned = image.oriented("PIL")
        assert turned.dtype == image.dtype
        assert np.array_equal(turned.data[0], volume.transpose(1, 2, 0)[::-1, ::-1, ::-1]), name


def test_a_group_of_a_stored_image_equals_the_whole(volume: NDArray[np.int16], stored: zp.Cohort) -> None:
    image = stored["ann"].ct.resampled(1.0)
    whole = expected(volume * 0.5 - 3, image)
    locations = [zp.PatchLocation((0, 3, 0), (9, 9, 9)), zp.PatchLocation((11, 10, 7), (12, 12, 12))]
    for location, found in zip(locations, image.read_group(locations), strict=True):
        assert np.abs(found[0] - whole[location.to_slices()]).max() < 1e-5 * 1000
    padded = image.read_group([zp.PatchLocation((-2, 0, 0), (6, 6, 6))], padding_mode="edge")[0]
    assert np.abs(padded[0, 2:] - whole[:4, :6, :6]).max() < 1e-5 * 1000
    assert np.array_equal(padded[0, 0], padded[0, 2])
    with pytest.raises(PatchLocationError):
        image.read(zp.PatchLocation((20, 20, 20), (12, 12, 12)))
    for scheduler in ("sync", "threads"):
        again = image.read_group(locations, scheduler=scheduler)
        assert all(np.array_equal(a, b) for a, b in zip(again, image.read_group(locations), strict=True))


def test_only_the_chunks_under_the_boxes_and_their_halo_are_read_each_once(
    stored: zp.Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Any] = []
    whole = gather_plan.GatherPlan.of

    def watched(array: Any, first: Any, stop: Any, *more: Any) -> Any:
        plans.append((first, stop))
        return whole(array, first, stop, *more)

    monkeypatch.setattr(gather_plan.GatherPlan, "of", watched)
    image = stored["ann"].ct.resampled((0.7, 0.9, 0.65))  # z alone changes
    image.read_group([zp.PatchLocation((0, 0, 8), (8, 8, 8)), zp.PatchLocation((4, 4, 10), (8, 8, 8))])
    [(first, stop)] = plans  # one plan for the group, in which each chunk is decoded once
    assert first.tolist() == [[0, 3, 0, 0], [0, 4, 4, 4]]
    assert stop.tolist() == [[1, 9, 8, 8], [1, 10, 12, 12]]


def test_normalize_map_and_grids_compose(volume: NDArray[np.int16], stored: zp.Cohort) -> None:
    subject = stored["ann"]
    values = volume * 0.5 - 3
    normalize = zp.Normalize("zscore", statistics={"mean": 10.0, "std": 4.0})
    clip = zp.Normalize("clip", statistics={"percentile_0_5": -50.0, "percentile_99_5": 400.0})
    grid = subject.ct.resampled(1.1)
    before = normalize(subject.ct).resampled(1.1).data[0]
    assert np.abs(before - expected((values - 10) / 4, grid)).max() < 1e-5 * 250
    after = normalize(grid).data[0]
    assert np.allclose(before, after, atol=1e-5 * 250)
    clipped = clip(subject.ct).resampled(1.1).data[0]
    assert np.abs(clipped - expected(np.clip((values + 50) / 450, 0, 1), grid)).max() < 1e-5
    own = zp.Normalize()(grid).data  # by the statistics of the stored image
    assert np.allclose(own[0], (expected(values, grid) - values.mean()) / values.std(), atol=1e-3)
    mapped = subject.ct.map(lambda voxels: voxels * 2).resampled(1.1).map(lambda voxels: voxels + 1).data[0]
    assert np.abs(mapped - (expected(values * 2, grid) + 1)).max() < 1e-5 * 4000
    twice = subject.ct.oriented("LPS").resampled((0.7, 0.9, 1.3)).oriented("RAS").data[0]
    assert np.allclose(twice, values)


def test_statistics_stay_until_values_are_rescaled(stored: zp.Cohort) -> None:
    image = stored["ann"].ct
    assert image.resampled(1.0).statistics == image.statistics == image.oriented("LPS").statistics
    assert image.statistics["mean"]
    assert not image.resampled(1.0).rescaled(2, 0).statistics
    assert not image.rescaled(2, 0).resampled(1.0).statistics


def test_labels_keep_their_type_and_their_classes(stored: zp.Cohort, volume: NDArray[np.int16]) -> None:
    seg = stored["ann"].seg
    nearest, linear = seg.resampled(0.6), seg.resampled(0.6, interpolation="linear")
    assert nearest.dtype == linear.dtype == np.uint8
    assert np.array_equal(nearest.data[0], expected(volume > 300, nearest, order=0))
    share = expected(volume > 300, linear)
    clear = np.abs(share - 0.5) > 1e-6
    assert np.array_equal(linear.data[0][clear], (share > 0.5)[clear])
    with pytest.raises(OptionError, match="no classes"):
        seg.resampled(1.0, interpolation="cubic")


def test_the_same_spacing_gives_the_same_values_as_float32(volume: NDArray[np.int16]) -> None:
    same = zp.ScalarImage(volume, affine=AFFINE).resampled((0.7, 0.9, 1.3))
    assert same.dtype == np.float32
    assert np.array_equal(same.data[0], volume)


def test_values_are_written_into_memory_of_any_type_and_strides(volume: NDArray[np.int16]) -> None:
    image = zp.ScalarImage(volume, affine=AFFINE).resampled(1.0)
    location = zp.PatchLocation((1, 2, 3), (8, 9, 10))
    plain = image.read(location)
    for dtype in (np.float16, np.float64):
        out = np.empty((1, 1, 8, 9, 10), dtype)
        assert np.allclose(image.read_group([location], out)[0], plain, rtol=1e-3)
    out = np.empty((1, 8, 20, 10), np.float32)[:, :, ::2][:, :, :9]
    image.read_group([location], [out])
    assert np.array_equal(out, plain)
    with pytest.raises(OptionError, match="cannot hold all values"):
        image.read_group([location], np.empty((1, 1, 8, 9, 10), np.int16))


def test_bool_half_and_complex_voxels(volume: NDArray[np.int16]) -> None:
    half = zp.ScalarImage((volume / 100).astype(np.float16)).resampled(1.5)
    assert half.dtype == np.float32
    assert np.isfinite(half.data).all()
    is_high = zp.ScalarImage(volume > 300).resampled(1.5).data
    assert ((is_high >= 0) & (is_high <= 1)).all()
    with pytest.raises(OptionError, match="complex voxels"):
        zp.ScalarImage(volume.astype(np.complex64)).resampled(1.5)
    picked = zp.ScalarImage(volume.astype(np.complex64)).resampled(1.5, interpolation="nearest")
    assert picked.dtype == np.complex64


def test_channels_are_chosen_before_or_after(volume: NDArray[np.int16]) -> None:
    image = zp.ScalarImage(np.stack([volume, volume + 5, volume * 2]), affine=AFFINE)
    after = image.resampled(1.0).select(channels=[2, 0]).data
    assert np.array_equal(after, image.select(channels=[2, 0]).resampled(1.0).data)
    moved = image.resampled(1.0)
    assert len({moved.select(channels=[n]).identity() for n in range(3)} | {moved.identity()}) == 4
    root, _ = moved.select(channels=[2]).root
    assert np.array_equal(root.data, image.data[2:])


def test_images_on_other_grids_are_sent_to_other_processes(stored: zp.Cohort) -> None:
    subject = stored["ann"].oriented("LPS").resampled(1.0)
    again = pickle.loads(pickle.dumps(subject))
    assert np.array_equal(again.ct.data, subject.ct.data)
    assert again.ct.identity() == subject.ct.identity()


def test_identity_knows_the_grid(stored: zp.Cohort) -> None:
    image = stored["ann"].ct
    made: list[Callable[[zp.Image], zp.Image]] = [
        lambda i: i,
        lambda i: i.resampled(1.0),
        lambda i: i.resampled(1.1),
        lambda i: i.resampled(1.0, interpolation="cubic"),
        lambda i: i.resampled(1.0, antialias=True),
        lambda i: i.oriented("LPS"),
        lambda i: i.rescaled(2, 0).resampled(1.0),
        lambda i: i.resampled(1.0).rescaled(2, 0),
    ]
    assert len({fn(image).identity() for fn in made}) == len(made)
    assert image.resampled(1.0).identity() == image.resampled(1.0).identity()


def test_reads_of_one_graph_never_take_the_place_of_each_other(stored: zp.Cohort) -> None:
    """As memory is freed and used again, two lists of boxes may have had the same address."""
    source = stored["ann"].ct.resampled(1.1).source
    keys: set[Any] = set()
    for _ in range(50):
        out = np.empty((1, 8, 8, 8), np.float32)
        found = source.tasks([zp.PatchLocation((0, 0, 0), (8, 8, 8))], [out], UNSCALED, 1).needs.keys()
        own = {key for key in found if key[0] == "resampled" or key[0][0] == "resampled"}
        assert own
        assert not own & keys
        keys |= own
