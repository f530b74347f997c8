"""Context of patches: equal to slices of the padded pyramid, in samplers, queues and predictions."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
from zpatch.chunks.levels import halve
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import OptionError, StoreExistsError
from zpatch.geometry.boxes import PatchLocation
from zpatch.sampling.patch_views import checked_context

SHAPE = (150, 70, 97)
FAR = 60  # voxels of padding on each side of a level

Array = NDArray[Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two subjects with an image and a label map, with pyramids, and one without."""
    folder = tmp_path_factory.mktemp("context")
    rng = np.random.default_rng(0)
    affine = np.diag([0.5, 0.7, 1.5, 1.0])
    affine[:3, 3] = 1, 2, 3
    for name in ("ann", "bob"):
        (folder / "source" / name).mkdir(parents=True)
        t1, seg = rng.integers(0, 900, SHAPE, dtype=np.int16), rng.integers(0, 3, SHAPE, dtype=np.uint8)
        nib.Nifti1Image(t1, affine).to_filename(folder / "source" / name / "t1.nii")
        nib.Nifti1Image(seg, affine).to_filename(folder / "source" / name / "seg.nii")
    zp.convert(folder / "source", folder / "store", pyramid=True)
    zp.convert(folder / "source", folder / "flat", include=["ann"])
    yield folder / "store"
    close_shards(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def subject(store: Path) -> zp.Subject:
    return zp.Cohort(store)["ann"]


def level_of(image: zp.ScalarImage, number: int) -> Array:
    """A level (C, I, J, K), made in memory."""
    voxels = image.data.transpose(0, 3, 2, 1)
    for _ in range(number):
        voxels = halve(voxels, majority=image.kind == "label")
    return voxels.transpose(0, 3, 2, 1)


def expected(level: Array, location: PatchLocation, width: int, mode: str = "edge") -> Array:
    """The slice of the padded level around the centre of a patch."""
    for axis, (start, size) in enumerate(zip(location.index, location.size, strict=True), start=1):
        first = int(np.floor((start + size / 2) / width - size / 2 + 0.5))
        voxels = np.pad(np.arange(level.shape[axis]), FAR, mode=mode)  # type: ignore[call-overload]
        level = level.take(voxels[FAR + first : FAR + first + size], axis)
    return level


@pytest.fixture(scope="module")
def levels(subject: zp.Subject) -> dict[tuple[str, int], Array]:
    return {(name, n): level_of(subject[name], n) for name in ("t1", "seg") for n in (1, 2)}


def check_patch(patch: zp.Patch, levels: dict[tuple[str, int], Array], mode: str = "edge") -> None:
    assert list(patch) == ["seg", "t1", "seg_x2", "t1_x2", "seg_x4", "t1_x4"]
    for (name, number), level in levels.items():
        found = patch[f"{name}_x{2**number}"]
        assert np.array_equal(found.data.numpy(), expected(level, patch.location, 2**number, mode))
        assert found.kind == patch[name].kind


samplers = pytest.mark.parametrize(
    "sampler",
    [
        zp.UniformSampler((20, 17, 64), context=(2, 4)),
        zp.LabelSampler(20, "seg", {1: 1, 2: 3}, context=(2, 4)),
        zp.WeightedSampler((64, 5, 6), "t1", context=(2, 4)),
    ],
    ids=repr,
)


@samplers
def test_every_sampler_gives_slices_of_the_padded_pyramid(
    subject: zp.Subject, levels: dict[tuple[str, int], Array], sampler: Any
) -> None:
    plain = type(sampler)(
        **{k: v for k, v in vars(sampler).items() if not k.startswith("_") and k != "context"}
    )
    without = list(plain(subject, 6, rng=3))
    for patch, other in zip(sampler(subject, 6, rng=3), without, strict=True):
        assert patch.location == other.location
        assert torch.equal(patch.t1.data, other.t1.data)
        check_patch(patch, levels)


@pytest.mark.parametrize("mode", [None, "reflect", "wrap"])
def test_a_grid_pads_its_context_like_its_patches(
    subject: zp.Subject, levels: dict[tuple[str, int], Array], mode: str | None
) -> None:
    grid = zp.GridSampler(subject, (64, 48, 40), (16, 16, 8), padding_mode=mode, context=(2, 4))
    plain = zp.GridSampler(subject, (64, 48, 40), (16, 16, 8), padding_mode=mode)
    assert len(grid) == len(plain)
    for number in range(0, len(grid), 5):
        check_patch(grid[number], levels, mode or "edge")
    [first, *_] = grid(subject)
    check_patch(first, levels, mode or "edge")


triples = {name: st.tuples(*[values] * 3) for name, values in {
    "index": st.integers(-50, 500), "size": st.integers(1, 100), "factors": st.sampled_from([1, 2, 4, 8]),
}.items()}  # fmt: skip


@given(**triples)
def test_the_centre_of_a_patch_is_kept_to_half_a_coarse_voxel(index: Any, size: Any, factors: Any) -> None:
    box = PatchLocation(index, size).around_the_same_centre(factors)
    assert box.size == size
    for a, b, p, f in zip(index, box.index, size, factors, strict=True):
        assert abs((b + p / 2) * f - (a + p / 2)) <= f / 2
        assert f > 1 or a == b


def test_the_affine_of_context_places_it_around_the_patch(subject: zp.Subject) -> None:
    [patch] = zp.UniformSampler(16, context=(2, 4))(subject, 1, rng=0)
    middle = np.array([7.5, 7.5, 7.5, 1])
    for name, factor in (("t1_x2", 2), ("t1_x4", 4)):
        apart = patch[name].affine @ middle - patch.t1.affine @ middle
        assert (np.abs(apart[:3]) <= np.array(subject.t1.spacing) * factor / 2 + 1e-9).all()
        np.testing.assert_allclose(
            np.diag(patch[name].affine)[:3], factor * np.array(subject.t1.spacing), atol=1e-6
        )


def test_a_level_is_an_image(subject: zp.Subject, levels: dict[tuple[str, int], Array]) -> None:
    level = subject.t1.level(2)
    assert np.array_equal(level.data, levels["t1", 2])
    assert subject.t1.level(0) is subject.t1
    np.testing.assert_allclose(level.spacing, 4 * np.array(subject.t1.spacing))
    np.testing.assert_allclose(
        level.affine @ [-0.5, -0.5, -0.5, 1], subject.t1.affine @ [-0.5, -0.5, -0.5, 1], atol=1e-6
    )
    assert isinstance(subject.seg.level(1), zp.LabelMap)
    assert level.identity() != subject.t1.level(1).identity() != subject.t1.identity()


def test_normalised_images_have_normalised_context(subject: zp.Subject, levels: dict[Any, Array]) -> None:
    normalize = zp.Normalize("zscore", statistics={"mean": 100.0, "std": 50.0})
    normalised = subject.with_images(t1=normalize(subject.t1))
    [patch] = zp.UniformSampler(16, context=(2,))(normalised, 1, rng=0)
    want = (expected(levels["t1", 1], patch.location, 2).astype(np.float32) - 100) / 50
    np.testing.assert_allclose(patch.t1_x2.data.numpy(), want, rtol=1e-6)


def test_a_slide_is_not_halved_along_its_plane(tmp_path: Path) -> None:
    (tmp_path / "source" / "ann").mkdir(parents=True)
    voxels = np.random.default_rng(0).integers(0, 255, (200, 150, 1), dtype=np.uint8)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "source" / "ann" / "t1.nii")
    zp.convert(tmp_path / "source", tmp_path / "store", pyramid=True)
    [subject] = zp.Cohort(tmp_path / "store")
    [patch] = zp.UniformSampler((32, 32, 1), context=(4,))(subject, 1, rng=0)
    level = level_of(subject.t1, 2)
    assert level.shape == (1, 50, 38, 1)
    i, j, _ = (int(np.floor((a + 16) / 4 - 16 + 0.5)) for a in patch.location.index)
    rows, columns = (np.clip(np.arange(a, a + 32), 0, n - 1) for a, n in ((i, 50), (j, 38)))
    assert np.array_equal(patch.t1_x4.data.numpy(), level[:, rows][:, :, columns])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_context_goes_through_a_queue(
    store: Path, levels: dict[Any, Array], workers: int, dtype: torch.dtype | None
) -> None:
    cohort = zp.Cohort(store)
    options: dict[str, Any] = {
        "max_length": 6,
        "patches_per_volume": 3,
        "num_workers": workers,
        "dtype": dtype,
    }
    with zp.Queue(cohort, zp.UniformSampler(24, context=(2, 4)), **options) as queue:
        stated = queue.max_memory
        batches = list(zp.SubjectsLoader(queue, 2))
    with zp.Queue(cohort, zp.UniformSampler(24), **options) as plain:
        assert stated > 2.8 * plain.max_memory
    seen = 0
    for batch in batches:
        assert batch.t1_x4.data.shape == (2, 1, 24, 24, 24)
        for n, location in enumerate(batch.patch_location):
            if batch.subjects[n] == "ann":
                seen += 1
                for (name, number), level in levels.items():
                    found = batch[f"{name}_x{2**number}"].data[n].numpy()
                    assert np.array_equal(found, expected(level, location, 2**number))
    assert seen == 3


class Stacked(torch.nn.Module):
    """What it is fed, once more."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_network_is_fed_context_behind_the_images(
    store: Path, subject: zp.Subject, levels: dict[Any, Array], tmp_path: Path, jobs: int
) -> None:
    """Without overlap, each voxel of the output is that of the patch which it is in."""
    options: dict[str, Any] = {
        "image": ["t1", "seg"],
        "patch_size": (50, 35, 97),
        "device": "cpu",
        "jobs": jobs,
    }
    found = zp.predict(Stacked(), [subject], tmp_path / "out", context=(2, 4), **options)["ann"].prediction
    assert found.num_channels == 6
    names = [(name, number) for number in (0, 1, 2) for name in ("t1", "seg")]
    for location in zp.GridSampler(subject, (50, 35, 97)).locations:
        voxels = found.read(location)
        for channel, (name, number) in enumerate(names):
            level = subject[name].data if number == 0 else levels[name, number]
            assert np.array_equal(voxels[channel], expected(level, location, 2**number)[0])
    with pytest.raises(StoreExistsError, match=r"differs in context: \[2,4\] then, null now"):
        zp.predict(Stacked(), [subject], tmp_path / "out", **options)


def test_a_level_that_is_not_stored_is_one_line_that_says_what_to_do(store: Path, tmp_path: Path) -> None:
    [flat] = zp.Cohort(store.with_name("flat"))
    text = r"image 'seg' of subject 'ann': it has 0 coarser levels, .* 'zpatch convert --pyramid'"
    with pytest.raises(OptionError, match=text):
        next(zp.UniformSampler(16, context=(2,))(flat, 1))
    with pytest.raises(OptionError, match=text):
        zp.Queue([flat], zp.UniformSampler(16, context=(2,)), max_length=4)
    options: dict[str, Any] = {"image": "seg", "patch_size": 32, "device": "cpu"}
    with pytest.raises(OptionError, match=text):
        zp.predict(Stacked(), [flat], tmp_path / "out", context=(2,), **options)
    assert not (tmp_path / "out").exists()
    [ann, _] = zp.Cohort(store)
    with pytest.raises(OptionError, match=r"it has 2 coarser levels, and level 3 is wanted"):
        next(zp.UniformSampler(16, context=(8,))(ann, 1))
    with pytest.raises(OptionError, match=r"no coarser levels, as it .* was mapped or resampled since"):
        next(zp.UniformSampler(16, context=(2,))(ann.resampled(1.0), 1))
    with pytest.raises(OptionError, match=r"convert with --spacing, --orient and --pyramid instead"):
        zp.predict(Stacked(), [ann], tmp_path / "out", context=(2,), spacing=1.0, **options)
    with pytest.raises(OptionError, match="is called 't1_x2', and so is an image"):
        next(zp.UniformSampler(16, context=(2,))(ann.with_images(t1_x2=ann.t1), 1))


@pytest.mark.parametrize("context", [(3,), (1,), (2, 2), (0,), (-2,), (2.0,), ("2",), (True,)])
def test_widths_that_are_no_different_powers_of_two_are_refused(context: Any) -> None:
    with pytest.raises(OptionError, match="context must be different powers of 2"):
        zp.UniformSampler(16, context=context)


def test_one_width_may_be_given_as_a_number() -> None:
    assert checked_context(4) == (4,)
    assert checked_context(()) == ()
    assert repr(zp.UniformSampler(8, context=(2,))) == "UniformSampler(patch_size=(8, 8, 8), context=(2,))"
    assert "context" not in repr(zp.UniformSampler(8))
