"""NRRD and MetaImage files: SimpleITK is the oracle of voxels and affines, also of how they are mapped."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
from zpatch.chunks.layout import Layout, plan_layout
from zpatch.conversion.source_files import fingerprint, has_fingerprint
from zpatch.errors import SourceError
from zpatch.geometry.boxes import padded_to_4d
from zpatch.volume_files import byte_streams
from zpatch.volume_files.formats import files_of, read_header
from zpatch.volume_files.nifti_writer import header_of
from zpatch.volume_files.volume_file import VolumeFile

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
SUFFIXES = [".mha", ".mhd", ".nrrd", ".nhdr"]
VOXELS: NDArray[np.int16] = np.arange(-12, 12, dtype="<i2").reshape(2, 3, 4)  # (z, y, x)
ZIPPED, GZIPPED = zlib.compress(VOXELS.tobytes()), gzip.compress(VOXELS.tobytes(), mtime=0)


def oracle(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels ([c,] z, y, x) and the affine in RAS that SimpleITK reads."""
    image = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = np.moveaxis(voxels, -1, 0)
    return voxels, affine_of(image)


def affine_of(image: Any) -> NDArray[np.float64]:
    n = image.GetDimension()
    affine = np.eye(4)
    step = np.array(image.GetDirection()).reshape(n, n) * image.GetSpacing()
    affine[: min(n, 3), : min(n, 3)] = step[:3, :3]
    affine[: min(n, 3), 3] = image.GetOrigin()[:3]
    return np.diag([-1.0, -1, 1, 1]) @ affine


def joined(file: VolumeFile, layout: Layout | None = None) -> NDArray[Any]:
    """All slabs, each in its place; ([c,] z, y, x)."""
    layout = layout or plan_layout(
        file.shape, file.channel_dtype.itemsize, interleaved=file.interleaved, chunk=2, shard_bytes=16
    )
    together, depth = (1, *layout.shards)[-4:-2]
    out = np.zeros(padded_to_4d(file.shape), file.channel_dtype)
    for slab in file.slabs(layout.slab_extent):
        c, z = slab.shard[0] * together, slab.shard[1] * depth
        out[c : c + slab.voxels.shape[0], z : z + slab.voxels.shape[1]] = slab.voxels
    return out.reshape(file.shape)


def stored(voxels: NDArray[Any]) -> NDArray[Any]:
    """Voxels ([c,] z, y, x) as (C, I, J, K)."""
    return voxels.reshape(padded_to_4d(voxels.shape)).transpose(0, 3, 2, 1)


def direction(draw: st.DrawFn, n: int) -> NDArray[np.float64]:
    """Axes in any order, some of them reversed, and perhaps oblique."""
    matrix = np.eye(n)[draw(st.permutations(range(n)))] * draw(
        st.lists(st.sampled_from([-1, 1]), min_size=n, max_size=n)
    )
    if draw(st.booleans()):
        matrix = np.linalg.qr(np.random.default_rng(draw(st.integers(0, 99))).normal(size=(n, n)))[0]
    return matrix


@st.composite
def images(draw: st.DrawFn) -> Any:
    """Images of 2 to 4 axes, of numbers or of vectors, with any geometry."""
    n = draw(st.sampled_from([2, 3, 3, 3, 4]))
    dtype = np.dtype(draw(st.sampled_from(TYPES)))
    channels = draw(st.sampled_from([1, 1, 2, 3])) if n < 4 else 1
    shape = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n)) + [channels] * (channels > 1)
    noise = np.random.default_rng(draw(st.integers(0, 99))).bytes(int(np.prod(shape)) * dtype.itemsize)
    voxels = np.frombuffer(noise, dtype).reshape(shape)
    image = sitk.GetImageFromArray(np.nan_to_num(voxels), isVector=channels > 1)
    image.SetSpacing(draw(st.lists(st.floats(0.1, 9), min_size=n, max_size=n)))
    image.SetOrigin(draw(st.lists(st.floats(-300, 300), min_size=n, max_size=n)))
    rotation = np.eye(n)
    rotation[: min(n, 3), : min(n, 3)] = direction(draw, min(n, 3))
    image.SetDirection(rotation.reshape(-1))
    return image


@given(image=images(), suffix=st.sampled_from(SUFFIXES), compressed=st.booleans())
def test_voxels_and_affine_are_those_of_simpleitk(
    image: Any, suffix: str, compressed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("files") / f"an image{suffix}"
    sitk.WriteImage(image, str(path), useCompression=compressed)
    file = read_header(path)
    voxels, affine = oracle(path)
    np.testing.assert_allclose(file.affine, affine, rtol=1e-9, atol=1e-9)
    read = joined(file)
    assert read.dtype == voxels.dtype
    np.testing.assert_array_equal(read.reshape(-1), voxels.reshape(-1))
    assert file.shape[-3:] == (*image.GetSize()[:3], 1)[2::-1]
    assert file.compressed == compressed
    assert [file for file in path.parent.iterdir() if file not in files_of(path)] == []
    header = header_of(file.raw_header)
    np.testing.assert_allclose(header.get_best_affine(), affine, rtol=1e-5, atol=1e-3)
    assert header.get_data_dtype() == voxels.dtype
    if compressed:
        with pytest.raises(SourceError, match="convert it first with 'zpatch convert "):
            zp.ScalarImage(path)
    else:
        mapped = zp.ScalarImage(path)
        np.testing.assert_array_equal(mapped.data, stored(read))
        np.testing.assert_allclose(mapped.affine, affine, rtol=1e-9, atol=1e-9)


# Files written by hand: what SimpleITK reads but does not write


def mha(*lines: str, data: bytes = VOXELS.tobytes(), last: str = "LOCAL", end: str = "\n") -> bytes:
    first = ["ObjectType = Image", "NDims = 3", "DimSize = 4 3 2", "BinaryData = True"]
    kind = [] if any(line.startswith("ElementType") for line in lines) else ["ElementType = MET_SHORT"]
    return end.join([*first, *kind, *lines, f"ElementDataFile = {last}", ""]).encode() + data


def nrrd(*lines: str, data: bytes = VOXELS.tobytes(), end: str = "\n") -> bytes:
    given = {line.partition(":")[0] for line in lines}
    usual = {"type": "short", "dimension": "3", "sizes": "4 3 2", "endian": "little", "encoding": "raw"}
    more = [f"{name}: {value}" for name, value in usual.items() if name not in given]
    return end.join(["NRRD0005", *more, *lines, "", ""]).encode() + data


ALONG = "space directions: (2,0,0) (0,3,0) (0,0,4)"
LPS = "space: left-posterior-superior"
RAS_LONG, ORIGIN = "space: right-anterior-superior", "space origin: (1,2,3)"
OF_FOUR = ("dimension: 4", "sizes: 2 3 2 2")
BIG = VOXELS.astype(">i2").tobytes()
ROTATED = ("ElementSpacing = 2 3 4", "Offset = 1 2 3")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.mha", mha("TransformMatrix = 0 1 0 0 0 1 1 0 0", *ROTATED)),
        ("a.mha", mha("Rotation = 0 -1 0 1 0 0 0 0 1", "Position = 1 2 3", "ElementSize = 2 3 4")),
        ("a.mha", mha("Orientation = 0 0 1 0 1 0 1 0 0", "Origin = 1 2 3")),
        ("a.mha", mha("Offset = 9 8 7", "Position = 1 2 3", "ElementSpacing = -2 3 4")),
        ("a.mha", mha("AnatomicalOrientation = LPI", "Comment = a = b", "elementspacing = 9 9 9")),
        ("a.mha", mha("ElementByteOrderMSB = True", data=BIG)),
        ("a.mha", mha("BinaryDataByteOrderMSB = True", data=BIG)),
        ("a.mha", mha("ElementType = MET_LONG", data=VOXELS.astype("<i4").tobytes())),
        ("a.mha", mha("ElementType = MET_ULONG_LONG", data=abs(VOXELS).astype("<u8").tobytes())),
        ("a.mha", mha("ElementType = MET_UCHAR_ARRAY", "ElementNumberOfChannels = 2")),
        ("a.mha", mha("HeaderSize = -1", data=b"anything" + VOXELS.tobytes())),
        ("a.mha", mha(end="\r\n")),
        ("a.mha", mha("CompressedData = True", f"CompressedDataSize = {len(ZIPPED)}", data=ZIPPED)),
        ("a.mha", mha("CompressedData = True", f"CompressedDataSize = {len(GZIPPED)}", data=GZIPPED)),
        ("a.nrrd", nrrd(LPS, ALONG, ORIGIN)),
        ("a.nrrd", nrrd(RAS_LONG, ALONG, ORIGIN)),
        ("a.nrrd", nrrd("space: LAS", ALONG, ORIGIN)),
        ("a.nrrd", nrrd("space: RAS", "space directions: (0,0,2) (-3,0,0) (0,4,0)", ORIGIN)),
        ("a.nrrd", nrrd("space: scanner-xyz", ALONG, ORIGIN)),
        ("a.nrrd", nrrd("space dimension: 3", ALONG, ORIGIN)),
        ("a.nrrd", nrrd("spacings: 2 3 4", "axis mins: 10 20 30")),
        ("a.nrrd", nrrd("spacings: 2 3 4", "axismins: 10 20 30", "centers: node node node")),
        ("a.nrrd", nrrd("spacings: nan nan nan")),
        ("a.nrrd", nrrd("# a comment: with colons", "key:=value: (", LPS, ALONG)),
        ("a.nrrd", nrrd("endian: big", LPS, ALONG, data=BIG)),
        ("a.nrrd", nrrd("type: unsigned short int", LPS, ALONG)),
        ("a.nrrd", nrrd("type: uint64_t", LPS, ALONG, data=abs(VOXELS).astype("<u8").tobytes())),
        ("a.nrrd", nrrd("byte skip: 3", LPS, ALONG, data=b"abc" + VOXELS.tobytes())),
        ("a.nrrd", nrrd("byte skip: -1", LPS, ALONG, data=b"abc" + VOXELS.tobytes())),
        ("a.nrrd", nrrd("line skip: 2", LPS, ALONG, data=b"ab\ncd\n" + VOXELS.tobytes())),
        ("a.nrrd", nrrd("encoding: gz", "byteskip: 3", data=gzip.compress(b"abc" + VOXELS.tobytes()))),
        ("a.nrrd", nrrd(LPS, ALONG, end="\r\n")),
        (
            "a.nrrd",
            nrrd(*OF_FOUR, "kinds: vector domain domain domain", LPS, f"{ALONG[:18]}none{ALONG[17:]}"),
        ),
        ("a.nrrd", nrrd(*OF_FOUR, "kinds: domain domain vector domain")),
        ("a.nrrd", nrrd(*OF_FOUR, "kinds: domain domain domain list", LPS, f"{ALONG} none")),
        ("a.nrrd", nrrd(*OF_FOUR, "kinds: domain domain domain vector")),
    ],
)
def test_a_file_written_by_hand_is_read_as_simpleitk_reads_it(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    file = read_header(path)
    voxels, affine = oracle(path)
    np.testing.assert_array_equal(joined(file), voxels)
    np.testing.assert_allclose(file.affine, affine)
    if not file.compressed:
        np.testing.assert_array_equal(zp.ScalarImage(path).data, stored(voxels))


SLICES = [VOXELS[0].tobytes(), VOXELS[1].tobytes()]


@pytest.mark.parametrize(
    ("name", "header", "files"),
    [
        ("a.mhd", mha(last="the voxels.raw", data=b""), {"the voxels.raw": VOXELS.tobytes()}),
        ("a.mhd", mha("HeaderSize = 5", last="a.raw", data=b""), {"a.raw": b"abcde" + VOXELS.tobytes()}),
        ("a.mhd", mha("HeaderSize = -1", last="a.raw", data=b""), {"a.raw": b"abcde" + VOXELS.tobytes()}),
        ("a.mhd", mha(last="s%03d.raw 7 9 2", data=b""), {f"s00{n}.raw": SLICES[n == 9] for n in (7, 9)}),
        ("a.mhd", mha(last="s%d.raw", data=b""), {f"s{n + 1}.raw": SLICES[n] for n in (0, 1)}),
        (
            "a.mhd",
            mha(last="LIST", data=b"q 1.raw\nq 0.raw\n"),
            {f"q {1 - n}.raw": SLICES[n] for n in (0, 1)},
        ),
        (
            "a.mhd",
            mha(last="LIST 1", data="".join(f"r{n}\n" for n in range(6)).encode()),
            {f"r{n}": VOXELS.reshape(6, 4)[n].tobytes() for n in range(6)},
        ),
        (
            "a.mhd",
            mha("CompressedData = True", last="a.zraw", data=b""),
            {"a.zraw": zlib.compress(VOXELS.tobytes())},
        ),
        (
            "a.nhdr",
            nrrd(LPS, ALONG, "data file: sub/a.raw", data=b""),
            {"sub/a.raw": VOXELS.tobytes()},
        ),
        (
            "a.nhdr",
            nrrd("byte skip: -1", "datafile: a b.raw", data=b""),
            {"a b.raw": b"abc" + VOXELS.tobytes()},
        ),
        (
            "a.nhdr",
            nrrd("data file: s%02d.raw 3 1 -2", data=b""),
            {f"s0{3 - 2 * n}.raw": SLICES[n] for n in (0, 1)},
        ),
        ("a.nhdr", nrrd("data file: s%d.raw 1 1 1 3", data=b""), {"s1.raw": VOXELS.tobytes()}),
        (
            "a.nhdr",
            nrrd("encoding: gzip", "data file: LIST", data=b"").rstrip() + b"\nx.gz\ny.gz\n",
            {name: gzip.compress(one) for name, one in zip(("x.gz", "y.gz"), SLICES, strict=True)},
        ),
        (
            "a.nhdr",
            nrrd("byte skip: 2", "line skip: 1", "data file: LIST 2", data=b"").rstrip()
            + b"\nx.raw\ny.raw\n",
            {name: b"ab\ncd" + one for name, one in zip(("x.raw", "y.raw"), SLICES, strict=True)},
        ),
    ],
)
def test_voxels_in_other_files_are_read_as_simpleitk_reads_them(
    name: str, header: bytes, files: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(header)
    for file, data in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    file_with = read_header(path)
    np.testing.assert_array_equal(oracle(path)[0], VOXELS)
    for depth in (1, 2):
        layout = Layout((depth, 3, 4), (depth, 3, 4))
        np.testing.assert_array_equal(joined(file_with, layout), VOXELS)
    assert file_with.files == files_of(path) == (path, *(tmp_path / file for file in files))
    if len(files) == 1 and not file_with.compressed:
        np.testing.assert_array_equal(zp.ScalarImage(path).data[0].T, VOXELS)
    elif len(files) > 1 and not file_with.compressed:
        with pytest.raises(SourceError, match="only voxels of one file can be mapped; convert it first"):
            zp.ScalarImage(path)
    seal = fingerprint(path, tmp_path)
    changed = tmp_path / list(files)[-1]
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x55")
    source = seal.path, seal.bytes, seal.mtime_ns
    assert not has_fingerprint(path, source, lambda: seal.checksum, tmp_path)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_channels_may_be_any_axis_of_an_nrrd_file(
    axis: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    by_channel = rng.integers(-99, 99, (3, 5, 4, 2), dtype=np.int16)  # (c, z, y, x)
    voxels = np.moveaxis(by_channel, 0, 3 - axis)
    kinds, vectors = ["domain"] * 3, ["(0,2,0)", "(3,0,0)", "(0,0,4)"]
    kinds.insert(axis, "list")
    vectors.insert(axis, "(nan,nan,nan)")
    sizes = " ".join(map(str, voxels.shape[::-1]))
    space = ("space: RAS", f"space directions: {' '.join(vectors)}", f"kinds: {' '.join(kinds)}")
    path = tmp_path / "a.nrrd"
    path.write_bytes(nrrd("dimension: 4", f"sizes: {sizes}", *space, data=voxels.tobytes()))
    file = read_header(path)
    assert (file.dims, file.axes) == ((2, 4, 5, 3), "czyx")
    np.testing.assert_array_equal(joined(file), by_channel)
    np.testing.assert_array_equal(zp.ScalarImage(path).data, stored(by_channel))
    assert file.affine[:3, :3].tolist() == [[0, 3, 0], [2, 0, 0], [0, 0, 4]]


def test_channels_of_time_points_are_read_point_by_point(tmp_path: Path, rng: np.random.Generator) -> None:
    voxels = rng.integers(0, 99, (2, 5, 4, 2, 3), dtype=np.uint8)  # (t, z, y, x, c)
    path = tmp_path / "a.mha"
    header = mha("ElementType = MET_UCHAR", "ElementNumberOfChannels = 3", data=b"")
    header = header.replace(b"NDims = 3", b"NDims = 4").replace(b"DimSize = 4 3 2", b"DimSize = 2 4 5 2")
    path.write_bytes(header + voxels.tobytes())
    file = read_header(path)
    assert file.dims == (2, 4, 5, 3, 2)
    np.testing.assert_array_equal(joined(file), np.moveaxis(voxels, -1, 1).reshape(6, 5, 4, 2))
    with pytest.raises(SourceError, match="only plain, uncompressed voxels can be mapped; convert it first"):
        zp.ScalarImage(path)


def test_an_axis_of_time_is_one_in_the_store_and_in_its_nifti_header(tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    path.write_bytes(nrrd(*OF_FOUR, "kinds: domain domain domain time", LPS, f"{ALONG} none"))
    file = read_header(path)
    header = header_of(file.raw_header)
    assert (file.axes, header.get_xyzt_units(), header["pixdim"][4]) == ("tzyx", ("mm", "sec"), 0)


@pytest.mark.parametrize(
    ("data", "unit", "first"),
    [
        (nrrd(LPS, ALONG, 'space units: "um" "um" "um"'), "micrometer", -2),
        (nrrd(LPS, ALONG, 'space units: "cm" "cm" "cm"'), "millimeter", -20),
        (nrrd("spacings: 2 3 4", 'units: "mm" "mm" "mm"'), "millimeter", -2),
        (nrrd(LPS, ALONG, 'space units: "mm" "um" "parsec"'), "millimeter", -2),
    ],
)
def test_units_are_those_of_nifti(data: bytes, unit: str, first: float, tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(data)
    file = read_header(tmp_path / "a.nrrd")
    assert (file.spatial_unit, file.affine[0, 0]) == (unit, first)


def test_a_plane_in_space_has_its_normal_as_third_axis(tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    plane = ("dimension: 2", "sizes: 4 6", "space: RAS", "space directions: (0,2,0) (0,0,3)", ORIGIN)
    path.write_bytes(nrrd(*plane))
    assert read_header(path).affine.tolist() == [[0, 0, 1, 1], [2, 0, 0, 2], [0, 3, 0, 3], [0, 0, 0, 1]]


# Bad input

HUGE = "4000000000 4000000000 4000000000"
FAILS: list[tuple[str, bytes, str]] = [
    ("a.mha", b"", "it is empty, so it is not a MetaImage file; copy the file again"),
    ("a.nrrd", b"", "it is empty, so it is not an NRRD file"),
    (
        "a.mha",
        b"version https://git-lfs.github.com/spec/v1\noid",
        "git-lfs pointer.*fetch the file with 'git lfs",
    ),
    ("a.nrrd", b"/annex/objects/SHA256E-s352--01", "git-annex pointer.*fetch the file with 'git annex get'"),
    (
        "a.mha",
        bytes(range(256)),
        "it is not a MetaImage file .its header is no text.; replace it, or leave it",
    ),
    ("a.nrrd", np.arange(999).tobytes(), "it is not an NRRD file .its header is no text"),
    ("a.mha", b"Comment = x\n" * 2**17, "not a MetaImage file .its header does not end within 1.0 MiB"),
    ("a.nrrd", b"NRRD0004\n" + b"# x\n" * 2**19, "not an NRRD file .its header does not end within 1.0 MiB"),
    ("a.mha", b"a" * 2**21, "its header does not end within 1.0 MiB"),
    (
        "a.mha",
        b"<html>Please log in</html>\n",
        "'<html>Please log in</html>' is not of the form 'key = value'",
    ),
    ("a.nrrd", b"<html>Please log in</html>\n", "it does not start with NRRD0001 to NRRD0005"),
    ("a.nrrd", nrrd().replace(b"NRRD0005", b"NRRD0009"), "it does not start with NRRD0001"),
    ("a.nrrd", nrrd("what is this"), "'what is this' is not of the form 'field: value'"),
    ("a.mha", mha()[:60], "no ElementDataFile in its header"),
    ("a.nrrd", nrrd()[:40], "its header does not end with an empty line"),
    ("a.mha", mha().replace(b"Type = Image", b"Type = Scene"), "its ObjectType is 'Scene'"),
    ("a.mha", mha()[:-1], "header declares .*copy the file again"),
    ("a.nrrd", nrrd()[:-1], "header declares .*copy the file again"),
    (
        "a.mha",
        mha().replace(b"DimSize = 4 3 2", f"DimSize = {HUGE}".encode()),
        "declares .*copy the file again",
    ),
    ("a.nrrd", nrrd(f"sizes: {HUGE}"), "header declares .*copy the file again"),
    (
        "a.nrrd",
        nrrd(f"sizes: {HUGE}", "encoding: gzip", data=GZIPPED),
        "of gzip data where its header declares",
    ),
    (
        "a.mha",
        mha().replace(b"DimSize = 4 3 2", b"DimSize = 4 0 2"),
        r"impossible dimensions \[4, 0, 2\]; repair",
    ),
    ("a.nrrd", nrrd("sizes: 4 -3 2"), r"it declares impossible dimensions \[4, -3, 2\]"),
    ("a.mha", mha().replace(b"DimSize = 4 3 2", b"DimSize = 4 3"), "'DimSize' has 2 values, not 3"),
    (
        "a.mha",
        mha().replace(b"DimSize = 4 3 2", b"DimSize = 4 x 2"),
        "'DimSize' is '4 x 2', which cannot be read",
    ),
    ("a.mha", mha().replace(b"DimSize = 4 3 2\n", b""), "declares impossible dimensions"),
    ("a.mha", mha("ElementNumberOfChannels = 0"), r"it declares impossible dimensions \[0\]"),
    ("a.nrrd", nrrd("dimension: 2"), "'dimension' is '2', which cannot be read"),
    ("a.nrrd", nrrd("dimension: 17", "sizes:" + " 1" * 17), "it declares impossible dimensions"),
    ("a.mha", mha("ElementType = MET_STRANGE"), "unknown voxel type 'MET_STRANGE'; repair its header"),
    ("a.nrrd", nrrd("type: block"), "unknown voxel type 'block'"),
    ("a.nrrd", nrrd("endian: "), "its field 'endian' is '', which cannot be read"),
    (
        "a.mha",
        mha("BinaryData = False").replace(b"BinaryData = True\n", b""),
        "voxels are written as text; save it",
    ),
    ("a.nrrd", nrrd("encoding: ascii"), "its encoding is ascii; save it with encoding gzip or raw"),
    ("a.nrrd", nrrd("encoding: bzip2"), "its encoding is bzip2; save it with encoding gzip or raw"),
    ("a.nrrd", nrrd("encoding: rot13"), "'encoding' is 'rot13', which cannot be read"),
    (
        "a.nrrd",
        nrrd("encoding: gzip", "byte skip: -1", data=GZIPPED),
        "'byte skip' is '-1', which cannot be read",
    ),
    (
        "a.nrrd",
        nrrd("line skip: 9", data=b"a\nb\n" + bytes(99)),
        "it does not have the 9 lines that its header",
    ),
    (
        "a.mha",
        mha("TransformMatrix = 1 0 0 1 0 0 0 0 1"),
        "directions or its origin are singular or not finite",
    ),
    (
        "a.mha",
        mha("TransformMatrix = nan 0 0 0 1 0 0 0 1"),
        "directions or its origin are singular or not finite",
    ),
    ("a.mha", mha("Offset = 0 inf 0"), "directions or its origin are singular or not finite"),
    ("a.mha", mha("Offset = 0 1e300 0"), "directions or its origin are singular or not finite"),
    ("a.mha", mha("TransformMatrix = 1 0 0 1"), "'TransformMatrix' has 4 values, not 9"),
    (
        "a.nrrd",
        nrrd(LPS, "space directions: (1,0,0) (2,0,0) (0,0,1)"),
        "singular or not finite; repair its header",
    ),
    ("a.nrrd", nrrd(LPS, "space directions: (1,0,0) (0,nan,1) (0,0,1)"), "singular or not finite"),
    (
        "a.nrrd",
        nrrd(LPS, "space directions: (1,0,0) (0,1,0)"),
        "'space directions' is '.*', which cannot be read",
    ),
    ("a.nrrd", nrrd(LPS, "space directions: 1,0,0 0,1,0 0,0,1"), "'space directions' is"),
    ("a.nrrd", nrrd(LPS, "space directions: (1,0,0) (0,1) (0,0,1)"), "'space directions' is"),
    ("a.nrrd", nrrd(LPS, "space directions: none none none"), "none of its axes is one of space"),
    (
        "a.nrrd",
        nrrd(LPS, "space directions: (1,0,0,0,0) (0,1,0,0,0) (0,0,1,0,0)"),
        "3 axes in a space of 5 dim",
    ),
    ("a.nrrd", nrrd(LPS, ALONG, "space origin: (1,2)"), "'space origin' is"),
    ("a.nrrd", nrrd("kinds: list list domain"), "2 axes of channels before its last axis of space"),
    ("a.nrrd", nrrd("kinds: domain domain"), "'kinds' is 'domain domain'"),
    ("a.mhd", mha(last="gone.raw"), "the file of its voxels, 'gone.raw', does not exist; copy it too"),
    ("a.mhd", mha(last="../gone.raw"), "the file of its voxels, '../gone.raw', does not exist"),
    ("a.mhd", mha(last="", data=b""), "the file of its voxels, '', is no regular file"),
    ("a.mhd", mha(last="a" * 5000), "the file of its voxels, 'a*...', does not exist"),
    ("a.mhd", mha(last="."), "the file of its voxels, '.', is no regular file; copy it too"),
    ("a.mhd", mha(last="LIST", data=b"a.mhd\n"), "it names 1 files of voxels for 2"),
    ("a.mhd", mha(last="s%d.raw 1 9999999 1"), "it names 3 files of voxels for 2"),
    ("a.mhd", mha(last="s%1000000d.raw"), "does not exist"),
    ("a.mhd", mha(last="s%s%n.raw 1 2 1"), "the file of its voxels, 's%s%n.raw 1 2 1', does not exist"),
    (
        "a.mhd",
        mha(last="LIST 1", data=b"").replace(b"4 3 2", b"1 3 200000"),
        "in 600000 files of 1 axes each, and at most",
    ),
    (
        "a.nhdr",
        nrrd("data file: s%d.raw 1 2 0", data=b""),
        "'data file' is 's%d.raw 1 2 0', which cannot be read",
    ),
    ("a.nhdr", nrrd("data file: ", data=b""), "the file of its voxels, '', is no regular file"),
]
BROKEN: list[tuple[str, bytes, str]] = [
    (
        "a.mha",
        mha("CompressedData = True", data=ZIPPED[:-1] + b"x"),
        "broken zlib data .*; copy the file again",
    ),
    ("a.mha", mha("CompressedData = True", data=ZIPPED[:-4]), "broken zlib data .*; copy the file again"),
    ("a.mha", mha("CompressedData = True", data=ZIPPED[:20]), "broken zlib data .*; copy the file again"),
    ("a.mha", mha("CompressedData = True", data=b"garbage" * 9), "broken zlib data .*; copy the file again"),
    (
        "a.mha",
        mha("CompressedData = True", data=ZIPPED + b"after"),
        "broken zlib data .other bytes follow its end",
    ),
    ("a.mha", mha("CompressedData = True", data=zlib.compress(bytes(47))), "it ends before its last voxel"),
    (
        "a.nrrd",
        nrrd("encoding: gzip", data=GZIPPED[:-8] + bytes(8)),
        "broken gzip data .*; copy the file again",
    ),
    ("a.nrrd", nrrd("encoding: gzip", data=GZIPPED[:-3]), "broken gzip data"),
    ("a.nrrd", nrrd("encoding: gzip", data=GZIPPED + b"garbage"), "broken gzip data"),
    ("a.nrrd", nrrd("encoding: gzip", data=VOXELS.tobytes()), "broken gzip data"),
    ("a.nrrd", nrrd("encoding: gzip", data=gzip.compress(bytes(40))), "it ends before its last voxel"),
]


@pytest.mark.parametrize(("name", "data", "why"), FAILS)
def test_a_bad_header_is_one_clear_line(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"^{path}.*{why}") as caught:
        read_header(path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "data", "why"), BROKEN)
def test_broken_voxels_are_one_clear_line(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"^{path}: {why}"):
        joined(read_header(path))


@pytest.mark.parametrize(
    ("name", "data", "warning"),
    [
        ("a.mha", mha(data=VOXELS.tobytes() + b"abc"), "3 trailing bytes after the last voxel"),
        ("a.nrrd", nrrd(data=VOXELS.tobytes() + b"abc"), "3 trailing bytes after the last voxel"),
        ("a.mha", mha("ElementSpacing = 0 1 1"), "a voxel size is zero or not finite: taken as 1 mm"),
        ("a.mha", mha(), "it has no TransformMatrix: only voxel sizes are known"),
        (
            "a.mha",
            mha("ElementToIntensityFunctionSlope = 2"),
            "its ElementToIntensityFunctionSlope is not applied",
        ),
        ("a.nrrd", nrrd(), "it has no space directions: only voxel sizes are known"),
        ("a.nrrd", nrrd("space: scanner-xyz", ALONG), "its space is 'scanner-xyz': taken as LPS"),
        (
            "a.nrrd",
            nrrd(LPS, ALONG, "space origin: (nan,nan,nan)"),
            "its space origin is not known: taken as 0",
        ),
    ],
)
def test_an_odd_file_is_read_with_a_warning(name: str, data: bytes, warning: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    file = read_header(tmp_path / name)
    assert warning in file.warnings
    np.testing.assert_array_equal(joined(file), VOXELS)


@pytest.mark.parametrize("before", [b"", b"abc" * 50000])
def test_trailing_bytes_in_compressed_data_are_a_warning(before: bytes, tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "a.mha"
    path.write_bytes(
        mha("CompressedData = True", data=zlib.compress(VOXELS.tobytes() + before + b"a") + bytes(9))
    )
    list(read_header(path).slabs((1, 2), warnings.append))
    assert warnings == [f"{len(before) + 1} trailing bytes after the last voxel"]


@pytest.mark.parametrize("data", [ZIPPED, GZIPPED])
@pytest.mark.parametrize("has_isal", [True, False])
def test_compressed_data_need_no_size(
    data: bytes, has_isal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_isal:
        monkeypatch.setattr(byte_streams, "_gzip", gzip)
        monkeypatch.setattr(byte_streams, "_zlib", zlib)
    (tmp_path / "a.mha").write_bytes(mha("CompressedData = True", data=data))
    np.testing.assert_array_equal(joined(read_header(tmp_path / "a.mha")), VOXELS)


def test_a_pointer_in_place_of_voxels_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"version https://git-lfs.github.com")
    (tmp_path / "a.mhd").write_bytes(mha(last="a.raw", data=b""))
    with pytest.raises(SourceError, match=r"a\.raw: it is a git-lfs pointer, so it holds no voxels; fetch"):
        read_header(tmp_path / "a.mhd")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.raw"])
def test_a_pipe_or_folder_is_no_file(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    if name == "a.raw":
        (tmp_path / "a.mhd").write_bytes(mha(last="a.raw"))
        name = "a.mhd"
    with pytest.raises(SourceError, match="is no regular file"):
        read_header(tmp_path / name)
