"""The door to OpenSlide: pixels as it reads them, for what tifffile does not read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slides_made
from numpy.typing import NDArray

import zpatch as zp
from zpatch.chunks.file_mark import FileMark
from zpatch.errors import SourceError
from zpatch.slides import openslide_file, slide_file
from zpatch.slides.tiff_file import NoCodecError

openslide = pytest.importorskip("openslide")
WRITERS = {"svs": slides_made.write_svs, "ndpi": slides_made.write_ndpi}


def region(path: Path, level: int, box: zp.PatchLocation) -> NDArray[np.uint8]:
    """What OpenSlide reads of a box of a level, as (C, I, J, 1)."""
    with openslide.OpenSlide(path) as slide:
        scale = slide.level_downsamples[level]
        corner = tuple(round(n * scale) for n in box.index[:2])
        pixels = np.asarray(slide.read_region(corner, level, box.size[:2]))
    return pixels[..., :3].transpose(2, 1, 0)[..., None]


@pytest.mark.parametrize("suffix", WRITERS)
def test_tifffile_and_openslide_read_the_same_pixels_of_the_finest_level(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"a.{suffix}", slides_made.picture(700, 500))
    image = zp.ScalarImage(path)
    assert image.opened.slide is not None
    assert image.opened.slide.file.door == "tifffile"
    for box in (
        zp.PatchLocation((0, 0, 0), (200, 150, 1)),
        zp.PatchLocation((123, 77, 0), (300, 260, 1)),
        zp.PatchLocation((image.shape[1] - 40, image.shape[2] - 30, 0), (40, 30, 1)),
    ):
        np.testing.assert_array_equal(image.read(box), region(path, 0, box))


def test_coarser_levels_are_the_same_too(tmp_path: Path) -> None:
    path = slides_made.write_svs(tmp_path / "a.svs", slides_made.picture(700, 500), levels=(2, 4))
    for level in (1, 2):
        image = zp.ScalarImage(path, level=level)
        box = zp.PatchLocation((0, 0, 0), image.spatial_shape)
        np.testing.assert_array_equal(image.read(box), region(path, level, box))


@pytest.fixture
def by_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slide that only OpenSlide is asked for."""
    path = slides_made.write_svs(tmp_path / "a.svs", slides_made.picture(700, 500), levels=(2, 4))

    def refuse(*_: Any) -> Any:
        raise NoCodecError("not by tifffile")

    monkeypatch.setattr(slide_file, "_by_tifffile", refuse)
    return path


def test_a_slide_that_tifffile_cannot_read_is_read_by_openslide(by_openslide: Path) -> None:
    image = zp.ScalarImage(by_openslide)
    assert image.opened.slide is not None
    file = image.opened.slide.file
    assert (file.door, file.kind, file.mpp) == ("openslide", "aperio", (0.5, 0.5))
    assert [level[:2] for level in image.levels] == [(700, 500), (350, 250), (175, 125)]
    assert {name for name, *_ in file.associated} == {"label", "macro", "thumbnail"}
    for level in range(3):
        image = zp.ScalarImage(by_openslide, level=level)
        for first in ((0, 0, 0), (image.shape[1] - 90, image.shape[2] - 70, 0)):
            box = zp.PatchLocation(first, (90, 70, 1))
            np.testing.assert_array_equal(image.read(box), region(by_openslide, level, box))
    half = zp.ScalarImage(by_openslide, mpp=1.0)
    assert half.shape == (3, 350, 250, 1)


def test_pixels_that_were_not_scanned_have_the_background_of_the_slide(by_openslide: Path) -> None:
    [level, *_] = openslide_file.levels_of(FileMark.of_voxels(by_openslide))
    _, width, height, _ = level.tile
    memory = np.empty((1, height, width, 3), np.uint8)
    corner = level.decoder()((0, 700 // width, 500 // height, 0), memory)
    assert corner is not None
    assert (corner[0, -1, -1] == 255).all()


def test_a_tiff_of_no_scanner_is_never_turned_into_colours(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    slides_made.plain(lambda: slides_made.small()[:, :, 0].astype(np.complex64), tile=(64, 64)).write(path)
    with pytest.raises(SourceError, match="pixels of type complex64 are not read; write it anew"):
        zp.ScalarImage(path)


def test_what_openslide_does_not_know_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"no slide at all")
    with pytest.raises(SourceError, match=f"{path}: OpenSlide knows no such format"):
        zp.ScalarImage(path)
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "b.mrxs").write_bytes(b"no slide at all")
    with pytest.raises(SourceError, match=r"OpenSlide is missing .*install 'zpatch\[openslide\]'"):
        zp.ScalarImage(tmp_path / "b.mrxs")


def test_a_mrxs_whose_data_is_missing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Slidedat.ini").write_text("[GENERAL]\nSLIDE_ID = x\n")
    with pytest.raises(SourceError, match=str(tmp_path / "a.mrxs")):
        zp.ScalarImage(tmp_path / "a.mrxs")
