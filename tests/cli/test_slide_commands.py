"""The commands on a slide: info, report, bench, predict and export, as users run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from slides_made import picture, write_svs

import zpatch as zp
from zpatch.cli import run

NETS = """
import torch

class Brown(torch.nn.Module):
    def forward(self, pixels):
        difference = pixels[:, 0] - pixels[:, 2]
        return torch.stack([30 - difference, difference - 30], 1)

def brown():
    return Brown()
"""
PREDICT = (
    "predict",
    "case.svs",
    "out.zarr",
    "--model",
    "nets:brown",
    "--patch-size",
    "256",
    "--reduce",
    "argmax",
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a slide and a network."""
    write_svs(tmp_path / "case.svs", picture(900, 700))
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints to stdout, or its last line of stderr where it fails."""
    capsys.readouterr()
    assert run(list(arguments)) == code
    found = capsys.readouterr()
    return found.err.splitlines()[-1] if code else found.out


def test_info_lists_levels_tiles_and_associated_images(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "info", "case.svs")
    for part in ("900 x 700 x 1 voxels of 0.5 x 0.5", "read by tifffile", "JPEG", "450 x 350", "128 x 128"):
        assert part in text
    assert "associated images: " in text
    known = json.loads(printed(capsys, "info", "case.svs", "--json"))
    assert [(level["width"], level["mpp"]) for level in known["levels"][:2]] == [
        (900, [0.5] * 2),
        (450, [1.0] * 2),
    ]
    assert (known["read_by"], known["codec"], known["shape"]) == ("tifffile", "JPEG", [900, 700, 1])


def test_info_of_a_file_without_pixel_sizes_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite("a.tif", picture(300, 200), tile=(64, 64), compression="zlib", photometric="rgb")
    assert "it states no micrometres per pixel: say --slide-mpp" in printed(capsys, "info", "a.tif")
    line = printed(capsys, *PREDICT[:1], "a.tif", *PREDICT[2:], "--mpp", "1", code=2)
    assert "say --slide-mpp with those of its finest level, or --level" in line
    printed(capsys, *PREDICT[:1], "a.tif", *PREDICT[2:], "--mpp", "1", "--slide-mpp", "0.5", "-q")
    assert zp.Cohort("out.zarr")["a"].prediction.spatial_shape == (150, 100, 1)


def test_a_report_shows_the_thumbnail_with_its_tissue(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "report", "case.svs", "-o", "case.html") == "case.html\n"
    page = Path("case.html").read_text()
    assert "data:image/png;base64," in page
    assert "of the slide" in page
    assert page.count("<tr>") >= 3
    known = json.loads(printed(capsys, "report", "case.svs", "-o", "case.html", "--json"))
    assert 0.2 < known["tissue"] < 0.9
    Path("other.html").write_text("mine")
    assert "is not a report" in printed(capsys, "report", "case.svs", "-o", "other.html", code=1)
    assert Path("other.html").read_text() == "mine"


def test_bench_measures_one_process_and_several(capsys: pytest.CaptureFixture[str]) -> None:
    known = json.loads(printed(capsys, "bench", "case.svs", "--seconds", "0.1", "-j", "2", "--json"))
    assert known["patch_size"] == [512, 512, 1]
    assert [speed["processes"] for speed in known["speeds"]] == [1, 2]
    assert all(speed["warm"] > 0 for speed in known["speeds"])


def test_a_prediction_at_some_mpp_in_tissue_only_is_exported(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--mpp", "1", "--overlap", "32", "--tissue", "auto", "-q")
    printed(capsys, *PREDICT, *options)
    found = zp.Cohort("out.zarr")["case"].prediction
    assert (found.spatial_shape, found.spacing[:2], found.spatial_unit) == (
        (450, 350, 1),
        (1.0, 1.0),
        "micrometer",
    )
    pixels = zp.ScalarImage("case.svs", mpp=1.0).data.astype(int)
    wanted = pixels[0] - pixels[2] > 30
    tissue = (
        zp.Subject(s=zp.ScalarImage("case.svs", mpp=1.0), t=zp.tissue_map(zp.ScalarImage("case.svs"))).t.data[
            0
        ]
        > 0
    )
    np.testing.assert_array_equal(found.data[0][tissue], wanted[tissue])
    printed(capsys, "export", "out.zarr", "case.ome.tif", "-q")
    np.testing.assert_array_equal(tifffile.imread("case.ome.tif"), found.data[0, :, :, 0].T)


def test_a_mask_in_a_tiff_file_on_a_coarser_grid_chooses_patches(capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((70, 90), np.uint8)
    mask[:20, :25] = 1
    tifffile.imwrite("mask.tif", mask, resolution=(2000, 2000), resolutionunit="CENTIMETER")  # 5 µm
    printed(capsys, *PREDICT, "--tissue", "mask.tif", "-q")
    assert zp.Cohort("out.zarr")["case"].prediction.statistics["skipped"] == 900 * 700 - 256 * 256


def test_a_damaged_tile_is_counted_with_exit_code_3_and_stops_a_strict_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tifffile.TiffFile("case.svs") as file:
        page: Any = file.series[0].levels[0].pages[0]
        offset, count = page.dataoffsets[4], page.databytecounts[4]
    with open("case.svs", "r+b") as slide:
        slide.seek(offset)
        slide.write(bytes(count))
    assert "the tile in column 4, row 0" in printed(capsys, *PREDICT, "--strict", code=1)
    line = printed(capsys, *PREDICT, "--overwrite", code=3)
    assert line.startswith("warning: damaged tiles were read as 0 for case/prediction (1)")
    assert "the tile in column 4, row 0" in printed(capsys, "info", "out.zarr")


def test_options_of_slides_are_refused_where_there_is_none(
    capsys: pytest.CaptureFixture[str], cohort_source: Path
) -> None:
    zp.convert(cohort_source, "store.zarr", limit=1)
    for option in ("--mpp", "--level", "--slide-mpp"):
        assert f"{option} is for slides" in printed(
            capsys, "predict", "store.zarr", *PREDICT[2:], option, "1", "--image", "t1", code=2
        )
    assert "say one of them" in printed(capsys, *PREDICT, "--mask", "m.tif", "--tissue", "auto", code=2)
    assert "mpp= and level=" not in (line := printed(capsys, *PREDICT, "--mpp", "1", "--level", "1", code=2))
    assert "both choose a level" in line
