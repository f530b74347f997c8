"""Prediction: a network over whole volumes gives what it would give on the volume in memory."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

import zpatch as zp
from zpatch.chunks.scaling import UNSCALED
from zpatch.errors import (
    DamageError,
    ModelError,
    OptionError,
    StoreError,
    StoreExistsError,
    UnknownNameError,
    ZpatchError,
)
from zpatch.networks.model_files import load_model
from zpatch.networks.network import Network
from zpatch.planning.model_inputs import ModelInputs
from zpatch.planning.planning import candidates, plan_prediction
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.probe import probe
from zpatch.prediction.prediction_run import run_prediction
from zpatch.store.voxel_index import read_label_table

MODES = ["crop", "average", "hann", "gaussian"]
JIT_IS_DEPRECATED = "ignore:`torch.jit:DeprecationWarning"


def pointwise(batch: torch.Tensor) -> torch.Tensor:
    """Two channels, each a function of the voxel alone."""
    return torch.stack([batch.sum(dim=1) * 2 + 1, 500 - batch[:, 0]], dim=1)


def of_neighbours(batch: torch.Tensor) -> torch.Tensor:
    """The value of a voxel depends on the patch that it is in."""
    return batch - batch.mean(dim=(1, 2, 3, 4), keepdim=True)


def expected(subject: zp.Subject) -> NDArray[np.float32]:
    """The pointwise network on the whole volume."""
    volume = torch.from_numpy(subject["t1"].data.astype(np.float32))
    return np.asarray(pointwise(volume[None])[0])


def predict(cohort: Any, out: Path, model: Any = pointwise, **options: Any) -> zp.Cohort:
    return zp.predict(model, cohort, out, **{"image": "t1", "patch_size": 24, "patch_overlap": 8, **options})


# The voxels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pointwise_network_gives_what_it_gives_on_the_whole_volume(
    cohort: zp.Cohort, out: Path, mode: str, batch_size: int
) -> None:
    predictions = predict(cohort, out, overlap_mode=mode, batch_size=batch_size)
    assert predictions.names == cohort.names
    for subject in cohort:
        found = predictions[subject.name].prediction
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.data, expected(subject), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_mode", [None, "reflect", "constant"])
def test_a_prediction_is_what_the_aggregator_makes_of_the_grids_patches(
    cohort: zp.Cohort, out: Path, mode: str, padding_mode: str | None
) -> None:
    options: dict[str, Any] = {"patch_overlap": (8, 0, 12), "padding_mode": padding_mode}
    found = predict(cohort[:1], out, of_neighbours, overlap_mode=mode, batch_size=3, **options)
    grid = zp.GridSampler(cohort[0], 24, **options)
    aggregator = zp.PatchAggregator(cohort[0].spatial_shape, mode, grid=grid)
    for batch in zp.SubjectsLoader(grid, 5):
        aggregator.add_batch(of_neighbours(batch.t1.data.float()), batch.patch_location)
    np.testing.assert_allclose(found[0].prediction.data, aggregator.get_output(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("patch_size", [64, (24, 64, 24)])
def test_a_volume_smaller_than_the_patch_is_padded_and_cropped_back(
    cohort: zp.Cohort, out: Path, patch_size: Any
) -> None:
    seen = set()

    def model(batch: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(batch.shape[2:]))
        return pointwise(batch)

    predictions = predict(cohort, out, model, patch_size=patch_size)
    assert seen == {(64, 64, 64) if patch_size == 64 else patch_size}
    for subject in cohort:
        found = predictions[subject.name].prediction
        np.testing.assert_allclose(found.data, expected(subject), rtol=1e-5, atol=1e-2)


def test_the_model_gets_float32_values_with_slope_and_intercept_applied(
    cohort: zp.Cohort, cohort_source: Path, out: Path
) -> None:
    subject = next(subject for subject in cohort if subject["t1"].scaling != UNSCALED)
    found = predict(cohort.select([subject.name]), out, lambda batch: batch)[0].prediction
    wanted = nib.Nifti1Image.from_filename(cohort_source / subject.name / "t1.nii.gz").get_fdata()
    np.testing.assert_allclose(found.data[0], wanted, rtol=1e-5, atol=1e-2)


def test_several_images_are_stacked_as_channels_in_their_order(cohort: zp.Cohort, out: Path) -> None:
    found = predict(cohort[:1], out, lambda batch: batch, image=["seg", "t1"])[0].prediction.data
    seg, t1 = (cohort[0][name].data[0] for name in ("seg", "t1"))
    np.testing.assert_allclose(found, [seg, t1], rtol=1e-6)


def test_a_dict_makes_an_image_for_each_key(cohort: zp.Cohort, out: Path) -> None:
    found = predict(cohort[:2], out, lambda batch: {"once": batch, "twice": batch * 2})
    for subject in found:
        assert list(subject.images) == ["once", "twice"]
        np.testing.assert_allclose(subject["twice"].data, subject["once"].data * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("reduce", "on_dense"),
    [
        ("argmax", lambda v: v.argmax(axis=0)[None]),
        ("sigmoid", lambda v: 1 / (1 + np.exp(-v.astype(np.float64)))),
        (("threshold", 300.0), lambda v: v > 300.0),
    ],
    ids=["argmax", "sigmoid", "threshold"],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_reductions_are_those_of_the_whole_volume(
    cohort: zp.Cohort, out: Path, reduce: Any, on_dense: Any
) -> None:
    found = predict(cohort[:1], out, reduce=reduce, overlap_mode="crop")[0].prediction
    np.testing.assert_allclose(found.data, on_dense(expected(cohort[0])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reduce", "dtype"),
    [(lambda v: v > 300, np.uint8), (torch.Tensor.half, np.float32), (torch.Tensor.bfloat16, np.float32)],
    ids=["bool", "float16", "bfloat16"],
)
def test_a_reduced_output_is_stored_in_a_type_that_nifti_has(
    cohort: zp.Cohort, out: Path, reduce: Any, dtype: Any
) -> None:
    found = predict(cohort[:1], out, reduce=reduce, overlap_mode="crop")[0].prediction
    assert found.dtype == dtype
    wanted = reduce(torch.from_numpy(expected(cohort[0])))
    np.testing.assert_array_equal(found.data, wanted.float().numpy())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int16])
@pytest.mark.parametrize("masked", [False, True])
def test_integers_stay_exact_in_crop_mode(out: Path, dtype: torch.dtype, masked: bool) -> None:
    volume = np.arange(20 * 24 * 28).reshape(20, 24, 28)
    mask = np.zeros(volume.shape, dtype=np.uint8)
    mask[:7, :9, :11] = 1
    subject = zp.Subject(t1=zp.ScalarImage(volume.astype(np.float32)), brain=zp.LabelMap(mask))
    options: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "overlap_mode": "crop"}
    options |= {"mask": "brain", "fill": 30000} if masked else {}
    found = predict([subject], out, lambda batch: batch.to(dtype), **options)[0].prediction
    assert found.dtype == str(dtype).removeprefix("torch.")
    wanted = np.where(found.data[0] == 30000, 30000, volume) if masked else volume
    np.testing.assert_array_equal(found.data[0], wanted)
    np.testing.assert_array_equal(found.data[0][mask > 0], volume[mask > 0])


# Networks that change the resolution


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "patch_size", "factor"),
    [((3, 40, 40), 16, 2), ((5, 40, 40), 16, 2), ((6, 64, 64), 32, 4), ((2, 50, 50), 16, 16)],
)
def test_a_smaller_output_of_a_volume_smaller_than_the_patch_is_where_its_affine_says(
    out: Path, shape: tuple[int, int, int], patch_size: int, factor: int, mode: str
) -> None:
    axes = [np.arange(n, dtype=np.float32) for n in shape]
    ramps = np.stack(np.meshgrid(*axes, indexing="ij"))
    subject = zp.Subject(t1=zp.ScalarImage(ramps))
    options: dict[str, Any] = {"patch_size": patch_size, "patch_overlap": 0, "overlap_mode": mode}
    shrink = torch.nn.AvgPool3d(factor)
    found = predict([subject], out, shrink, **options)[0].prediction
    assert found.spatial_shape == tuple(max(1, int(n / factor + 0.5)) for n in shape)
    voxels = np.stack(np.meshgrid(*map(np.arange, found.spatial_shape), indexing="ij"), axis=-1)
    centres = voxels @ found.affine[:3, :3].T + found.affine[:3, 3]
    np.testing.assert_allclose(found.data, np.moveaxis(centres, -1, 0), atol=factor / 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 20, 21), (5, 9, 40), (15, 16, 17)])
@pytest.mark.parametrize("padding_mode", [None, "edge"])
def test_a_larger_output_is_that_of_the_whole_volume(
    out: Path, shape: tuple[int, int, int], mode: str, padding_mode: str | None, rng: np.random.Generator
) -> None:
    volume = rng.uniform(1, 2, shape).astype(np.float32)
    options: dict[str, Any] = {"patch_size": 16, "patch_overlap": 8, "overlap_mode": mode}
    found = predict(
        [zp.Subject(t1=zp.ScalarImage(volume))],
        out,
        torch.nn.Upsample(scale_factor=2),
        padding_mode=padding_mode,
        **options,
    )
    wanted = volume.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(found[0].prediction.data[0], wanted, rtol=1e-6)


# Running


def test_a_network_is_run_in_evaluation_mode_and_its_modes_are_restored(cohort: zp.Cohort, out: Path) -> None:
    class Net(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return batch

    network = Net()
    network.frozen = torch.nn.Identity().eval()
    predict(cohort[:1], out, network)
    assert network.training
    assert not network.frozen.training


def test_one_subject_where_several_are_wanted_is_refused(cohort: zp.Cohort, out: Path) -> None:
    with pytest.raises(OptionError, match="is one subject; give a list of it"):
        predict(cohort[0], out)  # type: ignore[arg-type]


def test_progress_counts_every_patch(cohort: zp.Cohort, out: Path) -> None:
    done: list[int] = []
    predict(cohort, out, batch_size=3, progress=done.append)
    assert sum(done) == sum(len(zp.GridSampler(subject, 24, 8)) for subject in cohort)


# The store


def test_a_prediction_is_a_store_that_verifies_and_that_zarr_opens(cohort: zp.Cohort, out: Path) -> None:
    predictions = predict(cohort, out, reduce="argmax")
    report = zp.verify(out)
    assert report.ok
    assert report.leftovers == ()
    for subject in predictions:
        stored = np.asarray(zarr.open_group(out, mode="r")[f"{subject.name}/prediction/0"])
        np.testing.assert_array_equal(stored, subject.prediction.data[0].T)


def test_affines_are_those_of_the_input_oblique_ones_too(cohort: zp.Cohort, out: Path) -> None:
    predictions = predict(cohort, out)
    oblique = [np.count_nonzero(np.abs(subject["t1"].affine[:3, :3]) > 1e-3) > 3 for subject in cohort]
    assert any(oblique)
    for subject in cohort:
        np.testing.assert_array_equal(predictions[subject.name].prediction.affine, subject["t1"].affine)


def test_an_exported_prediction_has_the_affine_and_the_shape_of_the_input(
    cohort: zp.Cohort, cohort_source: Path, out: Path, tmp_path: Path
) -> None:
    predictions = predict(cohort, out, reduce="argmax")
    zp.export(out, tmp_path / "nifti")
    for name in cohort.names:
        source = nib.Nifti1Image.from_filename(cohort_source / name / "t1.nii.gz")
        written = nib.Nifti1Image.from_filename(tmp_path / "nifti" / name / "prediction.nii.gz")
        assert written.shape == source.shape
        np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(written.dataobj), predictions[name].prediction.data[0])


def test_a_predicted_label_map_has_an_index_and_feeds_a_label_sampler(cohort: zp.Cohort, out: Path) -> None:
    subject = predict(cohort[:1], out, reduce="argmax")[0]
    image = subject.prediction
    assert isinstance(image, zp.LabelMap)
    assert image.folder is not None
    table = read_label_table(image.folder, image.record.files)
    assert table is not None
    assert set(table.values.tolist()) >= set(np.unique(image.data).tolist()) - {0}
    for patch in zp.LabelSampler(9, "prediction", {1: 1})(subject, 20, rng=0):
        assert patch.prediction.data[0, 4, 4, 4] == 1


def test_subjects_of_arrays_are_predicted_in_their_own_space(out: Path, rng: np.random.Generator) -> None:
    volume = rng.normal(size=(20, 21, 22)).astype(np.float32)
    affine = [[0, -2, 0, 5], [1, 0, 0.5, 6], [0, 0, 3, 7], [0, 0, 0, 1]]
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(volume, affine=affine))
    found = predict([subject], out, lambda batch: batch, patch_size=16)["ann"].prediction
    np.testing.assert_allclose(found.data[0], volume, atol=1e-5)
    np.testing.assert_array_equal(found.affine, affine)


def test_two_subjects_of_one_name_are_refused_before_anything_runs(out: Path) -> None:
    twins = [zp.Subject(name="ann", t1=zp.ScalarImage(np.zeros((8, 8, 8)))) for _ in range(2)]

    def model(batch: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model ran")

    with pytest.raises(ZpatchError, match="'ann'"):
        predict(twins, out, model, patch_size=8, patch_overlap=0)
    assert not out.exists()


def test_subjects_whose_names_differ_in_case_only_are_refused_before_anything_runs(out: Path) -> None:
    twins = [zp.Subject(name=name, t1=zp.ScalarImage(np.zeros((8, 8, 8)))) for name in ("Ann", "ann")]

    def model(batch: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model ran")

    with pytest.raises(OptionError, match="subject names 'Ann' and 'ann' differ in case only; rename one"):
        predict(twins, out, model, patch_size=8, patch_overlap=0)
    assert not out.exists()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("Seg", "seg"), "subject 'sub-01': output names 'Seg' and 'seg' differ in case only; rename one"),
        (("seg", "a/b"), "subject 'sub-01': output name 'a/b' is not usable"),
    ],
)
def test_outputs_whose_names_no_store_can_hold_are_refused_before_anything_is_written(
    cohort: zp.Cohort, out: Path, names: tuple[str, str], text: str
) -> None:
    with pytest.raises(ModelError, match=text):
        predict(cohort, out, lambda batch: dict.fromkeys(names, batch))
    assert not out.exists()


@pytest.mark.parametrize(
    ("fill", "reduce"),
    [(-1, "argmax"), (0.5, "argmax"), (300, "argmax"), (math.nan, ("threshold", 1.0)), (1e39, None)],
)
def test_a_fill_that_the_output_cannot_hold_is_refused_before_anything_is_written(
    cohort: zp.Cohort, out: Path, fill: float, reduce: Any
) -> None:
    with pytest.raises(OptionError, match=rf"fill={re.escape(str(fill))} does not fit the output"):
        predict(cohort, out, fill=fill, reduce=reduce, mask="seg")
    assert not out.exists()


def test_a_fill_of_nan_fits_fractions(cohort: zp.Cohort) -> None:
    options = PredictOptions.of(image="t1", patch_size=24, mask="seg", fill=math.nan, device="cpu")
    assert plan_prediction(Network.of(pointwise, options), cohort[:1], options)


def test_a_resumed_prediction_is_planned_in_the_shards_it_was_begun_with(cohort: zp.Cohort) -> None:
    options = PredictOptions.of(image="t1", patch_size=24, device="cpu", tta=True)
    network = Network.of(lambda batch: {"once": batch, "twice": batch}, options)
    plans = plan_prediction(network, cohort[:2], options)
    assert all(plan.tta for plan in plans)
    first, _ = cohort.names[:2]
    begun = {first: {head.head.name: head.record.chunks for head in plans[0].heads}}
    again = plan_prediction(network, cohort[:2], options, begun=begun)
    assert [head.record.shards for head in again[0].heads] == [h.record.chunks for h in plans[0].heads]
    assert [head.record.shards for head in again[1].heads] == [h.record.shards for h in plans[1].heads]


def test_an_output_that_exists_is_refused_and_replaced_where_that_is_wanted(
    cohort: zp.Cohort, out: Path
) -> None:
    predict(cohort[:1], out)
    with pytest.raises(StoreExistsError, match=r"out.zarr: it exists already; say overwrite=True"):
        predict(cohort[:1], out, resume=False)
    with pytest.raises(StoreExistsError, match=r"out.zarr: .* differs in subjects: .*; say overwrite=True"):
        predict(cohort[1:2], out)
    again = predict(cohort[1:2], out, lambda batch: {"other": batch}, overwrite=True)
    assert (again.names, list(again[0].images)) == (["sub-02"], ["other"])
    assert zp.verify(out).ok


@pytest.mark.parametrize("way", ["out.zarr", "folder/../out.zarr", "link.zarr"])
def test_the_store_that_is_read_is_never_overwritten(cohort_store: Path, out: Path, way: str) -> None:
    shutil.copytree(cohort_store, out)
    (out.parent / "folder").mkdir()
    (out.parent / "link.zarr").symlink_to(out)
    with pytest.raises(StoreError, match=way):
        predict(zp.Cohort(out), out.parent / way, overwrite=True)
    assert zp.verify(out).ok
    assert len(zp.Cohort(out)) == 4


# Failures


def test_a_model_that_fails_names_subject_and_location_and_its_output_can_be_resumed(
    cohort: zp.Cohort, out: Path
) -> None:
    patches = sum(len(zp.GridSampler(subject, 24, 8)) for subject in cohort[:2])
    calls = itertools.count(-1)  # one more, to see what the model gives

    class Model:
        def __call__(self, batch: torch.Tensor) -> torch.Tensor:
            if next(calls) == patches + 2:
                raise ArithmeticError("too hard")
            return batch

    with pytest.raises(ModelError) as error:
        predict(cohort, out, Model(), keep_going=False)
    text = str(error.value)
    assert "the model failed on subject 'sub-03', patches at (0, " in text
    assert "given (1, 1, 24, 24, 24): ArithmeticError: too hard" in text
    report = zp.verify(out)
    assert not report.ok
    assert (report.damages, report.leftovers) == ((), (".unfinished",))
    assert report.missing_subjects == ("sub-03", "sub-04")
    assert zp.Cohort(out).names == ["sub-01", "sub-02"]
    assert predict(cohort, out, Model()).names == cohort.names
    assert next(calls) <= 2 + sum(len(zp.GridSampler(subject, 24, 8)) for subject in cohort) + 2
    assert zp.verify(out).ok
    assert not (out / ".unfinished").exists()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda batch: batch[:, :, 1:], r"made \(23, 24, 24\) of a patch of \(24, 24, 24\); it must keep"),
        (lambda batch: batch[:, 0], r"must give a tensor \(B, C, x, y, z\) .*, not \(1, 24, 24, 24\)"),
        (lambda batch: [batch], r"must give a tensor \(B, C, x, y, z\) .*, not list"),
        (lambda batch: torch.cat([batch, batch]), r"not \(2, 1, 24, 24, 24\) for one patch"),
    ],
    ids=["shape", "dimensions", "type", "length"],
)
def test_an_output_that_cannot_be_placed_names_subject_and_fault(
    cohort: zp.Cohort, out: Path, model: Any, text: str
) -> None:
    with pytest.raises(ModelError, match=text) as error:
        predict(cohort, out, model)
    assert not out.exists()
    assert "'sub-01'" in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"image": "t9"}, UnknownNameError, r"no image 't9' in subject 'sub-01'; did you mean 't1'"),
        ({"image": []}, OptionError, "image"),
        ({"patch_overlap": 7}, ZpatchError, "must be even and at least 0, not 7 on axis I"),
        ({"patch_overlap": 24}, ZpatchError, "not smaller than the patch .24.; use at most 22"),
        ({"overlap_mode": "mean"}, OptionError, "overlap_mode must be one of"),
        ({"reduce": "argmin"}, OptionError, "reduce must be"),
        ({"padding_mode": "mirror"}, OptionError, "padding_mode must be .*'mirror'"),
        ({"batch_size": 0}, OptionError, "batch_size must be at least 1, not 0"),
        ({"device": "gpu"}, OptionError, "device .*'gpu'"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_written(
    cohort: zp.Cohort, out: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        predict(cohort, out, **options)
    assert not out.exists()


def test_images_of_different_shapes_cannot_be_stacked(out: Path) -> None:
    shapes = [(8, 8, 8), (8, 8, 9)]
    images = {name: zp.ScalarImage(np.zeros(n)) for name, n in zip(("a", "b"), shapes, strict=True)}
    with pytest.raises(OptionError, match="images a, b of 'subject' differ in shape"):
        predict([zp.Subject(**images)], out, image=["a", "b"])


def test_a_prediction_of_no_subject_is_refused(cohort: zp.Cohort, out: Path) -> None:
    with pytest.raises(OptionError, match="no subject to predict"):
        predict(cohort[:0], out)


# Models


class Doubling(torch.nn.Module):
    """A network that can be scripted and exported."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * 2


def check_doubles(model: Any, cohort: zp.Cohort, out: Path) -> None:
    found = predict(cohort[:1], out, model)[0].prediction
    np.testing.assert_allclose(found.data, cohort[0]["t1"].data * 2.0, rtol=1e-6)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working folder; ``sys.path`` is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_factory_is_found_from_the_working_folder(cohort: zp.Cohort, out: Path, here: Path) -> None:
    (here / "nets_of_inference.py").write_text("def doubling():\n    return lambda batch: batch * 2\n")
    check_doubles(load_model("nets_of_inference:doubling"), cohort, out)


@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_a_torchscript_file_is_loaded(cohort: zp.Cohort, out: Path, tmp_path: Path) -> None:
    torch.jit.script(Doubling()).save(tmp_path / "net.pt")
    check_doubles(load_model(str(tmp_path / "net.pt")), cohort, out)


def test_an_exported_program_is_loaded(cohort: zp.Cohort, out: Path, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Doubling(), (torch.zeros(1, 1, 24, 24, 24),)), tmp_path / "net.pt2")
    check_doubles(load_model(str(tmp_path / "net.pt2")), cohort, out)


@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("nosuch.pt", "model 'nosuch.pt' is no file; name one, or a factory as package.module:factory"),
        ("nosuch_module:net", "cannot be loaded: ModuleNotFoundError: No module named 'nosuch_module'"),
        ("math:nosuch", "cannot be loaded: AttributeError: .*'nosuch'"),
        ("os:getcwd", "model 'os:getcwd' gave str, which cannot be called"),
        (":", "model ':' cannot be loaded"),
        ("garbage.pt", "model 'garbage.pt' cannot be loaded"),
        ("garbage.pt2", "model 'garbage.pt2' cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_clear_line(spec: str, text: str, here: Path) -> None:
    for name in ("garbage.pt", "garbage.pt2"):
        (here / name).write_bytes(b"this is no network")
    with pytest.raises(ModelError, match=text) as error:
        load_model(spec)
    assert "\n" not in str(error.value)


# Several outputs


def two_heads(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"seg": pointwise(batch), "dist": batch[:, :1] * 2}


def test_each_output_has_its_own_reduction(cohort: zp.Cohort, out: Path) -> None:
    reduce = {"dist": None, "seg": "argmax"}
    found = predict(cohort[:1], out, two_heads, reduce=reduce, overlap_mode="crop")[0]
    assert (found["seg"].kind, found["dist"].kind) == ("label", "scalar")
    np.testing.assert_array_equal(found["seg"].data, expected(cohort[0]).argmax(axis=0)[None])
    np.testing.assert_allclose(found["dist"].data, cohort[0]["t1"].data * 2, rtol=1e-5)
    again = predict(
        cohort[:1], out, two_heads, reduce=dict(sorted(reduce.items())[::-1]), overlap_mode="crop"
    )
    assert again.names == ["sub-01"]
    with pytest.raises(StoreExistsError, match="differs in reduce: "):
        predict(cohort[:1], out, two_heads, reduce={**reduce, "dist": "sigmoid"}, overlap_mode="crop")


@pytest.mark.parametrize(
    ("reduce", "text"),
    [
        ({"sge": "argmax", "dist": None},
         r"^reduce: no output 'sge' in the network; did you mean 'seg'\? \(it has: seg, dist\)$"),
        ({"seg": "argmax"}, r"^reduce says nothing of the output 'dist'; add it, as none to keep its values "
         r"\(the network's outputs are seg, dist\)$"),
        ({"seg": "argmin", "dist": None}, "^reduce must be 'argmax', "),
        ("argmax", "^reduce='argmax' would give class 0 everywhere, as the output 'dist' has one channel; "),
        ({"seg": None, "dist": "softmax"}, "^reduce='softmax' would give 1 everywhere, as the "),
    ],
)  # fmt: skip
def test_reductions_that_do_not_fit_the_outputs_are_refused_before_anything_is_written(
    cohort: zp.Cohort, out: Path, reduce: Any, text: str
) -> None:
    with pytest.raises(OptionError, match=text) as error:
        predict(cohort, out, two_heads, reduce=reduce)
    assert error.value.option == "reduce"
    assert not out.exists()


# Outputs that are not finite


class WithGaps(torch.nn.Module):
    """Scores that are NaN where the input is bright, and infinite where it is brightest."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        scores = pointwise(batch)
        scores[:, 1][batch[:, 0] > 600] = math.nan
        scores[:, 0][batch[:, 0] > 800] = math.inf
        return scores


def gaps(subject: zp.Subject) -> NDArray[np.bool_]:
    """The voxels (I, J, K) for which the scores are not finite."""
    bright: NDArray[np.bool_] = subject["t1"].data[0] > 600
    return bright


GAPS_ARE_COUNTED = pytest.mark.filterwarnings("ignore:the network gave NaN or infinite values")


@pytest.mark.parametrize("run", [{}, {"jobs": 2}, {"batch_size": 3, "reduce": None}])
@GAPS_ARE_COUNTED
def test_voxels_that_are_not_finite_are_counted_before_they_are_reduced(
    cohort: zp.Cohort, out: Path, run: dict[str, Any]
) -> None:
    options = {"overlap_mode": "crop", "reduce": "argmax", **run}
    for subject, found in zip(cohort, predict(cohort, out, WithGaps(), **options), strict=True):
        record, count = found.prediction.record, int(gaps(subject).sum())
        assert record is not None
        assert count > 0
        assert record.stats["not_finite"] == count
        assert record.warnings == (f"the network gave NaN or infinite values in {count} voxels",)


@GAPS_ARE_COUNTED
def test_voxels_that_are_not_finite_are_counted_only_where_patches_are_run(
    cohort: zp.Cohort, out: Path
) -> None:
    found = predict(cohort[:1], out, WithGaps(), mask="seg", fill=-1, patch_size=12, patch_overlap=4)[0]
    data, stats = found.prediction.data, found.prediction.statistics
    assert 0 < stats["not_finite"] == (~np.isfinite(data)).any(axis=0).sum()
    assert 0 < stats["skipped"] == (data == -1).all(axis=0).sum()


@pytest.mark.usefixtures("small_chunks")
@GAPS_ARE_COUNTED
def test_they_are_counted_once_in_bands_and_in_a_prediction_that_is_resumed(
    cohort: zp.Cohort, out: Path
) -> None:
    subject, options = cohort[:1], PredictOptions.of(image="t1", patch_size=24, patch_overlap=8, device="cpu")
    count = predict(subject, out.with_name("whole.zarr"), WithGaps())[0].prediction.statistics["not_finite"]
    assert count >= gaps(subject[0]).sum()
    network = Network.of(WithGaps(), options)
    heads = probe(network, ModelInputs.of(subject[0], options), options)
    [plan] = [
        p
        for p in candidates(ModelInputs.of(subject[0], options), heads, options, slabs=3)
        if len(p.regions) == 3
    ][:1]
    assert plan.patches_run > plan.patches
    found = run_prediction(network, [plan], out.with_name("bands.zarr"), options)
    assert found[0].prediction.statistics["not_finite"] == count

    model, patches = WithGaps(), itertools.count(1)

    def stop(module: Any, batches: Any) -> None:
        if next(patches) == 20:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        predict(subject, out, model)
    assert list(out.glob(".unfinished/sub-01/*/.ledger/prediction/*.json"))
    hook.remove()
    with pytest.raises(
        ModelError, match=r"in an earlier run; leave out strict=True|the output 'prediction' is NaN"
    ):
        predict(subject, out, model, strict=True)
    assert predict(subject, out, model)[0].prediction.statistics["not_finite"] == count


def test_a_warning_at_the_end_says_where_they_are_also_when_all_was_done_before(
    cohort: zp.Cohort, out: Path
) -> None:
    counts = {subject.name: int(gaps(subject).sum()) for subject in cohort[:2]}
    named = ", ".join(f"{n}/prediction ({counts[n]})" for n in sorted(counts, key=lambda n: -counts[n]))
    text = f"the network gave NaN or infinite values in {sum(counts.values())} voxels: {named}; strict=True "
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"^{re.escape(text)}stops at the first$"):
            predict(cohort[:2], out, WithGaps(), overlap_mode="crop")


@pytest.mark.parametrize("jobs", [1, 2])
def test_strict_stops_at_the_first_patch_and_names_it(cohort: zp.Cohort, out: Path, jobs: int) -> None:
    text = (
        r"^subject 'sub-01': the output 'prediction' is NaN or infinite in \d+ voxels of the patch at "
        r"\((\d+), (\d+), (\d+)\), its input in 0; without strict=True they are counted, "
        r"and reported at the end$"
    )
    with pytest.raises(ModelError, match=text) as error:
        predict(cohort[:1], out, WithGaps(), strict=True, jobs=jobs, batch_size=2)
    found = re.search(text, str(error.value))
    assert found is not None
    i, j, k = map(int, found.groups())
    assert gaps(cohort[0])[i : i + 24, j : j + 24, k : k + 24].any()


def test_strict_says_whether_the_input_was_not_finite(out: Path) -> None:
    volume = np.zeros((30, 20, 20), np.float32)
    volume[25, 3, 3] = np.nan
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(volume))
    with pytest.raises(ModelError, match=r"in 1 voxels of the patch at \(14, 0, 0\), its input in 1; "):
        predict([subject], out, lambda batch: batch, strict=True, patch_size=16)


def test_strict_changes_nothing_of_finite_outputs_and_refuses_what_an_earlier_run_let_pass(
    cohort: zp.Cohort, out: Path
) -> None:
    predict(cohort[:1], out)
    before = out.joinpath("manifest.jsonl").read_bytes()
    predict(cohort[:1], out, strict=True)
    assert out.joinpath("manifest.jsonl").read_bytes() == before
    gappy = out.with_name("gappy.zarr")
    with pytest.warns(UserWarning, match="the network gave NaN"):
        predict(cohort[:1], gappy, WithGaps())
    text = "^the network gave NaN or infinite values in .*, in an earlier run; leave out strict=True, or say "
    with pytest.raises(ModelError, match=text):
        predict(cohort[:1], gappy, WithGaps(), strict=True)


# Statistics that no store has


@pytest.mark.parametrize("mode", ["zscore", "clip"])
def test_images_without_statistics_are_normalised_by_one_pass_over_their_voxels(
    out: Path, rng: np.random.Generator, mode: str
) -> None:
    volume = rng.integers(0, 3000, (30, 28, 26), dtype=np.int16)
    other = zp.ScalarImage(volume * 2)
    subject = zp.Subject(t1=zp.ScalarImage(volume), t2=other)
    found = predict([subject], out, lambda batch: batch, image=["t1", "t2"], normalize=mode)
    low, high = np.percentile(volume, [0.5, 99.5])
    zscored = (volume - volume.mean()) / volume.std()
    expected = zscored if mode == "zscore" else (volume.clip(low, high) - low) / (high - low)
    np.testing.assert_allclose(found[0].prediction.data, [expected] * 2, rtol=1e-5, atol=1e-5)


def test_statistics_of_a_store_are_used_as_they_are(
    cohort: zp.Cohort, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(image: zp.Image, progress: Any = None) -> Any:
        raise AssertionError("a pass that is not needed")

    monkeypatch.setattr("zpatch.planning.model_inputs.computed_statistics", refuse)
    assert predict(cohort[:1], out, normalize="zscore").names == cohort[:1].names


def test_an_input_that_changes_after_its_statistics_were_computed_is_damage(
    tmp_path: Path, out: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(rng.integers(0, 9, (26, 26, 26), dtype=np.int16), np.eye(4)), path)
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(path))
    options = PredictOptions.of(image="t1", patch_size=24, patch_overlap=8, normalize="zscore")
    network = Network.of(pointwise, options)
    plans = plan_prediction(network, [subject], options)
    os.utime(path, (1, 1))
    with pytest.raises(DamageError, match=r"of subject 'ann': .* is not the file that was opened"):
        run_prediction(network, plans, out, options)


def test_a_subject_whose_statistics_cannot_be_computed_fails_alone(
    tmp_path: Path, out: Path, rng: np.random.Generator
) -> None:
    subjects = []
    for name in ("ann", "bob"):
        array = zarr.create_array(
            tmp_path / name, shape=(26, 26, 26), chunks=(13, 13, 13), dtype="i2", dimension_names="zyx"
        )
        array[...] = rng.integers(0, 9, array.shape)
        subjects.append(zp.Subject(name=name, t1=zp.ScalarImage(tmp_path / name)))
    (tmp_path / "ann" / "c/1/1/1").write_bytes(b"no chunk")
    with pytest.raises(DamageError, match="ann"):
        predict(subjects, out, normalize="zscore")
    assert zp.Cohort(out).names == ["bob"]


# Time points


def test_time_points_of_files_are_no_channels_without_a_word(tmp_path: Path, out: Path) -> None:
    frames = np.stack([np.full((26, 26, 26), n, np.int16) for n in range(3)], axis=3)
    file = nib.Nifti1Image(frames, np.eye(4))
    file.header.set_xyzt_units("mm", "sec")
    nib.save(file, tmp_path / "bold.nii")
    image = zp.ScalarImage(tmp_path / "bold.nii")
    with pytest.raises(OptionError, match=r"has 3 time points; say time=N for one of 0 to 2, or channels= t"):
        predict([zp.Subject(t1=image)], out)
    found = predict([zp.Subject(t1=image.select(time=2))], out, lambda b: b)[0].prediction.data
    np.testing.assert_allclose(found, np.full((1, 26, 26, 26), 2), rtol=1e-6)
    frames_as_channels = zp.Subject(t1=image.select(channels=[2, 1]))
    found = predict([frames_as_channels], out, lambda b: b, overwrite=True)[0].prediction.data
    np.testing.assert_allclose(found[:, 0, 0, 0], [2, 1], rtol=1e-6)


def test_time_points_of_a_store_are_channels_and_that_is_said(tmp_path: Path, out: Path) -> None:
    frames = np.stack([np.full((26, 26, 26), n, np.int16) for n in range(3)], axis=3)
    file = nib.Nifti1Image(frames, np.eye(4))
    file.header.set_xyzt_units("mm", "sec")
    (tmp_path / "source" / "ann").mkdir(parents=True)
    nib.save(file, tmp_path / "source" / "ann" / "t1.nii")
    zp.convert(tmp_path / "source", tmp_path / "store")
    stored = zp.Cohort(tmp_path / "store")
    options = PredictOptions.of(image="t1", patch_size=24, patch_overlap=8)
    network = Network.of(pointwise, options)
    [plan] = plan_prediction(network, stored, options)
    assert "26 x 26 x 26 voxels of 3 channels (3 time points as channels) in 8 patches" in str(plan)
    assert plan_prediction(
        network, stored.map(lambda s: s.with_images(t1=s.t1.map(lambda a: a + 1))), options
    )
    one = stored.map(lambda s: s.with_images(t1=s.t1.select(time=1)))
    [plan] = plan_prediction(network, one, options)
    assert "26 x 26 x 26 voxels (time point 1 of 3) in 8 patches" in str(plan)
