"""Images: lazy views of any source as (C, I, J, K), scaled by fixed rules, never read outside."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from reading import both_loops, stored
from reading import loop as loop

import zpatch as zp
from zpatch.chunks.scaling import UNSCALED
from zpatch.errors import NotAStoreError, OptionError, PatchLocationError, SourceError
from zpatch.sources.group_read import read_group, read_requests
from zpatch.sources.voxel_source import Request
from zpatch.sources.voxel_sources import ArraySource

AFFINE = np.array([[0, 2, 0, 10], [3, 0, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1.0]])


@pytest.fixture
def volume(rng: np.random.Generator) -> NDArray[np.int16]:
    """(C, I, J, K)."""
    return rng.integers(-100, 100, (2, 5, 6, 7), dtype=np.int16)


def save(path: Path, voxels: NDArray[Any], *, slope: float = 1, inter: float = 0) -> Path:
    """A NIfTI file of stored voxels, with a slope that nibabel does not choose."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(voxels, AFFINE, dtype=voxels.dtype).to_filename(path)
    with path.open("r+b") as file:
        file.seek(112)
        file.write(np.array([slope, inter], "<f4").tobytes())
    return path


def converted(folder: Path, voxels: NDArray[Any], **scaling: float) -> zp.Image:
    save(folder / "source" / "sub.nii", voxels, **scaling)
    zp.convert(folder / "source", folder / "store", chunk=4)
    return zp.Cohort(folder / "store")[0].image


def test_an_array_of_three_axes_is_one_channel(volume: NDArray[np.int16]) -> None:
    image = zp.ScalarImage(volume[0])
    assert image.shape == (1, 5, 6, 7)
    assert image.spatial_shape == (5, 6, 7)
    assert image.num_channels == 1
    assert image.dtype == np.int16
    np.testing.assert_array_equal(image.data[0], volume[0])


def test_an_array_of_four_axes_has_channels_first(volume: NDArray[np.int16]) -> None:
    image = zp.ScalarImage(volume)
    assert (image.shape, image.num_channels) == ((2, 5, 6, 7), 2)
    np.testing.assert_array_equal(image.data, volume)


def test_only_the_boxes_of_a_dask_array_are_computed(volume: NDArray[np.int16]) -> None:
    image = zp.ScalarImage(da.from_array(volume, chunks=3) * 2)
    location = zp.PatchLocation((1, 2, 3), (3, 3, 3))
    np.testing.assert_array_equal(image.read(location), volume[(slice(None), *location.to_slices())] * 2)


@pytest.mark.parametrize("axes", ["zyx", "xyz", "yxz", "czyx", "xyzc", "zcxy", "tzyx"])
@pytest.mark.parametrize("said", ["by names", "by axes="])
@pytest.mark.parametrize("opened", ["path", "str", "array"])
def test_the_axes_of_a_zarr_array_are_named_by_its_dimension_names(
    tmp_path: Path, volume: NDArray[np.int16], axes: str, said: str, opened: str
) -> None:
    letters = axes.translate(str.maketrans("", "", "xyz")) + "xyz"
    whole = volume if len(axes) == 4 else volume[:1]
    stored = whole.reshape(whole.shape[-len(axes) :]).transpose([letters.index(axis) for axis in axes])
    names = list(axes) if said == "by names" else None
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=stored.shape, chunks=(3,) * stored.ndim, dtype=stored.dtype,
        dimension_names=names,
    )  # fmt: skip
    array[:] = stored
    data: Any = {"path": tmp_path / "a.zarr", "str": str(tmp_path / "a.zarr"), "array": array}[opened]
    image = zp.ScalarImage(data, axes=None if names else axes, affine=AFFINE)
    np.testing.assert_array_equal(image.data, whole)
    np.testing.assert_array_equal(image.affine, AFFINE)


@pytest.mark.parametrize("axes", [None, "zy", "zyxx", "abc", "zyxct"])
def test_a_zarr_array_of_unknown_axes_is_an_error(tmp_path: Path, axes: str | None) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(2, 3, 4), dtype="u1")
    with pytest.raises(OptionError, match=r"the axes of a Zarr array of shape \(2, 3, 4\) are .*; say axes="):
        zp.ScalarImage(tmp_path / "a.zarr", axes=axes)


def test_an_array_of_a_store_can_be_opened_by_its_path(cohort_store: Path, cohort: zp.Cohort) -> None:
    t1 = cohort["sub-01"].t1
    np.testing.assert_array_equal(zp.ScalarImage(cohort_store / "sub-01" / "t1" / "0").data, t1.data)


@pytest.mark.parametrize("subject", ["sub-01", "sub-02", "sub-03"])
def test_an_image_of_a_store_can_be_opened_by_its_path(
    cohort_store: Path, cohort: zp.Cohort, subject: str
) -> None:
    image = zp.ScalarImage(cohort_store / subject / "t1")
    np.testing.assert_array_equal(image.data, cohort[subject].t1.data)
    np.testing.assert_array_equal(image.affine, cohort[subject].t1.affine)
    assert image.dtype == cohort[subject].t1.dtype


def test_any_ome_zarr_image_is_opened_with_its_scale_and_translation(
    tmp_path: Path, volume: NDArray[np.int16]
) -> None:
    transforms = [
        {"type": "scale", "scale": [1.0, 4.0, 3.0, 2.0]},
        {"type": "translation", "translation": [0.0, 30.0, 20.0, 10.0]},
    ]
    multiscale = {
        "axes": [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "zyx")],
        "datasets": [{"path": "full", "coordinateTransformations": transforms}],
    }
    ome = {"version": "0.5", "multiscales": [multiscale]}
    group = zarr.create_group(tmp_path / "image.zarr", attributes={"ome": ome})
    group.create_array("full", shape=(2, 7, 6, 5), dtype="i2")[:] = volume.transpose(0, 3, 2, 1)
    image = zp.ScalarImage(tmp_path / "image.zarr")
    np.testing.assert_array_equal(image.data, volume)
    np.testing.assert_array_equal(image.affine, [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
    assert image.spacing == (2, 3, 4)


@pytest.mark.parametrize(("name", "why"), [("a.mgz", "save it as NIfTI"), ("A.NII.GZ", "convert it first")])
def test_a_file_of_another_format_is_an_error_that_names_the_formats(
    tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / name).write_bytes(b"voxels")
    with pytest.raises(SourceError, match=why):
        zp.ScalarImage(tmp_path / name)


def test_a_zarr_group_that_is_not_an_image_is_an_error(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "group", mode="w")
    with pytest.raises(NotAStoreError, match="group: it is a Zarr group but no OME-Zarr image; name an ima"):
        zp.ScalarImage(tmp_path / "group")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_a_path_that_is_not_an_image_is_an_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "thing")
    with pytest.raises(NotAStoreError, match="thing: it is no Zarr array or OME-Zarr image"):
        zp.ScalarImage(tmp_path / "thing")


@pytest.mark.parametrize("endianness", ["<", ">"])
def test_an_uncompressed_nifti_file_is_mapped_and_only_boxes_are_read(
    tmp_path: Path, volume: NDArray[np.int16], endianness: str
) -> None:
    header = nib.Nifti1Header(endianness=endianness)
    header.set_data_dtype(np.int16)
    nib.Nifti1Image(np.moveaxis(volume, 0, -1), AFFINE, header).to_filename(tmp_path / "a.nii")
    image = zp.ScalarImage(tmp_path / "a.nii")
    assert isinstance(image.source, ArraySource)
    assert isinstance(image.source.array, np.memmap)
    np.testing.assert_array_equal(image.data, volume)
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert image.dtype == image.data.dtype == np.dtype("=i2")


def test_a_nifti_file_with_a_slope_is_scaled(tmp_path: Path, volume: NDArray[np.int16]) -> None:
    path = save(tmp_path / "a.nii", volume[0], slope=0.5, inter=3)
    image = zp.ScalarImage(path)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image.data[0], np.asanyarray(nib.load(path).dataobj))


def test_a_compressed_nifti_file_is_an_error_that_says_to_convert_it(
    tmp_path: Path, volume: NDArray[np.int16]
) -> None:
    nib.Nifti1Image(volume[0], AFFINE).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(SourceError, match=r"a.nii.gz: patches cannot be read .*'zpatch convert .* STORE'"):
        zp.ScalarImage(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").rename(tmp_path / "b.nii")
    with pytest.raises(
        SourceError, match=r"b.nii: only plain, uncompressed voxels can be mapped; convert it"
    ):
        zp.ScalarImage(tmp_path / "b.nii")


@pytest.mark.parametrize("shape", [(3,), (3, 4), (1, 2, 3, 4, 5)])
def test_an_array_of_another_number_of_axes_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        OptionError, match=r"an image is \(I, J, K\) or \(C, I, J, K\), not of shape \(" + str(shape[0])
    ):
        zp.ScalarImage(np.zeros(shape))


@pytest.mark.parametrize("data", [np.full((1, 2, 3), "a"), np.full((1, 2, 3), None)])
def test_an_array_of_other_things_than_numbers_is_an_error(data: Any) -> None:
    with pytest.raises(OptionError, match="an image is of numbers, not of"):
        zp.ScalarImage(data)


def test_an_affine_is_four_by_four() -> None:
    with pytest.raises(OptionError, match=r"affine must be 4 x 4, not of shape \(3, 3\)"):
        zp.ScalarImage(np.zeros((1, 2, 3)), affine=np.eye(3))


def test_an_image_without_an_affine_has_voxels_of_one_millimetre() -> None:
    image = zp.ScalarImage(np.zeros((1, 2, 3)))
    np.testing.assert_array_equal(image.affine, np.eye(4))
    assert image.spacing == (1, 1, 1)


def test_an_affine_cannot_be_changed_by_accident() -> None:
    given = AFFINE.copy()
    image = zp.ScalarImage(np.zeros((1, 2, 3)), affine=given)
    given[:] = 0
    image.affine[:] = 0
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert image.spacing == (3, 2, 4)


SCALED = {
    "u1": "f4", "i1": "f4", "i2": "f4", "u2": "f4", "i4": "f8", "u4": "f8", "i8": "f8", "u8": "f8",
    "f4": "f8", "f8": "f8", "c8": "c8", "c16": "c16",
}  # fmt: skip


@pytest.mark.parametrize("code", list(SCALED))
def test_scaled_voxels_are_float32_or_float64_for_wide_types(tmp_path: Path, code: str) -> None:
    stored = np.arange(60).reshape(3, 4, 5).astype(code)
    image = converted(tmp_path, stored, slope=0.25, inter=-3)
    whole = zp.PatchLocation((0, 0, 0), (3, 4, 5))
    assert image.scaling != UNSCALED
    assert image.dtype == image.read(whole).dtype == image.dask.dtype == np.dtype(SCALED[code])
    np.testing.assert_array_equal(image.read(whole)[0], stored * np.float32(0.25) - 3)
    np.testing.assert_array_equal(image.dask.compute(), image.data)
    unscaled = image.read(whole, scaled=False)
    assert unscaled.dtype == stored.dtype
    np.testing.assert_array_equal(unscaled[0], stored)


@pytest.mark.parametrize("code", list(SCALED))
def test_voxels_without_a_slope_keep_their_type(tmp_path: Path, code: str) -> None:
    image = converted(tmp_path, np.arange(60).reshape(3, 4, 5).astype(code))
    assert image.scaling == UNSCALED
    assert image.dtype == image.data.dtype == image.dask.dtype == np.dtype(code)


def test_a_fill_is_a_value_and_not_a_stored_voxel(tmp_path: Path) -> None:
    image = converted(tmp_path, np.zeros((3, 4, 5), np.int16), slope=2, inter=1)
    [patch] = image.read_group([zp.PatchLocation((-1, 0, 0), (2, 1, 1))], padding_mode="constant", fill=7.5)
    assert patch.ravel().tolist() == [7.5, 1]


@pytest.mark.parametrize(
    ("index", "size"),
    [((-1, 0, 0), (2, 2, 2)), ((0, 0, 6), (2, 2, 2)), ((0, 0, 0), (5, 6, 8)), ((9, 9, 9), (1, 1, 1))],
)
def test_a_box_that_reaches_outside_is_an_error(
    volume: NDArray[np.int16], index: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    image = zp.ScalarImage(volume)
    why = r"from \(.*\) to \(.*\) is not inside ScalarImage\(.*; keep it in 0 .. \(5, 6, 7\), or use a Grid"
    with pytest.raises(PatchLocationError, match=why):
        image.read(zp.PatchLocation(index, size))


def test_a_box_of_negative_size_is_an_error(cohort: zp.Cohort, volume: NDArray[np.int16]) -> None:
    for image in (zp.ScalarImage(volume), cohort["sub-01"].t1):
        with pytest.raises(
            PatchLocationError, match=r"the box from \(2, 2, 2\) to \(3, 1, 3\) is not inside"
        ):
            image.read(zp.PatchLocation((2, 2, 2), (1, -1, 1)))


def test_only_the_boxes_of_a_mapped_image_are_computed(cohort: zp.Cohort) -> None:
    t1 = cohort["sub-01"].t1
    mapped = t1.map(lambda array: (array - 100.0) / 2)
    assert isinstance(mapped, zp.ScalarImage)
    assert (mapped.shape, mapped.dtype) == (t1.shape, np.float64)
    np.testing.assert_array_equal(mapped.affine, t1.affine)
    np.testing.assert_array_equal(mapped.data, (t1.data - 100.0) / 2)
    location = zp.PatchLocation((3, 4, 5), (6, 7, 8))
    np.testing.assert_array_equal(mapped.read(location), (t1.read(location) - 100.0) / 2)


def test_a_map_may_change_channels_and_keeps_the_kind(volume: NDArray[np.int16]) -> None:
    mapped = zp.LabelMap(volume).map(lambda array: da.concatenate([array, array[:1] > 0]).astype(np.uint8))
    assert isinstance(mapped, zp.LabelMap)
    assert mapped.num_channels == 3
    np.testing.assert_array_equal(mapped.data[2], volume[0] > 0)


def test_a_map_of_a_stored_label_map_is_sampled_by_its_new_values(cohort: zp.Cohort) -> None:
    seg = cohort["sub-01"].seg
    subject = zp.Subject(seg=seg.map(lambda array: (array == 2) * 5))
    [location] = zp.LabelSampler(1, "seg", {5: 1}).locations(subject, 1, 0)
    assert seg.read(location).item() == 2


def test_a_map_that_changes_the_spatial_shape_is_an_error(volume: NDArray[np.int16]) -> None:
    with pytest.raises(OptionError, match=r"from \(5, 6, 7\) to \(3, 6, 7\); only values and channels may"):
        zp.ScalarImage(volume).map(lambda array: array[:, ::2])


def test_statistics_are_those_of_the_store_or_else_empty(
    cohort: zp.Cohort, volume: NDArray[np.int16]
) -> None:
    assert cohort["sub-01"].t1.statistics["max"] == cohort["sub-01"].t1.data.max()
    assert zp.ScalarImage(volume).statistics == {}


def test_an_image_of_a_store_survives_pickling(cohort: zp.Cohort) -> None:
    t1 = cohort["sub-03"].t1
    copy = pickle.loads(pickle.dumps(t1))
    assert type(copy) is type(t1)
    np.testing.assert_array_equal(copy.data, t1.data)
    assert len(pickle.dumps(t1)) < 10_000


def test_the_text_of_an_image_names_it(cohort: zp.Cohort) -> None:
    i, j, k = cohort["sub-01"].seg.spatial_shape
    assert repr(cohort["sub-01"].seg) == f"LabelMap(sub-01/seg, shape (1, {i}, {j}, {k}), uint8)"
    assert repr(zp.SamplingMap(np.zeros((1, 2, 3)))) == "SamplingMap(shape (1, 1, 2, 3), float64)"


# Several images together, and memory that the caller provides

OUT_LAYOUTS: dict[str, Callable[[tuple[int, ...], Any], NDArray[Any]]] = {
    "C order": lambda shape, dtype: np.full(shape, 77).astype(dtype),
    "stored order": lambda shape, dtype: (
        np.full(shape[:1] + shape[:0:-1], 77).astype(dtype).transpose(0, 3, 2, 1)
    ),
    "backwards": lambda shape, dtype: np.full(shape, 77).astype(dtype)[:, ::-1, ::-1, ::-1],
    "a part of a batch": lambda shape, dtype: np.full((3, *(n + 2 for n in shape)), 77).astype(dtype)[
        1, 1:-1, 1:-1, 1:-1, 1:-1
    ],
    "a tensor": lambda shape, dtype: torch.zeros(shape, dtype=getattr(torch, np.dtype(dtype).name)).numpy(),
}


@both_loops
@pytest.mark.parametrize("layout", list(OUT_LAYOUTS))
@pytest.mark.parametrize("dtype", ["i2", "f4", "f2", "f8"])
def test_boxes_are_read_into_memory_of_any_layout_and_type(
    tmp_path: Path, volume: NDArray[np.int16], layout: str, dtype: str
) -> None:
    plain = stored(tmp_path / "plain", volume.transpose(0, 3, 2, 1), chunk=3, shard=2)
    half = stored(tmp_path / "half", volume.transpose(0, 3, 2, 1), chunk=2, shard=1, slope=0.5, inter=3.0)
    images = [
        plain,
        half,
        zp.ScalarImage(volume),
        zp.ScalarImage(da.from_array(volume, chunks=3)),
        plain.rescaled(2, 1),
    ]
    wholes = [volume, volume * 0.5 + 3, volume, volume, volume * 2 + 1]
    locations = [zp.PatchLocation((1, 2, 3), (3, 3, 3)), zp.PatchLocation((0, 0, 0), (5, 6, 7))] * 2
    outs = [[OUT_LAYOUTS[layout]((2, *box.size), dtype) for box in locations] for _ in images]
    read_requests(
        [
            Request(image.source, locations, given, image.scaling)
            for image, given in zip(images, outs, strict=True)
        ]
    )
    for whole, given in zip(wholes, outs, strict=True):
        for box, out in zip(locations, given, strict=True):
            expected = whole[(slice(None), *box.to_slices())].astype(np.float32).astype(dtype)
            np.testing.assert_array_equal(out, expected)


@both_loops
def test_memory_around_a_box_is_left_alone(tmp_path: Path, volume: NDArray[np.int16]) -> None:
    image = stored(tmp_path / "image", volume.transpose(0, 3, 2, 1), chunk=3, shard=2)
    box = zp.PatchLocation((1, 1, 1), (4, 4, 4))
    memory = np.full((4, 6, 6, 6), 99, np.int16)
    read_group([image], [box], out=[[memory[1:3, 1:-1, 1:-1, 1:-1]]])
    around = np.ones(memory.shape, bool)
    around[1:3, 1:-1, 1:-1, 1:-1] = False
    assert (memory[around] == 99).all()
    np.testing.assert_array_equal(memory[1:3, 1:-1, 1:-1, 1:-1], volume[:, 1:5, 1:5, 1:5])


@both_loops
def test_boxes_of_one_group_may_be_written_to_memory_of_different_types(
    tmp_path: Path, volume: NDArray[np.int16]
) -> None:
    image = stored(tmp_path / "image", volume.transpose(0, 3, 2, 1), chunk=3, shard=2)
    box = zp.PatchLocation((0, 0, 0), (5, 6, 7))
    outs = [np.zeros(volume.shape, dtype) for dtype in ("i2", "f4", "i2", "f8")]
    read_group([image], [box] * 4, out=[outs])
    for out in outs:
        np.testing.assert_array_equal(out, volume)


def test_memory_of_another_shape_is_an_error(volume: NDArray[np.int16]) -> None:
    box = zp.PatchLocation((0, 0, 0), (2, 2, 2))
    why = r"the memory for a box of \(2, 2, 2, 2\) voxels has the shape \(1, 2, 2, 2\)"
    with pytest.raises(OptionError, match=why):
        read_group([zp.ScalarImage(volume)], [box], out=[[np.zeros((1, 2, 2, 2))]])


GROUP = [zp.PatchLocation((1, 2, 3), (3, 3, 3)), zp.PatchLocation((2, 3, 0), (3, 3, 3))]
OUTS: dict[str, Callable[[], Any]] = {
    "one array": lambda: np.zeros((2, 2, 3, 3, 3), np.float32),
    "one array in stored order": lambda: np.zeros((2, 2, 3, 3, 3), np.int16).transpose(0, 1, 4, 3, 2),
    "a list of arrays": lambda: [np.zeros((2, 3, 3, 3), dtype) for dtype in ("i2", "f8")],
    "one tensor": lambda: torch.zeros(2, 2, 3, 3, 3),
    "a list of tensors": lambda: [torch.zeros((2, 3, 3, 3), dtype=t) for t in (torch.int32, torch.half)],
}


@both_loops
@pytest.mark.parametrize("out", list(OUTS))
@pytest.mark.parametrize("padding_mode", [None, "reflect"])
def test_a_group_is_read_into_the_memory_given_as_out_and_out_is_returned(
    tmp_path: Path, volume: NDArray[np.int16], out: str, padding_mode: str | None
) -> None:
    image = stored(tmp_path / "image", volume.transpose(0, 3, 2, 1), chunk=3, shard=2)
    reach = -1 if padding_mode else 0
    locations = [zp.PatchLocation((box.index[0], box.index[1], reach), box.size) for box in GROUP]
    expected = image.read_group(locations, padding_mode=padding_mode)
    given = OUTS[out]()
    assert image.read_group(locations, given, padding_mode=padding_mode) is given
    for patch, memory in zip(expected, given, strict=True):
        np.testing.assert_array_equal(np.asarray(memory), patch)
    outs = [OUTS[out](), np.zeros((2, 2, 3, 3, 3))]
    assert zp.read_group([image, image], locations, outs, padding_mode=padding_mode) is outs
    for memory in outs:
        for patch, part in zip(expected, memory, strict=True):
            np.testing.assert_array_equal(np.asarray(part), patch)


@pytest.mark.parametrize(
    ("values", "memory", "fits"),
    [
        ("i2", "i2", True), ("i2", "i4", True), ("i2", "f2", True), ("u1", "i2", True), ("f8", "f4", True),
        ("i8", "f4", True), ("f4", "c8", True), ("?", "u1", True), ("i2", ">i2", True), ("c16", "c8", True),
        ("u8", "i8", True), ("i8", "u8", False),
        ("i2", "u2", False), ("u2", "i2", False), ("i4", "i2", False), ("f4", "i4", False),
        ("u1", "?", False), ("c8", "f4", False), ("i2", "O", False), ("i2", "U9", False),
        ("i2", "M8[s]", False),
    ],
)  # fmt: skip
def test_memory_is_of_floats_or_has_all_values_of_the_image(values: str, memory: str, fits: bool) -> None:
    image = zp.ScalarImage(np.ones((2, 2, 2), values))
    box, out = zp.PatchLocation((0, 0, 0), (2, 2, 2)), np.zeros((1, 1, 2, 2, 2), memory)
    if fits:
        assert (image.read_group([box], out) == 1).all()
        return
    why = f"memory of {out.dtype} cannot hold all values of {image!r}; give memory of {image.dtype} or of"
    with pytest.raises(OptionError, match=re.escape(why)):
        image.read_group([box], out)


@pytest.mark.parametrize(
    ("out", "why"),
    [
        (np.zeros((3, 2, 3, 3, 3)), "there is memory for 3 boxes, but 2 are read"),
        ([np.zeros((2, 3, 3, 3))], "there is memory for 1 boxes, but 2 are read"),
        (np.zeros((2, 3, 3, 3)), r"a box of (2, 3, 3, 3) voxels has the shape (3, 3, 3)"),
        (np.broadcast_to(0.0, (2, 2, 3, 3, 3)), "is read-only; give an array that can be written to"),
        ([[0], [0]], "the memory for a box must be a numpy array or a tensor of torch, not list"),
        (torch.zeros((2, 2, 3, 3, 3), dtype=torch.bfloat16), "cannot be read into this tensor: Got unsupp"),
        (torch.zeros((2, 2, 3, 3, 3), requires_grad=True), "cannot be read into this tensor: Can't call"),
        (torch.zeros((2, 2, 3, 3, 3), device="meta"), "cannot be read into this tensor: can't convert meta"),
    ],
)  # fmt: skip
def test_memory_that_cannot_be_read_into_is_refused(volume: NDArray[np.int16], out: Any, why: str) -> None:
    with pytest.raises(OptionError, match=re.escape(why)):
        zp.ScalarImage(volume).read_group(GROUP, out)


@pytest.mark.parametrize("option", ["out", "scaled", "fill"])
def test_what_is_given_for_each_image_must_be_given_for_all(volume: NDArray[np.int16], option: str) -> None:
    images, given = [zp.ScalarImage(volume)] * 2, {option: [[np.zeros((2, 3, 3, 3))] * 2]}
    with pytest.raises(OptionError, match=f"{option} must have one entry for each of 2 images, not 1"):
        zp.read_group(images, GROUP, **given)  # type: ignore[call-overload]


def test_nothing_is_read_into_memory_when_a_box_is_outside(volume: NDArray[np.int16]) -> None:
    out = np.zeros((2, 2, 3, 3, 3))
    with pytest.raises(PatchLocationError, match="is not inside"):
        zp.ScalarImage(volume).read_group([GROUP[0], zp.PatchLocation((4, 0, 0), (3, 3, 3))], out)
    assert not out.any()


@both_loops
def test_unscaled_voxels_of_several_images_are_the_stored_voxels(
    tmp_path: Path, volume: NDArray[np.int16]
) -> None:
    images = [
        stored(tmp_path / str(slope), volume.transpose(0, 3, 2, 1), chunk=3, shard=2, slope=slope)
        for slope in (1.0, 0.5, -2.0)
    ]
    box = zp.PatchLocation((1, 1, 1), (3, 3, 3))
    for [patch] in read_group(images, [box], scaled=False):
        assert patch.dtype == np.int16
        np.testing.assert_array_equal(patch, volume[:, 1:4, 1:4, 1:4])


def test_no_images_or_no_boxes_give_empty_lists(volume: NDArray[np.int16]) -> None:
    assert read_group([], [zp.PatchLocation((0, 0, 0), (1, 1, 1))]) == []
    assert read_group([zp.ScalarImage(volume)] * 2, []) == [[], []]


def test_images_of_different_shapes_may_be_read_together_if_both_have_the_box(
    volume: NDArray[np.int16],
) -> None:
    small, large = zp.ScalarImage(volume[:1, :3, :3, :3]), zp.ScalarImage(volume)
    box = zp.PatchLocation((1, 1, 1), (2, 2, 2))
    [[one], [other]] = read_group([small, large], [box])
    np.testing.assert_array_equal(one, other[:1])
    with pytest.raises(PatchLocationError, match=r"is not inside ScalarImage\(shape \(1, 3, 3, 3\)"):
        read_group([large, small], [zp.PatchLocation((1, 1, 1), (3, 3, 3))])


@both_loops
def test_a_rescaled_image_clips_values_and_then_scales_them(
    tmp_path: Path, volume: NDArray[np.int16]
) -> None:
    image = stored(tmp_path / "image", volume.transpose(0, 3, 2, 1), chunk=3, shard=2, slope=0.5, inter=1.0)
    changed = image.rescaled(-0.1, 2, -20, 30).rescaled(3, 0, 0, 3.5)
    values = np.clip(np.clip(volume * 0.5 + 1, -20, 30) * -0.1 + 2, 0, 3.5) * 3
    assert changed.dtype == changed.data.dtype == np.float32
    np.testing.assert_allclose(changed.data, values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(changed.dask.compute(), values, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(changed.read(zp.PatchLocation((0, 0, 0), (5, 6, 7)), scaled=False), volume)
    np.testing.assert_array_equal(image.data, volume * 0.5 + 1)
    assert type(changed) is type(image)
    np.testing.assert_array_equal(changed.affine, image.affine)


@pytest.mark.parametrize("code", ["u1", "i2", "i4", "f4", "f8"])
def test_an_array_in_memory_can_be_rescaled(code: str) -> None:
    voxels = np.arange(24).reshape(1, 2, 3, 4).astype(code)
    image = zp.ScalarImage(voxels).rescaled(0.5, 1, 3, 20)
    assert image.dtype == image.data.dtype == (np.float32 if voxels.itemsize < 4 else np.float64)
    np.testing.assert_allclose(image.data, np.clip(voxels, 3, 20) * 0.5 + 1)
    lazy = zp.ScalarImage(da.from_array(voxels, chunks=2)).rescaled(0.5, 1, 3, 20)
    np.testing.assert_array_equal(lazy.data, image.data)
