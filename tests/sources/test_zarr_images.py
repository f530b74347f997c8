"""Arrays that other programs wrote: all that zarr-python can write are read as zarr-python reads them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import BZ2, LZ4, Blosc, Delta, GZip, Zlib, Zstd
from numpy.typing import NDArray
from reading import assert_same_bytes, both_loops, draw_box, random_voxels
from reading import loop as loop
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import DamageError, NotAStoreError, OptionError, StoreError
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.image import Image, ScalarImage
from zpatch.sources.voxel_sources import DaskSource, ShardSource

DTYPES = ["|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16"]
SHAPE, CHUNKS, SHARDS = (9, 10, 11), (3, 4, 5), (6, 8, 10)
BLOSC = [
    BloscCodec(cname=cname, shuffle=shuffle, clevel=5)
    for cname in ("lz4", "lz4hc", "blosclz", "zstd", "zlib")
    for shuffle in ("noshuffle", "shuffle", "bitshuffle")
]
COMPRESSORS: list[Any] = [*BLOSC, ZstdCodec(), ZstdCodec(checksum=True), GzipCodec(), None]
V2_COMPRESSORS: list[Any] = [
    *[Blosc(name, 5, n) for name in ("lz4", "lz4hc", "blosclz", "zstd", "zlib") for n in (0, 1, 2)],
    *[Zstd(), GZip(), Zlib(), None],
]
Draw = st.DataObject


@pytest.fixture
def voxels() -> NDArray[np.int16]:
    """(z, y, x); a smooth volume with some noise."""
    rng = np.random.default_rng(5)
    return (np.arange(990).reshape(SHAPE) // 7 + rng.integers(0, 3, SHAPE)).astype(np.int16)


def in_frame(whole: NDArray[Any], axes: str) -> NDArray[Any]:
    """A whole array in the axis order of an image, (C, I, J, K)."""
    channels = [a for a in axes if a in "ct"]
    if len(channels) > 1:  # one of them is of length 1
        gone = next(a for a in channels if whole.shape[axes.index(a)] == 1)
        whole, axes = whole[tuple(0 if a == gone else slice(None) for a in axes)], axes.replace(gone, "")
    axes = axes.replace("t", "c")
    missing = "".join(a for a in "czyx" if a not in axes)
    whole = whole[(None,) * len(missing)]
    return whole.transpose([(missing + axes).index(a) for a in "cxyz"])


def read_whole(image: Image) -> NDArray[Any]:
    """All voxels in overlapping boxes."""
    i, j, k = image.spatial_shape
    boxes = [PatchLocation((0, 0, 0), (i, j, k)), PatchLocation((i // 2, 0, k // 3), (i - i // 2, j, 1))]
    whole, part = image.read_group(boxes)
    np.testing.assert_array_equal(part, whole[(slice(None), *boxes[1].to_slices())])
    return whole


def check(path: Path, axes: str = "zyx", *, through: type = ShardSource, array: Any = None) -> None:
    """An array has the voxels that zarr reads, and is read through the expected source."""
    image = ScalarImage(path if array is None else array, axes=axes)
    assert type(image.source) is through
    expected = in_frame(zarr.open_array(path, mode="r")[...] if array is None else array[...], axes)
    assert_same_bytes(read_whole(image), expected.astype(expected.dtype.newbyteorder("=")))
    assert image.shape == expected.shape
    close_shards(path)


def written_v3(path: Path, voxels: NDArray[Any], **how: Any) -> Path:
    chosen: dict[str, Any] = {"shape": voxels.shape, "chunks": CHUNKS, "dtype": voxels.dtype} | how
    zarr.create_array(path, **chosen)[...] = voxels
    return path


def written_v2(path: Path, voxels: NDArray[Any], **how: Any) -> Path:
    chosen: dict[str, Any] = {"shape": voxels.shape, "chunks": CHUNKS, "dtype": voxels.dtype} | how
    zarr.create_array(path, zarr_format=2, **chosen)[...] = voxels
    return path


# Encodings


@both_loops
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_an_encoding_of_version_3_is_read_from_the_files(
    tmp_path: Path, voxels: NDArray[np.int16], compressor: Any
) -> None:
    check(written_v3(tmp_path / "plain", voxels, compressors=compressor))
    check(written_v3(tmp_path / "sharded", voxels, compressors=compressor, shards=SHARDS))


@both_loops
@pytest.mark.parametrize("compressor", V2_COMPRESSORS, ids=repr)
def test_an_encoding_of_version_2_is_read_from_the_files(
    tmp_path: Path, voxels: NDArray[np.int16], compressor: Any
) -> None:
    check(written_v2(tmp_path / "a", voxels, compressors=compressor))


@both_loops
@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("index_checksum", [True, False])
def test_shards_of_any_inner_order_and_index_are_read_from_the_files(
    tmp_path: Path, voxels: NDArray[np.int16], location: Any, endian: Any, index_checksum: bool
) -> None:
    for number, between in enumerate([[], [BloscCodec(typesize=2)], [ZstdCodec()], [GzipCodec()]]):
        for checksum in ([], [Crc32cCodec()]):
            sharding = ShardingCodec(
                chunk_shape=CHUNKS,
                codecs=[BytesCodec(endian=endian), *between, *checksum],
                index_codecs=[BytesCodec(), *([Crc32cCodec()] if index_checksum else [])],
                index_location=location,
            )
            path = tmp_path / f"{number}{bool(checksum)}"
            array = zarr.create(
                store=path, shape=SHAPE, chunks=SHARDS, dtype="i2", codecs=[sharding], zarr_format=3
            )
            array[...] = voxels
            check(path)


@both_loops
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("checksum", [True, False])
def test_chunks_without_shards_of_any_order_are_read_from_the_files(
    tmp_path: Path, endian: Any, checksum: bool
) -> None:
    for number, between in enumerate([[], [BloscCodec(typesize=4)], [ZstdCodec()], [GzipCodec()]]):
        voxels = random_voxels(SHAPE, "<f4")
        path = tmp_path / str(number)
        codecs = [BytesCodec(endian=endian), *between, *([Crc32cCodec()] if checksum else [])]
        array = zarr.create(store=path, shape=SHAPE, chunks=CHUNKS, dtype="f4", codecs=codecs, zarr_format=3)
        array[...] = voxels
        check(path)


@both_loops
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_of_number_in_either_order_is_read_from_the_files(tmp_path: Path, dtype: str) -> None:
    voxels = random_voxels(SHAPE, dtype)
    check(written_v3(tmp_path / "3", voxels, shards=SHARDS))
    check(written_v2(tmp_path / "2", voxels))
    if dtype[0] == "<":
        check(written_v2(tmp_path / "big", voxels.astype(dtype.replace("<", ">"))))


@both_loops
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("separator", [".", "/"])
def test_files_are_found_by_either_separator(
    tmp_path: Path, voxels: NDArray[np.int16], version: int, separator: str
) -> None:
    encodings = ["v2"] if version == 2 else ["default", "v2"]
    for name in encodings:
        encoding = {"name": name, "separator": separator}
        path = tmp_path / name
        zarr.create_array(
            path, shape=SHAPE, chunks=CHUNKS, dtype="i2", zarr_format=version, chunk_key_encoding=encoding
        )[...] = voxels  # type: ignore[arg-type]
        check(path)
        files = [str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()]
        assert f"{'c' + separator if name == 'default' else ''}0{separator}1{separator}2" in files


# Axes


@both_loops
@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ("zyx", (7, 8, 9)),
        ("yx", (8, 9)),
        ("xy", (8, 9)),
        ("xyz", (7, 8, 9)),
        ("yxz", (7, 8, 9)),
        ("cyx", (3, 8, 9)),
        ("yxc", (8, 9, 3)),
        ("xcy", (8, 3, 9)),
        ("czyx", (2, 7, 8, 9)),
        ("zyxc", (7, 8, 9, 2)),
        ("zcyx", (7, 2, 8, 9)),
        ("tzyx", (1, 7, 8, 9)),
        ("tzyx", (3, 7, 8, 9)),
        ("xyzt", (7, 8, 9, 3)),
        ("tyx", (3, 8, 9)),
        ("tczyx", (1, 2, 7, 8, 9)),
        ("tczyx", (3, 1, 7, 8, 9)),
        ("tczyx", (1, 1, 7, 8, 9)),
        ("xyztc", (7, 8, 9, 1, 2)),
        ("tcyx", (1, 2, 8, 9)),
    ],
)
def test_any_order_of_axes_is_read_from_the_files(tmp_path: Path, axes: str, shape: tuple[int, ...]) -> None:
    voxels = random_voxels(shape, "<i2") % 1000
    chunks = tuple(min(n, 1 if axis in "ct" else 4) for axis, n in zip(axes, shape, strict=True))
    shards = tuple(2 * c for c in chunks)
    check(written_v3(tmp_path / "3", voxels, chunks=chunks), axes)
    check(written_v2(tmp_path / "2", voxels, chunks=chunks), axes)
    together = tuple(min(n, 4) for n in shape)
    check(written_v3(tmp_path / "channels together", voxels, chunks=together), axes)
    if not any(n == 1 for n in shape):
        check(written_v3(tmp_path / "sharded", voxels, chunks=chunks, shards=shards), axes)


@both_loops
@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ("tczyx", (3, 4, 7, 8, 9)),
        ("tczyx", (3, 1, 7, 8, 9)),
        ("tczyx", (1, 4, 7, 8, 9)),
        ("ctyx", (4, 3, 8, 9)),
        ("xyztc", (7, 8, 9, 3, 4)),
        ("tzyx", (3, 7, 8, 9)),
        ("yxt", (8, 9, 3)),
        ("yxc", (8, 9, 4)),
    ],
)
def test_a_time_point_and_channels_are_read_in_any_order_of_axes_and_chunks(
    tmp_path: Path, axes: str, shape: tuple[int, ...], full: bool
) -> None:
    voxels = random_voxels(shape, "<i2")
    length = dict(zip(axes, shape, strict=True))
    selections = [None, [0], [3, 0], [1, 2, 2, 0]]
    alone = tuple(min(n, 1 if axis in "ct" else 4) for axis, n in zip(axes, shape, strict=True))
    together = tuple(min(n, 4) for n in shape)
    for number, (write, chunks) in enumerate(itertools.product([written_v2, written_v3], [alone, together])):
        path = write(tmp_path / str(number), voxels, chunks=chunks)
        cases = list(itertools.product(range(length.get("t", 1)), selections))
        for point, channels in cases if full else cases[number::12]:  # with each kind of file others
            if channels is not None and max(channels) >= length.get("c", 1):
                continue
            image = ScalarImage(path, axes=axes, time=point, channels=channels)
            taken = voxels.take([point], axes.index("t")) if "t" in axes else voxels
            expected = in_frame(taken, axes)
            assert_same_bytes(read_whole(image), expected if channels is None else expected[channels])
            assert image.opened.channel_axis == "c"
            if chunks == alone:
                assert isinstance(image.source, ShardSource)
            again = pickle.loads(pickle.dumps(image))
            assert_same_bytes(again.data, image.data)
            assert_same_bytes(image.dask.compute(scheduler="sync"), image.data)
    close_shards(tmp_path)


def test_chunks_of_other_time_points_and_channels_are_not_read(tmp_path: Path) -> None:
    voxels = random_voxels((3, 4, 7, 8, 9), "<i2")
    path = written_v3(tmp_path / "a", voxels, chunks=(1, 1, 7, 8, 9))
    for place in np.ndindex(3, 4):
        if place not in ((2, 1), (2, 3)):
            (path / "c" / str(place[0]) / str(place[1]) / "0/0/0").write_bytes(b"no chunk at all")
    image = ScalarImage(path, axes="tczyx", time=2, channels=[3, 1])
    assert_same_bytes(image.data, in_frame(voxels[2], "czyx")[[3, 1]])
    assert image.source.shape == image.shape == (2, 9, 8, 7)
    with pytest.raises(DamageError):
        ScalarImage(path, axes="tczyx", time=1).data  # noqa: B018
    close_shards(tmp_path)


@pytest.mark.parametrize(
    ("axes", "shape", "chosen", "text"),
    [
        ("tczyx", (3, 4, 7, 8, 9), {}, "a has 3 time points and 4 channels; say time=N for one of 0 to 2"),
        ("tczyx", (3, 4, 7, 8, 9), {"time": 3}, r"^time must be 0 to 2 \(there are 3 time points\), not 3$"),
        ("tzyx", (3, 7, 8, 9), {"time": -1}, r"^time must be 0 to 2 \(there are 3 time points\), not -1$"),
        ("czyx", (3, 7, 8, 9), {"time": 1}, r"^time must be 0 \(there are no time points\), not 1$"),
        (
            "czyx",
            (3, 7, 8, 9),
            {"channels": [0, 3]},
            r"^channels must be 0 to 2 \(there are 3 channels\), not 3$",
        ),
        ("czyx", (3, 7, 8, 9), {"channels": []}, "channels= names none; leave it out to read all"),
        ("zyx", (7, 8, 9), {"channels": [1]}, r"^channels must be 0 \(there are no channels\), not 1$"),
        (
            "tzyx",
            (3, 7, 8, 9),
            {"time": 1, "channels": [1]},
            r"^channels must be 0 \(there are no channels\), not 1$",
        ),
    ],
)
def test_a_time_point_or_channel_that_is_not_there_is_refused(
    tmp_path: Path, axes: str, shape: tuple[int, ...], chosen: Any, text: str
) -> None:
    path = written_v3(tmp_path / "a", random_voxels(shape, "<i2"), chunks=shape)
    with pytest.raises(OptionError, match=text) as error:
        ScalarImage(path, axes=axes, **chosen)
    assert error.value.option == next(iter(reversed(chosen)), "time")


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        (["time", "z", "y", "x"], "t"),
        (["T", "Z", "Y", "X"], "t"),
        (["channel", "z", "y", "x"], "c"),
        (["c", "z", "y", "x"], "c"),
    ],
)
def test_axes_that_have_names_are_known(tmp_path: Path, names: list[str], axes: str) -> None:
    voxels = random_voxels((3, 7, 8, 9), "<i2")
    path = written_v3(tmp_path / "3", voxels, chunks=(1, 4, 4, 4), dimension_names=names)
    attributes = {"_ARRAY_DIMENSIONS": names}  # as xarray writes it
    old = written_v2(tmp_path / "2", voxels, chunks=(1, 4, 4, 4), attributes=attributes)
    for image in (ScalarImage(path), ScalarImage(old)):
        assert image.opened.channel_axis == axes
        assert_same_bytes(image.select(channels=[2]).data, in_frame(voxels[2:], "czyx"))


def test_axes_of_an_ome_image_are_known_by_their_names_or_types(tmp_path: Path) -> None:
    voxels = random_voxels((3, 2, 7, 8, 9), "<i2")
    for number, (frame, stain) in enumerate([("t", "c"), ("frame", "stain"), ("time", "channel")]):
        path = tmp_path / str(number)
        kinds = [(frame, "time"), (stain, "channel"), ("z", "space"), ("y", "space"), ("x", "space")]
        scale = [{"type": "scale", "scale": [5.0, 1.0, 4.0, 3.0, 2.0]}]
        multiscale = {
            "axes": [{"name": name, "type": kind} for name, kind in kinds],
            "datasets": [{"path": "0", "coordinateTransformations": scale}],
        }
        group = zarr.create_group(path, attributes={"ome": {"version": "0.5", "multiscales": [multiscale]}})
        group.create_array("0", shape=voxels.shape, chunks=(1, 1, 4, 4, 4), dtype="i2")[...] = voxels
        image = ScalarImage(path, time=1)
        assert_same_bytes(image.data, in_frame(voxels[1], "czyx"))
        assert image.spacing == (2.0, 3.0, 4.0)
        with pytest.raises(OptionError, match="3 time points and 2 channels"):
            ScalarImage(path)


@pytest.mark.parametrize("version", [2, 3])
def test_chunks_that_are_long_along_an_axis_of_length_1_are_read(tmp_path: Path, version: int) -> None:
    voxels = random_voxels((1, 2, 7, 8, 9), "<i2")
    write = written_v2 if version == 2 else written_v3
    path = write(
        tmp_path / "a", voxels, chunks=(4, 1, 4, 4, 4)
    )  # chunks of four points in time, of which there is one
    image = ScalarImage(path, axes="tczyx")
    assert_same_bytes(read_whole(image), in_frame(voxels, "tczyx"))


@given(
    data=st.data(),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    chunks=st.tuples(*[st.integers(1, 5)] * 3),
    packed=st.tuples(*[st.integers(1, 3)] * 3),
    dtype=st.sampled_from(DTYPES),
    compressor=st.sampled_from(COMPRESSORS),
    axes=st.permutations("zyx").map("".join),
    version=st.sampled_from([2, 3, "sharded"]),
)
@both_loops
def test_boxes_of_any_array_are_read_as_zarr_reads_them(
    data: Draw, shape: tuple[int, ...], chunks: tuple[int, ...], packed: tuple[int, ...], dtype: str,
    compressor: Any, axes: str, version: Any, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("any") / "a.zarr"
    voxels = random_voxels(shape, dtype)
    if version == 2:
        written_v2(path, voxels, chunks=chunks)
    else:
        shards = {"shards": tuple(c * n for c, n in zip(chunks, packed, strict=True))}
        how = shards if version == "sharded" else {}
        written_v3(path, voxels, chunks=chunks, compressors=compressor, **how)
    image = ScalarImage(path, axes=axes)
    assert isinstance(image.source, ShardSource)
    whole = in_frame(zarr.open_array(path, mode="r")[...], axes)
    boxes = [draw_box(data, image.spatial_shape) for _ in range(3)] * 2
    for box, patch in zip(boxes, image.read_group(boxes), strict=True):
        assert_same_bytes(patch, whole[(slice(None), *box.to_slices())])
    close_shards(path)


# Missing chunks


@both_loops
@pytest.mark.parametrize("fill", [0, -7, 3.5, np.nan, np.inf])
@pytest.mark.parametrize("version", [2, 3, "sharded"])
def test_missing_chunks_have_the_fill_value(tmp_path: Path, fill: float, version: Any) -> None:
    how = {"shards": SHARDS} if version == "sharded" else {}
    dtype = "i2" if isinstance(fill, int) else "f4"
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, fill_value=fill,
        zarr_format=2 if version == 2 else 3, **how,
    )  # fmt: skip
    check(tmp_path / "a")
    array[0:3, 4:8, 5:11] = 9
    array[8, 9, 10] = 4
    check(tmp_path / "a")
    scaled = ScalarImage(tmp_path / "a", axes="zyx").rescaled(0.5, 1).data
    np.testing.assert_allclose(scaled, in_frame(array[...], "zyx") * 0.5 + 1)


@both_loops
def test_a_fill_value_that_is_not_given_is_zero(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype="i2", zarr_format=2, fill_value=None)
    assert not ScalarImage(tmp_path / "a", axes="zyx").data.any()


# Written again


@both_loops
@pytest.mark.parametrize("how", [{}, {"shards": SHARDS}], ids=["plain", "sharded"])
def test_an_array_that_was_written_again_is_read_again(tmp_path: Path, how: dict[str, Any]) -> None:
    path = tmp_path / "a"
    array = zarr.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="i2", compressors=None, **how)
    image = ScalarImage(path, axes="zyx")
    assert not image.data.any()
    for value in (3, 4, 4, 0, 5):
        array[...] = value
        assert (image.data == value).all()
        array[4, 5, 6] = value + 1  # one chunk of many
        assert image.data[0, 6, 5, 4] == value + 1
        time.sleep(0.005)  # so that file times differ


@both_loops
def test_a_chunk_that_was_removed_is_read_as_the_fill_value(
    tmp_path: Path, voxels: NDArray[np.int16]
) -> None:
    path = written_v3(tmp_path / "a", voxels)
    image = ScalarImage(path, axes="zyx")
    np.testing.assert_array_equal(image.data[0], voxels.T)
    (path / "c" / "0" / "0" / "0").unlink()
    check(path)
    assert not image.data[0, :5, :4, :3].any()


@both_loops
def test_another_array_at_the_same_path_is_read_as_itself(tmp_path: Path) -> None:
    path = tmp_path / "a"
    arrangements: list[dict[str, Any]] = [
        {"shape": (8, 8, 8), "chunks": (4, 4, 4), "shards": (8, 8, 8), "dtype": "i2", "fill_value": 3},
        {"shape": (8, 8, 8), "chunks": (2, 2, 2), "shards": (8, 8, 8), "dtype": "i4", "fill_value": 5},
        {"shape": (8, 8, 8), "chunks": (2, 2, 2), "shards": (8, 8, 8), "dtype": "i4", "fill_value": 6},
        {"shape": (9, 8, 7), "chunks": (9, 8, 7), "dtype": "f4", "fill_value": 7},
        {"shape": (9, 8, 7), "chunks": (9, 8, 7), "dtype": "f4", "fill_value": np.nan},
    ]
    for is_written, arrangement in itertools.product([False, True], arrangements):
        zarr.create_array(path, overwrite=True, **arrangement)
        image = ScalarImage(path, axes="zyx")  # of chunks that are missing before and after
        filled = np.full(arrangement["shape"][::-1], arrangement["fill_value"])
        np.testing.assert_array_equal(image.data[0], filled)
        if is_written:
            voxels = random_voxels(arrangement["shape"], arrangement["dtype"])
            zarr.open_array(path, mode="r+")[...] = voxels
            assert_same_bytes(ScalarImage(path, axes="zyx").data[0], voxels.T)
        shutil.rmtree(path)


# Arrays that only zarr can read


def check_through_zarr(path: Path, axes: str = "zyx") -> None:
    check(path, axes, through=DaskSource)


def test_a_transposed_array_is_read_through_zarr(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    codecs = [TransposeCodec(order=(2, 0, 1)), BytesCodec(), BloscCodec(typesize=2)]
    zarr.create(store=tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype="i2", codecs=codecs, zarr_format=3)[
        ...
    ] = voxels
    check_through_zarr(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")
def test_shards_with_a_transposition_inside_or_outside_are_read_through_zarr(
    tmp_path: Path, voxels: NDArray[np.int16]
) -> None:
    turn = TransposeCodec(order=(2, 1, 0))
    inside = [ShardingCodec(chunk_shape=CHUNKS, codecs=[turn, BytesCodec(), ZstdCodec()])]
    outside = [TransposeCodec(order=(0, 1, 2)), ShardingCodec(chunk_shape=CHUNKS, codecs=[BytesCodec()])]
    nested = [
        ShardingCodec(chunk_shape=SHARDS, codecs=[ShardingCodec(chunk_shape=CHUNKS, codecs=[BytesCodec()])])
    ]
    for name, codecs, chunks in (
        ("inside", inside, SHARDS), ("outside", outside, SHARDS), ("nested", nested, (12, 16, 20)),
    ):  # fmt: skip
        zarr.create(
            store=tmp_path / name, shape=SHAPE, chunks=chunks, dtype="i2", codecs=codecs, zarr_format=3
        )[...] = voxels
        check_through_zarr(tmp_path / name)


def test_an_array_with_a_compressed_index_is_read_through_zarr(
    tmp_path: Path, voxels: NDArray[np.int16]
) -> None:
    for name, index in (("big", [BytesCodec(endian="big"), Crc32cCodec()]),):
        sharding = ShardingCodec(chunk_shape=CHUNKS, codecs=[BytesCodec()], index_codecs=index)
        zarr.create(
            store=tmp_path / name, shape=SHAPE, chunks=SHARDS, dtype="i2", codecs=[sharding], zarr_format=3
        )[...] = voxels
        check_through_zarr(tmp_path / name)


@pytest.mark.parametrize(
    "how",
    [
        {"filters": [Delta(dtype="<i2")]},
        {"order": "F"},
        {"compressors": BZ2()},
        {"compressors": LZ4()},
    ],
    ids=repr,
)
def test_filters_and_order_of_version_2_are_read_through_zarr(
    tmp_path: Path, voxels: NDArray[np.int16], how: dict[str, Any]
) -> None:
    check_through_zarr(written_v2(tmp_path / "a", voxels, **how))


@pytest.mark.parametrize("axes", ["zyx", "xyz"])
def test_an_array_in_memory_is_read_through_zarr(voxels: NDArray[np.int16], axes: str) -> None:
    array = zarr.create_array(zarr.storage.MemoryStore(), shape=SHAPE, chunks=CHUNKS, dtype="i2")
    array[...] = voxels
    check(Path("nowhere"), axes, through=DaskSource, array=array)


def test_an_array_in_a_zip_file_is_read_through_zarr(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as store:
        zarr.create_array(store, shape=SHAPE, chunks=SHAPE, dtype="i2")[...] = voxels
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="r") as store:
        array = zarr.open_array(store, mode="r")
        check(Path("nowhere"), through=DaskSource, array=array)


def test_an_array_through_zarr_may_have_an_axis_that_is_not_kept(tmp_path: Path) -> None:
    voxels = random_voxels((1, 2, 7, 8, 9), "<i2")
    path = written_v2(tmp_path / "a", voxels, chunks=(1, 1, 4, 4, 4), order="F")
    check_through_zarr(path, "tczyx")


# Ways to open an array


@pytest.mark.parametrize("opened", ["path", "str", "array", "group", "relative", "link"])
def test_an_array_is_opened_by_its_path_or_as_an_object(
    tmp_path: Path, voxels: NDArray[np.int16], opened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = zarr.create_group(tmp_path / "group")
    array = group.create_array("deep/er", shape=SHAPE, chunks=CHUNKS, shards=SHARDS, dtype="i2")
    array[...] = voxels
    path = tmp_path / "group" / "deep" / "er"
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    data: Any = {
        "path": path,
        "str": str(path),
        "array": array,
        "group": zarr.open_group(tmp_path / "group")["deep/er"],
        "relative": Path("group/deep/er"),
        "link": tmp_path / "link",
    }[opened]
    image = ScalarImage(data, axes="zyx")
    assert isinstance(image.source, ShardSource)
    monkeypatch.chdir("/")
    assert_same_bytes(image.data[0], voxels.T)


def pyramid(path: Path, version: int) -> list[NDArray[Any]]:
    """An OME-Zarr image of three levels, of version 0.4 or 0.5."""
    levels = [random_voxels((2, 8 >> n, 12 >> n, 16 >> n), "<u2", n) for n in range(3)]
    datasets = [
        {
            "path": str(n),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, 4.0 * 2**n, 3.0 * 2**n, 2.0 * 2**n]},
                {"type": "translation", "translation": [0.0, 30.0 + n, 20.0, 10.0]},
            ],
        }
        for n in range(3)
    ]
    axes = [{"name": "c", "type": "channel"}, *({"name": a, "type": "space"} for a in "zyx")]
    multiscales = [{"version": "0.4", "name": "image", "axes": axes, "datasets": datasets}]
    attributes = (
        {"multiscales": multiscales}
        if version == 2
        else {"ome": {"version": "0.5", "multiscales": multiscales}}
    )
    group = zarr.create_group(path, zarr_format=version, attributes=attributes)  # type: ignore[arg-type]
    for n, level in enumerate(levels):
        encoding = {"name": "v2" if version == 2 else "default", "separator": "/"}
        array = group.create_array(
            str(n), shape=level.shape, chunks=(1, 4, 4, 4), dtype="u2", chunk_key_encoding=encoding
        )
        array[...] = level
    return levels


@both_loops
@pytest.mark.parametrize("version", [2, 3])
def test_each_level_of_a_pyramid_is_opened_by_its_path(tmp_path: Path, version: int) -> None:
    levels = pyramid(tmp_path / "image.zarr", version)
    for number, level in enumerate(levels):
        image = ScalarImage(tmp_path / "image.zarr" / str(number))
        assert isinstance(image.source, ShardSource)
        assert_same_bytes(image.data, level.transpose(0, 3, 2, 1))
        assert image.spacing == (2 * 2**number, 3 * 2**number, 4 * 2**number)
        assert image.affine[:3, 3].tolist() == [10, 20, 30 + number]
    finest = ScalarImage(tmp_path / "image.zarr")
    assert_same_bytes(finest.data, levels[0].transpose(0, 3, 2, 1))
    assert finest.spacing == (2, 3, 4)


def test_an_array_beside_a_pyramid_is_not_a_level_of_it(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    pyramid(tmp_path / "image.zarr", 3)
    path = written_v3(tmp_path / "image.zarr" / "more", voxels)
    with pytest.raises(OptionError, match=r"the axes of a Zarr array of shape .* say axes="):
        ScalarImage(path)
    check(path)


# Damage, and paths that are not arrays


@both_loops
@pytest.mark.parametrize("compressor", [BloscCodec(typesize=2), ZstdCodec(), GzipCodec(), None], ids=repr)
def test_a_chunk_cut_short_is_an_error_that_names_its_file(
    tmp_path: Path, voxels: NDArray[np.int16], compressor: Any
) -> None:
    path = written_v3(tmp_path / "a", voxels, compressors=compressor)
    file = path / "c" / "1" / "1" / "1"
    size = file.stat().st_size
    for length in {0, 1, size // 2, size - 1}:
        file.write_bytes((file.read_bytes() + bytes(size))[:length])
        with pytest.raises(DamageError) as caught:
            ScalarImage(path, axes="zyx").data  # noqa: B018
        assert str(file) in str(caught.value)
        assert "restore the file from a copy" in str(caught.value)
        written_v3(path, voxels, compressors=compressor, overwrite=True)


@both_loops
def test_a_shard_that_fails_its_checksum_is_an_error(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    path = tmp_path / "a"
    sharding = ShardingCodec(chunk_shape=CHUNKS, codecs=[BytesCodec(), Crc32cCodec()])
    zarr.create(store=path, shape=SHAPE, chunks=SHARDS, dtype="i2", codecs=[sharding], zarr_format=3)[...] = (
        voxels
    )
    file = path / "c" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[30] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamageError, match=r"c/0/0/0: chunk 0 of the file .* does not match its checksum"):
        ScalarImage(path, axes="zyx").read(PatchLocation((0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.write_text("{"),
        lambda document: document.write_text("[]"),
        lambda document: document.write_text('"zarr"'),
        lambda document: document.unlink(),
        lambda document: change(document, "node_type", "tree"),
        lambda document: change(document, "shape", None),
        lambda document: change(document, "codecs", [{"name": "no such codec"}]),
        lambda document: change(document, "codecs", []),
        lambda document: change(document, "data_type", "no such type"),
    ],
)
def test_an_array_whose_metadata_is_broken_is_an_error(
    tmp_path: Path, voxels: NDArray[np.int16], spoil: Callable[[Path], None]
) -> None:
    path = written_v3(tmp_path / "a", voxels)
    spoil(path / "zarr.json")
    with pytest.raises(NotAStoreError, match="a: it is no Zarr array or OME-Zarr image"):
        ScalarImage(path, axes="zyx")


def change(document: Path, key: str, value: Any) -> None:
    metadata = json.loads(document.read_text())
    metadata[key] = value
    document.write_text(json.dumps(metadata))


def ome_group(folder: Path, **changed: Any) -> None:
    """An OME-Zarr image of (z, y, x) with some metadata changed; ``inner`` is a group beside its level."""
    group = zarr.open_group(folder, mode="w")
    group.create_array("0", data=np.zeros(SHAPE, np.int16), chunks=CHUNKS)
    group.create_group("inner")
    transforms = [{"type": "scale", "scale": [1.0, 2.0, 3.0]}]
    dataset = {"path": "0", "coordinateTransformations": transforms, **changed}
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": [dataset]}]}


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "inner"},
        {"path": "../.."},
        {"coordinateTransformations": [{"type": "scale", "scale": [1.0, 2.0]}]},
        {"coordinateTransformations": [{"type": "scale", "scale": ["1", "2", "3"]}]},
        {"coordinateTransformations": [{"type": "scale", "scale": [1, 2, 10**400]}]},
        {"coordinateTransformations": [{"type": "translation", "translation": "abc"}]},
    ],
    ids=lambda changed: f"{changed!s:.70}",
)
def test_ome_metadata_of_another_form_is_an_error(tmp_path: Path, changed: dict[str, Any]) -> None:
    ome_group(tmp_path / "good.zarr")
    assert ScalarImage(tmp_path / "good.zarr").spacing == (3, 2, 1)
    ome_group(tmp_path / "bad.zarr", **changed)
    with pytest.raises(NotAStoreError, match=r"bad\.zarr: it is a Zarr group but no OME-Zarr image"):
        ScalarImage(tmp_path / "bad.zarr")


def test_a_level_whose_own_metadata_is_broken_is_an_error(tmp_path: Path) -> None:
    ome_group(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "0" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"')
    with pytest.raises(NotAStoreError, match=r"a\.zarr: it is a Zarr group but no OME-Zarr image"):
        ScalarImage(tmp_path / "a.zarr")


@pytest.mark.parametrize("chunks", [[3, 0, 5], [0, 0, 0]], ids=str)
def test_chunks_without_voxels_are_an_error(tmp_path: Path, chunks: list[int]) -> None:
    zarr.create_array(tmp_path / "a", data=np.zeros(SHAPE, np.int16), chunks=CHUNKS)
    document = json.loads((tmp_path / "a" / "zarr.json").read_text())
    document["chunk_grid"]["configuration"]["chunk_shape"] = chunks
    (tmp_path / "a" / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match=str(tmp_path / "a")):
        ScalarImage(tmp_path / "a", axes="zyx")


@pytest.mark.parametrize("shape", [(10**7, 4, 4), (10**9,) * 3], ids=str)
def test_an_array_through_zarr_of_very_many_chunks_is_an_error(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    zarr.create_array(tmp_path / "a", shape=(4, 4, 4), dtype="u1", chunks=(1, 1, 1), zarr_format=2, order="F")
    document = json.loads((tmp_path / "a" / ".zarray").read_text())
    (tmp_path / "a" / ".zarray").write_text(json.dumps({**document, "shape": shape}))
    with pytest.raises(StoreError, match=f"{tmp_path / 'a'}: .* write it anew with other chunks"):
        ScalarImage(tmp_path / "a", axes="zyx")


def test_a_chunk_that_zarr_cannot_read_is_an_error_that_names_the_array(
    tmp_path: Path, voxels: NDArray[np.int16]
) -> None:
    path = written_v2(tmp_path / "a", voxels, filters=[Delta("<i2")])
    image = ScalarImage(path, axes="zyx")
    (path / "0.0.0").write_bytes(b"\0\0")
    with pytest.raises(DamageError, match=f"damaged: {path}: zarr cannot read it"):
        image.read(PatchLocation((0, 0, 0), (2, 2, 2)))


def test_names_of_dimensions_that_are_none_are_not_taken(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", data=np.zeros(SHAPE, np.int16), chunks=CHUNKS, zarr_format=2)
    array.attrs["_ARRAY_DIMENSIONS"] = 3
    with pytest.raises(OptionError, match="are not named"):
        ScalarImage(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["<M8[s]", "|S5"])
def test_an_array_of_other_things_than_numbers_is_an_error(tmp_path: Path, dtype: str) -> None:
    zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2)
    with pytest.raises(OptionError, match="an image is of numbers, not of"):
        ScalarImage(tmp_path / "a", axes="zyx")


def test_a_pipe_instead_of_a_chunk_is_an_error(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    path = written_v3(tmp_path / "a", voxels)
    file = path / "c" / "0" / "0" / "0"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DamageError, match="no regular file"):
        ScalarImage(path, axes="zyx").read(PatchLocation((0, 0, 0), (1, 1, 1)))


def test_an_array_whose_files_are_links_is_read_as_zarr_reads_it(tmp_path: Path) -> None:
    voxels = np.arange(8 * 9 * 10, dtype=np.int16).reshape(8, 9, 10)
    array = zarr.create_array(tmp_path / "linked", data=voxels, chunks=(4, 4, 4), dimension_names=list("zyx"))
    for file in [file for file in (tmp_path / "linked" / "c").rglob("*") if file.is_file()]:
        target = tmp_path / f"annex-{'-'.join(file.parts[-3:])}"
        file.rename(target)
        file.symlink_to(target)
    np.testing.assert_array_equal(ScalarImage(array).data[0].T, array[:])
