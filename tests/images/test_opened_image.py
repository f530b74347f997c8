"""The identity of an image: different for different voxels, without reading voxels from files."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import zarr
from numcodecs import Delta
from numpy.typing import NDArray

import zpatch as zp
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import StoreExistsError

SHAPE = (9, 10, 11)

Voxels = NDArray[np.int16]


def as_nifti(folder: Path, voxels: Voxels) -> zp.Image:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "image.nii")
    return zp.ScalarImage(folder / "image.nii")


def as_zarr(folder: Path, voxels: Voxels, **options: Any) -> zp.Image:
    path = folder / "image.zarr"
    if not path.exists():
        zarr.create_array(path, shape=SHAPE, chunks=(4, 4, 4), dtype="i2", **options)
    zarr.open_array(path)[:] = voxels
    return zp.ScalarImage(path, axes="xyz")


def as_zarr_3(folder: Path, voxels: Voxels) -> zp.Image:
    return as_zarr(folder, voxels)


def as_zarr_2(folder: Path, voxels: Voxels) -> zp.Image:
    return as_zarr(folder, voxels, zarr_format=2)


def as_zarr_that_only_zarr_reads(folder: Path, voxels: Voxels) -> zp.Image:
    return as_zarr(folder, voxels, zarr_format=2, filters=[Delta(dtype="<i2")])


def as_array(folder: Path, voxels: Voxels) -> zp.Image:
    return zp.ScalarImage(voxels.copy())


def as_array_in_another_order(folder: Path, voxels: Voxels) -> zp.Image:
    return zp.ScalarImage(np.asfortranarray(voxels))


def as_mapped_file(folder: Path, voxels: Voxels) -> zp.Image:
    voxels.tofile(folder / "image.raw")
    return zp.ScalarImage(np.memmap(folder / "image.raw", np.int16, "r", shape=SHAPE))


def as_stored(folder: Path, voxels: Voxels) -> zp.Image:
    (folder / "source").mkdir(exist_ok=True)
    as_nifti(folder / "source", voxels)
    zp.convert(folder / "source", folder / "store", overwrite=True)
    return zp.Cohort(folder / "store")[0].image


def as_stored_by_its_path(folder: Path, voxels: Voxels) -> zp.Image:
    stored = as_stored(folder, voxels)
    assert stored.folder is not None
    return zp.ScalarImage(stored.folder)


def as_mapped_image(folder: Path, voxels: Voxels) -> zp.Image:
    return as_nifti(folder, voxels).map(lambda array: array + 1)


WAYS = [value for name, value in list(globals().items()) if name.startswith("as_") and name != "as_zarr"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    close_shards(tmp_path)


@pytest.fixture
def voxels(rng: np.random.Generator) -> Voxels:
    return rng.integers(0, 1000, SHAPE, dtype=np.int16)


@pytest.mark.parametrize("way", WAYS)
def test_equal_voxels_have_one_identity_and_another_voxel_has_another(
    way: Callable[[Path, Voxels], zp.Image], folder: Path, voxels: Voxels
) -> None:
    image = way(folder, voxels)
    first = image.identity()
    assert image.identity() == first
    if way is not as_mapped_file:  # the map would be pickled as an array
        assert pickle.loads(pickle.dumps(image)).identity() == first
    assert image.rescaled(2, 0).identity() != first
    voxels[4, 5, 6] += 1
    assert way(folder, voxels).identity() != first


def test_volumes_in_one_mapped_file_have_different_identities(folder: Path, voxels: Voxels) -> None:
    np.stack([voxels, voxels]).tofile(folder / "two.raw")
    two = np.memmap(folder / "two.raw", np.int16, "r", shape=(2, *SHAPE))
    second = np.memmap(folder / "two.raw", np.int16, "r", shape=SHAPE, offset=voxels.nbytes)
    images = [zp.ScalarImage(array) for array in (two[0], two[1], second, two[1][::-1])]
    first, *others = [image.identity() for image in images]
    assert first not in others
    assert others[0] == others[1] != others[2]


def test_the_identity_of_an_array_in_memory_is_that_of_its_voxels(voxels: Voxels) -> None:
    every_second = np.repeat(voxels, 2, axis=2)[:, :, ::2]
    copy = every_second.copy()
    assert zp.ScalarImage(every_second).identity() == zp.ScalarImage(copy).identity()
    assert zp.ScalarImage(copy, affine=np.diag([2, 2, 2, 1])).identity() != zp.ScalarImage(copy).identity()


def test_an_affine_of_any_numbers_has_an_identity(voxels: Voxels) -> None:
    affines = [np.eye(4), np.full((4, 4), np.nan), np.diag([np.inf, 1, 1, 1])]
    assert len({zp.ScalarImage(voxels, affine=affine).identity() for affine in affines}) == 3


def test_an_image_of_another_axis_order_has_another_identity(voxels: Voxels) -> None:
    cube = voxels[:9, :9, :9]
    turned = cube.transpose(2, 1, 0)
    assert zp.ScalarImage(turned).identity() != zp.ScalarImage(cube).identity()
    assert zp.ScalarImage(turned.copy()).identity() != zp.ScalarImage(cube.copy()).identity()


def test_the_identity_of_an_expression_is_its_shape(voxels: Voxels) -> None:
    array = da.from_array(voxels, chunks=4)
    assert zp.ScalarImage(array).identity() == zp.ScalarImage(array + 1).identity()
    assert zp.ScalarImage(array).identity() != zp.ScalarImage(array[1:]).identity()


@pytest.mark.parametrize("way", [as_nifti, as_zarr_3, as_array])
def test_a_prediction_is_not_resumed_from_voxels_that_have_changed(
    way: Callable[[Path, Voxels], zp.Image], folder: Path, voxels: Voxels
) -> None:
    def predicted(image: zp.Image) -> zp.Cohort:
        subject = zp.Subject(name="one", image=image)
        return zp.predict(negated, [subject], folder / "out.zarr", image="image", patch_size=8)

    image = way(folder, voxels)
    found = predicted(image)["one"].prediction.data
    np.testing.assert_allclose(found[0], -voxels, rtol=1e-6)
    predicted(image)
    voxels[4, 5, 6] += 1
    with pytest.raises(StoreExistsError, match=r"the prediction of 'one' was made from other inputs"):
        predicted(way(folder, voxels))


def negated(batch: Any) -> Any:
    return -batch


@pytest.mark.parametrize("way", WAYS)
def test_channels_of_every_kind_of_image_can_be_chosen(
    way: Callable[[Path, Voxels], zp.Image], folder: Path, voxels: Voxels
) -> None:
    image = way(folder, voxels)
    one = image.select(channels=[0, 0])
    np.testing.assert_array_equal(one.data, np.concatenate([image.data] * 2))
    assert one.statistics == {}
    assert one.identity() != image.identity()
    assert image.select().identity() == image.identity()


class ReadsWhatIsSliced:
    """An array as those of h5py and tensorstore are."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.shape, self.dtype, self._array = array.shape, array.dtype, array

    def __getitem__(self, key: Any) -> NDArray[Any]:
        assert all(isinstance(each, slice) for each in key)
        return self._array[key]


@pytest.mark.parametrize("kind", ["memory", "mapped", "dask", "lazy"])
def test_chosen_channels_of_arrays_of_channels_are_those_of_numpy(
    folder: Path, voxels: Voxels, kind: str
) -> None:
    array = np.stack([voxels, voxels + 1, voxels + 2, voxels + 3])
    array.tofile(folder / "four.raw")
    kinds = {
        "memory": array,
        "mapped": np.memmap(folder / "four.raw", np.int16, "r", shape=array.shape),
        "dask": da.from_array(array, chunks=4),
        "lazy": ReadsWhatIsSliced(array),
    }
    image = zp.ScalarImage(kinds[kind])
    for channels in ([0], [2, 1], [0, 2, 3], [1, 1]):
        chosen = image.select(channels=channels)
        assert chosen.shape == (len(channels), *SHAPE)
        again = pickle.loads(pickle.dumps(chosen))
        for found in (chosen.data, again.data, chosen.dask.compute(scheduler="sync")):
            np.testing.assert_array_equal(found, array[channels])
        last = chosen.select(channels=[len(channels) - 1])
        np.testing.assert_array_equal(last.data[0], array[channels[-1]])
    assert len({image.select(channels=[n]).identity() for n in range(4)}) == 4


def test_a_time_point_of_a_nifti_file_can_be_chosen(folder: Path, voxels: Voxels) -> None:
    frames = np.stack([voxels, voxels + 1, voxels + 2], axis=3)
    file = nib.Nifti1Image(frames, np.eye(4))
    file.header.set_xyzt_units("mm", "sec")
    nib.save(file, folder / "bold.nii")
    image = zp.ScalarImage(folder / "bold.nii")
    assert image.opened.in_words == "3 time points as channels"
    point = image.select(time=1)
    assert (point.opened.in_words, point.shape) == ("time point 1 of 3", (1, *SHAPE))
    np.testing.assert_array_equal(point.data[0], voxels + 1)
    assert image.select(channels=[2, 0]).opened.in_words == "time points 2, 0 of 3 as channels"
    np.testing.assert_array_equal(zp.ScalarImage(folder / "bold.nii", time=2).data[0], voxels + 2)
