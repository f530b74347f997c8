"""Whole slides: two-dimensional images are predicted without conversion, also at a coarser level."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import NotAStoreError, OptionError, PatchSizeError
from zpatch.images.open_subjects import open_subjects

SHAPE = (1000, 1504)  # y, x
PATCH, OVERLAP = (256, 256, 1), (32, 32, 0)
PIXEL_UM = {"y": 0.25, "x": 0.5}
ORIGIN_UM = {"y": 10.0, "x": 20.0}
AXES = ("yxc", "cyx", "yx")
FORMATS = (2, 3)

NETS = """
import torch

def stain():
    # A convolution in the plane, of the mean of all colours.
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv3d(1, 2, (3, 3, 1), padding=(1, 1, 0))
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
    return lambda batch: layer(batch.mean(dim=1, keepdim=True))

def stain_2d():
    # The same in two dimensions, for (B, C, y, x).
    flat = torch.nn.Conv2d(1, 2, 3, padding=1)
    generator = torch.Generator().manual_seed(0)
    weights, flat.bias.data = (torch.rand(shape, generator=generator) - 0.5 for shape in ((2, 1, 3, 3, 1), 2))
    flat.weight.data = weights[..., 0].transpose(2, 3)
    return torch.nn.Sequential(Grey(), flat)

class Grey(torch.nn.Module):
    def forward(self, batch):
        return batch.mean(dim=1, keepdim=True)

def colours():
    return lambda batch: batch

def tissue():
    return lambda batch: torch.stack([batch.mean(dim=1), 128 - batch[:, 0]], dim=1)
"""


def pixels() -> NDArray[np.uint8]:
    """Pixels (y, x, c), coarse enough to compress well."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (SHAPE[0] // 8, SHAPE[1] // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1) + rng.integers(0, 3, (*SHAPE, 1), dtype=np.uint8)


def in_order(image: NDArray[Any], axes: str) -> NDArray[Any]:
    if axes == "yx":
        return image[..., 0]
    return image if axes == "yxc" else image.transpose(2, 0, 1)


def write_array(group: Any, name: str, values: NDArray[Any], axes: str) -> None:
    chunks = tuple(min(n, 128) if a in "yx" else n for a, n in zip(axes, values.shape, strict=True))
    named: Any = {"dimension_names": list(axes)}
    if group.metadata.zarr_format == 2:
        named = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype, **named)[:] = values


def write_slide(path: Path, axes: str, zarr_format: Any) -> Path:
    """An OME-Zarr image of three levels, the origin of each half a coarse pixel further in."""
    group: Any = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    datasets = []
    for level in range(3):
        factor = 2**level
        write_array(group, str(level), in_order(pixels()[::factor, ::factor], axes), axes)
        scale = [PIXEL_UM[a] * factor if a in "yx" else 1.0 for a in axes]
        translation = [ORIGIN_UM[a] + PIXEL_UM[a] * (factor - 1) / 2 if a in "yx" else 0.0 for a in axes]
        transforms = [
            {"type": "scale", "scale": scale},
            {"type": "translation", "translation": translation},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    described = [
        {"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", "unit": "micrometer"}
        for a in axes
    ]
    multiscale = {"name": "slide", "axes": described, "datasets": datasets}
    if zarr_format == 2:
        group.attrs["multiscales"] = [{**multiscale, "version": "0.4"}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]}
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with slides of every order of axes and both formats, and the networks."""
    folder = tmp_path_factory.mktemp("slides")
    for axes in AXES:
        for zarr_format in FORMATS:
            write_slide(folder / f"{axes}-v{zarr_format}.ome.zarr", axes, zarr_format)
    (folder / "nets_of_slides.py").write_text(NETS)
    yield folder
    close_shards(folder)
    shutil.rmtree(folder)


@pytest.fixture
def slide(slides: Path) -> Path:
    return slides / "yxc-v3.ome.zarr"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out.zarr"
    close_shards(tmp_path)
    shutil.rmtree(tmp_path / "out.zarr", ignore_errors=True)


@pytest.fixture(autouse=True)
def there(slides: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the folder of the slides the working folder, and run torch in one thread for the same rounding."""
    monkeypatch.chdir(slides)
    monkeypatch.syspath_prepend(slides)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(name: str) -> Any:
    import nets_of_slides

    return getattr(nets_of_slides, name)()


def dense(name: str, axes: str, level: int = 0) -> NDArray[np.float32]:
    """The output of a network for the whole plane at once, (c, y, x)."""
    image = pixels()[:: 2**level, :: 2**level]
    colours = image[..., :1] if axes == "yx" else image
    batch = torch.from_numpy(colours.astype(np.float32)).permute(2, 1, 0)[None, ..., None]  # B, C, I, J, K
    with torch.inference_mode():
        found: NDArray[np.float32] = network(name)(batch)[0, ..., 0].permute(0, 2, 1).numpy()
    return found


def command(*arguments: Any) -> int:
    """Run the command line in this process, and return its exit code."""
    return zpatch.cli.run([str(argument) for argument in arguments])


def predict(slide: Path, out: Path, *options: Any, model: str = "stain") -> int:
    size = ("--patch-size", "256,256,1", "--overlap", "32,32,0")
    return command("predict", slide, out, "--model", f"nets_of_slides:{model}", *size, *options)


def as_ome_zarr(folder: Path) -> tuple[NDArray[Any], dict[str, float], dict[str, float], dict[str, str]]:
    """An image as read by zarr: (c, y, x), and the scale, translation and unit of each axis."""
    group: Any = zarr.open_group(folder, mode="r")
    [multiscale] = group.attrs["ome"]["multiscales"]
    names = [axis["name"] for axis in multiscale["axes"]]
    transforms = {t["type"]: t[t["type"]] for t in multiscale["datasets"][0]["coordinateTransformations"]}
    voxels = np.asarray(group[multiscale["datasets"][0]["path"]])
    voxels = voxels.reshape(-1, *voxels.shape[-2:])
    scale = dict(zip(names, transforms["scale"], strict=True))
    translation = dict(zip(names, transforms["translation"], strict=True))
    units = {axis["name"]: axis.get("unit", "") for axis in multiscale["axes"]}
    return voxels, scale, translation, units


# The pixels


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("axes", AXES)
def test_a_slide_is_predicted_by_the_command_line_as_the_whole_plane_would_be(
    slides: Path, out: Path, axes: str, zarr_format: int
) -> None:
    slide = slides / f"{axes}-v{zarr_format}.ome.zarr"
    assert predict(slide, out, "--blend", "crop", "-q") == 0
    found = zp.Cohort(out)[0].prediction
    assert found.shape == (2, SHAPE[1], SHAPE[0], 1)
    np.testing.assert_allclose(found.data[..., 0].transpose(0, 2, 1), dense("stain", axes), atol=1e-3)


@pytest.mark.parametrize("blend", ["hann", "gaussian", "average"])
def test_every_blend_of_a_pointwise_network_is_the_dense_result(slide: Path, out: Path, blend: str) -> None:
    assert predict(slide, out, "--blend", blend, "--batch-size", 3, "-q", model="colours") == 0
    voxels, *_ = as_ome_zarr(out / "yxc-v3" / "prediction")
    np.testing.assert_allclose(voxels, dense("colours", "yxc"), atol=1e-3)


def test_a_label_map_of_a_slide_is_the_dense_argmax_also_with_jobs(slide: Path, out: Path) -> None:
    assert predict(slide, out, "--reduce", "argmax", "--jobs", 2, "-q", model="tissue") == 0
    voxels, *_ = as_ome_zarr(out / "yxc-v3" / "prediction")
    assert voxels.dtype == np.uint8
    scores = dense("tissue", "yxc")
    clear = np.abs(scores[0] - scores[1]) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(voxels[0][clear], scores.argmax(axis=0)[clear])


@pytest.mark.parametrize(("level", "model"), [(0, "stain"), (1, "stain"), (2, "colours")])
def test_a_level_of_the_pyramid_is_predicted_even_if_it_is_smaller_than_a_patch(
    slide: Path, out: Path, level: int, model: str
) -> None:
    assert predict(slide / str(level), out, "--blend", "crop", "-q", model=model) == 0
    voxels, *_ = as_ome_zarr(out / f"yxc-v3-{level}" / "prediction")
    assert (min(voxels.shape[1:]) < PATCH[0]) == (level == 2)
    np.testing.assert_allclose(voxels, dense(model, "yxc", level), atol=1e-3)


def test_a_slide_is_predicted_by_a_2d_network(
    slide: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(slide / "2", out, "--blend", "crop", "-q", model="stain_2d") == 1
    assert "; for a 2-D network say --model-axes yx" in capsys.readouterr().err
    assert predict(slide, out, "--blend", "crop", "-q", "--model-axes", "yx", model="stain_2d") == 0
    voxels, *_ = as_ome_zarr(out / "yxc-v3" / "prediction")
    np.testing.assert_allclose(voxels, dense("stain", "yxc"), atol=1e-3)


def test_a_slide_is_predicted_from_python_in_the_same_way(slide: Path, out: Path) -> None:
    subjects = open_subjects(slide)
    assert [subject.name for subject in subjects] == ["yxc-v3"]
    assert subjects[0].image.shape == (3, SHAPE[1], SHAPE[0], 1)
    options: Any = {"image": "image", "patch_size": PATCH, "patch_overlap": OVERLAP}
    zp.predict(network("tissue"), subjects, out, **options)
    assert predict(slide, out.with_name("other.zarr"), "-q", model="tissue") == 0
    for here, other in zip(zp.Cohort(out), zp.Cohort(out.with_name("other.zarr")), strict=True):
        np.testing.assert_array_equal(here.prediction.data, other.prediction.data)


def test_a_slide_opened_by_hand_needs_no_store(slides: Path, out: Path) -> None:
    image = zp.ScalarImage(slides / "cyx-v2.ome.zarr" / "2")
    subject = zp.Subject(name="slide", he=image)
    options: Any = {"image": "he", "patch_size": PATCH, "patch_overlap": OVERLAP}
    found = zp.predict(network("colours"), [subject], out, **options)["slide"].prediction
    np.testing.assert_allclose(found.data[..., 0].transpose(0, 2, 1), dense("colours", "cyx", 2), atol=1e-3)


@pytest.mark.parametrize("axes", ["yxc", "cyx", "yx"])
def test_a_plain_zarr_array_with_named_axes_is_a_slide_too(tmp_path: Path, out: Path, axes: str) -> None:
    group = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    write_array(group, "plain.zarr", in_order(pixels(), axes), axes)
    assert predict(tmp_path / "plain.zarr", out, "--blend", "crop", "-q") == 0
    voxels, scale, translation, _ = as_ome_zarr(out / "plain" / "prediction")
    np.testing.assert_allclose(voxels, dense("stain", axes), atol=1e-3)
    assert (scale["y"], scale["x"], translation["y"], translation["x"]) == (1, 1, 0, 0)


def test_an_array_without_names_of_axes_is_an_error_of_one_line_that_says_how_to_name_them(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    write_array(group, "plain.zarr", pixels(), "yxc")
    assert predict(tmp_path / "plain.zarr", out, model="colours") == 2
    line = capsys.readouterr().err
    assert "the axes of a Zarr array of shape (1000, 1504, 3) are not named" in line
    assert "as in --axes zyx" in line
    assert predict(tmp_path / "plain.zarr", out, "--axes", "yxc", "-q", model="colours") == 0
    voxels, *_ = as_ome_zarr(out / "plain" / "prediction")
    np.testing.assert_allclose(voxels, dense("colours", "yxc"), atol=1e-3)


def test_axes_of_a_store_are_refused(slide: Path, out: Path) -> None:
    assert predict(slide / "2", out, "-q") == 0
    with pytest.raises(OptionError, match="is not a Zarr array; axes= can be given for a Zarr array only"):
        open_subjects(out, axes="zyx")


def test_an_array_with_axes_given_as_an_option_is_a_slide_too(tmp_path: Path, out: Path) -> None:
    group = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    write_array(group, "plain.zarr", pixels(), "yxc")
    subject = zp.Subject(image=zp.ScalarImage(tmp_path / "plain.zarr", axes="yxc"))
    options: Any = {"image": "image", "patch_size": PATCH, "patch_overlap": OVERLAP}
    found = zp.predict(network("colours"), [subject], out, **options)[0].prediction.data
    np.testing.assert_allclose(found[..., 0].transpose(0, 2, 1), dense("colours", "yxc"), atol=1e-3)


# The grid


@pytest.mark.parametrize("level", [None, 0, 1, 2])
@pytest.mark.parametrize("zarr_format", FORMATS)
def test_the_output_is_an_ome_zarr_image_on_the_grid_of_its_level(
    slides: Path, out: Path, level: int | None, zarr_format: int
) -> None:
    slide = slides / f"cyx-v{zarr_format}.ome.zarr"
    assert predict(slide if level is None else slide / str(level), out, "-q", model="tissue") == 0
    factor = 2 ** (level or 0)
    [subject] = zp.Cohort(out)
    voxels, scale, translation, units = as_ome_zarr(out / subject.name / "prediction")
    assert voxels.shape == (2, SHAPE[0] // factor, SHAPE[1] // factor)
    for axis in "yx":
        assert scale[axis] == pytest.approx(PIXEL_UM[axis] * factor)
        assert translation[axis] == pytest.approx(ORIGIN_UM[axis] + PIXEL_UM[axis] * (factor - 1) / 2)
        assert units[axis] == "micrometer"


def test_a_network_that_shrinks_its_patches_gives_the_coarser_grid(slide: Path, out: Path) -> None:
    options: Any = {"image": "image", "patch_size": PATCH, "patch_overlap": OVERLAP, "overlap_mode": "crop"}
    pool = torch.nn.AvgPool3d((4, 4, 1))
    found = zp.predict(pool, open_subjects(slide), out, **options)[0].prediction
    assert found.shape == (3, SHAPE[1] // 4, SHAPE[0] // 4, 1)
    blocks = pixels().reshape(SHAPE[0] // 4, 4, SHAPE[1] // 4, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(found.data[..., 0].transpose(0, 2, 1), blocks.transpose(2, 0, 1), atol=1e-3)
    _, scale, translation, _ = as_ome_zarr(out / "yxc-v3" / "prediction")
    assert (scale["y"], scale["x"]) == (1.0, 2.0)
    assert (translation["y"], translation["x"]) == pytest.approx((10 + 1.5 * 0.25, 20 + 1.5 * 0.5))


# Further use of the output


def test_info_verify_and_export_work_on_the_output(
    slide: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(slide / "1", out, "--reduce", "argmax", "-q", model="tissue") == 0
    capsys.readouterr()
    assert command("info", out) == 0
    assert "752x500x1" in capsys.readouterr().out
    assert command("verify", out, "-q") == 0
    assert command("export", out, tmp_path / "nifti", "-q") == 0
    exported = nib.Nifti1Image.from_filename(tmp_path / "nifti" / "yxc-v3-1" / "prediction.nii.gz")
    found = zp.Cohort(out)[0].prediction
    np.testing.assert_array_equal(np.asarray(exported.dataobj).reshape(752, 500, 1), found.data[0])


def test_a_prediction_of_a_slide_can_be_predicted_from_again(slide: Path, out: Path) -> None:
    assert predict(slide, out, "-q", model="colours") == 0
    second = out.with_name("second.zarr")
    assert predict(out, second, "-q", model="tissue") == 0
    voxels, *_ = as_ome_zarr(second / "yxc-v3" / "prediction")
    np.testing.assert_allclose(voxels, dense("tissue", "yxc"), atol=1e-3)
    shutil.rmtree(second)


def test_a_plan_states_the_cost_of_a_slide_and_writes_nothing(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slide that is large beside what any plan holds; its pixels are not looked at."""
    slide = tmp_path / "large.zarr"
    zarr.create_array(
        slide, shape=(2000, 3000, 3), chunks=(256, 256, 3), dtype=np.uint8, dimension_names=list("yxc")
    )
    size = ("--patch-size", "512,512,1", "--overlap", "64,64,0")
    model = ("--model", "nets_of_slides:tissue")
    assert command("predict", slide, out, *model, *size, "--dry-run", "--json") == 0
    said = capsys.readouterr()
    [plan] = json.loads(said.out)
    assert plan["shape"] == [3000, 2000, 1]
    assert plan["patches"] == math.ceil((3000 - 512) / 448 + 1) * math.ceil((2000 - 512) / 448 + 1)
    assert plan["chunks_in"] == 12 * 8
    assert plan["peak_bytes"] < 2000 * 3000 * (3 + 3 * 4)
    assert "35 patches" in said.err
    assert not out.exists()


def test_the_source_of_a_slide_is_never_written_to(slide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((str(path), path.stat().st_mtime_ns) for path in slide.rglob("*"))
    for output in (slide, slide / "1"):
        for option in ((), ("--overwrite",)):
            predict(slide, output, "-q", *option)
            assert before == sorted((str(path), path.stat().st_mtime_ns) for path in slide.rglob("*"))
    assert capsys.readouterr().err.count("zpatch: error: ") == 4


# Mistakes of a newcomer


@pytest.mark.parametrize("size", ["512", "512,512,2", "1,512,512"])
def test_a_patch_of_several_planes_is_refused_with_a_size_that_fits_a_single_plane(
    slide: Path, out: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    arguments = ("--model", "nets_of_slides:stain", "--patch-size", size)
    assert command("predict", slide, out, *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    right = "1,512,1" if size.startswith("1,") else "512,512,1"
    assert line.startswith("zpatch: error: ")
    assert "one plane" in line
    assert right in line
    assert not out.exists()
    with pytest.raises(PatchSizeError, match="one plane"):
        zp.predict(network("stain"), open_subjects(slide), out, image="image", patch_size=512)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--patch-size", "5,5,1,1"], 2, "'5,5,1,1' is not one integer, or two or three with commas (I,J or"),
        (["--patch-size", "512,512,1", "--overlap", "64"], 2, "--overlap of 64 voxels on axis K is not "),
        (["--patch-size", "512,512,1", "--overlap", "6,6,0,0"], 2, "'6,6,0,0' is not one integer, or two or"),
        (["--patch-size", "512,512,1", "--image", "he"], 1, "no image 'he' in subject 'yxc-v3'"),
        (
            ["--patch-size", "512,512,1", "--include", "sub-*"],
            2,
            "yxc-v3.ome.zarr is one image; --include and",
        ),
        (["--patch-size", "512,512,1", "--mask", "tissue"], 1, "no image 'tissue' in subject 'yxc-v3'"),
        (
            ["--patch-size", "512,512,1", "--mask", "no.nii"],
            2,
            "no.nii is neither an image of yxc-v3 (image) no",
        ),
        (
            ["--patch-size", "512,512,1", "--time", "1"],
            2,
            "--time must be 0 (there are no time points), not 1",
        ),
        (
            ["--patch-size", "512,512,1", "--channel", "0,3"],
            2,
            "--channel must be 0 to 2 (there are 3 channels), not 3",
        ),
    ],
)
def test_options_that_do_not_fit_a_slide_are_errors_of_one_line(
    slide: Path, out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    assert command("predict", slide, out, "--model", "nets_of_slides:tissue", *arguments) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("zpatch: error: " if code == 1 else ("zpatch: error: ", "Error: "))
    assert text in line
    assert not out.exists()


def test_paths_that_are_not_slides_are_errors_of_one_line(
    slide: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("nothing")
    zarr.open_group(tmp_path / "group.zarr", mode="w", zarr_format=3)
    (tmp_path / "torn.zarr").mkdir()
    (tmp_path / "torn.zarr" / "zarr.json").write_text("{")
    places = {
        tmp_path / "nowhere.ome.zarr": "it does not exist",
        tmp_path / "folder": "it is no zpatch store",
        tmp_path / "folder" / "notes.txt": "files of this format are not read",
        tmp_path / "group.zarr": "it is a Zarr group but no OME-Zarr image; name an image or an array in it",
        tmp_path / "torn.zarr": "it is no Zarr array or OME-Zarr image",
        slide / "9": "it does not exist",
    }
    for place, text in places.items():
        assert predict(place, out) == 1, place
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"zpatch: error: {place}: {text}"), line
        with pytest.raises(NotAStoreError):
            open_subjects(place)
    assert not out.exists()


def test_a_slide_resumed_from_another_level_or_network_is_refused(slide: Path, out: Path) -> None:
    assert predict(slide, out, "-q", model="tissue") == 0
    for place, model in ((slide / "1", "tissue"), (slide, "colours")):
        assert predict(place, out, "-q", model=model) == 1
    assert predict(slide, out, "-q", model="tissue") == 0
    with pytest.raises(OptionError, match="include= and exclude= are for a store"):
        open_subjects(slide, include=["a"])
