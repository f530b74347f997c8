"""NIfTI -> store -> NIfTI: the same bytes, for every kind of header and voxel type."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from corpus import NIBABEL_FILES
from numpy.typing import NDArray

import zpatch as zp
from zpatch.errors import DamageError, OptionError, StoreExistsError, UnknownNameError

RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
RGBA = np.dtype([*RGB.descr, ("A", "u1")])
DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "c16"]

both_suffixes = pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])


def content(path: Path) -> bytes:
    """The bytes of a file, uncompressed."""
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def back(path: Path, folder: Path, suffix: str, **options: Any) -> bytes:
    """The contents of a file after a round trip through a store."""
    (folder / "source").mkdir()
    shutil.copy(path, folder / "source")
    zp.convert(folder / "source", folder / "store", **options)
    [exported] = zp.export(folder / "store", folder / "out", suffix=suffix)
    assert exported.name.endswith(suffix)
    return content(exported)


def save(path: Path, voxels: NDArray[Any], *, endianness: str = "<", kind: type = nib.Nifti1Image) -> Path:
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(voxels.dtype)
    kind(voxels, np.diag([2.0, 3.0, 4.0, 1.0]), header, dtype=voxels.dtype).to_filename(path)
    return path


@both_suffixes
@pytest.mark.parametrize("path", NIBABEL_FILES, ids=lambda path: path.name)
def test_files_of_nibabel_come_back_byte_for_byte(path: Path, tmp_path: Path, suffix: str) -> None:
    assert back(path, tmp_path, suffix) == content(path)


def test_a_cohort_comes_back_byte_for_byte(cohort_source: Path, cohort_store: Path, tmp_path: Path) -> None:
    exported = zp.export(cohort_store, tmp_path / "out")
    originals = sorted(cohort_source.rglob("*.nii.gz"))
    assert sorted(p.relative_to(tmp_path / "out") for p in exported) == [
        p.relative_to(cohort_source) for p in originals
    ]
    for original in originals:
        assert content(tmp_path / "out" / original.relative_to(cohort_source)) == content(original)


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_voxel_type_comes_back_byte_for_byte(
    tmp_path: Path, rng: np.random.Generator, code: str, endianness: str, kind: type
) -> None:
    voxels = (rng.normal(size=(5, 6, 7)) * 100).astype(np.int8).astype(code)
    path = save(tmp_path / "a.nii", voxels, endianness=endianness, kind=kind)
    assert back(path, tmp_path, ".nii") == content(path)


@pytest.mark.parametrize("code", ["f4", "f8", "c8", "c16"])
def test_every_nan_comes_back_with_its_payload(tmp_path: Path, code: str) -> None:
    dtype = np.dtype(code)
    voxels = np.random.default_rng(0).bytes(4 * 5 * 6 * dtype.itemsize)
    path = save(tmp_path / "a.nii", np.zeros((4, 5, 6), dtype))
    path.write_bytes(path.read_bytes()[:352] + b"\xff" * 80 + voxels[80:])
    assert back(path, tmp_path, ".nii") == content(path)


@pytest.mark.parametrize("dtype", [RGB, RGBA], ids=["RGB", "RGBA"])
@pytest.mark.parametrize("dims", [(4, 5, 6), (4, 5), (4, 5, 6, 1), (4, 5, 6, 2)], ids=str)
@both_suffixes
def test_colours_come_back_byte_for_byte(
    tmp_path: Path, rng: np.random.Generator, dtype: np.dtype[Any], dims: tuple[int, ...], suffix: str
) -> None:
    voxels = rng.integers(0, 255, (*dims, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
    path = save(tmp_path / "a.nii", voxels)
    assert back(path, tmp_path, suffix) == content(path)


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("code", ["f4", "f8"])
def test_label_maps_of_floats_come_back_as_floats(tmp_path: Path, code: str, endianness: str) -> None:
    labels = np.resize(np.array([-3, 0, 1, 2, 70000], code), (5, 6, 7))
    path = save(tmp_path / "a_seg.nii", labels, endianness=endianness)
    assert back(path, tmp_path, ".nii.gz") == content(path)


@pytest.mark.parametrize(
    "dims", [(5,), (5, 6), (5, 6, 7, 3), (5, 6, 7, 2, 3), (5, 1, 1, 1, 2, 1, 3)], ids=str
)
def test_files_of_any_number_of_axes_come_back_byte_for_byte(
    tmp_path: Path, rng: np.random.Generator, dims: tuple[int, ...]
) -> None:
    path = save(tmp_path / "a.nii", rng.integers(0, 99, dims, dtype=np.int16))
    assert back(path, tmp_path, ".nii", chunk=4) == content(path)


@pytest.mark.parametrize("codec", ["lz4", "lz4hc", "zstd", "none"])
def test_every_codec_gives_the_bytes_back(tmp_path: Path, codec: str) -> None:
    assert back(NIBABEL_FILES[0], tmp_path, ".nii", codec=codec, chunk=7) == content(NIBABEL_FILES[0])


def test_bytes_after_the_last_voxel_are_left_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.ones((2, 3, 4), np.int16))
    whole = content(path)
    path.write_bytes(whole + b"123")
    assert back(path, tmp_path, ".nii") == whole


def test_one_image_can_be_exported_to_a_named_file(
    cohort_source: Path, cohort_store: Path, tmp_path: Path
) -> None:
    [exported] = zp.export(cohort_store, tmp_path / "one.nii", include=["sub-02"], images=["t1"])
    assert exported == tmp_path / "one.nii"
    assert content(exported) == content(cohort_source / "sub-02" / "t1.nii.gz")


def test_patterns_choose_what_is_exported(cohort_store: Path, tmp_path: Path) -> None:
    exported = zp.export(
        cohort_store, tmp_path, include=["sub-0[12]", "sub-03"], exclude=["*2"], images=["s*"]
    )
    assert [p.relative_to(tmp_path).as_posix() for p in exported] == [
        "sub-01/seg.nii.gz",
        "sub-03/seg.nii.gz",
    ]


def test_an_export_replaces_files_only_with_overwrite_and_otherwise_writes_none(
    cohort_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "sub-02").mkdir()
    (tmp_path / "sub-02" / "t1.nii").write_bytes(b"precious")
    with pytest.raises(StoreExistsError, match=r"sub-02/t1.nii: it exists already; say overwrite=True"):
        zp.export(cohort_store, tmp_path, images=["t1"], suffix=".nii")
    assert [p.name for p in tmp_path.rglob("*.nii")] == ["t1.nii"]
    zp.export(cohort_store, tmp_path, images=["t1"], suffix=".nii", overwrite=True)
    assert (tmp_path / "sub-02" / "t1.nii").read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"include": ["sub-11"]}, UnknownNameError, "no subject 'sub-11' in store .*; did you mean 'sub-01'"),
        ({"images": ["t2"]}, UnknownNameError, "no image 't2' in store .*; did you mean 't1'"),
        ({"exclude": ["*"]}, UnknownNameError, "no image of .* fits include=, exclude= and images="),
        (
            {"suffix": ".img"},
            OptionError,
            r"suffix must be one of .nii, .nii.gz, .ome.tif, .*, not '.img'",
        ),
    ],
)
def test_unknown_names_in_an_export_are_an_error_that_lists_the_known_ones(
    cohort_store: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        zp.export(cohort_store, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_several_images_cannot_be_exported_to_one_file(cohort_store: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"out.nii is one file, but 8 images were chosen; choose one"):
        zp.export(cohort_store, tmp_path / "out.nii")


def test_a_damaged_image_is_an_error_and_leaves_no_file(cohort_store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))
    for shard in (copy / "sub-01" / "t1" / "0" / "c").rglob("0"):
        if shard.is_file():
            shard.unlink()
    with pytest.raises(DamageError, match=r"sub-01/t1/0/c/0/0/0: it is missing"):
        zp.export(copy, tmp_path / "out.nii", include=["sub-01"], images=["t1"])
    assert [p.name for p in tmp_path.iterdir()] == ["copy.zarr"]


def test_progress_adds_up_to_the_bytes_of_all_voxels(cohort_store: Path, tmp_path: Path) -> None:
    amounts: list[int] = []
    zp.export(cohort_store, tmp_path / "out", images=["t1"], progress=amounts.append)
    assert sum(amounts) == sum(subject.t1.record.voxel_bytes for subject in zp.Cohort(cohort_store))
