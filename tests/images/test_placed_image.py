"""Images and subjects on other grids, beside nibabel and TorchIO, and all that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given
from hypothesis import strategies as st
from nibabel.processing import resample_to_output

import zpatch as zp
from zpatch.errors import OptionError

AFFINE = np.array([[-0.8, 0, 0, 20], [0, 0, 1.5, -10], [0, 1.1, 0, 4], [0, 0, 0, 1.0]])
SHAPE = (18, 14, 11)


@pytest.fixture(scope="module")
def volume() -> Any:
    return np.random.default_rng(0).integers(-800, 1200, SHAPE).astype(np.int16)


@given(seed=st.integers(0, 2**32 - 1), letters=st.permutations(["RL", "AP", "SI"]), ways=st.integers(0, 7))
def test_images_are_oriented_as_nibabel_does_it(seed: int, letters: list[str], ways: int) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4))
    if abs(np.linalg.det(affine)) < 0.05:
        return
    codes = "".join(pair[ways >> n & 1] for n, pair in enumerate(letters))
    voxels = rng.integers(0, 99, (3, 4, 5)).astype(np.int16)
    found = zp.ScalarImage(voxels, affine=affine).oriented(codes)
    start, end = nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    expected = nib.Nifti1Image(voxels, affine).as_reoriented(nib.orientations.ornt_transform(start, end))
    assert np.array_equal(found.data[0], np.asanyarray(expected.dataobj))
    assert np.allclose(found.affine, expected.affine)


def test_torchio_orients_alike(volume: Any) -> None:
    theirs = tio.ToCanonical()(tio.ScalarImage(tensor=volume[None], affine=AFFINE))
    ours = zp.ScalarImage(volume, affine=AFFINE).oriented("RAS")
    assert np.array_equal(ours.data, theirs.numpy())
    assert np.allclose(ours.affine, theirs.affine)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_torchio_resamples_alike_where_its_grid_is_the_same(volume: Any, mode: str) -> None:
    """TorchIO rounds the number of voxels up, and starts at the same faces."""
    affine = np.diag([1.0, 1, 1, 1])
    voxels = volume[:16, :12, :8].astype(np.float32)
    theirs = tio.Resample(2, image_interpolation=mode)(tio.ScalarImage(tensor=voxels[None], affine=affine))
    ours = zp.ScalarImage(voxels, affine=affine).resampled(2, interpolation=mode)
    assert ours.shape == theirs.shape == (1, 8, 6, 4)
    assert np.allclose(ours.affine, theirs.affine)
    if mode == "linear":
        assert np.abs(ours.data - theirs.numpy()).max() < 1e-5 * 2000
    else:  # each place is between two voxels: they take the lower ones, the higher ones are taken here
        assert np.isin(ours.data, voxels).all()


def test_nibabel_resamples_alike_on_its_grid(volume: Any) -> None:
    """nibabel's grid starts at the first voxel's centre, not at its face: it is another grid."""
    affine = np.diag([1.0, 1.5, 2, 1])
    image = zp.ScalarImage(volume, affine=affine)
    for mode, order in (("linear", 1), ("cubic", 3)):
        theirs = resample_to_output(
            nib.Nifti1Image(volume.astype(float), affine), 1.25, order, mode="nearest"
        )
        grid = zp.ScalarImage(np.zeros(theirs.shape, np.float32), affine=theirs.affine)
        ours = image.on_grid_of(grid, interpolation=mode)
        assert np.abs(ours.data[0] - theirs.get_fdata()).max() < 1e-4 * 2000
        assert not np.allclose(image.resampled(1.25).affine, theirs.affine)


def test_subjects_of_many_grids_become_one_grid(volume: Any) -> None:
    turned = AFFINE @ np.diag([0.5, 2, 1, 1])
    subject = zp.Subject(
        t1=zp.ScalarImage(volume, affine=AFFINE),
        t2=zp.ScalarImage(volume[:, ::2], affine=turned),
        seg=zp.LabelMap((volume > 0).astype(np.uint8)[::2], affine=AFFINE @ np.diag([2, 1, 1, 1])),
    )
    with pytest.raises(OptionError, match=r"put them on one grid, as in subject.on_grid_of\('t1'\)"):
        _ = subject.spatial_shape
    moved = subject.on_grid_of("t1")
    assert moved.t1 is subject.t1
    assert moved.spatial_shape == SHAPE
    assert {tuple(image.affine.ravel()) for image in moved.images.values()} == {tuple(AFFINE.ravel())}
    assert moved.seg.dtype == np.uint8
    patch = next(zp.UniformSampler(6)(moved, 1, rng=0))
    assert patch.t2.data.dtype == torch.float32
    assert np.array_equal(patch.t2.data[0], moved.t2.data[0][patch.location.to_slices()])


def test_options_of_a_subject_are_for_its_kinds_of_images(volume: Any) -> None:
    labels = (volume > 0).astype(np.uint8)
    subject = zp.Subject(
        ct=zp.ScalarImage(volume, affine=AFFINE),
        seg=zp.LabelMap(labels, affine=AFFINE),
        where=zp.SamplingMap(labels.astype(np.float32), affine=AFFINE),
    )
    moved = subject.resampled(1.5, interpolation="cubic", label_interpolation="linear", antialias=True)
    linear = subject.seg.resampled(1.5, interpolation="linear")
    assert np.array_equal(moved.seg.data, linear.data)
    assert (moved.name, moved.split, list(moved)) == (subject.name, subject.split, list(subject))


def test_mistakes_are_named(volume: Any) -> None:
    image = zp.ScalarImage(volume, affine=AFFINE)
    subject = zp.Subject(ct=image, seg=zp.LabelMap(volume, affine=AFFINE), name="ann")
    with pytest.raises(OptionError, match=r"'ct' of subject 'ann': spacing must be positive"):
        subject.resampled(-1)
    with pytest.raises(OptionError, match=r"'seg' of subject 'ann': a label map cannot be interpolated"):
        subject.resampled(1, label_interpolation="cubic")
    with pytest.raises(OptionError, match=r"three letters as RAS, LPS or PIR, not 'RAX'"):
        subject.oriented("RAX")
    with pytest.raises(KeyError, match="no image 't9'"):
        subject.on_grid_of("t9")
    far = zp.ScalarImage(volume, affine=AFFINE + np.array([[0, 0, 0, 1e4]] * 3 + [[0] * 4]))
    with pytest.raises(OptionError, match=r"'ct' of subject 'ann': the images do not overlap in space"):
        subject.on_grid_of(far)
    with pytest.raises(OptionError, match="singular"):
        zp.ScalarImage(volume, affine=np.zeros((4, 4))).oriented("RAS")
    with pytest.raises(OptionError, match="singular"):
        zp.ScalarImage(volume, affine=np.zeros((4, 4))).resampled(1)


def test_a_queue_feeds_resampled_patches_from_its_workers(cohort_store: Path) -> None:
    cohort = zp.Cohort(cohort_store).map(lambda s: s.oriented("LPS").resampled(1.4))
    name = next(n for n, image in cohort[0].images.items() if image.kind == "scalar")
    labels = next(n for n, image in cohort[0].images.items() if image.kind == "label")
    sampler = zp.LabelSampler(5, labels)
    streams = []
    for workers in (0, 2):
        options = {"max_length": 8, "patches_per_volume": 2, "num_workers": workers, "seed": 3}
        with zp.Queue(cohort, sampler, **options) as queue:
            streams.append(
                [(p.subject, p.location, p[name].data.clone(), p[labels].data.clone()) for p in queue]
            )
    for a, b in zip(*streams, strict=True):
        assert a[:2] == b[:2]
        assert torch.equal(a[2], b[2])
        assert torch.equal(a[3], b[3])
    subject = {s.name: s for s in cohort}[streams[0][0][0]]
    patch = subject[name].read(streams[0][0][1])
    assert np.array_equal(streams[0][0][2], patch)


@pytest.mark.parametrize("mode", [None, "edge", "constant"])
def test_grids_and_aggregators_work_on_a_resampled_image(volume: Any, mode: str | None) -> None:
    subject = zp.Subject(ct=zp.ScalarImage(volume, affine=AFFINE)).resampled(1.3)
    grid = zp.GridSampler(subject, 6, 2, padding_mode=mode)
    with zp.PatchAggregator(subject.spatial_shape, grid=grid, overlap_mode="hann") as aggregator:
        for patch in grid:
            aggregator.add_batch(patch.ct.data[None], [patch.location])
        assert np.allclose(aggregator.get_output().numpy(), subject.ct.data, atol=1e-2)


def test_predictions_of_a_resampled_image_are_on_its_grid(volume: Any, tmp_path: Path) -> None:
    subject = zp.Subject(ct=zp.ScalarImage(volume, affine=AFFINE)).oriented("RAS").resampled(1.3)
    options: dict[str, Any] = {"image": "ct", "patch_size": 8, "patch_overlap": 2}
    [found] = zp.predict(lambda batch: batch * 2, [subject], tmp_path / "out.zarr", **options)
    assert np.allclose(found.prediction.data, subject.ct.data * 2, atol=1e-2)
    assert np.allclose(found.prediction.affine, subject.ct.affine)
