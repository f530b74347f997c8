"""A prediction on the scan's own grid: the blended volume of the model's grid, resampled and then reduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

import zpatch as zp
import zpatch.cli
from zpatch.errors import ModelError, OptionError, StoreExistsError
from zpatch.geometry.voxel_grid import VoxelGrid

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[Any]
SHAPE = (37, 52, 29)
OPTIONS: dict[str, Any] = {
    "image": "t1",
    "patch_size": (24, 32, 20),
    "patch_overlap": (8, 4, 6),
    "batch_size": 2,
}


class Net(torch.nn.Module):
    """Four channels that differ from voxel to voxel, and depend on the neighbours."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch[:, :1]
        smooth = torch.nn.functional.avg_pool3d(batch, 3, 1, 1)
        return torch.cat([batch, smooth, torch.sin(3 * batch), batch * smooth], dim=1)


class Heads(Net):
    """A label head that is made of probabilities, a map, and one of half the resolution."""

    def forward(self, batch: torch.Tensor) -> Any:
        found = super().forward(batch)
        return {"seg": found, "dist": found[:, :2], "half": found[:, :2, ::2, ::2, ::2]}


def affine_of(spacing: Any, codes: str = "RAS", tilt: float = 0.0) -> Array:
    """An affine whose axes point to some codes, turned about the first axis by ``tilt``."""
    affine = np.diag([*spacing, 1.0])
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    affine = affine @ nib.orientations.inv_ornt_aff(turn, SHAPE)
    rotation = np.eye(4)
    rotation[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    found = rotation @ affine
    found[:3, 3] += [-31.5, 12.25, 7]
    return np.asarray(found)


def subject_of(rng: np.random.Generator, affine: Array, shape: Any = SHAPE) -> zp.Subject:
    voxels = ndimage.gaussian_filter(rng.normal(size=shape), 1).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[10:14, 20:30, 5:9] = 1
    images = {"t1": zp.ScalarImage(10 * voxels, affine=affine), "mask": zp.LabelMap(mask, affine=affine)}
    return zp.Subject.of(images, name="ann")


def predicted(subject: zp.Subject, out: Path, model: Any = None, **options: Any) -> zp.Subject:
    return zp.predict(model or Net(), [subject], out, device="cpu", **{**OPTIONS, **options})["ann"]


def dense(volume: zp.ScalarImage, grid: VoxelGrid) -> Array:
    """A whole volume on another grid, by scipy, in float64."""
    matrix = np.linalg.solve(volume.affine, grid.affine)
    places = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij")).reshape(3, -1)
    at = matrix[:3, :3] @ places + matrix[:3, 3:]
    return np.stack(
        [
            ndimage.map_coordinates(c.astype(np.float64), at, order=1, mode="nearest").reshape(grid.shape)
            for c in volume.data
        ]
    )


MODES = ["crop", "average", "hann", "gaussian"]
GRIDS = [
    (0.4, "RAS", {"spacing": 1.0}),
    (0.7, "LPS", {"spacing": 1.0, "orientation": "RAS"}),
    (1.0, "PIR", {"orientation": "RAS"}),
    ((0.8, 0.8, 3.0), "RAS", {"spacing": (1.5, 1.0, 1.2)}),
    ((1.2, 0.7, 2.5), "SAL", {"spacing": 1.0, "orientation": "LPS"}),
    (2.5, "ASR", {"spacing": (None, 1, 2), "orientation": "RAS"}),
]


@pytest.mark.parametrize("number", range(len(GRIDS)))
@pytest.mark.parametrize("turn", range(len(MODES)))
def test_scores_are_resampled_onto_the_grid_of_the_scan_and_then_reduced(
    tmp_path: Path, rng: np.random.Generator, full: bool, number: int, turn: int
) -> None:
    if turn and not full:
        pytest.skip("one mode for each grid in the quick run")
    spacing, codes, grid = GRIDS[number]
    affine = affine_of(np.broadcast_to(spacing, 3), codes, tilt=0.3)
    subject = subject_of(rng, affine)
    options = {"overlap_mode": MODES[(number + turn) % len(MODES)], **grid}
    on_model = predicted(subject, tmp_path / "model", output_grid="model", **options).prediction
    scores = predicted(subject, tmp_path / "native", **options).prediction
    classes = predicted(subject, tmp_path / "classes", reduce="argmax", **options).prediction
    want = dense(on_model, subject.t1.grid)
    assert (scores.spatial_shape, classes.spatial_shape) == (SHAPE, SHAPE)
    np.testing.assert_allclose(scores.affine, affine, atol=1e-12)
    np.testing.assert_allclose(scores.data, want, atol=1e-5 * np.ptp(want))
    best = np.sort(want, axis=0)
    is_clear = best[-1] - best[-2] > 1e-4
    assert is_clear.mean() > 0.9
    assert np.array_equal(classes.data[0][is_clear], want.argmax(axis=0)[is_clear])
    assert isinstance(classes, zp.LabelMap)


def test_the_model_sees_the_image_that_is_oriented_and_resampled(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2), "PIR"))
    options: dict[str, Any] = {"spacing": (1, 1.5, 1), "orientation": "RAS", "output_grid": "model"}
    found = predicted(subject, tmp_path / "a", **options).prediction
    placed = subject.oriented("RAS").resampled((1, 1.5, 1))
    want = predicted(placed, tmp_path / "b").prediction
    assert found.data.tobytes() == want.data.tobytes()
    assert np.array_equal(found.affine, want.affine)
    np.testing.assert_allclose(found.spacing, (1, 1.5, 1))


def test_a_scan_that_is_on_the_models_grid_is_predicted_as_without_it(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    subject = subject_of(rng, affine_of((1, 1, 2)))
    found = predicted(subject, tmp_path / "a", spacing=(1, 1, 2), orientation="RAS").prediction
    assert found.data.tobytes() == predicted(subject, tmp_path / "b").prediction.data.tobytes()


def test_every_head_comes_back_to_the_grid_of_the_scan(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2), "PIR"))
    options: dict[str, Any] = {"spacing": 1.2, "orientation": "RAS", "model": Heads()}
    reduce = {"seg": "argmax", "dist": None, "half": None}
    on_model = predicted(subject, tmp_path / "model", output_grid="model", **options)
    found = predicted(subject, tmp_path / "native", reduce=reduce, **options)
    for name in reduce:
        assert found[name].spatial_shape == SHAPE
        want = dense(on_model[name], subject.t1.grid)
        if name == "seg":
            assert (found.seg.data[0] != want.argmax(axis=0)).mean() < 1e-3
        else:
            np.testing.assert_allclose(found[name].data, want, atol=1e-4)


def test_flips_are_averaged_before(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2)))
    options: dict[str, Any] = {"spacing": 1.2, "tta": True}
    on_model = predicted(subject, tmp_path / "model", output_grid="model", **options).prediction
    found = predicted(subject, tmp_path / "native", **options).prediction
    np.testing.assert_allclose(found.data, dense(on_model, subject.t1.grid), atol=1e-4)


def test_integers_are_classes_of_the_nearest_voxel(tmp_path: Path, rng: np.random.Generator) -> None:
    def classes(batch: torch.Tensor) -> torch.Tensor:
        return (batch > 0).to(torch.uint8) * 7

    subject = subject_of(rng, affine_of((0.7, 1.2, 2)))
    found = predicted(subject, tmp_path / "out", classes, overlap_mode="crop", spacing=1.2).prediction
    assert found.dtype == np.uint8
    assert set(np.unique(found.data)) == {0, 7}


def test_voxels_inside_a_mask_are_the_same_as_without_it(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2), "PIR"))
    grid: dict[str, Any] = {"spacing": 1.0, "orientation": "RAS"}
    without = predicted(subject, tmp_path / "without", **grid).prediction
    inside = subject["mask"].data[0] > 0
    found = predicted(subject, tmp_path / "with", mask="mask", fill=-99, **grid).prediction
    assert found.data[:, inside].tobytes() == without.data[:, inside].tobytes()
    empty = (found.data == -99).all(axis=0)
    assert found.statistics["skipped"] == empty.sum() > 0
    on_model = predicted(
        subject, tmp_path / "model", mask="mask", fill=-99, output_grid="model", **grid
    ).prediction
    covered = zp.ScalarImage((on_model.data != -99).all(axis=0).astype(np.float32), affine=on_model.affine)
    weight = dense(covered, subject.t1.grid)[0]
    assert np.array_equal(empty, weight < 1 - 1e-5)


def test_a_mask_that_is_a_function_gets_the_subject_on_the_models_grid(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    subject, seen = subject_of(rng, affine_of((0.7, 1.2, 2), "PIR")), set()

    def is_inside(subject: zp.Subject, location: zp.PatchLocation) -> bool:
        seen.add((subject.t1.spatial_shape, subject["mask"].spatial_shape))
        return bool(subject["mask"].read(location.clipped(subject["mask"].spatial_shape)).any())

    predicted(subject, tmp_path / "out", spacing=1.5, mask=is_inside)
    assert seen == {(subject.t1.resampled(1.5).spatial_shape,) * 2}


def test_an_empty_mask_fills_all(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2)))
    subject = subject.with_images(mask=zp.LabelMap(np.zeros(SHAPE, np.uint8), affine=subject.t1.affine))
    found = predicted(subject, tmp_path / "out", spacing=1.5, mask="mask", fill=3).prediction
    assert (found.data == 3).all()


def test_images_of_other_grids_are_put_on_that_of_one(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2)))
    flair = subject_of(rng, affine_of((1, 1, 1.5), tilt=0.1), (33, 60, 40)).t1
    both = subject.with_images(flair=flair)
    with pytest.raises(OptionError, match=r"differ in shape: \(37, 52, 29\), .*; align= puts them"):
        predicted(both, tmp_path / "no", image=("t1", "flair"))
    options: dict[str, Any] = {"image": ("t1", "flair"), "align": "flair", "spacing": 1.1}
    found = predicted(both, tmp_path / "out", **options).prediction
    assert found.spatial_shape == flair.spatial_shape
    np.testing.assert_allclose(found.affine, flair.affine)
    aligned = both.on_grid_of(flair.resampled(1.1))
    on_model = predicted(
        aligned.with_images(flair=flair.resampled(1.1)), tmp_path / "m", image=("t1", "flair")
    )
    np.testing.assert_allclose(found.data, dense(on_model.prediction, flair.grid), atol=1e-4)


def test_an_image_that_is_not_fed_may_give_the_grid(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2)))
    ref = zp.LabelMap(np.zeros((20, 22, 24), np.uint8), affine=affine_of((1.5, 2, 2)))
    found = predicted(subject.with_images(ref=ref), tmp_path / "out", align="ref").prediction
    assert found.spatial_shape == (20, 22, 24)
    aligned = subject.on_grid_of(ref)
    assert found.data.tobytes() == predicted(aligned, tmp_path / "b").prediction.data.tobytes()


def test_images_that_do_not_overlap_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    far = affine_of((1, 1, 1))
    far[:3, 3] += 1000
    subject = subject_of(rng, affine_of((1, 1, 1))).with_images(ref=subject_of(rng, far).t1)
    with pytest.raises(OptionError, match="do not overlap in space"):
        predicted(subject, tmp_path / "out", align="ref")


def test_an_output_of_another_grid_is_not_resumed(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2)))
    predicted(subject, tmp_path / "out", spacing=1.0)
    predicted(subject, tmp_path / "out", spacing=(1, 1, 1))
    for options in ({"spacing": 1.1}, {}, {"spacing": 1.0, "orientation": "RAS"},
                    {"spacing": 1.0, "output_grid": "model"}):  # fmt: skip
        with pytest.raises(StoreExistsError, match=r"differs in (spacing|orientation|output_grid)"):
            predicted(subject, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"spacing": 0}, "spacing must be positive"),
        ({"spacing": float("nan")}, "spacing must be positive"),
        ({"spacing": (1, 2)}, "spacing must be one number of mm or three"),
        ({"spacing": 1e-9}, r"over 2\*\*31 voxels"),
        ({"orientation": "RAX"}, "three letters"),
        ({"output_grid": "mine"}, "output_grid must be one of native, model"),
        ({"align": "t9"}, "t9"),
    ],
)
def test_a_grid_that_is_none_is_one_line(
    tmp_path: Path, rng: np.random.Generator, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(zp.errors.ZpatchError, match=text) as refused:
        predicted(subject_of(rng, affine_of((1, 1, 1))), tmp_path / "out", **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_complex_outputs_are_not_interpolated(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((1, 1, 2)))
    with pytest.raises(ModelError, match=r"is complex .*; say output_grid='model'"):
        predicted(subject, tmp_path / "out", lambda batch: batch.to(torch.complex64), spacing=1.0)


@pytest.fixture
def store(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A store of one scan, and the file that it was converted from."""
    (tmp_path / "nifti" / "ann").mkdir(parents=True)
    subject = subject_of(rng, affine_of((0.7, 1.2, 2), "PIR", tilt=0.2))
    for name, image in subject.images.items():
        nib.Nifti1Image(image.data[0], image.affine).to_filename(
            tmp_path / "nifti" / "ann" / f"{name}.nii.gz"
        )
    zp.convert(tmp_path / "nifti", tmp_path / "store")
    return tmp_path / "store"


def test_the_command_writes_a_label_map_that_lies_on_the_scan(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(store), str(tmp_path / "out"), "--model", "test_native_grid:Net", "-q"]
    command += ["--image", "t1", "--patch-size", "16", "--overlap", "8", "--reduce", "argmax"]
    command += ["--spacing", "1x1x2", "--orient", "RAS"]
    assert zpatch.cli.run([*command, "--dry-run"]) == 0
    assert "voxels of 1 x 1 x 2 mm (from 37 x 52 x 29 of 1.2 x 2 x 0.7 mm)" in capsys.readouterr().out
    assert zpatch.cli.run([*command, "--dry-run", "--json"]) == 0
    [figures] = json.loads(capsys.readouterr().out)
    assert figures["native_shape"] == list(SHAPE) != figures["shape"]
    assert zpatch.cli.run(command) == 0
    zp.export(tmp_path / "out", tmp_path / "exported")
    scan = nib.Nifti1Image.from_filename(tmp_path / "nifti" / "ann" / "t1.nii.gz")
    found = nib.Nifti1Image.from_filename(tmp_path / "exported" / "ann" / "prediction.nii.gz")
    assert found.shape == scan.shape
    np.testing.assert_allclose(found.affine, scan.affine, atol=1e-5)
    for code in ("qform_code", "sform_code"):
        assert found.header[code] == scan.header[code]
    assert zpatch.cli.run([*command, "--spacing", "2"]) == 1
    assert "differs in spacing: [1.0,1.0,2.0] then, [2.0,2.0,2.0] now" in capsys.readouterr().err


def test_pyramids_are_made_of_what_came_back(tmp_path: Path, rng: np.random.Generator) -> None:
    subject = subject_of(rng, affine_of((0.7, 1.2, 2)), (140, 60, 40))
    found = zp.predict(
        Net(),
        [subject],
        tmp_path / "out",
        device="cpu",
        spacing=1.5,
        pyramid=True,
        reduce="argmax",
        **OPTIONS,
    )
    record = found["ann"].prediction.record
    assert record is not None
    assert record.levels
    assert zp.verify(tmp_path / "out").ok
