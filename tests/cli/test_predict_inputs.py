"""Inputs of ``zpatch predict`` that cannot be used: one line each, with what they are and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import zarr

import zpatch as zp
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


def write(path: Path, values: Any, axes: str = "zyx") -> Path:
    chunks = tuple(min(10, n) or 1 for n in values.shape)
    array = zarr.create_array(
        path, shape=values.shape, chunks=chunks, dtype=values.dtype, dimension_names=list(axes)
    )
    array[...] = values
    return path


def command(*arguments: Any, model: str = "same", size: int = 10) -> int:
    model_options = ("--model", f"nets_of_inputs:{model}", "--patch-size", str(size))
    return zpatch.cli.run(["predict", *map(str, arguments), *model_options])


def refusal(
    capsys: pytest.CaptureFixture[str], *arguments: Any, model: str = "same", size: int = 10, code: int = 1
) -> str:
    """The one line that a prediction is refused with; no option of Python is in it."""
    assert command(*arguments, "-q", model=model, size=size) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(("zpatch: error: ", "Error: "))
    assert not any(name in line for name in ("patch_size", "image.map", "memory of", "time=", "channels="))
    return line


@pytest.mark.parametrize(
    ("name", "what", "todo"),
    [
        ("a.nd2", "a slide in a format of its maker", "bioformats2raw FILE FOLDER"),
        ("a.VSI", "a slide in a format of its maker", "bioformats2raw FILE FOLDER"),
        ("a.svs", "no TIFF file (its first bytes are of none)", "copy the file again"),
        ("a.h5", "an HDF5 file", "give the array to zpatch.ScalarImage"),
        ("a.npy", "an array of numpy", "give the array to zpatch.ScalarImage"),
        ("a.nii.gz", "a NIfTI file", "'zpatch convert . STORE', and name STORE"),
        ("a.nii", "not a NIfTI file", "its first bytes are no NIfTI header"),
        ("a.ozx", "a zipped Zarr", "unzip it, and name the folder"),
        ("a.ima", "a DICOM file", "'dcm2niix FOLDER'"),
    ],
)
def test_a_file_that_is_no_zarr_is_said_to_be_what_it_is(
    capsys: pytest.CaptureFixture[str], name: str, what: str, todo: str
) -> None:
    Path(name).write_bytes(b"bytes" * 100)
    line = refusal(capsys, name, "out.zarr")
    assert f"{name}: it is {what}" in line
    assert todo in line
    if ".nii" not in name:
        with pytest.raises(SourceError, match=re.escape(f"it is {what}")):
            ScalarImage(name)


def test_a_file_of_an_unknown_format_is_said_to_be_none_that_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("a.png").write_bytes(b"bytes")
    line = refusal(capsys, "a.png", "out.zarr")
    assert "a.png: files of this format are not read, but stores, OME-Zarr and Zarr; save it as one" in line


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


def predicted(path: str) -> Any:
    """The voxels of the only subject of an output, (C, I, J, K)."""
    [subject] = zp.Cohort(path)
    return subject.prediction.data


FRAMES = np.arange(5 * 3 * 20 * 30 * 40, dtype=np.uint16).reshape(5, 3, *SHAPE)


@pytest.mark.parametrize(
    ("axes", "options", "text"),
    [
        ("tczyx", [], "has 5 time points and 3 channels; say --time N for one of 0 to 4"),
        ("tczyx", ["--time", 5], "--time must be 0 to 4 (there are 5 time points), not 5"),
        (
            "tczyx",
            ["--time", 1, "--channel", "0,3"],
            "--channel must be 0 to 2 (there are 3 channels), not 3",
        ),
        ("tzyx", [], "has 5 time points; say --time N for one of 0 to 4, or --channel to give several"),
        ("????", [], "are '????'; say --axes with one letter for each"),
        ("czyx", ["--channel", "a"], "'a' is not a whole number, or several with commas"),
    ],
)
def test_time_points_and_unknown_axes_are_no_channels_without_a_word(
    capsys: pytest.CaptureFixture[str], axes: str, options: list[Any], text: str
) -> None:
    write(Path("a.zarr"), FRAMES if len(axes) == 5 else FRAMES[:, 0], axes)
    assert text in refusal(capsys, "a.zarr", "out.zarr", *options, code=2)
    assert not Path("out.zarr").exists()
    close_shards(Path())


@pytest.mark.parametrize(
    ("axes", "options", "chosen", "said"),
    [
        ("tczyx", ["--time", 3, "--channel", "2,0"], FRAMES[3, [2, 0]],
         "of 2 channels (time point 3 of 5, channels 2, 0 of 3)"),
        ("tczyx", ["--time", 0], FRAMES[0], "of 3 channels (time point 0 of 5)"),
        ("tzyx", ["--time", 4], FRAMES[4:, 0], "(time point 4 of 5)"),
        ("tzyx", ["--channel", 1, "--channel", 3], FRAMES[[1, 3], 0], "(time points 1, 3 of 5 as channels)"),
        ("czyx", [], FRAMES[:, 0], "voxels of 5 channels in"),
    ],
)  # fmt: skip
def test_a_chosen_time_point_and_channels_are_predicted_and_said(
    capsys: pytest.CaptureFixture[str], axes: str, options: list[Any], chosen: Any, said: str
) -> None:
    write(Path("a.zarr"), FRAMES if len(axes) == 5 else FRAMES[:, 0], axes)
    assert command("a.zarr", "out.zarr", *options, "--dry-run") == 0
    assert said in capsys.readouterr().out
    assert command("a.zarr", "out.zarr", *options) == 0
    np.testing.assert_allclose(predicted("out.zarr"), chosen.transpose(0, 3, 2, 1), rtol=1e-6)
    if "--time" in options:
        other = ["--time", 1, *options[2:]]
        assert "made from other inputs" in refusal(capsys, "a.zarr", "out.zarr", *other)
    close_shards(Path())


def test_time_and_channels_of_a_store_are_chosen_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a.zarr"), np.ones(SHAPE, np.uint8))
    assert command("a.zarr", "store.zarr") == 0
    for flag in ("--time", "--channel", "--axes"):
        line = refusal(capsys, "store.zarr", "out.zarr", flag, 0, code=2)
        assert f"{flag} can be given for a Zarr array only" in line


# Statistics that no store has


@pytest.mark.parametrize("mode", ["zscore", "clip"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_statistics_are_computed_once_before_and_that_is_said(
    capsys: pytest.CaptureFixture[str], mode: str, jobs: int
) -> None:
    values = np.random.default_rng(0).integers(0, 900, SHAPE, dtype=np.uint16)
    write(Path("a.zarr"), values)
    said = (
        "image 'image' of subject 'a' has no statistics stored: they are computed first, reading its 46.9 KiB"
    )
    assert command("a.zarr", "out.zarr", "--normalize", mode, "--dry-run", "-q") == 0
    assert said in capsys.readouterr().out
    assert command("a.zarr", "out.zarr", "--normalize", mode, "--dry-run", "--json") == 0
    assert "\"image 'image' of subject 'a'\"" in capsys.readouterr().out
    assert command("a.zarr", "out.zarr", "--normalize", mode, "--jobs", jobs, "--dry-run") == 0
    planned = capsys.readouterr().err.partition(" patches")[0]
    assert command("a.zarr", "out.zarr", "--normalize", mode, "--jobs", jobs) == 0
    talk = capsys.readouterr().err
    assert talk.count(said) == 1
    assert planned in talk  # as many patches
    low, high = np.percentile(values, [0.5, 99.5])
    zscored = (values - values.mean()) / values.std()
    expected = zscored if mode == "zscore" else (values.clip(low, high) - low) / (high - low)
    np.testing.assert_allclose(predicted("out.zarr")[0], expected.T, rtol=1e-5, atol=1e-5)
    before = {path: path.read_bytes() for path in Path("out.zarr").rglob("*") if path.is_file()}
    assert command("a.zarr", "out.zarr", "--normalize", mode) == 0  # the pass gives the same numbers
    assert {path: path.read_bytes() for path in before} == before
    close_shards(Path())


# A mask in a file


def mask() -> Any:
    inside = np.zeros(SHAPE, np.uint8)
    inside[5:9, 12:18, 22:29] = 1
    return inside


@pytest.mark.parametrize("kind", ["mask.nii", "mask.zarr", "mask.ome.zarr"])
def test_a_mask_may_be_a_file(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    write(Path("a.zarr"), np.ones(SHAPE, np.uint8))
    if kind == "mask.nii":
        nib.save(nib.Nifti1Image(mask().T, np.eye(4)), kind)
    else:
        write(Path(kind), mask())
    assert command("a.zarr", "out.zarr", "--mask", kind, "--fill", 7) == 0
    found = predicted("out.zarr")[0].T
    assert (found[:10, 10:20, 20:30] == 1).all()
    assert (found == 7).sum() == found.size - 1000
    assert command("a.zarr", "out.zarr", "--mask", kind, "--fill", 7) == 0
    write(Path("other.zarr"), np.ones(SHAPE, np.uint8))
    line = refusal(capsys, "a.zarr", "out.zarr", "--mask", "other.zarr", "--fill", 7)
    assert "was made from other inputs, mask or shards" in line
    close_shards(Path())


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("gone.nii", 2, "gone.nii is neither an image of a (image) nor a file"),
        ("tissue", 1, "no image 'tissue' in subject 'a'"),
        ("mask.nii.gz", 2, "mask.nii.gz is compressed, so that boxes cannot be read from it: unpack it with"),
        (
            "small.zarr",
            2,
            "the mask 'mask' of 'a' has the shape (39, 30, 20) (I, J, K), the image (40, 30, 20)",
        ),
        ("frames.zarr", 2, "the mask 'mask' of 'a' has 5 time points; give one of them"),
        ("notes.txt", 1, "notes.txt: images are read from .nii, .nrrd, .nhdr, .mha, .mhd files and from"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(
    capsys: pytest.CaptureFixture[str], name: str, code: int, text: str
) -> None:
    write(Path("a.zarr"), np.ones(SHAPE, np.uint8))
    write(Path("small.zarr"), mask()[:, :, 1:])
    write(Path("frames.zarr"), FRAMES[:, 0], "tzyx")
    Path("mask.nii.gz").write_bytes(b"bytes")
    Path("notes.txt").write_text("none")
    assert text in refusal(capsys, "a.zarr", "out.zarr", "--mask", name, code=code)
    assert not Path("out.zarr").exists()
    close_shards(Path())


def test_a_mask_in_a_file_is_of_one_subject(capsys: pytest.CaptureFixture[str], cohort_store: Path) -> None:
    write(Path("mask.zarr"), mask())
    line = refusal(capsys, cohort_store, "out.zarr", "--image", "t1", "--mask", "mask.zarr", code=2)
    assert (
        "mask.zarr is a file, and there are 4 subjects: name an image that each of them has, or choose"
        in line
    )


# Outputs in or around what is read


def test_an_output_in_the_group_or_store_or_mask_that_is_read_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = zarr.create_group("plate.zarr")
    group.create_group("A/1")
    write(Path("plate.zarr/A/1/0"), np.ones(SHAPE, np.uint8))
    write(Path("mask.zarr"), mask())
    write(Path("a.zarr"), np.ones(SHAPE, np.uint8))
    assert command("a.zarr", "store.zarr") == 0
    before = sorted(Path().rglob("*"))
    image = "plate.zarr/A/1/0"
    for arguments, text in (
        ((image, "plate.zarr/out.zarr"), "plate.zarr/out.zarr: it is inside"),
        ((image, "plate.zarr/A/1/labels"), "plate.zarr/A/1/labels: it is inside"),
        ((image, "plate.zarr/A/1/0/out"), "0/out: it is inside"),
        (("store.zarr", "store.zarr/out"), "store.zarr/out: it is inside"),
        (("store.zarr", "store.zarr"), "store.zarr: it is the store that is read"),
        (("a.zarr", "mask.zarr/out", "--mask", "mask.zarr"), "mask.zarr/out: it is inside"),
        (
            ("store.zarr/a/prediction", "store.zarr", "--overwrite"),
            "store.zarr: it is the store that is read",
        ),
    ):
        line = refusal(capsys, *arguments)
        assert text in line
        assert "choose another output" in line
        assert refusal(capsys, *arguments, "--dry-run") == line
    assert sorted(Path().rglob("*")) == before
    close_shards(Path())


def test_an_output_that_holds_what_is_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a.zarr"), np.ones(SHAPE, np.uint8))
    assert command("a.zarr", "store.zarr") == 0
    inside = Path("store.zarr/extra/mask.nii").absolute()
    inside.parent.mkdir()
    nib.save(nib.Nifti1Image(mask().T, np.eye(4)), inside)
    line = refusal(capsys, "a.zarr", "store.zarr", "--overwrite", "--mask", "store.zarr/extra/mask.nii")
    assert (
        f"store.zarr: it holds {inside.relative_to(Path().absolute())}, which is read; choose another output"
        in line
    )
    Path("link.zarr").symlink_to("store.zarr")
    assert "link.zarr/out: it is inside" in refusal(capsys, "store.zarr", "link.zarr/out")
    close_shards(Path())
