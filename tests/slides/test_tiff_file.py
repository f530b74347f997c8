"""Damaged, cut and odd TIFF files: voxels, or one clear line; never another error, a hang or much memory."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import slides_made
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from processes import close_slides
from slides_made import write

import zpatch as zp
from zpatch.errors import OptionError, SourceError, ZpatchError
from zpatch.runtime.process_memory import private_bytes
from zpatch.slides import tiff_file
from zpatch.slides.tiles import DamagedTileError

GREY = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


def read(path: Path, **options: Any) -> Any:
    image = zp.ScalarImage(path, **options)
    return image.read(zp.PatchLocation((0, 0, 0), image.spatial_shape))


def outcome(path: Path, most: int = 2**31) -> tuple[Any, str]:
    """The voxels of a file, ``most`` along an axis, or the error of zpatch that reading it gives."""
    try:
        image = zp.ScalarImage(path)
        i, j, k = (min(n, most) for n in image.spatial_shape)
        return image.read(zp.PatchLocation((0, 0, 0), (i, j, k))), ""
    except ZpatchError as error:
        return None, str(error)


def with_tile(path: Path, number: int, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a tile of the finest level, in place."""
    with tifffile.TiffFile(path) as file:
        page = file.series[0].keyframe
        offset, count = page.dataoffsets[number], page.databytecounts[number]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = change(bytes(data[offset : offset + count]))
    path.write_bytes(data)


def with_tag(path: Path, tag: int, number: int, value: int) -> None:
    """Change one value of a tag of tiles of the finest level."""
    with tifffile.TiffFile(path, mode="r+") as file:
        found = file.series[0].keyframe.tags[tag]
        values = list(found.value)
        values[number] = value
        found.overwrite(values, dtype=found.dtype)


GARBAGE = {
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "noise in its second half": lambda data: (
        data[: len(data) // 2] + np.random.default_rng(0).bytes(len(data) - len(data) // 2)
    ),
    "zeros in its second half": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(
    "name", ["tiles jpeg", "tiles zlib", "tiles lzw", "tiles zstd", "svs", "vips subifds"]
)
def test_garbage_in_a_tile_is_damage_that_names_it(tmp_path: Path, name: str, garbage: str) -> None:
    if name == "tiles lzw" and "second" in garbage:
        pytest.skip("LZW without a checksum may decode what was changed")
    path, made = write(name, tmp_path)
    voxels = made.voxels(path)
    with_tile(path, 2, GARBAGE[garbage])
    with pytest.raises(DamagedTileError, match=rf"damaged: {path}: the tile in column 2, row 0 .*; restore"):
        read(path)
    image = zp.ScalarImage(path)
    below = zp.PatchLocation((0, 128, 0), (150, 79, 1))
    np.testing.assert_array_equal(image.read(below), voxels[:, *below.to_slices()])
    filled = image.with_source(image.source.filling())
    found = filled.read(zp.PatchLocation((0, 0, 0), image.spatial_shape))
    is_zero = (found == 0).all(axis=(0, 3))
    width, height, _ = image.source.chunk_shape
    assert is_zero[2 * width : 3 * width, :height].all()
    np.testing.assert_array_equal(found[:, :, height:], voxels[:, :, height:])
    assert len(filled.source.damaged()) == 1


@pytest.mark.parametrize(
    ("tag", "value", "text"),
    [
        (325, 0xFFFFFFFF, "of its 4294967295 bytes"),
        (325, 7, "row 0 "),
        (324, 0xFFFFFF00, "has 0 of its"),
        (324, 0, "row 0 "),
    ],
)
@pytest.mark.parametrize("name", ["tiles zlib", "big"])
def test_a_tile_that_lies_nowhere_is_damage_and_takes_no_memory(
    tmp_path: Path, name: str, tag: int, value: int, text: str
) -> None:
    path, _ = write(name, tmp_path)
    with_tag(path, tag, 2, value)
    before = private_bytes()
    with pytest.raises(DamagedTileError, match=f"{path}: the tile in column 2, row 0 .*"):
        read(path)
    assert private_bytes() - before < 2**26
    with pytest.raises(DamagedTileError, match=text):
        read(path)


CUT = [
    *("tiles jpeg", "tiles zlib", "svs", "ome channels", "contiguous", "strips zlib", "imagej"),
    *("imagej compressed", "stack", "vips subifds", "ndpi", "planar"),
]


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_short_is_one_line_or_has_the_shape_that_it_had(tmp_path: Path, name: str) -> None:
    path, _ = write(name, tmp_path)
    data, shape = path.read_bytes(), zp.ScalarImage(path).shape
    for kept in (0, 1, 4, 7, 8, 9, 16, 100, *np.linspace(200, len(data) - 1, 25).astype(int).tolist()):
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(data[:kept])
        found, text = outcome(cut)
        assert text.count("\n") == 0
        assert str(cut) in text if found is None else found.shape == shape
        close_slides(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.svs", b"", "it is no TIFF file (its first bytes are of none); copy the file again"),
        ("a.svs", b"hello world", "it is no TIFF file (its first bytes are of none); copy the file again"),
        ("a.tif", b"\x89PNG\r\n\x1a\n" + bytes(99), "it is no TIFF file"),
        ("a.tif", b"II*\0", "its directory of images cannot be read"),
        ("a.tif", b"II*\0\x08\0\0\0", "it holds no image that can be read; copy the file again"),
        ("a.tif", b"II*\0\0\0\0\0", "it holds no image that can be read; copy the file again"),
        ("a.tif", b"II*\0\x08\0\0\0\xff\xff" + bytes(40), "its directory of images cannot be read"),
        ("a.tif", b"II+\0\x09\0\0\0" + bytes(40), "its directory of images cannot be read"),
    ],
)
def test_a_file_that_is_no_tiff_is_one_line(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{tmp_path / name}: ") as error:
        zp.ScalarImage(tmp_path / name)
    assert text in str(error.value)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.tif").mkdir()
    os.mkfifo(tmp_path / "pipe.svs")
    (tmp_path / "loop.svs").symlink_to(tmp_path / "loop.svs")
    for name in ("folder.tif", "pipe.svs", "loop.svs", "nowhere.ndpi"):
        with pytest.raises(SourceError, match=f"{tmp_path / name}: it cannot be opened"):
            zp.ScalarImage(tmp_path / name)


def test_associated_images_only_are_no_slide(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ndpi") as file:
        slides_made._write_ndpi_page(file, slides_made.small()[:40, :64], -1.0, 2e4, 4)
    slides_made._as_ndpi(tmp_path / "a.ndpi")
    with pytest.raises(
        SourceError, match=r"it has associated images only \(Macro\), and not the slide itself"
    ):
        zp.ScalarImage(tmp_path / "a.ndpi")


@pytest.mark.parametrize(
    "options", [{"metadata": {"Name": "labels"}, "ome": True}, {"metadata": {"name": "label"}}]
)
def test_the_only_image_of_a_file_may_have_any_name(tmp_path: Path, options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, tile=(16, 16), **options)
    assert zp.LabelMap(tmp_path / "a.tif").shape == (1, 64, 64, 1)


def test_a_library_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write("tiles jpeg", tmp_path)
    plain, made = write("tiles none", tmp_path)
    wanted = made.voxels(plain)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(
            SourceError, match=r"its tiles are JPEG, which imagecodecs decodes; install 'zpatch\[sl"
        ):
            zp.ScalarImage(path)
        np.testing.assert_array_equal(read(plain), wanted)
    close_slides(tmp_path)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(
        SourceError, match=r"TIFF files are read by tifffile and imagecodecs, .*'zpatch\[slides\]'"
    ):
        zp.ScalarImage(path)


def test_a_codec_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    path, _ = write("one tile", tmp_path)
    for number in (65000, 32809, 1234):
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags[259].overwrite(number)
        with pytest.raises(ZpatchError, match=f"{path}: "):
            read(path)
        close_slides(tmp_path)


def test_axes_without_known_names_are_refused_and_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pixels = np.arange(2 * 3 * 32 * 48, dtype=np.uint16).reshape(2, 3, 32, 48)
    options: dict[str, Any] = {"photometric": "minisblack", "tile": (16, 16)}
    tifffile.imwrite(path, pixels, metadata={"axes": "QHYX"}, **options)
    with pytest.raises(
        OptionError, match=r"its axes are QHYX \(2, 3, 32, 48\); say axes= with one letter for each"
    ):
        zp.ScalarImage(path)
    np.testing.assert_array_equal(read(path, axes="zcyx"), pixels.transpose(1, 3, 2, 0))
    np.testing.assert_array_equal(read(path, axes="tcyx", time=1), pixels[1].transpose(0, 2, 1)[..., None])
    for wrong in ("yx", "zcxy", "qcyx", "ccyx", "tzcyx", ""):
        with pytest.raises(OptionError, match="axes"):
            zp.ScalarImage(path, axes=wrong)


def test_time_points_of_channels_are_chosen_by_number(tmp_path: Path) -> None:
    pixels = slides_made.of_channels()
    path = slides_made.write_ome(tmp_path / "a.ome.tif", pixels, "TCZYX")
    with pytest.raises(OptionError, match="has 2 time points and 2 channels; say time=N for one of 0 to 1"):
        zp.ScalarImage(path)
    with pytest.raises(OptionError, match="time must be 0 to 1, not 2"):
        zp.ScalarImage(path, time=2)
    for time_point in range(2):
        image = zp.ScalarImage(path, time=time_point)
        assert image.opened.in_words == f"time point {time_point} of 2"
        np.testing.assert_array_equal(read(path, time=time_point), pixels[time_point].transpose(0, 3, 2, 1))
    identities = {str(zp.ScalarImage(path, time=n).opened.identity()) for n in range(2)}
    assert len(identities) == 2
    np.testing.assert_array_equal(read(path, time=1, channels=[1])[0], pixels[1, 1].transpose(2, 1, 0))


def test_tiles_too_large_for_memory_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    side = 2**16
    data = imagecodecs.zlib_encode(b"\0" * 100)
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter([data]),
        bigtiff=True,
        shape=(side, side),
        dtype=np.uint8,
        tile=(side, side),
        compression="zlib",
    )
    with pytest.raises(SourceError, match=r"its tiles of 65536 x 65536 x 1 pixels take 4\.0 GiB each"):
        zp.ScalarImage(tmp_path / "a.tif")


def test_a_tile_that_inflates_beyond_its_size_takes_no_memory(tmp_path: Path) -> None:
    data = imagecodecs.zlib_encode(bytes(2**28))
    tifffile.imwrite(
        tmp_path / "a.tif", iter([data]), shape=(64, 64), dtype=np.uint8, tile=(64, 64), compression="zlib"
    )
    before = private_bytes()
    found, text = outcome(tmp_path / "a.tif")
    assert found is not None or "column 0, row 0" in text
    assert private_bytes() - before < 2**26


FUZZED = [
    "tiles of 16",
    "tiles jpeg",
    "svs",
    "ndpi",
    "ome channels",
    "imagej",
    "contiguous",
    "planar",
    "deep tiles",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUZZED)
def test_any_bytes_changed_in_a_file_give_voxels_or_an_error_of_zpatch(tmp_path: Path, name: str) -> None:
    """Most changes are made where directories are: in the first or last bytes, and around other pages."""
    path, _ = write(name, tmp_path)
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        directories = [page.offset for page in file.pages]
    places = [n for at in (0, *directories) for n in range(at, min(at + 220, len(data)))]
    changed = tmp_path / f"changed{path.suffix}"

    place = st.sampled_from(places) | st.integers(0, len(data) - 1)

    @given(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6))
    def check(changes: list[tuple[int, int]]) -> None:
        found = bytearray(data)
        for at, value in changes:
            found[at] = value
        changed.write_bytes(found)
        before, start = private_bytes(), time.process_time()
        with warnings.catch_warnings(action="ignore"):
            _, text = outcome(changed, most=64)
        close_slides(tmp_path)
        assert "\n" not in text
        assert time.process_time() - start < 5
        assert private_bytes() - before < 2**28

    check()


def test_descriptors_are_closed_with_the_file(tmp_path: Path) -> None:
    path, _ = write("tiles jpeg", tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read(path)
        close_slides(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not [key for key in tiff_file._open._values if key[1].path == path]
