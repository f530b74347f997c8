"""Inputs of ``zpatch predict`` that cannot be used: one line each, with what they are and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import SourceError
from zpatch.images.image import ScalarImage

NETS = """
import torch

def same():
    return lambda batch: batch * 1.0

def halved():
    def run(batch):
        half = torch.nn.functional.max_pool3d(batch, 2)
        return batch + torch.nn.functional.interpolate(half, scale_factor=2)
    return run

def two_channels():
    return torch.nn.Conv3d(2, 1, 3, padding=1)
"""

SHAPE = (20, 30, 40)


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_of_inputs.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def write(path: Path, values: Any) -> Path:
    chunks = tuple(min(10, n) or 1 for n in values.shape)
    array = zarr.create_array(
        path, shape=values.shape, chunks=chunks, dtype=values.dtype, dimension_names=list("zyx")
    )
    array[...] = values
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any, model: str = "same", size: int = 10) -> str:
    """The one line that a prediction is refused with; no option of Python is in it."""
    model_options = ("--model", f"nets_of_inputs:{model}", "--patch-size", str(size), "-q")
    assert zpatch.cli.run(["predict", *map(str, arguments), *model_options]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("zpatch: error: ")
    assert not any(name in line for name in ("patch_size", "image.map", "memory of"))
    return line


@pytest.mark.parametrize(
    ("name", "what", "todo"),
    [
        ("a.svs", "a slide", "bioformats2raw FILE FOLDER"),
        ("a.ome.tif", "a TIFF image", "bioformats2raw FILE FOLDER"),
        ("a.TIFF", "a TIFF image", "bioformats2raw FILE FOLDER"),
        ("a.h5", "an HDF5 file", "give the array to zpatch.ScalarImage"),
        ("a.npy", "an array of numpy", "give the array to zpatch.ScalarImage"),
        ("a.nii.gz", "a NIfTI file", "'zpatch convert . STORE', and name STORE"),
        ("a.nii", "a NIfTI file", "'zpatch convert . STORE', and name STORE"),
        ("a.ozx", "a zipped Zarr", "unzip it, and name the folder"),
    ],
)
def test_a_file_that_is_no_zarr_is_said_to_be_what_it_is(
    capsys: pytest.CaptureFixture[str], name: str, what: str, todo: str
) -> None:
    Path(name).write_bytes(b"bytes" * 100)
    line = refusal(capsys, name, "out.zarr")
    assert f"{name}: it is {what}; " in line
    assert todo in line
    if ".nii" not in name:
        with pytest.raises(SourceError, match=f"it is {what}"):
            ScalarImage(name)


def test_n5_and_a_series_of_images_are_said_to_be_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.n5").mkdir()
    assert "a.n5: it is N5; copy it into a Zarr array" in refusal(capsys, "a.n5", "out.zarr")
    for version, attributes in (
        (2, {"bioformats2raw.layout": 3}),
        (3, {"ome": {"bioformats2raw.layout": 3}}),
    ):
        series: Any = zarr.create_group(f"series{version}", zarr_format=version, attributes=attributes)
        for number in (0, 1, 10, 2, 3):
            series.create_group(str(number))
        line = refusal(capsys, f"series{version}", "out.zarr")
        named = ", ".join(f"series{version}/{number}" for number in range(4))
        assert f"it holds a series of images (bioformats2raw); name one: {named} ... (5 in all)" in line


def test_an_empty_and_a_complex_image_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("empty.zarr"), np.zeros((0, 30, 40), np.uint8))
    line = refusal(capsys, "empty.zarr", "out.zarr")
    assert "image 'image' of subject 'empty' has no voxels: its shape (C, I, J, K) is (1, 40, 30, 0)" in line
    write(Path("complex.zarr"), np.ones(SHAPE, np.complex64))
    line = refusal(capsys, "complex.zarr", "out.zarr")
    assert "image 'image' of subject 'complex' has complex values (complex64)" in line
    assert "save its magnitude" in line
    assert not Path("out.zarr").exists()
    close_shards(Path())


def test_an_output_inside_its_input_is_refused_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(Path("slide.zarr"), np.ones(SHAPE, np.uint8))
    before = sorted(Path("slide.zarr").rglob("*"))
    line = refusal(capsys, "slide.zarr", "slide.zarr/out.zarr")
    assert "slide.zarr/out.zarr: it is inside" in line
    assert "choose another output" in line
    assert sorted(Path("slide.zarr").rglob("*")) == before
    close_shards(Path())


@pytest.mark.parametrize(("model", "size"), [("halved", 11), ("two_channels", 10)])
def test_a_patch_that_the_network_does_not_take_is_said_with_what_it_was_given(
    capsys: pytest.CaptureFixture[str], model: str, size: int
) -> None:
    write(Path("slide.zarr"), np.ones(SHAPE, np.uint8))
    line = refusal(capsys, "slide.zarr", "out.zarr", model=model, size=size)
    assert f"check that it takes 1 channels and patches of ({size}, {size}, {size}) voxels" in line
    assert "many networks need a --patch-size of multiples of 16 or 32" in line
    assert torch.is_inference_mode_enabled() is False
    close_shards(Path())
