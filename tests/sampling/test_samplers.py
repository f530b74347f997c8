"""Samplers: patches are drawn by the exact law that the documentation states, from any source of maps."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray

import zpatch as zp
from zpatch.errors import (
    OptionError,
    PatchSizeError,
    SamplingError,
    UnknownNameError,
)
from zpatch.sampling import randomness
from zpatch.sampling.patch_sampler import RandomSampler

SHAPE = (9, 8, 7)
DRAWS = 10_000
KINDS: dict[str, type[zp.Image]] = {"t1": zp.ScalarImage, "seg": zp.LabelMap, "where": zp.SamplingMap}
PATCHES = [1, 2, 3, (4, 3, 2), (5, 8, 3), SHAPE]

every_patch = pytest.mark.parametrize("patch_size", PATCHES, ids=str)
every_source = pytest.mark.parametrize("source", ["numpy", "dask", "stored"])


def subject_of(source: str, folder: Path, **arrays: NDArray[Any]) -> zp.Subject:
    """A subject of arrays (I, J, K) or (C, I, J, K): in memory, of dask blocks, or stored with an index."""
    if source == "stored":
        for name, array in arrays.items():
            path = folder / "source" / "sub" / f"{name}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
            nib.Nifti1Image(voxels, np.eye(4), dtype=voxels.dtype).to_filename(path)
        zp.convert(folder / "source", folder / "store", chunk=3, sampling_patterns=["where"])
        return zp.Cohort(folder / "store")[0]
    if source == "dask":
        arrays = {name: da.from_array(array, chunks=3) for name, array in arrays.items()}
    return zp.Subject(**{name: KINDS[name](array) for name, array in arrays.items()})


def in_memory(**arrays: NDArray[Any]) -> zp.Subject:
    return subject_of("numpy", Path(), **arrays)


def inside(patch_size: Any, shape: tuple[int, ...] = SHAPE) -> NDArray[np.bool_]:
    """The voxels that can be a centre: start + p // 2 for every start."""
    size = np.broadcast_to(patch_size, 3)
    mask = np.zeros(shape, bool)
    for starts in itertools.product(*(range(n - p + 1) for n, p in zip(shape, size, strict=True))):
        mask[tuple(starts + size // 2)] = True
    return mask


def centres(
    sampler: RandomSampler, subject: zp.Subject, *, count: int = DRAWS, seed: int = 1
) -> NDArray[Any]:
    """How often each voxel is the centre of a patch."""
    locations = sampler.locations(subject, count, seed)
    assert {location.size for location in locations} == {sampler.patch_size}
    found = np.array([location.index for location in locations]) + np.array(sampler.patch_size) // 2
    flat = np.ravel_multi_index(tuple(found.T), subject.spatial_shape)
    return np.bincount(flat, minlength=np.prod(subject.spatial_shape)).reshape(subject.spatial_shape)


def follows(seen: NDArray[Any], weights: NDArray[Any]) -> bool:
    """Whether counts follow a law, by a chi-square test; where it is zero there must be none."""
    law = weights / weights.sum(dtype=np.float64)
    assert not seen[law == 0].any()
    if (law > 0).sum() == 1:
        return True
    return bool(scipy.stats.chisquare(seen[law > 0], law[law > 0] * seen.sum()).pvalue > 1e-3)


@pytest.fixture
def labels(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Three classes of unequal size, each present at the volume's centre and elsewhere."""
    labels = rng.choice(4, SHAPE, p=[0.6, 0.25, 0.1, 0.05]).astype(np.uint8)
    labels[4, 4, 3] = 1
    return labels


@every_patch
def test_uniform_patches_start_anywhere_alike(patch_size: Any) -> None:
    subject = in_memory(t1=np.zeros(SHAPE))
    assert follows(centres(zp.UniformSampler(patch_size), subject), inside(patch_size))


@every_patch
@every_source
def test_weighted_centres_follow_the_map_where_patches_fit(
    tmp_path: Path, rng: np.random.Generator, patch_size: Any, source: str
) -> None:
    weights = rng.uniform(0.3, 1, SHAPE).astype(np.float32)
    weights[rng.random(SHAPE) < 0.4] = 0
    weights[4, 4, 3] = 1
    subject = subject_of(source, tmp_path, where=weights)
    seen = centres(zp.WeightedSampler(patch_size, "where"), subject)
    assert follows(seen, weights.astype(np.float64) * inside(patch_size))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, bool])
@pytest.mark.parametrize("name", ["t1", "seg", "where"])
def test_any_image_may_be_a_map_and_small_integers_do_not_wrap(name: str, dtype: Any) -> None:
    weights = np.full(SHAPE, 200).astype(dtype)
    weights[:2] = 0
    subject = in_memory(**{name: weights})
    assert follows(centres(zp.WeightedSampler(3, name), subject), (weights > 0) * inside(3))


def test_a_stored_map_is_followed_by_its_scaled_values(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = rng.integers(0, 20, SHAPE, dtype=np.int16)
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "where.nii"
    nib.Nifti1Image(stored, np.eye(4)).to_filename(path)
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([0.5, 2], "<f4").tobytes()
    path.write_bytes(data)
    zp.convert(tmp_path / "source", tmp_path / "store", chunk=3, sampling_patterns=["where"])
    seen = centres(zp.WeightedSampler(3, "image"), zp.Cohort(tmp_path / "store")[0])
    assert follows(seen, (stored * 0.5 + 2) * inside(3))


def law_of(labels: NDArray[Any], probabilities: Mapping[int, float], allowed: NDArray[Any]) -> NDArray[Any]:
    """Each class by its probability, each of its allowed voxels alike; absent classes left out."""
    law = np.zeros(labels.shape)
    for label, probability in probabilities.items():
        mine = (labels == label) & allowed
        if mine.any():
            law[mine] = probability / mine.sum()
    return law


@every_patch
@every_source
def test_the_class_is_drawn_first_and_then_a_voxel_of_it(
    tmp_path: Path, labels: NDArray[np.uint8], patch_size: Any, source: str
) -> None:
    probabilities = {0: 0, 1: 2, 2: 1, 3: 1}
    subject = subject_of(source, tmp_path, seg=labels)
    seen = centres(zp.LabelSampler(patch_size, "seg", probabilities), subject)
    assert follows(seen, law_of(labels, probabilities, inside(patch_size)))


def test_probabilities_of_two_one_and_one_are_a_half_and_two_quarters(labels: NDArray[np.uint8]) -> None:
    sampler = zp.LabelSampler(3, "seg", {0: 0, 1: 2, 2: 1, 3: 1})
    seen = centres(sampler, in_memory(seg=labels))
    shares = [seen[labels == label].sum() for label in range(4)]
    assert follows(np.array(shares), np.array([0, 0.5, 0.25, 0.25]))


@every_source
@pytest.mark.parametrize("corner", [(0, 0, 0), (8, 7, 6), (0, 4, 3), (8, 4, 3)])
def test_a_class_in_the_border_alone_is_absent_and_the_others_share_its_part(
    tmp_path: Path, source: str, corner: tuple[int, int, int]
) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[4, 4, 3], labels[4, 4, 4], labels[corner] = 1, 2, 3
    probabilities = {1: 1, 2: 3, 3: 96}
    subject = subject_of(source, tmp_path, seg=labels)
    seen = centres(zp.LabelSampler(6, "seg", probabilities), subject)
    assert seen[4, 4, 3] + seen[4, 4, 4] == DRAWS
    assert follows(seen, law_of(labels, probabilities, inside(6)))


@every_source
def test_a_class_with_one_allowed_voxel_left_is_drawn_there(tmp_path: Path, source: str) -> None:
    labels = np.ones(SHAPE, np.uint8)
    labels[inside(5)] = 2
    labels[5, 4, 3] = 1
    subject = subject_of(source, tmp_path, seg=labels)
    seen = centres(zp.LabelSampler(5, "seg", {1: 1}), subject, count=100)
    assert seen[5, 4, 3] == 100


@every_source
def test_without_probabilities_all_that_is_not_zero_is_one_class(
    tmp_path: Path, labels: NDArray[np.uint8], source: str
) -> None:
    subject = subject_of(source, tmp_path, t1=np.zeros(SHAPE, np.int16), seg=labels)
    assert follows(centres(zp.LabelSampler(3), subject), (labels > 0) * inside(3))


@every_source
@pytest.mark.parametrize("probabilities", [{0: 1, 2: 3}, None])
def test_in_a_map_of_channels_the_keys_are_channels_and_nonzero_voxels_are_present(
    tmp_path: Path, rng: np.random.Generator, source: str, probabilities: dict[int, float] | None
) -> None:
    channels = (rng.random((3, *SHAPE)) < 0.2).astype(np.int16) * 7
    if probabilities:
        law = sum(
            p * (channels[c] * inside(3)) / (channels[c] * inside(3)).sum() for c, p in probabilities.items()
        )
    else:
        law = channels.any(axis=0) * inside(3)
    subject = subject_of(source, tmp_path, seg=channels)
    assert follows(centres(zp.LabelSampler(3, "seg", probabilities), subject), law)


@every_source
def test_negative_and_large_labels_are_classes(tmp_path: Path, source: str) -> None:
    labels = np.resize(np.array([-5, 0, 614454277], np.int32), SHAPE)
    probabilities = {-5: 1, 614454277: 3, 1: 5}
    seen = centres(zp.LabelSampler(2, "seg", probabilities), subject_of(source, tmp_path, seg=labels))
    assert follows(seen, law_of(labels, probabilities, inside(2)))


def often_rejected() -> NDArray[np.uint8]:
    """One class, with a twelfth of it at allowed centres of 3-patches, in a whole chunk of 3."""
    labels = (~inside(3)).astype(np.uint8)
    labels[3:6, 3:6, 3:6] = 1
    return labels


@pytest.mark.parametrize("source", ["dask", "stored"])
@pytest.mark.parametrize(
    "sampler", [zp.LabelSampler(3, "seg", {1: 1}), zp.WeightedSampler(3, "where")], ids=repr
)
def test_a_draw_does_not_depend_on_the_draws_before_it(
    tmp_path: Path, sampler: RandomSampler, source: str
) -> None:
    labels = often_rejected()
    used, fresh = (
        subject_of(source, tmp_path / name, seg=labels, where=labels.astype(np.float32)) for name in "ab"
    )
    few, many = sampler.locations(used, 5, 1), sampler.locations(used, 1000, 2)
    assert sampler.locations(used, 1000, 2) == many
    assert sampler.locations(used, 5, 1) == few
    assert sampler.locations(fresh, 1000, 2) == many
    assert sampler.locations(fresh, 5, 1) == few
    assert follows(centres(sampler, used), labels * inside(3))


def test_all_patches_of_a_subject_in_an_epoch_are_of_one_draw(tmp_path: Path) -> None:
    used, fresh = (subject_of("dask", tmp_path, seg=often_rejected()) for _ in range(2))
    sampler = zp.LabelSampler(3, "seg", {1: 1})
    with zp.Queue([used], sampler, patches_per_volume=100) as queue:
        for epoch in (0, 1, 0):
            queue.set_epoch(epoch)
            rng = randomness.rng(0, epoch, 0, 0, purpose=randomness.Purpose.LOCATIONS)
            drawn = sampler.locations(fresh, 100, rng)
            assert sorted(p.location.index for p in queue) == sorted(location.index for location in drawn)


@every_source
def test_a_subject_that_was_drawn_from_can_be_sent_to_a_process(tmp_path: Path, source: str) -> None:
    labels = often_rejected()
    subject = subject_of(source, tmp_path, seg=labels, where=labels.astype(np.float32))
    for sampler in (zp.LabelSampler(3, "seg"), zp.WeightedSampler(3, "where")):
        drawn = sampler.locations(subject, 100, 1)
        assert sampler.locations(pickle.loads(pickle.dumps(subject)), 100, 1) == drawn


def test_a_label_map_of_a_plain_array_may_be_of_floats() -> None:
    labels = np.resize(np.array([0, 1, 2], np.float32), SHAPE)
    seen = centres(zp.LabelSampler(2, "t1", {1: 1}), in_memory(t1=labels))
    assert follows(seen, (labels == 1) * inside(2))


def test_the_first_label_map_is_taken_where_none_is_named(labels: NDArray[np.uint8]) -> None:
    subject = zp.Subject(
        t1=zp.ScalarImage(np.ones(SHAPE)), one=zp.LabelMap(labels), two=zp.LabelMap(np.ones(SHAPE))
    )
    assert not centres(zp.LabelSampler(3), subject)[labels == 0].any()


def test_locations_are_drawn_without_reading_the_images(cohort_store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))
    subject = zp.Cohort(copy)[0]
    shutil.rmtree(subject.t1.folder / "0" / "c")
    assert len(zp.LabelSampler(8).locations(subject, 10, 0)) == 10
    shutil.rmtree(subject.seg.folder / "0" / "c")
    assert len(zp.UniformSampler(8).locations(subject, 10, 0)) == 10


def constant(value: float, dtype: Any = np.float32) -> NDArray[Any]:
    return np.full(SHAPE, value, dtype)


def border() -> NDArray[Any]:
    weights = np.zeros(SHAPE, np.float32)
    weights[0, 0, 0] = weights[-1, -1, -1] = 1
    return weights


def some(value: float) -> NDArray[Any]:
    weights = np.ones(SHAPE, np.float32)
    weights[4, 4, 3] = value
    return weights


@pytest.mark.parametrize("source", ["numpy", "dask"])
@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (some(-1), "negative weights; a sampling map must be at least 0"),
        (some(np.nan), "NaN or infinite weights; a sampling map must be finite"),
        (some(np.inf), "NaN or infinite weights; a sampling map must be finite"),
        (constant(0), "is zero everywhere; nothing can be drawn from it"),
        (
            border(),
            r"is zero wherever a patch of \(5, 5, 5\) fits; all of its weight is near the border; use a",
        ),
        (np.ones((2, *SHAPE)), "has 2 channels; a map has one"),
    ],
)
def test_a_map_that_cannot_be_drawn_from_is_an_error(
    tmp_path: Path, source: str, weights: NDArray[Any], why: str
) -> None:
    subject = subject_of(source, tmp_path, where=weights)
    with pytest.raises(SamplingError, match=f"the map 'where' of subject 'subject'.*{why}"):
        zp.WeightedSampler(5, "where").locations(subject, 10, 0)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (constant(0), "the map 'where' of subject 'sub' is zero everywhere"),
        (border(), "the map 'where' of subject 'sub' is zero wherever a patch .* is near the border"),
    ],
)
def test_a_stored_map_that_cannot_be_drawn_from_is_an_error(
    tmp_path: Path, weights: NDArray[Any], why: str
) -> None:
    subject = subject_of("stored", tmp_path, where=weights)
    with pytest.raises(SamplingError, match=why):
        zp.WeightedSampler(5, "where").locations(subject, 10, 0)


@every_source
@pytest.mark.parametrize(
    ("probabilities", "wanted"), [({3: 1, 1: 1}, "3, 1"), ({7: 1, 0: 0}, "7"), (None, "all but 0")]
)
def test_classes_without_an_allowed_centre_are_an_error_that_names_them(
    tmp_path: Path, source: str, probabilities: dict[int, float] | None, wanted: str
) -> None:
    subject = subject_of(source, tmp_path, seg=border().astype(np.uint8))
    with pytest.raises(
        SamplingError, match=rf"wanted classes \({wanted}\) of 'seg' of subject .* patch of \(5, 5, 5\); use"
    ):
        zp.LabelSampler(5, "seg", probabilities).locations(subject, 10, 0)


@pytest.mark.parametrize("probabilities", [{}, {1: 0}, {1: -1, 2: 2}, {1: np.nan}, {1: np.inf}])
def test_invalid_probabilities_are_an_error(probabilities: dict[int, float]) -> None:
    with pytest.raises(OptionError, match="label_probabilities must be at least 0, finite, and not all 0"):
        zp.LabelSampler(3, "seg", probabilities)


SAMPLERS = [zp.UniformSampler(3), zp.WeightedSampler(3, "where"), zp.LabelSampler(3, "seg", {1: 1, 2: 2})]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


@pytest.fixture
def subject(rng: np.random.Generator, labels: NDArray[np.uint8]) -> zp.Subject:
    return in_memory(t1=rng.random(SHAPE), seg=labels, where=rng.random(SHAPE))


@every_sampler
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_patch_larger_than_the_volume_is_an_error_that_names_the_axis(
    sampler: RandomSampler, subject: zp.Subject, axis: int
) -> None:
    size = [3, 3, 3]
    size[axis] = SHAPE[axis] + 1
    larger = copy.copy(sampler)
    larger.patch_size = tuple(size)  # type: ignore[assignment]
    with pytest.raises(
        PatchSizeError,
        match=rf"patch of {size[axis]} voxels does not fit axis {'IJK'[axis]} of 'subject' "
        rf"\({SHAPE[axis]} voxels\); use a smaller patch_size, or .*padding_mode",
    ):
        larger.locations(subject, 1, 0)


@pytest.mark.parametrize("size", [0, -1, (3, 0, 3)])
def test_an_empty_patch_is_an_error(size: Any) -> None:
    with pytest.raises(PatchSizeError, match="patch_size must be at least 1 on every axis, not"):
        zp.UniformSampler(size)


@pytest.mark.parametrize("size", [2.5, (2,), (1, 2, 3, 4), "large", None])
def test_an_invalid_patch_size_is_an_error(size: Any) -> None:
    with pytest.raises(OptionError, match="patch_size must be one integer or three, not"):
        zp.UniformSampler(size)


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        (zp.WeightedSampler(3, "wher"), "no image 'wher' in subject 'subject'; did you mean 'where'"),
        (zp.LabelSampler(3, "segg"), "no image 'segg' in subject 'subject'; did you mean 'seg'"),
    ],
)
def test_an_unknown_map_is_an_error_with_the_nearest_names(
    subject: zp.Subject, sampler: RandomSampler, why: str
) -> None:
    with pytest.raises(UnknownNameError, match=why):
        sampler.locations(subject, 1, 0)


def test_a_subject_without_a_label_map_is_an_error_that_lists_its_images() -> None:
    with pytest.raises(UnknownNameError, match=r"'subject' has no label map \(it has: t1\); say label_name="):
        zp.LabelSampler(3).locations(in_memory(t1=np.zeros(SHAPE)), 1, 0)


def test_a_negative_number_of_patches_is_an_error(subject: zp.Subject) -> None:
    with pytest.raises(OptionError, match="num_patches must be at least 0, not -1"):
        zp.UniformSampler(3).locations(subject, -1)


@every_sampler
def test_a_sampler_yields_as_many_patches_as_it_is_asked_for(
    sampler: RandomSampler, subject: zp.Subject
) -> None:
    for count in (0, 1, 16, 17, 40):
        assert len(list(sampler(subject, count))) == count
    assert len(list(itertools.islice(sampler(subject), 50))) == 50
    assert sampler.locations(subject, 0) == []


@every_sampler
@every_source
def test_a_patch_holds_the_voxels_at_its_location(
    sampler: RandomSampler, tmp_path: Path, rng: np.random.Generator, labels: NDArray[np.uint8], source: str
) -> None:
    arrays = {"t1": rng.random((2, *SHAPE)).astype(np.float32), "seg": labels, "where": rng.random(SHAPE)}
    for patch in sampler(subject_of(source, tmp_path, **arrays), 5, rng=3):
        for name, array in arrays.items():
            box = (slice(None), *patch.location.to_slices())
            np.testing.assert_array_equal(patch[name].data, array.reshape(-1, *SHAPE)[box])
            assert patch[name].kind == KINDS[name].kind


@every_sampler
def test_an_integer_seeds_the_draw_and_none_is_fresh(sampler: RandomSampler, subject: zp.Subject) -> None:
    def draw(source: Any) -> list[zp.PatchLocation]:
        return sampler.locations(subject, 30, source)

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)
    generator = np.random.default_rng(7)
    assert draw(generator) != draw(generator)
    assert draw(np.random.default_rng(7)) == draw(np.random.default_rng(7))
    drawn = [[patch.location for patch in sampler(subject, 30, rng=7)] for _ in range(2)]
    assert drawn[0] == drawn[1]


@every_sampler
def test_the_global_generators_are_neither_read_nor_written(
    sampler: RandomSampler, subject: zp.Subject
) -> None:
    def state() -> tuple[str, str, str]:
        return repr(np.random.get_state()), repr(torch.get_rng_state().tolist()), repr(random.getstate())  # noqa: NPY002

    before = state()
    list(sampler(subject, 5))
    list(sampler(subject, 5, rng=1))
    assert state() == before


@every_source
def test_a_patch_has_memory_of_its_own(tmp_path: Path, source: str) -> None:
    volume = np.zeros(SHAPE, np.float32)
    subject = subject_of(source, tmp_path, t1=volume)
    for patch in [*zp.UniformSampler(3)(subject, 4, rng=0), zp.GridSampler(subject, 3)[0]]:
        assert patch.t1.data.untyped_storage().nbytes() == 27 * 4
        patch.t1.data[...] = 1
    assert not volume.any()
    assert not subject.t1.data.any()


def test_the_affine_of_a_patch_puts_its_corner_where_it_is_in_the_volume(subject: zp.Subject) -> None:
    affine = np.array([[0, 2, 0.5, 10], [3, 0, 0, 20], [0, 0.1, 4, 30], [0, 0, 0, 1]])
    oblique = zp.Subject(t1=zp.ScalarImage(np.zeros(SHAPE), affine=affine))
    for patch in zp.UniformSampler(3)(oblique, 5, rng=0):
        np.testing.assert_allclose(patch.t1.affine[:3, 3], (affine @ [*patch.location.index, 1])[:3])
        np.testing.assert_array_equal(patch.t1.affine[:3, :3], affine[:3, :3])
