"""NIfTI files: nibabel is the oracle; broken files that it reads all the same are refused or warned of."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from corpus import NIBABEL_FILES
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.chunks.layout import Layout, plan_layout
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.conversion_plan import plan_conversion
from zpatch.conversion.source_files import fingerprint
from zpatch.errors import NiftiError
from zpatch.volume_files.nifti_header import read_header
from zpatch.volume_files.nifti_writer import make_header, write_nifti
from zpatch.volume_files.volume_file import VolumeFile

DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "c16"]
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])

DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SCL_SLOPE, SCL_INTER = 40, 70, 72, 76, 108, 112, 116
QFORM_CODE, SFORM_CODE, QUATERN_B, SROW_X, MAGIC = 252, 254, 256, 280, 344

any_file = pytest.mark.parametrize("path", NIBABEL_FILES, ids=lambda path: path.name)


def whole_planes(shape: tuple[int, ...], together: int, depth: int) -> Layout:
    shards = (together, depth, *shape[-2:])[-len(shape) :]
    return Layout(shards, shards)


def joined(file: VolumeFile, layout: Layout | None = None) -> NDArray[Any]:
    """All slabs, each in its place by its index of shards."""
    layout = layout or plan_layout(file.shape, file.channel_dtype.itemsize, interleaved=file.interleaved)
    together, depth = (1, *layout.shards)[-4:-2]
    out = np.zeros((1, *file.shape)[-4:], file.channel_dtype)
    for slab in file.slabs(layout.slab_extent):
        c, z = slab.shard[0] * together, slab.shard[1] * depth
        out[c : c + slab.voxels.shape[0], z : z + slab.voxels.shape[1]] = slab.voxels
    return out.reshape(file.shape)


def in_file_order(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """nibabel's unscaled voxels, axes reversed."""
    return np.asarray(nib.load(path).dataobj.get_unscaled()).T.reshape(shape)


def save(path: Path, voxels: NDArray[Any], *, endianness: str = "<") -> Path:
    header = nib.Nifti1Header(endianness=endianness)
    header.set_data_dtype(voxels.dtype)
    nib.Nifti1Image(voxels, np.diag([2.0, 3.0, 4.0, 1.0]), header, dtype=voxels.dtype).to_filename(path)
    return path


def overwrite(path: Path, offset: int, layout: str, *values: Any) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, *values)
    path.write_bytes(data)
    return path


@pytest.fixture
def voxels(rng: np.random.Generator) -> NDArray[np.int16]:
    return rng.integers(-1000, 1000, (5, 4, 6), dtype=np.int16)


@pytest.fixture
def plain(tmp_path: Path, voxels: NDArray[np.int16]) -> Path:
    return save(tmp_path / "plain.nii", voxels)


@any_file
def test_a_header_has_the_values_that_nibabel_reads(path: Path) -> None:
    file, image = read_header(path), nib.load(path)
    assert file.dims == image.shape
    assert file.dtype == image.get_data_dtype()
    assert file.raw_header == image_bytes(path)[: image.dataobj.offset]
    assert (file.slope, file.inter) == (image.dataobj.slope, image.dataobj.inter)
    assert file.compressed == (path.suffix == ".gz")
    assert not file.warnings
    np.testing.assert_array_equal(file.affine, image.affine)


def image_bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


@any_file
def test_slabs_joined_are_the_voxels_that_nibabel_reads(path: Path) -> None:
    file = read_header(path)
    np.testing.assert_array_equal(joined(file), in_file_order(path, file.shape))


@given(data=st.data(), dims=st.lists(st.integers(1, 5), min_size=1, max_size=5), zipped=st.booleans())
def test_slabs_of_any_layout_joined_are_the_voxels(
    data: st.DataObject, dims: list[int], zipped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("slabs") / f"any.nii{'.gz' if zipped else ''}"
    save(path, np.random.default_rng(0).integers(0, 255, dims, dtype=np.uint8))
    file = read_header(path)
    channels, planes, _, _ = (1, *file.shape)[-4:]
    depth = data.draw(st.integers(1, planes + 2), "depth")
    together = data.draw(st.integers(1, channels + 1), "channels") if depth >= planes else 1
    layout = whole_planes(file.shape, together, depth)
    np.testing.assert_array_equal(joined(file, layout), in_file_order(path, file.shape))


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_of_every_type_are_kept_in_little_endian_order(
    tmp_path: Path, rng: np.random.Generator, code: str, endianness: str, suffix: str
) -> None:
    dtype = np.dtype(code)
    written = np.frombuffer(rng.bytes(60 * dtype.itemsize), np.uint8).view(dtype).reshape(3, 4, 5)
    if dtype.kind in "fc":
        written = (rng.normal(size=(3, 4, 5)) * 1e10).astype(dtype)
    path = save(tmp_path / f"any{suffix}", written, endianness=endianness)
    file = read_header(path)
    assert file.dtype == dtype.newbyteorder(endianness)
    assert file.channel_dtype == dtype.newbyteorder("<")
    np.testing.assert_array_equal(joined(file), written.T)


@pytest.mark.parametrize("dims", [(3, 4, 5), (3, 4, 1), (3, 4, 5, 1)])
def test_colours_become_channels(tmp_path: Path, rng: np.random.Generator, dims: tuple[int, ...]) -> None:
    colours = rng.integers(0, 255, (*dims, 3), dtype=np.uint8)
    path = save(tmp_path / "rgb.nii", colours.view(RGB).reshape(dims))
    file = read_header(path)
    assert file.colours == 3
    assert (file.shape, file.channel_dtype, file.axes) == ((3, *dims[2::-1]), np.uint8, "czyx")
    np.testing.assert_array_equal(joined(file), colours.reshape(*dims[:3], 3).T)


def test_colours_over_time_become_channels_voxel_by_voxel(tmp_path: Path, rng: np.random.Generator) -> None:
    colours = rng.integers(0, 255, (3, 4, 5, 2, 3), dtype=np.uint8)
    save(tmp_path / "rgb.nii", colours.view(RGB).reshape(3, 4, 5, 2))
    [planned] = plan_conversion(tmp_path, ConvertOptions()).images
    stored = joined(planned.file, planned.layout)
    assert stored.shape == (6, 5, 4, 3)
    assert {channel.tobytes() for channel in stored} == {
        colours[..., t, c].T.tobytes() for t in range(2) for c in range(3)
    }


@pytest.mark.parametrize("time_unit", ["sec", "msec", "usec", "unknown"])
def test_a_fourth_axis_is_time_where_the_header_has_a_unit_of_time(tmp_path: Path, time_unit: str) -> None:
    image = nib.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), np.eye(4))
    image.header.set_xyzt_units("micron", time_unit)
    image.to_filename(tmp_path / "4d.nii")
    file = read_header(tmp_path / "4d.nii")
    assert file.axes == ("czyx" if time_unit == "unknown" else "tzyx")
    assert file.spatial_unit == "micrometer"


def test_extensions_before_the_voxels_are_part_of_the_raw_header(
    tmp_path: Path, voxels: NDArray[np.int16]
) -> None:
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100))
    image.to_filename(tmp_path / "extended.nii")
    file = read_header(tmp_path / "extended.nii")
    assert len(file.raw_header) > 352
    whole = nib.Nifti1Header.from_fileobj(io.BytesIO(file.raw_header))
    assert whole.extensions == nib.load(tmp_path / "extended.nii").header.extensions
    np.testing.assert_array_equal(joined(file), voxels.T)


def test_a_gap_before_the_voxels_is_part_of_the_raw_header(plain: Path, voxels: NDArray[np.int16]) -> None:
    data = plain.read_bytes()
    plain.write_bytes(data[:352] + bytes(range(48)) + data[352:])
    file = read_header(overwrite(plain, VOX_OFFSET, "<f", 400.0))
    assert file.raw_header[352:] == bytes(range(48))
    np.testing.assert_array_equal(joined(file), voxels.T)


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_an_invalid_slope_means_no_scaling(plain: Path, slope: float) -> None:
    file = read_header(overwrite(plain, SCL_SLOPE, "<ff", slope, 7.0))
    assert (file.slope, file.inter) == (1.0, 0.0)


def test_the_sform_comes_before_the_qform_and_both_before_voxel_sizes(plain: Path) -> None:
    assert read_header(plain).affine_source == "sform"
    overwrite(plain, SFORM_CODE, "<h", 0)
    overwrite(plain, QFORM_CODE, "<h", 1)
    assert read_header(plain).affine_source == "qform"
    overwrite(plain, QFORM_CODE, "<h", 0)
    file = read_header(plain)
    assert file.affine_source == "pixdim"
    assert "neither sform nor qform" in file.warnings[0]
    np.testing.assert_array_equal(file.affine, nib.load(plain).affine)


def test_a_singular_sform_is_replaced_by_a_usable_qform_with_a_warning(plain: Path) -> None:
    overwrite(plain, QFORM_CODE, "<h", 1)
    file = read_header(overwrite(plain, SROW_X, "<4f", 0, 0, 0, np.nan))
    assert file.affine_source == "qform"
    assert file.warnings == ("its sform is singular or not finite",)


def test_a_singular_sform_without_a_usable_qform_is_an_error(plain: Path) -> None:
    overwrite(plain, QFORM_CODE, "<h", 0)
    refused(overwrite(plain, SROW_X, "<4f", 0, 0, 0, 0), "neither its sform nor its qform is usable")


def test_an_sform_and_a_qform_that_differ_are_a_warning(plain: Path) -> None:
    overwrite(plain, QFORM_CODE, "<h", 1)
    assert any("qform" in w for w in read_header(overwrite(plain, SROW_X, "<4f", 2, 0, 0, 50)).warnings)


@pytest.mark.parametrize("size", [0.0, -0.0, np.nan, np.inf])
def test_an_invalid_voxel_size_is_a_warning(plain: Path, size: float) -> None:
    overwrite(plain, QFORM_CODE, "<hh", 0, 0)
    file = read_header(overwrite(plain, PIXDIM + 4, "<f", size))
    assert "taken as its magnitude, or as 1 mm" in file.warnings[0]
    np.testing.assert_array_equal(np.diag(file.affine), [-1, 3, 4, 1])  # nibabel's: x to the left


def test_trailing_bytes_are_a_warning(plain: Path, voxels: NDArray[np.int16]) -> None:
    plain.write_bytes(plain.read_bytes() + b"12345")
    file = read_header(plain)
    assert file.warnings == ("5 trailing bytes after the last voxel",)
    np.testing.assert_array_equal(joined(file), voxels.T)


@pytest.mark.parametrize(("written", "named"), [("a.nii", "b.nii.gz"), ("a.nii.gz", "b.nii")])
def test_a_name_that_does_not_fit_the_compression_is_a_warning(
    tmp_path: Path, voxels: NDArray[np.int16], written: str, named: str
) -> None:
    path = save(tmp_path / written, voxels).rename(tmp_path / named)
    file = read_header(path)
    assert file.warnings == ("its name does not fit its compression",)
    np.testing.assert_array_equal(joined(file), voxels.T)


def test_bits_per_voxel_that_contradict_the_type_are_a_warning(plain: Path) -> None:
    file = read_header(overwrite(plain, BITPIX, "<h", 8))
    assert file.warnings == ("bitpix is 8 for voxels of 16 bits",)


def refused(path: Path, why: str) -> None:
    """The file is refused in one line that names it and says why."""
    with pytest.raises(NiftiError, match=why) as caught:
        joined(read_header(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a NIfTI file"),
        (b"/annex/objects/SHA256E-s123--abc.nii.gz\n", "not a NIfTI file"),
        (b"x" * 5000, "not a NIfTI file"),
        (b"\x5c\x01\x00\x00", "not a NIfTI file"),
        (b"\x1c\x02\x00\x00" + bytes(400), "ends inside its header"),
        (b"\x1f\x8b", "broken gzip"),
        (b"\x1f\x8b" + b"x" * 500, "broken gzip"),
        (gzip.compress(b"", mtime=0), "not a NIfTI file"),
        (gzip.compress(b"x" * 5000, mtime=0), "not a NIfTI file"),
    ],
)
def test_a_file_that_is_not_nifti_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "not.nii.gz"
    path.write_bytes(content)
    refused(path, why)


@pytest.mark.parametrize(
    ("offset", "layout", "values", "why"),
    [
        (MAGIC, "4s", (b"abc\0",), "its magic is b'abc'"),
        (MAGIC, "4s", (b"\0\0\0\0",), "its magic is b''"),
        (MAGIC, "4s", (b"ni1\0",), "its voxels, plain.img, are not beside it; copy both files of the pair"),
        (DIM, "<h", (0,), "impossible dimensions"),
        (DIM, "<h", (-3,), "impossible dimensions"),
        (DIM, "<h", (8,), "impossible dimensions"),
        (DIM + 2, "<h", (0,), r"impossible dimensions \[3, 0, 4, 6"),
        (DIM + 4, "<h", (-4,), r"impossible dimensions \[3, 5, -4, 6"),
        (DIM, "<4h", (3, 32767, 32767, 32767), "its header declares 64.0 TiB; copy the file again"),
        (DATATYPE, "<h", (12345,), "unknown voxel type 12345"),
        (DATATYPE, "<h", (0,), "not supported"),
        (DATATYPE, "<h", (1,), "not supported"),
        (DATATYPE, "<h", (1536,), "not supported; save it as float64"),
        (DATATYPE, "<h", (2048,), "not supported; save it as float64"),
        (VOX_OFFSET, "<f", (0.0,), "cannot start at byte 0"),
        (VOX_OFFSET, "<f", (348.0,), "cannot start at byte 348"),
        (VOX_OFFSET, "<f", (352.5,), "cannot start at byte 352.5"),
        (VOX_OFFSET, "<f", (-16.0,), "cannot start at byte -16"),
        (VOX_OFFSET, "<f", (1e30,), "cannot start at byte 1e"),
        (VOX_OFFSET, "<f", (np.nan,), "cannot start at byte nan"),
        (VOX_OFFSET, "<f", (40000.0,), "ends before its first voxel"),
        (VOX_OFFSET, "<f", (368.0,), "its header declares"),
        (SCL_SLOPE, "<ff", (2.0, np.nan), "its scl_inter is nan; repair its header"),
    ],
)
def test_an_invalid_header_is_refused(
    plain: Path, offset: int, layout: str, values: tuple[Any, ...], why: str
) -> None:
    refused(overwrite(plain, offset, layout, *values), why)


@pytest.mark.parametrize("kept", [4, 347, 351, 352, 353, 500])
def test_a_truncated_file_is_refused(plain: Path, kept: int) -> None:
    plain.write_bytes(plain.read_bytes()[:kept])
    refused(plain, "not a NIfTI file|copy the file again")


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffixes", [(".hdr", ".img"), (".hdr.gz", ".img.gz")])
def test_a_pair_of_files_is_one_image(
    tmp_path: Path, voxels: NDArray[np.int16], kind: Any, order: str, suffixes: tuple[str, str]
) -> None:
    header = kind.header_class(endianness=order)
    kind(voxels.astype(f"{order}i2"), np.diag([1, 2, 3, 1]), header).to_filename(tmp_path / f"a{suffixes[1]}")
    file = read_header(tmp_path / f"a{suffixes[0]}")
    np.testing.assert_array_equal(joined(file), voxels.T)
    np.testing.assert_array_equal(file.affine, np.diag([1, 2, 3, 1]))


def test_a_header_whose_voxels_are_not_beside_it_is_refused(
    tmp_path: Path, voxels: NDArray[np.int16]
) -> None:
    nib.Nifti1Pair(voxels, np.eye(4)).to_filename(tmp_path / "pair.hdr")
    (tmp_path / "pair.img").unlink()
    refused(tmp_path / "pair.hdr", "its voxels, pair.img, are not beside it; copy both files of the pair")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "broken.nii").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "folder.nii", "it is no regular file; leave it out")
    refused(tmp_path / "broken.nii", r"cannot be read \(No such file")
    refused(tmp_path / "missing.nii", r"cannot be read \(No such file")


@pytest.fixture
def zipped(tmp_path: Path, voxels: NDArray[np.int16]) -> Path:
    return save(tmp_path / "zipped.nii.gz", voxels)


def test_a_changed_checksum_or_length_of_gzip_data_is_refused(zipped: Path) -> None:
    data = zipped.read_bytes()
    for byte in range(1, 9):
        damaged = bytearray(data)
        damaged[-byte] ^= 1
        zipped.write_bytes(damaged)
        refused(zipped, "broken gzip data .*copy the file again")


def test_a_bit_flip_in_gzip_data_is_refused_or_harmless(
    zipped: Path, voxels: NDArray[np.int16], rng: np.random.Generator, full: bool
) -> None:
    data = zipped.read_bytes()
    for position in rng.integers(2, len(data), 2000 if full else 200).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        zipped.write_bytes(damaged)
        with contextlib.suppress(NiftiError):
            file = read_header(zipped)
            np.testing.assert_array_equal(joined(file), voxels.T)
            assert file.raw_header == gzip.decompress(data)[:352]


def test_truncated_gzip_data_are_refused_wherever_they_end(zipped: Path) -> None:
    data = zipped.read_bytes()
    for kept in [*range(2, len(data), 7), *range(len(data) - 9, len(data))]:
        zipped.write_bytes(data[:kept])
        refused(zipped, "copy the file again|not a NIfTI file")


def test_more_voxels_declared_than_gzip_data_hold_are_refused(
    tmp_path: Path, plain: Path, voxels: NDArray[np.int16]
) -> None:
    overwrite(plain, DIM, "<4h", 3, 5, 4, 7)
    path = tmp_path / "short.nii.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    refused(path, "ends before its last voxel .the header declares 280 B.; copy the file again")


def test_a_source_checksum_is_blake2b_of_the_bytes(plain: Path) -> None:
    assert (
        fingerprint(plain, plain.parent).checksum
        == hashlib.blake2b(plain.read_bytes(), digest_size=16).hexdigest()
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("code", ["<i2", ">i2", "<f4", ">f8", "<c8", ">c16"])
def test_a_written_file_is_the_header_and_then_the_voxels(tmp_path: Path, suffix: str, code: str) -> None:
    path = tmp_path / "deep" / f"out{suffix}"
    slabs = [np.arange(6).reshape(1, 1, 2, 3), np.arange(6, 12).reshape(1, 1, 2, 3)]
    write_nifti(path, b"header", iter(slabs), dtype=np.dtype(code))
    assert image_bytes(path) == b"header" + np.arange(12).astype(code).tobytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing() -> Iterator[NDArray[Any]]:
        yield np.zeros((1, 1, 2, 3))
        raise RuntimeError("a shard is damaged")

    for path in (tmp_path / "out.nii", tmp_path / "out.nii.gz"):
        with pytest.raises(RuntimeError, match="a shard is damaged"):
            write_nifti(path, b"header", failing(), dtype=np.dtype(np.int16))
    assert not list(tmp_path.iterdir())

    path.write_bytes(b"older")
    with pytest.raises(RuntimeError, match="a shard is damaged"):
        write_nifti(path, b"header", failing(), dtype=np.dtype(np.int16))
    assert path.read_bytes() == b"older"


def test_gzip_output_does_not_depend_on_name_or_time(tmp_path: Path) -> None:
    for name in ("one.nii.gz", "another.nii.gz"):
        write_nifti(tmp_path / name, b"header", iter([np.ones((1, 2, 3, 4))]), dtype=np.dtype(np.int16))
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "another.nii.gz").read_bytes()


@pytest.mark.parametrize(("shape", "channels"), [((4, 5, 6), 1), ((4, 5, 6), 3), ((40000, 1, 2), 1)])
def test_a_built_header_is_read_by_nibabel_and_zpatch(
    tmp_path: Path, shape: tuple[int, int, int], channels: int
) -> None:
    affine = np.array([[2, 0.5, 0, 1], [0, 3, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1.0]])  # sheared: no qform
    raw_header = make_header(shape, channels, np.dtype(np.float32), affine)
    voxels = np.zeros((channels, *shape[::-1]), np.float32)
    path = tmp_path / "made.nii"
    write_nifti(path, raw_header, iter([voxels]), dtype=voxels.dtype)
    image = nib.load(path)
    assert image.shape == ((*shape, channels) if channels > 1 else shape)
    assert isinstance(image, nib.Nifti2Image) == (max(shape) > 32767)
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_allclose(read_header(path).affine, affine)
    assert not read_header(path).warnings


def test_slabs_that_are_no_longer_in_use_lend_their_memory_to_the_next(tmp_path: Path) -> None:
    voxels = np.arange(100 * 90 * 61, dtype=np.int16).reshape(61, 90, 100)
    file = read_header(save(tmp_path / "a.nii.gz", voxels.T))
    seen: set[int] = set()
    for slab in file.slabs((1, 8)):  # seven of 8 planes and one of 5
        seen.add(slab.voxels.__array_interface__["data"][0])
        first = 8 * slab.shard[1]
        np.testing.assert_array_equal(slab.voxels[0], voxels[first : first + 8])
        del slab
    assert len(seen) == 2
