"""TorchIO about 0.13 on zpatch: its examples, and its border on each side of a patch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader

import zpatch as zp
import zpatch.compat.torchio0 as torchio
from zpatch.errors import IncompleteCoverageError, ModelError, OptionError, PatchOverlapError, PatchSizeError

CHANNELS_DIMENSION = 1
PATCH = 8


@pytest.fixture(scope="module")
def subjects(cohort_source: Path, cache: None) -> list[torchio.Subject]:
    """The small cohort as a script of TorchIO 0.13 names it."""
    found = []
    for folder in sorted(folder for folder in cohort_source.iterdir() if folder.is_dir()):
        t1 = torchio.Image("t1", next(folder.glob("t1.nii*")), torchio.INTENSITY)
        label = torchio.Image("label", next(folder.glob("seg.nii*")), torchio.LABEL)
        found.append(torchio.Subject([t1, label], name=folder.name))
    assert len(found) == 4
    return found


def drawn_seed() -> int:
    """What the next sampler or queue will draw, after ``torch.manual_seed``."""
    torch.manual_seed(5)
    number = int(torch.randint(2**63 - 1, ()))
    torch.manual_seed(5)
    return number


def is_labelled(patch: Any) -> bool:
    return bool(patch["label"][torchio.DATA][0, PATCH // 2, PATCH // 2, PATCH // 2] != 0)


# The examples of the documentation


def test_training_with_a_queue_gives_the_patches_of_the_native_queue(subjects: list[torchio.Subject]) -> None:
    seed = drawn_seed()
    subjects_dataset = torchio.ImagesDataset(subjects)
    queue_dataset = torchio.Queue(
        subjects_dataset,
        max_length=12,
        samples_per_volume=5,
        patch_size=PATCH,
        sampler_class=torchio.sampler.ImageSampler,
        num_workers=1,
        shuffle_subjects=True,
        shuffle_patches=True,
    )
    assert len(queue_dataset) == 20
    same = zp.Queue(subjects, zp.UniformSampler(PATCH), 12, 5, seed=seed)
    for _ in range(2):
        expected = iter(same)
        for batch in DataLoader(queue_dataset, batch_size=4):
            inputs, targets = batch["t1"][torchio.DATA], batch["label"][torchio.DATA]
            for voxels, labels, first in zip(inputs, targets, batch["index_ini"], strict=True):
                patch = next(expected)
                assert tuple(first.tolist()) == patch.location.index
                assert torch.equal(voxels, patch.t1.data)
                assert torch.equal(labels, patch.label.data)
        assert next(expected, None) is None
    queue_dataset.close()


@pytest.mark.parametrize("of", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_dense_inference_is_that_of_the_native_sampler_and_aggregator(
    subjects: list[torchio.Subject], of: Any
) -> None:
    input_data = of(subjects[0]["t1"].data[0].float())
    patch_size, patch_overlap = 12, 2
    grid_sampler = torchio.inference.GridSampler(input_data, patch_size, patch_overlap)
    patch_loader = DataLoader(grid_sampler, batch_size=4)
    aggregator = torchio.inference.GridAggregator(input_data, patch_overlap)
    model = torch.nn.Conv3d(1, 3, 3, padding=1).eval()
    with torch.no_grad():
        for patches_batch in patch_loader:
            input_tensor = patches_batch[torchio.IMAGE]
            locations = patches_batch[torchio.LOCATION]
            logits = model(input_tensor)
            labels = logits.argmax(dim=CHANNELS_DIMENSION, keepdim=True)
            aggregator.add_batch(labels, locations)
    output_tensor = aggregator.get_output_tensor()

    subject = zp.Subject(image=zp.ScalarImage(np.asarray(input_data)))
    grid = zp.GridSampler(subject, patch_size, 2 * patch_overlap)
    same = zp.PatchAggregator(subject.spatial_shape, "crop", grid=grid)
    with torch.no_grad():
        for batch in zp.SubjectsLoader(grid, batch_size=4):
            same.add_batch(model(batch.image.data).argmax(1, keepdim=True), batch.patch_location)
    assert output_tensor.shape == subject.spatial_shape
    expected = same.get_output()
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(output_tensor[None], expected)
    assert len(output_tensor.unique()) > 1


# The grid


def reference_starts(length: int, patch: int, border: int) -> list[int]:
    """What TorchIO 0.13 computed on an axis, but for the place that it added between the only two."""
    found, start = [], 0
    while start + patch <= length:
        found.append(start)
        start += patch - 2 * border
    return sorted({*found, length - patch})


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Shape, patch size and border."""
    size = [draw(st.integers(1, 9)) for _ in range(3)]
    border = [draw(st.integers(0, (p - 1) // 2)) for p in size]
    return [p + draw(st.integers(0, 12)) for p in size], size, border


@given(case=grids())
def test_the_step_of_a_grid_is_the_patch_without_both_borders(
    case: tuple[list[int], list[int], list[int]],
) -> None:
    shape, size, border = case
    grid = torchio.GridSampler(np.zeros(shape, np.uint8), size, border)
    axes = [reference_starts(n, p, b) for n, p, b in zip(shape, size, border, strict=True)]
    starts = list(itertools.product(*axes))
    assert grid.locations[:, :3].tolist() == [list(start) for start in starts]
    assert np.array_equal(grid.locations[:, 3:], grid.locations[:, :3] + size)
    assert len(grid) == len(starts)


@given(case=grids(), seed=st.integers(0, 1000))
def test_the_aggregator_restores_the_volume_of_the_grid(
    case: tuple[list[int], list[int], list[int]], seed: int
) -> None:
    shape, size, border = case
    volume = np.random.default_rng(seed).integers(-9, 9, shape)
    grid = torchio.GridSampler(volume, size, border)
    one, two = (
        torchio.GridAggregator(volume, border),
        torchio.GridAggregator(torch.from_numpy(volume), border),
    )
    for batch in DataLoader(grid, batch_size=5):
        patches, locations = batch[torchio.IMAGE], batch[torchio.LOCATION]
        for patch, location in zip(patches, locations, strict=True):
            assert np.array_equal(patch[0], box(volume, location.tolist()))
        one.add_batch(patches, locations)
        two.add_batch(torch.cat([patches, -patches], dim=1), locations)
    assert np.array_equal(one.get_output_tensor(), volume)
    assert np.array_equal(two.get_output_tensor(), np.stack([volume, -volume]))


def box(volume: NDArray[Any], ends: list[int]) -> NDArray[Any]:
    return volume[tuple(slice(a, b) for a, b in zip(ends[:3], ends[3:], strict=True))]


def test_borders_are_cut_off_but_at_the_border_of_the_volume() -> None:
    volume = np.zeros((10, 4, 4), np.float32)
    grid = torchio.GridSampler(volume, (4, 4, 4), (1, 0, 0))
    aggregator = torchio.GridAggregator(volume, (1, 0, 0))
    patch = torch.full((1, 1, 4, 4, 4), 100.0)
    for number, location in enumerate(grid.locations):
        patch[:, :, 1:3] = number
        patch[:, :, 0] = 10 + number
        patch[:, :, 3] = 20 + number
        aggregator.add_batch(patch, location[None])
    assert aggregator.get_output_tensor()[:, 0, 0].tolist() == [10, 0, 0, 1, 1, 2, 2, 3, 3, 23]


def test_a_grid_is_over_files_and_images_too(subjects: list[torchio.Subject]) -> None:
    image = subjects[0]["t1"]
    for source in (image, zp.ScalarImage(image.folder), image.folder):
        patch = torchio.GridSampler(source, PATCH, 1)[0]
        assert torch.equal(patch[torchio.IMAGE], image.data[:, :PATCH, :PATCH, :PATCH])


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PatchSizeError):
        torchio.GridSampler(np.zeros((4, 4, 4)), 5, 0)
    with pytest.raises(PatchOverlapError):
        torchio.GridSampler(np.zeros((9, 9, 9)), 4, 2)
    aggregator = torchio.GridAggregator(np.zeros((9, 9, 9)), 1)
    aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), torch.tensor([[0, 0, 0, 4, 4, 4]]))
    with pytest.raises(IncompleteCoverageError):
        aggregator.get_output_tensor()


def test_patches_of_another_size_than_their_locations_are_refused() -> None:
    aggregator = torchio.GridAggregator(np.zeros((9, 9, 9)), 1)
    with pytest.raises(ModelError, match=r"the network must keep the patch's shape$"):
        aggregator.add_batch(torch.ones(1, 1, 2, 4, 4), torch.tensor([[0, 0, 0, 4, 4, 4]]))


# Samplers and queue


@pytest.mark.parametrize("sampler_class", [torchio.ImageSampler, torchio.LabelSampler])
def test_a_sampler_is_iterated_without_end(subjects: list[torchio.Subject], sampler_class: Any) -> None:
    seed = drawn_seed()
    patches = list(itertools.islice(sampler_class(subjects[1], PATCH), 20))
    native = zp.UniformSampler(PATCH) if sampler_class is torchio.ImageSampler else zp.LabelSampler(PATCH)
    for patch, same in zip(patches, native(subjects[1], rng=seed), strict=False):
        assert tuple(patch["index_ini"].tolist()) == same.location.index
        assert torch.equal(patch["t1"][torchio.DATA], same.t1.data)
        assert torchio.LOCATION not in patch
    assert all(map(is_labelled, patches)) == (sampler_class is torchio.LabelSampler)
    [batch] = itertools.islice(DataLoader(sampler_class(subjects[1], PATCH), batch_size=3), 1)
    assert batch["index_ini"].shape == (3, 3)


def test_the_label_map_is_the_one_called_label_or_else_the_first() -> None:
    ones, zeros = np.ones((9, 9, 9), np.uint8), np.zeros((9, 9, 9), np.uint8)
    first, label = torchio.Image("first", zeros, torchio.LABEL), torchio.Image("label", ones, torchio.LABEL)
    assert next(iter(torchio.LabelSampler(torchio.Subject(first, label), 4)))["label"].data.all()
    other = torchio.Image("other", ones, torchio.LABEL)
    assert next(iter(torchio.LabelSampler(torchio.Subject(other), 4)))["other"].data.all()
    for subject, name in ((torchio.Subject(first, label), "label"), (torchio.Subject(other), "other")):
        queue = torchio.Queue([subject], 5, 3, 4, torchio.LabelSampler)
        assert all(patch[name].data.all() for patch in queue)


def test_a_queue_draws_by_the_class_of_its_sampler(subjects: list[torchio.Subject]) -> None:
    patches = list(torchio.Queue(subjects, 12, 4, PATCH, torchio.LabelSampler))
    assert len(patches) == 16
    assert all(map(is_labelled, patches))
    for wrong in (torchio.GridSampler, torchio.ImageSampler(subjects[0], PATCH)):
        with pytest.raises(OptionError, match="sampler_class must be ImageSampler or LabelSampler"):
            torchio.Queue(subjects, 12, 4, PATCH, wrong)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="verbose has no effect"):
        torchio.Queue(subjects, 12, 4, PATCH, torchio.ImageSampler, verbose=True)


def test_the_last_place_of_a_patch_is_drawn_too() -> None:
    subject = torchio.Subject(torchio.Image("t1", np.zeros((5, 4, 4), np.uint8)))
    patches = itertools.islice(torchio.ImageSampler(subject, 4), 50)
    assert {int(patch["index_ini"][0]) for patch in patches} == {0, 1}


def test_a_dataloader_gives_whole_subjects(subjects: list[torchio.Subject]) -> None:
    [batch] = DataLoader(torchio.ImagesDataset([subjects[0], subjects[0]]), batch_size=2)
    for name in ("t1", "label"):
        voxels = subjects[0][name].data
        assert torch.equal(batch[name][torchio.DATA], torch.stack([voxels, voxels]))


def test_transforms_are_those_of_torchio() -> None:
    installed = pytest.importorskip("torchio")

    class Mine(installed.RandomFlip):  # type: ignore[misc]
        pass

    assert issubclass(torchio.RandomFlip, installed.RandomFlip)
    subject = torchio.Subject(torchio.Image("t1", np.arange(64).reshape(4, 4, 4)))
    dataset = torchio.ImagesDataset([subject], transform=Mine(axes=0, flip_probability=1))
    for patch in torchio.Queue(dataset, 5, 3, 4, torchio.ImageSampler):
        assert torch.equal(patch["t1"].data, subject["t1"].data.flip(1))


def test_images_of_a_subject_are_given_one_by_one_or_in_a_list() -> None:
    t1 = torchio.Image("t1", np.zeros((5, 4, 4)))
    label = torchio.Image("label", np.zeros((5, 4, 4), np.uint8), torchio.LABEL)
    for subject in (torchio.Subject(t1, label), torchio.Subject([t1, label])):
        assert list(subject.images) == ["t1", "label"]
        assert isinstance(subject["label"], zp.LabelMap)
    with pytest.raises(OptionError, match="need names that differ"):
        torchio.Subject(t1, t1)
