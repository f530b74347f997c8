"""Conversion to another voxel size: the voxels of the lazy image, and what records and exports say."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zarr

import zpatch as zp
from zpatch.chunks.levels import halve
from zpatch.cli import run
from zpatch.conversion import conversion_options
from zpatch.conversion.conversion_plan import ConvertOptions, plan_conversion
from zpatch.errors import OptionError

SHAPE = (37, 42, 53)
AFFINE = np.array([[-0.7, 0, 0, 20], [0, 0, 1.2, -10], [0, 0.9, 0, 4], [0, 0, 0, 1.0]])


def write(folder: Path, name: str, voxels: Any, affine: Any = AFFINE, **scaling: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_slope_inter(scaling.get("slope", 1), scaling.get("inter", 0))
    nib.save(image, folder / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case: scaled integers, floats, a label map, a map of weights and a time series."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("spacing") / "source"
    case = folder / "ann"
    write(case, "ct", rng.integers(-900, 900, SHAPE).astype(np.int16), slope=0.5, inter=-3)
    write(case, "pet", rng.exponential(size=SHAPE).astype(np.float32))
    write(case, "seg", rng.integers(0, 4, SHAPE).astype(np.uint8))
    write(case, "bold", rng.integers(0, 900, (*SHAPE, 3)).astype(np.int16))
    return folder


def values_of(file: Path, kind: type[zp.Image]) -> zp.Image:
    image = nib.load(file)
    voxels = np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    voxels = np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels
    voxels = voxels.astype(np.float32) if voxels.dtype == np.float64 else voxels
    return kind(voxels, affine=image.affine)  # type: ignore[attr-defined]


OPTIONS: list[dict[str, Any]] = [
    {"spacing": 1.0},
    {"spacing": (1.3, None, 0.6), "orient": "RAS"},
    {"spacing": (2.1, 0.5, 1.0), "orient": "PIL", "interpolation": "cubic"},
    {"spacing": 2.5, "antialias": True, "orient": "LPS"},
    {"spacing": (0.7, 0.9, 1.2), "orient": "SAR"},
]


@pytest.mark.parametrize("shard_bytes", [1, 2**25])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_store_holds_the_voxels_of_the_lazy_image(
    options: dict[str, Any], shard_bytes: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_options, "SHARD_BYTES", shard_bytes)
    zp.convert(source, tmp_path / "a.zarr", chunk=16, pyramid=True, **options)
    subject = zp.Cohort(tmp_path / "a.zarr")["ann"]
    how = {name: options[name] for name in ("interpolation", "antialias") if name in options}
    for name, image in subject.images.items():
        kind = zp.LabelMap if name == "seg" else zp.ScalarImage
        native = values_of(source / "ann" / f"{name}.nii.gz", kind)
        turned = native.oriented(options["orient"]) if "orient" in options else native
        lazy = turned.resampled(options["spacing"], **({} if name == "seg" else how))
        assert image.shape == lazy.shape
        assert np.allclose(image.affine, lazy.affine, atol=1e-5)
        assert image.dtype == (np.uint8 if name == "seg" else np.float32)
        if name == "seg":
            assert np.array_equal(image.data, lazy.data)
        else:
            reach = float(np.ptp(native.data))
            assert np.abs(image.data - lazy.data).max() <= 2e-6 * reach
        group = zarr.open_group(tmp_path / "a.zarr" / "ann" / name, mode="r")
        assert image.record is not None
        levels = [np.asarray(group[str(n)][:]) for n in range(len(image.record.levels) + 1)]
        for fine, coarse in itertools.pairwise(v.reshape((1, *v.shape)[-4:]) for v in levels):
            np.testing.assert_array_equal(coarse, halve(fine, majority=name == "seg"))
    assert zp.verify(tmp_path / "a.zarr").ok


def test_the_record_keeps_the_grid_and_the_header_of_the_file(source: Path, tmp_path: Path) -> None:
    zp.convert(source, tmp_path / "a.zarr", spacing=1, orient="RAS")
    image = zp.Cohort(tmp_path / "a.zarr")["ann"].ct
    record = image.record
    assert record is not None
    made = record.resampled
    assert made is not None
    assert (made.spacing, made.shape, made.interpolation, made.antialias) == (
        (1, 1, 1),
        SHAPE,
        "linear",
        False,
    )
    assert np.allclose(made.affine, AFFINE)
    header = nib.Nifti1Header(base64.b64decode(made.header))
    assert tuple(header["dim"][1:4]) == SHAPE
    assert record.stats["mean"] == pytest.approx(
        zp.Cohort(tmp_path / "a.zarr")["ann"].ct.data.mean(), rel=1e-4
    )


def test_exports_are_on_the_grid_of_the_store_and_say_so(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zp.convert(source, tmp_path / "a.zarr", spacing=(1, 1, 2), orient="RAS")
    assert run(["export", str(tmp_path / "a.zarr"), str(tmp_path / "out")]) == 0
    assert "4 of them were resampled" in capsys.readouterr().err
    for name in ("ct", "pet", "seg", "bold"):
        found = nib.load(tmp_path / "out" / "ann" / f"{name}.nii.gz")
        assert b"resampled by zpatch" in found.header["descrip"].tobytes()
        stored = zp.Cohort(tmp_path / "a.zarr")["ann"][name]
        turned = nib.as_closest_canonical(found)
        voxels = np.moveaxis(turned.get_fdata().reshape(*turned.shape[:3], -1), -1, 0)  # type: ignore[attr-defined]
        assert np.array_equal(voxels, stored.data)
        assert np.allclose(turned.affine, stored.affine, atol=1e-5)  # type: ignore[attr-defined]
    again = tmp_path / "again.zarr"  # what was exported is a source as any other
    zp.convert(tmp_path / "out", again)
    assert np.array_equal(
        zp.Cohort(again)["ann"].seg.oriented("RAS").data, zp.Cohort(tmp_path / "a.zarr")["ann"].seg.data
    )


def test_a_colour_image_stays_one(tmp_path: Path) -> None:
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    voxels = np.zeros((20, 18, 16), rgb)
    voxels["R"] = np.arange(20, dtype=np.uint8)[:, None, None] * 10
    (tmp_path / "source" / "ann").mkdir(parents=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "source" / "ann" / "rgb.nii.gz")
    zp.convert(tmp_path / "source", tmp_path / "a.zarr", spacing=2, interpolation="cubic")
    image = zp.Cohort(tmp_path / "a.zarr")["ann"].rgb
    assert (image.shape, image.dtype) == ((3, 10, 9, 8), np.uint8)
    assert image.data[0, 4, 4, 4] == 85
    zp.export(tmp_path / "a.zarr", tmp_path / "out")
    assert nib.load(tmp_path / "out" / "ann" / "rgb.nii.gz").get_data_dtype() == rgb


def test_the_same_command_does_nothing_and_another_spacing_converts_again(
    source: Path, tmp_path: Path
) -> None:
    store = tmp_path / "a.zarr"
    plans = {
        "first": {"spacing": 2},
        "the same": {"spacing": (2, 2, 2)},
        "kept": {"spacing": (2, None, 2)},
        "cubic": {"spacing": 2, "interpolation": "cubic"},
        "none": {},
    }
    zp.convert(source, store, **plans["first"])
    done = zp.Cohort(store).store.manifest
    planned = {
        name: len(plan_conversion(source, ConvertOptions.of(**options), done=done).cases)
        for name, options in plans.items()
    }
    assert planned == {"first": 0, "the same": 0, "kept": 1, "cubic": 1, "none": 1}
    zp.convert(source, store, spacing=3)
    assert zp.Cohort(store)["ann"].ct.spacing == pytest.approx((3, 3, 3))
    assert zp.verify(store).ok


def test_the_command_line_shows_both_grids(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "a.zarr")
    assert run(["convert", str(source), store, "--spacing", "1x1x2.5", "--dry-run"]) == 0
    assert "26x38x25" in capsys.readouterr().out
    assert run(["convert", str(source), store, "--spacing", "1x1x2.5", "--antialias"]) == 0
    assert run(["info", store]) == 0
    printed = capsys.readouterr().out
    assert "resampled to 1 x 1 x 2.5 mm (linear, antialiased) from 37x42x53 of 0.7 x 0.9 x 1.2 mm" in printed
    assert "resampled to 1 x 1 x 2.5 mm (nearest)" in printed
    assert run(["verify", store]) == 0
    assert run(["report", store, "-o", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"spacing": 0}, "spacing must be positive"),
        ({"spacing": (1, float("nan"), 1)}, "spacing must be positive"),
        ({"spacing": (1, 2)}, "one number of mm or three"),
        ({"spacing": 1, "interpolation": "nearest"}, "interpolation must be linear or cubic"),
        ({"antialias": True}, "antialias= is for resampling; say spacing= too"),
        ({"interpolation": "cubic"}, "interpolation= is for resampling; say spacing= too"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, why: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=why):
        zp.convert(source, tmp_path / "a.zarr", **options)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("text", ["0", "1x1", "a", "1x-1x1", "nan", "inf"])
def test_a_spacing_that_is_none_is_refused_by_the_command_line(
    text: str, source: Path, tmp_path: Path
) -> None:
    assert run(["convert", str(source), str(tmp_path / "a.zarr"), "--spacing", text]) == 2


def test_a_file_that_cannot_be_resampled_fails_alone(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    write(folder / "ann", "t1", np.ones((9, 9, 9), np.int16), np.eye(4))
    write(folder / "bob", "t1", np.ones((9, 9, 9), np.complex64), np.eye(4))
    write(folder / "cid", "t1", np.ones((9, 9, 9), np.int16), np.diag([1e-7, 1, 1, 1]))
    report = zp.convert(folder, tmp_path / "a.zarr", spacing=1)
    assert sorted(zp.Cohort(tmp_path / "a.zarr").names) == ["ann", "cid"]
    reasons = {failure.subject: failure.reason for failure in report.failures}
    assert "complex voxels" in reasons["bob"]
