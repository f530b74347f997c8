"""TorchIO 0.18 to 1.x on zpatch: its examples, its locations and volumes, and the stated differences."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch.utils.data import DataLoader, DistributedSampler, Subset

import zpatch as zp
import zpatch.compat.torchio1 as tio
from zpatch.compat.transforms import from_torchio, on_tensors
from zpatch.errors import IncompleteCoverageError, ModelError, OptionError, PatchSizeError
from zpatch.images.image import stored_image

# Torch says so where there are more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

PATCH = 8

# A patch as values: first voxel, and the voxels of t1.
Item = tuple[tuple[int, ...], bytes]


@pytest.fixture(scope="module")
def subjects(cohort_source: Path, cache: None) -> list[tio.Subject]:
    """The small cohort as a script of TorchIO 1 names it."""
    folders = sorted(folder for folder in cohort_source.iterdir() if folder.is_dir())
    assert folders
    return [
        tio.Subject(
            t1=tio.ScalarImage(next(folder.glob("t1.nii*"))),
            seg=tio.LabelMap(next(folder.glob("seg.nii*"))),
            name=folder.name,
            age=40 + number,
        )
        for number, folder in enumerate(folders)
    ]


@pytest.fixture(scope="module")
def brain(subjects: list[tio.Subject]) -> tio.Subject:
    """A subject with a map to sample by."""
    weights = np.random.default_rng(1).random(subjects[0].spatial_shape, np.float32)
    affine = subjects[0].t1.affine
    return tio.Subject(
        subjects[0], sampling_map=tio.Image(tensor=weights, affine=affine, type=tio.SAMPLING_MAP)
    )


def in_memory(*shape: int, seed: int = 0, **more: Any) -> tio.Subject:
    voxels = np.random.default_rng(seed).random(shape, np.float32)
    labels = np.random.default_rng(seed + 1).integers(0, 4, shape, np.uint8)
    return tio.Subject(t1=tio.ScalarImage(tensor=voxels), seg=tio.LabelMap(tensor=labels), **more)


def native(subject: tio.Subject) -> zp.Subject:
    """The same images as zpatch alone opens them."""
    images = {
        name: stored_image(image.folder, image.record)
        for name, image in subject.images.items()
        if image.folder and image.record
    }
    return zp.Subject.of(images, name=subject.name)


def drawn_seed(seed: int = 5) -> int:
    """What the next sampler or queue will draw, after ``torch.manual_seed``."""
    torch.manual_seed(seed)
    number = int(torch.randint(2**63 - 1, ()))
    torch.manual_seed(seed)
    return number


def items(patches: Iterable[Any], limit: int | None = None) -> list[Item]:
    """Patches of either API as values, those of a batch one by one."""
    found: list[Item] = []
    for patch in itertools.islice(patches, limit):
        if isinstance(patch, zp.Patch):
            found.append((patch.location.index, patch.t1.data.contiguous().numpy().tobytes()))
            continue
        where, data = patch[tio.LOCATION], patch["t1"][tio.DATA]
        for place, voxels in [(where, data)] if where.ndim == 1 else zip(where, data, strict=True):
            found.append((tuple(place.tolist()[:3]), voxels.contiguous().numpy().tobytes()))
    return found


# The examples of the documentation


def test_training_with_a_queue_gives_the_patches_of_the_native_queue(subjects: list[tio.Subject]) -> None:
    seed = drawn_seed()
    patch_size, queue_length, samples_per_volume = PATCH, 12, 5
    sampler = tio.data.UniformSampler(patch_size)
    subjects_dataset = tio.SubjectsDataset(subjects)
    patches_queue = tio.Queue(subjects_dataset, queue_length, samples_per_volume, sampler, num_workers=2)
    patches_loader = DataLoader(patches_queue, batch_size=4, num_workers=0)
    found = []
    model = torch.nn.Identity()
    for _ in range(2):
        for patches_batch in patches_loader:
            inputs = patches_batch["t1"][tio.DATA]
            targets = patches_batch["seg"][tio.DATA]
            assert model(inputs).shape == targets.shape == (len(inputs), 1, PATCH, PATCH, PATCH)
            assert patches_batch[tio.LOCATION].shape == (len(inputs), 6)
            found += items([patches_batch])
    patches_queue.close()
    same = zp.Queue([native(s) for s in subjects], zp.UniformSampler(PATCH), 12, 5, seed=seed)
    assert found == items(same) + items(same)
    assert len(found) == 2 * 5 * len(subjects)


def test_weighted_sampling_is_that_of_the_native_sampler(brain: tio.Subject) -> None:
    rng = drawn_seed()
    sampler = tio.data.WeightedSampler(PATCH, "sampling_map")
    found = items(sampler(brain), 5)
    assert found == items(zp.WeightedSampler(PATCH, "sampling_map")(brain, rng=rng), 5)
    assert len(set(found)) > 1


def test_label_sampling_is_that_of_the_native_sampler(brain: tio.Subject) -> None:
    rng = drawn_seed()
    probabilities = {0: 0.5, 1: 0.5}
    sampler = tio.data.LabelSampler(patch_size=PATCH, label_name="seg", label_probabilities=probabilities)
    found = items(sampler(brain, num_patches=10))
    expected = zp.LabelSampler(PATCH, "seg", probabilities)(native(brain), 10, rng=rng)
    assert found == items(expected)
    first = next(iter(tio.LabelSampler(PATCH)(brain)))
    assert first.seg.data[0, PATCH // 2, PATCH // 2, PATCH // 2] > 0


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@pytest.mark.parametrize("padding_mode", [None, "reflect", 7])
def test_dense_inference_is_that_of_the_native_sampler_and_aggregator(
    brain: tio.Subject, mode: str, padding_mode: Any, full: bool
) -> None:
    if not full and (mode, padding_mode) not in (("crop", None), ("average", "reflect"), ("hann", 7)):
        pytest.skip("each mode with each padding needs --full")  # they concern different classes
    patch_overlap = 4, 4, 2
    patch_size = 12, 12, 10
    grid_sampler = tio.inference.GridSampler(brain, patch_size, patch_overlap, padding_mode)
    patch_loader = DataLoader(grid_sampler, batch_size=4)
    aggregator = tio.inference.GridAggregator(grid_sampler, overlap_mode=mode)
    model = torch.nn.Conv3d(1, 3, 3, padding=1).eval()
    with torch.no_grad():
        for patches_batch in patch_loader:
            input_tensor = patches_batch["t1"][tio.DATA]
            locations = patches_batch[tio.LOCATION]
            aggregator.add_batch(model(input_tensor.float()), locations)
    output_tensor = aggregator.get_output_tensor()
    assert output_tensor.shape == (3, *brain.spatial_shape)

    mode_of_pad, fill = ("constant", 7) if padding_mode == 7 else (padding_mode, 0)
    grid = zp.GridSampler(brain, patch_size, patch_overlap, mode_of_pad, fill)
    same = zp.PatchAggregator(brain.spatial_shape, mode, grid=grid)
    with torch.no_grad():
        for batch in zp.SubjectsLoader(grid, batch_size=4):
            same.add_batch(model(batch.t1.data.float()), batch.patch_location)
    torch.testing.assert_close(output_tensor, same.get_output(), rtol=0, atol=1e-6)


def test_distributed_training_deals_out_the_subjects(subjects: list[tio.Subject]) -> None:
    subjects_dataset = tio.SubjectsDataset(subjects)
    seen: list[list[set[str]]] = []
    for rank in range(2):
        subject_sampler: Any = DistributedSampler(
            subjects_dataset, num_replicas=2, rank=rank, shuffle=True, drop_last=True
        )
        patches_queue = tio.Queue(
            subjects_dataset, 10, 3, tio.data.UniformSampler(PATCH), subject_sampler=subject_sampler
        )
        assert (patches_queue.num_subjects, len(patches_queue)) == (
            len(subjects) // 2,
            3 * (len(subjects) // 2),
        )
        seen.append([])
        for epoch in range(4):
            subject_sampler.set_epoch(epoch)
            names = [
                name for batch in tio.SubjectsLoader(patches_queue, batch_size=2) for name in batch["name"]
            ]
            assert len(names) == len(patches_queue)
            seen[-1].append(set(names))
    assert all(a.isdisjoint(b) for a, b in zip(*seen, strict=True))
    assert len(set(map(frozenset, seen[0]))) > 1  # the caller's epochs count


# Patches and batches


def test_a_patch_is_a_mapping_with_attributes(brain: tio.Subject) -> None:
    [patch] = tio.UniformSampler((4, 5, 6))(brain, 1)
    ini, fin = patch[tio.LOCATION].tolist()[:3], patch[tio.LOCATION].tolist()[3:]
    assert [b - a for a, b in zip(ini, fin, strict=True)] == [4, 5, 6]
    assert list(patch) == ["t1", "seg", "sampling_map", "name", "age", "location"]
    assert patch["t1"][tio.DATA] is patch.t1.data
    assert patch["t1"][tio.DATA].shape == (1, 4, 5, 6)
    assert patch.t1.type, patch.seg.type == (tio.INTENSITY, tio.LABEL)
    assert patch.age == 40
    np.testing.assert_allclose(patch.t1.affine[:3, 3], (brain.t1.affine @ [*ini, 1])[:3])
    box = tuple(slice(a, b) for a, b in zip(ini, fin, strict=True))
    assert torch.equal(patch.t1.data, brain.t1.data[:, *box])
    with pytest.raises(AttributeError, match="no 'flair' here"):
        patch.flair  # noqa: B018 - the access is what is tested


def test_a_patch_and_its_images_have_a_shape_and_are_saved(brain: tio.Subject, tmp_path: Path) -> None:
    [patch] = tio.LabelSampler((4, 5, 6), "seg")(brain, 1)
    [batch] = DataLoader([patch, patch], batch_size=2)  # type: ignore[arg-type]
    assert patch.shape == patch.t1.shape == (1, 4, 5, 6)
    assert batch.shape == batch.seg.shape == (2, 1, 4, 5, 6)
    for one in (patch, patch.seg, batch, batch.t1):
        assert one.spatial_shape == (4, 5, 6)
    for name, made in (("t1", tio.ScalarImage), ("seg", tio.LabelMap)):
        for image in (patch[name], brain[name]):
            image.save(tmp_path / f"{name}.nii.gz")
            again = made(tmp_path / f"{name}.nii.gz")
            assert torch.equal(again.data, image.data)
            np.testing.assert_allclose(again.affine, image.affine, atol=1e-5)


@pytest.mark.parametrize("loader", [DataLoader, tio.SubjectsLoader])
@pytest.mark.parametrize("workers", [0, 1])
def test_whole_subjects_of_a_dataset_are_batched(loader: Any, workers: int) -> None:
    subjects = [in_memory(5, 6, 7, seed=n, number=n, name=f"sub-{n}") for n in range(3)]
    dataset = tio.SubjectsDataset(subjects, transform=on_tensors(torch.neg))
    for whole in (dataset, Subset(dataset, [0, 1, 2])):
        batches = list(loader(whole, batch_size=2, num_workers=workers))
        assert [batch["name"] for batch in batches] == [["sub-0", "sub-1"], ["sub-2"]]
        assert batches[0]["number"].tolist() == [0, 1]
        assert torch.equal(batches[0]["t1"][tio.DATA], -torch.stack([s.t1.data for s in subjects[:2]]))
        assert torch.equal(batches[1]["seg"][tio.DATA][0], subjects[2].seg.data)
        assert batches[0].shape == (2, 1, 5, 6, 7)


@pytest.mark.parametrize("loader", [DataLoader, tio.SubjectsLoader])
def test_batches_are_mappings_with_attributes_too(brain: tio.Subject, loader: Any) -> None:
    queue = tio.Queue([brain], 6, 6, tio.UniformSampler(PATCH))
    batches = list(loader(queue, batch_size=4))
    assert [len(batch["t1"][tio.DATA]) for batch in batches] == [4, 2]
    batch = batches[0]
    assert batch.t1.data.shape == batch["seg"][tio.DATA].shape == (4, 1, PATCH, PATCH, PATCH)
    assert batch.t1.affine.shape == (4, 4, 4)
    assert batch[tio.LOCATION].shape == (4, 6)
    assert batch["name"] == [brain.name] * 4
    assert batch.age.tolist() == [40] * 4


def test_the_loader_leaves_entries_that_cannot_be_stacked_as_lists() -> None:
    queue = tio.Queue([in_memory(9, 9, 9, notes=None, tags=["a"])], 6, 2, tio.UniformSampler(PATCH))
    [batch] = tio.SubjectsLoader(queue, batch_size=2)
    assert (batch.notes, batch.tags) == ([None, None], [["a"], ["a"]])


def test_a_subject_of_a_cohort_carries_its_images_and_its_name(cohort: zp.Cohort) -> None:
    queue = tio.Queue(tio.SubjectsDataset(cohort), 6, 2, tio.LabelSampler(PATCH))
    patches = list(queue)
    assert sorted(patch["name"] for patch in patches) == sorted(2 * cohort.names)
    [patch] = tio.UniformSampler(PATCH)(cohort[0], 1)
    assert set(patch) == {*cohort[0].images, "name", "location"}


# The queue


def test_num_samples_of_a_subject_takes_precedence() -> None:
    subjects = [
        in_memory(10, 10, 10),
        in_memory(10, 10, 10, num_samples=np.int64(9)),
        in_memory(9, 9, 9, num_samples=1),
    ]
    for number, subject in enumerate(subjects):
        subject.metadata["number"] = number
    queue = tio.Queue(subjects, 5, 4, tio.UniformSampler(PATCH))
    for _ in range(2):
        found = [patch["number"] for patch in queue]
        assert [found.count(number) for number in range(3)] == [4, 9, 1]
    assert len(queue) == queue.iterations_per_epoch == 14
    for wrong in (0, -1, 2.5, "3", np.int64(0)):
        with pytest.raises(OptionError, match="num_samples of subject 0 must be at least 1"):
            tio.Queue([in_memory(9, 9, 9, num_samples=wrong)], 5, 4, tio.UniformSampler(PATCH))


def test_each_iteration_is_an_epoch_also_after_one_that_was_broken_off(subjects: list[tio.Subject]) -> None:
    seed = drawn_seed()
    queue = tio.Queue(subjects, 7, 5, tio.UniformSampler(PATCH))
    first = items(queue, 3)
    second, third = items(queue), items(queue)
    same = zp.Queue([native(s) for s in subjects], zp.UniformSampler(PATCH), 7, 5, seed=seed)
    assert first == items(same)[:3]
    assert [second, third] == [items(same), items(same)]


@pytest.mark.parametrize(
    "sampler", [tio.UniformSampler(PATCH), tio.LabelSampler(PATCH)], ids=["uniform", "label"]
)
def test_torch_manual_seed_decides_the_draws(subjects: list[tio.Subject], sampler: Any) -> None:
    def drawn(seed: int) -> list[Item]:
        torch.manual_seed(seed)
        queue = tio.Queue(subjects, 7, 2, sampler)
        return items(sampler(subjects[0], 3)) + items(queue)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert items(sampler(subjects[0], 3)) != items(sampler(subjects[0], 3))


def test_shuffling_follows_the_options() -> None:
    subjects = [in_memory(9, 9, 9, seed=n, number=n) for n in range(6)]
    queue = tio.Queue(subjects, 50, 2, tio.UniformSampler(PATCH), None, 0, False, False)
    assert [patch["number"] for patch in queue] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    queue = tio.Queue(subjects, 50, 2, tio.UniformSampler(PATCH), shuffle_patches=False)
    numbers = [patch["number"] for patch in queue]
    assert numbers[::2] == numbers[1::2] != sorted(numbers[::2])
    queue = tio.Queue(subjects, 50, 2, tio.UniformSampler(PATCH), [4, 1, 1])
    patches = list(queue)
    assert sorted(patch["number"] for patch in patches) == [1, 1, 1, 1, 4, 4]
    assert len(set(items(patches))) > 3
    with pytest.raises(OptionError, match="needs a sampler of this module"):
        tio.Queue(subjects, 50, 2, zp.UniformSampler(PATCH))  # type: ignore[arg-type]


def test_labels_are_of_all_channels_where_no_probabilities_are_given() -> None:
    labels = np.zeros((2, 9, 9, 9), np.uint8)
    labels[1, 4, 4, 5] = 1
    subject = tio.Subject(seg=tio.LabelMap(tensor=labels))
    places = [patch[tio.LOCATION].tolist() for patch in tio.LabelSampler(4, "seg")(subject, 3)]
    assert places == [[2, 2, 3, 6, 6, 7]] * 3


def test_a_grid_in_a_queue_gives_the_first_patches_of_each_subject() -> None:
    subjects = [in_memory(10, 10, 10), in_memory(9, 20, 9, num_samples=99)]
    grid = tio.GridSampler(patch_size=PATCH, patch_overlap=2, padding_mode="edge")
    queue = tio.Queue(subjects, 5, 3, grid, shuffle_subjects=False, shuffle_patches=False)
    found = [patch[tio.LOCATION].tolist() for patch in queue]
    each = [tio.GridSampler(subject, PATCH, 2, "edge").locations.tolist() for subject in subjects]
    assert found == each[0][:3] + each[1]


def test_a_queue_states_the_memory_that_it_takes() -> None:
    small, large = in_memory(9, 9, 9), tio.Subject(t1=np_image(3, 20, 20, 20))
    queue = tio.Queue([small, large], 20, 4, tio.UniformSampler(PATCH))
    assert queue.get_max_memory() == queue.get_max_memory(large) > queue.get_max_memory(small)
    assert queue.get_max_memory(small) >= 20 * PATCH**3 * 5
    dealt = tio.Queue([small, large], 20, 4, tio.UniformSampler(PATCH), subject_sampler=[1, 1])
    state = torch.get_rng_state()
    assert dealt.get_max_memory(small) == queue.get_max_memory(small)
    assert torch.equal(torch.get_rng_state(), state)
    assert queue.get_max_memory_pretty(small).endswith("KiB")
    assert repr(queue) == "Queue(max_length=20, num_subjects=2, samples_per_volume=4, iterations_per_epoch=8)"


def np_image(*shape: int) -> tio.ScalarImage:
    return tio.ScalarImage(tensor=np.zeros(shape, np.float32))


@pytest.mark.parametrize("name", ["Image", "Subject", "GridSampler", "UniformSampler", "Queue"])
def test_pickles_name_classes_by_the_public_module_or_by_their_own(name: str) -> None:
    """A pickle of an earlier version has ``zpatch.compat.torchio1``."""
    cls = getattr(tio, name)
    assert pickle.loads(f"czpatch.compat.torchio1\n{name}\n.".encode()) is cls
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_queue_refuses_a_single_subject() -> None:
    with pytest.raises(OptionError, match=r"'subject' is a single one; say Queue\(\[subject\], ...\)"):
        tio.Queue(in_memory(8, 8, 8), 4, 2, tio.UniformSampler(4))


def test_verbose_warns_that_it_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="verbose has no effect"):
        tio.Queue([in_memory(9, 9, 9)], 5, 4, tio.UniformSampler(PATCH), verbose=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_transform_of_a_dataset_runs_on_each_patch_of_its_subjects(workers: int) -> None:
    plain = in_memory(9, 9, 9)
    dataset = tio.SubjectsDataset([plain], transform=on_tensors(torch.neg))
    assert len(dataset) == 1
    assert dataset.dry_iter() == [plain]
    patches = [
        *tio.Queue(dataset, 5, 2, tio.UniformSampler(PATCH), num_workers=workers),
        *tio.UniformSampler(PATCH)(dataset[0], 2),
        *tio.GridSampler(dataset[0], PATCH),
        tio.GridSampler(dataset[0], PATCH)[0],
    ]
    assert len(patches) == 2 + 2 + 8 + 1
    for patch in patches:
        box = tuple(slice(a, a + PATCH) for a in patch[tio.LOCATION].tolist()[:3])
        assert torch.equal(patch.t1.data, -plain.t1.data[:, *box])
        assert torch.equal(patch.seg.data, plain.seg.data[:, *box])
    for part in ([dataset[0]], torch.utils.data.Subset(dataset, [0])):
        with pytest.raises(OptionError, match="split the list of subjects instead"):
            tio.Queue(part, 5, 2, tio.UniformSampler(PATCH))  # type: ignore[arg-type]
    dataset.set_transform(None)
    assert dataset[0] is plain


# Images and subjects


def test_images_are_made_of_the_sources_of_torchio(subjects: list[tio.Subject], tmp_path: Path) -> None:
    image = subjects[0].t1
    assert isinstance(image, zp.ScalarImage)
    assert isinstance(subjects[0].seg, zp.LabelMap)
    assert image.folder is not None
    stored = tio.ScalarImage(str(image.folder))
    assert torch.equal(stored.data, subjects[0].t1.data)
    assert torch.equal(stored[tio.DATA], subjects[0].t1[tio.DATA])
    assert np.array_equal(stored[tio.AFFINE], image.affine)
    affine = np.diag([2.0, 2, 3, 1])
    given = tio.Image(tensor=torch.ones(2, 4, 5, 6), affine=affine, type=tio.LABEL)
    assert (type(given), given.shape, given.spacing) == (tio.LabelMap, (2, 4, 5, 6), (2, 2, 3))
    assert given[tio.TYPE] == tio.LABEL
    assert type(tio.Image(image)) is tio.ScalarImage
    assert np.array_equal(tio.Image(image).affine, image.affine)
    assert torch.equal(pickle.loads(pickle.dumps(given)).data, given.data)
    assert given.map(lambda array: array + 1).data.unique().tolist() == [2]
    with pytest.raises(KeyError):
        given["history"]


def test_an_image_of_nothing_or_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="made of a path or of a tensor"):
        tio.ScalarImage()
    with pytest.raises(OptionError, match="made of a path or of a tensor"):
        tio.ScalarImage(tmp_path, tensor=np.zeros((3, 3, 3)))
    with pytest.raises(OptionError, match="type must be one of intensity, label, sampling_map"):
        tio.Image(tensor=np.zeros((3, 3, 3)), type="scalar")
    with pytest.raises(OptionError, match="a LabelMap is not of type 'intensity'"):
        tio.LabelMap(tensor=np.zeros((3, 3, 3)), type=tio.INTENSITY)


def test_a_subject_is_a_mapping_of_images_and_all_else() -> None:
    image, labels = np_image(3, 4, 5), tio.LabelMap(tensor=np.zeros((3, 4, 5), np.uint8))
    subject = tio.Subject({"t1": image, "age": 45}, seg=labels)
    assert dict(subject) == {"t1": image, "seg": labels, "age": 45}
    assert subject.t1 is subject["t1"] is image
    assert (subject.age, subject["age"], subject.get("sex"), len(subject)) == (45, 45, None, 3)
    assert "seg" in subject
    again = pickle.loads(pickle.dumps(subject))
    assert (list(again), again.age, again.seg.shape) == (list(subject), 45, (1, 3, 4, 5))
    assert (subject.shape, subject.spatial_shape) == ((1, 3, 4, 5), (3, 4, 5))
    assert subject.get_images() == [image]
    assert subject.get_images(intensity_only=False) == [image, labels]
    with pytest.raises(KeyError, match="no image 't2' in subject"):
        subject["t2"]
    with pytest.raises(OptionError, match="one dictionary"):
        tio.Subject({"t1": image}, {"seg": labels})
    with pytest.raises(OptionError, match="must be a Subject, not dict"):
        next(tio.UniformSampler(2)({"t1": image}))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least one subject"):
        tio.SubjectsDataset([])


def test_name_and_split_of_a_subject_keep_their_values() -> None:
    subject = in_memory(9, 9, 9, split="train", name=7)
    assert (subject.split, subject.name) == (subject["split"], subject["name"]) == ("train", 7)
    patches = list(tio.Queue([subject], 5, 3, tio.UniformSampler(PATCH), num_workers=1))
    assert [(patch.split, patch.name) for patch in patches] == [("train", 7)] * 3
    assert (in_memory(9, 9, 9).split, in_memory(9, 9, 9).name) == (None, "subject")


def test_images_of_a_subject_with_different_affines_are_not_sampled_together() -> None:
    sampler = tio.UniformSampler(PATCH)

    def subject_moved_by(millimetres: float) -> tio.Subject:
        affine = np.diag([2.0, 2, 3, 1])
        image = tio.ScalarImage(tensor=np.zeros((9, 9, 9)), affine=affine)
        affine[0, 3] = millimetres
        return tio.Subject(t1=image, seg=tio.LabelMap(tensor=np.zeros((9, 9, 9), np.uint8), affine=affine))

    same, other = subject_moved_by(1e-7), subject_moved_by(0.1)
    assert len(list(sampler(same, 2))) == len(list(tio.Queue([same], 5, 2, sampler))) == 2
    for patches in (sampler(other, 2), tio.Queue([other], 5, 2, sampler)):
        with pytest.raises(OptionError, match="'t1' and 'seg' of subject 'subject' have different affines"):
            list(patches)


def test_a_grid_without_a_subject_is_for_a_queue_only() -> None:
    grid = tio.GridSampler(patch_size=4)
    assert len(list(grid(in_memory(4, 4, 8)))) == 2
    with pytest.raises(OptionError, match="no subject"):
        grid()
    with pytest.raises(OptionError, match="leave out num_patches"):
        grid(in_memory(4, 4, 8), 3)
    with pytest.raises(OptionError, match="patch_size is missing"):
        tio.GridSampler(in_memory(4, 4, 8))
    with pytest.raises(PatchSizeError):
        tio.GridSampler(in_memory(4, 4, 8), 5)


# The aggregator


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@given(data=st.data())
def test_a_network_that_makes_its_patches_smaller_gives_a_smaller_volume(
    mode: str, data: st.DataObject
) -> None:
    factor = data.draw(st.integers(2, 3))
    size = [factor * data.draw(st.integers(2, 4)) for _ in range(3)]
    overlap = [2 * data.draw(st.integers(0, (p - 1) // 2)) for p in size]
    shape = [p + data.draw(st.integers(0, 13)) for p in size]
    padding_mode = data.draw(st.sampled_from([None, "edge"]))
    grid = tio.GridSampler(in_memory(*shape), size, overlap, padding_mode)
    aggregator = tio.GridAggregator(grid, mode, downsampling_factor=factor)
    field = torch.ones(1, 2, *(p // factor for p in size))
    for patch in grid:
        aggregator.add_batch(field, patch[tio.LOCATION][None])
    output = aggregator.get_output_tensor()
    assert output.shape == (2, *(n // factor for n in shape))
    torch.testing.assert_close(output, torch.ones_like(output))


def test_an_output_of_another_size_is_refused_with_the_advice_that_helps_here() -> None:
    grid = tio.GridSampler(in_memory(8, 8, 8), 4)
    for factor in (1, 2):
        aggregator = tio.GridAggregator(grid, downsampling_factor=factor)
        with pytest.raises(ModelError, match="or downsampling_factor= must say how it scales"):
            aggregator.add_batch(torch.ones(1, 1, 3, 3, 3), grid[0][tio.LOCATION][None])


def test_a_patch_that_is_missing_is_an_error() -> None:
    grid = tio.GridSampler(in_memory(8, 8, 8), 4)
    aggregator = tio.GridAggregator(grid)
    aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), grid[0][tio.LOCATION][None])
    with pytest.raises(IncompleteCoverageError):
        aggregator.get_output_tensor()


# The installed TorchIO


@pytest.fixture(scope="module")
def torchio() -> Any:
    return pytest.importorskip("torchio")


def in_torchio(torchio: Any, subject: tio.Subject) -> Any:
    kinds = {"scalar": torchio.ScalarImage, "label": torchio.LabelMap, "sampling": torchio.ScalarImage}
    return torchio.Subject(
        {name: kinds[image.kind](tensor=image[tio.DATA]) for name, image in subject.items()}
    )


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], Any]:
    """Shape, patch size, overlap and padding mode that TorchIO takes."""
    shape = [draw(st.integers(4, 14)) for _ in range(3)]
    size = [draw(st.integers(1, 9)) for _ in range(3)]
    overlap = [2 * draw(st.integers(0, (p - 1) // 2)) for p in size]
    mode = draw(st.sampled_from([None, "constant", "edge", "reflect", "symmetric", "wrap", 3]))
    assume(all(p <= n + (o if mode is not None else 0) for n, p, o in zip(shape, size, overlap, strict=True)))
    return shape, size, overlap, mode


@given(case=grids())
def test_the_patches_of_a_grid_equal_those_of_torchio(torchio: Any, case: tuple[Any, ...]) -> None:
    shape, size, overlap, mode = case
    subject = in_memory(*shape)
    ours = tio.GridSampler(subject, size, overlap, mode)
    theirs = torchio.GridSampler(in_torchio(torchio, subject), size, overlap, mode)
    assert ours.locations.tolist() == theirs.locations.tolist()
    assert len(ours) == len(theirs)
    for number in {0, len(ours) // 2, len(ours) - 1}:
        assert torch.equal(ours[number].t1.data, theirs[number].t1.data)
        assert torch.equal(ours[number][tio.LOCATION], theirs[number][torchio.LOCATION])


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@given(case=grids(), seed=st.integers(0, 1000))
def test_the_volume_of_an_aggregator_is_that_of_torchio(
    torchio: Any, mode: str, case: tuple[Any, ...], seed: int
) -> None:
    shape, size, overlap, padding_mode = case
    subject = in_memory(*shape)
    ours = tio.GridSampler(subject, size, overlap, padding_mode)
    theirs = torchio.GridSampler(in_torchio(torchio, subject), size, overlap, padding_mode)
    batch = torch.rand(len(ours), 2, *size, generator=torch.Generator().manual_seed(seed))
    volumes = []
    for sampler, module in ((ours, tio), (theirs, torchio)):
        aggregator = module.GridAggregator(sampler, overlap_mode=mode)
        places = torch.from_numpy(np.asarray(sampler.locations))
        for first in range(0, len(batch), 7):
            aggregator.add_batch(batch[first : first + 7], places[first : first + 7])
        volumes.append(aggregator.get_output_tensor())
    torch.testing.assert_close(volumes[0], volumes[1], rtol=0, atol=1e-6)


def test_a_smaller_volume_is_that_of_torchio_where_nothing_overlaps(torchio: Any) -> None:
    subject = in_memory(14, 12, 17)
    ours = tio.GridSampler(subject, (4, 6, 8))
    theirs = torchio.GridSampler(in_torchio(torchio, subject), (4, 6, 8))
    batch = torch.rand(len(ours), 2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    volumes = []
    for sampler, module in ((ours, tio), (theirs, torchio)):
        aggregator = module.GridAggregator(sampler, downsampling_factor=2)
        aggregator.add_batch(batch, torch.from_numpy(np.asarray(sampler.locations)))
        volumes.append(aggregator.get_output_tensor())
    assert torch.equal(*volumes)


def starts(patches: Iterable[Any]) -> NDArray[np.int64]:
    return np.array([patch["location"].tolist()[:3] for patch in patches])


def locations_of(sampler: Any, subject: tio.Subject, count: int) -> NDArray[np.int64]:
    return np.array([location.index for location in sampler.native.locations(subject, count, rng=7)])


def assert_drawn_from(places: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
    """Chi-square of places against weights; none where a weight is 0."""
    counts = np.zeros(weights.shape)
    np.add.at(counts, tuple(places.T), 1)
    assert counts[weights == 0].sum() == 0
    expected = weights[weights > 0] / weights.sum() * len(places)
    assert stats.chisquare(counts[weights > 0], expected).pvalue > 1e-3


def centres_to_starts(weights: NDArray[np.float64], size: Sequence[int]) -> NDArray[np.float64]:
    box = tuple(slice(p // 2, n - (p - 1) // 2) for n, p in zip(weights.shape, size, strict=True))
    return weights[box]


def test_uniform_locations_are_distributed_as_in_torchio(torchio: Any) -> None:
    subject, size = in_memory(6, 5, 5), (4, 4, 3)
    torch.manual_seed(3)
    theirs = starts(torchio.UniformSampler(size)(in_torchio(torchio, subject), 800))
    assert_drawn_from(theirs, np.ones((3, 2, 3)))
    assert_drawn_from(locations_of(tio.UniformSampler(size), subject, 8000), np.ones((3, 2, 3)))


@pytest.mark.parametrize("size", [(3, 3, 3), (4, 3, 2), (1, 2, 6)])
def test_weighted_locations_are_distributed_as_in_torchio(torchio: Any, size: tuple[int, int, int]) -> None:
    weights = np.random.default_rng(2).integers(0, 5, (7, 6, 7)).astype(np.float32)
    subject = tio.Subject(in_memory(7, 6, 7), weights=tio.Image(tensor=weights, type=tio.SAMPLING_MAP))
    sampler = torchio.WeightedSampler(size, "weights")
    other = in_torchio(torchio, subject)
    exact = sampler.process_probability_map(sampler.get_probability_map(other), other)
    found = locations_of(tio.WeightedSampler(size, "weights"), subject, 20_000)
    assert_drawn_from(found, centres_to_starts(exact, size))


@pytest.mark.parametrize("probabilities", [None, {0: 0, 1: 2, 2: 1, 3: 1}, {0: 1, 3: 4}, {2: 1, 9: 5}])
@pytest.mark.parametrize("size", [(3, 3, 3), (4, 3, 2)])
def test_label_locations_are_distributed_as_in_torchio(
    torchio: Any, probabilities: Any, size: tuple[int, int, int]
) -> None:
    subject = in_memory(7, 6, 7)
    sampler = torchio.LabelSampler(size, "seg", probabilities)
    other = in_torchio(torchio, subject)
    exact = sampler.process_probability_map(sampler.get_probability_map(other), other)
    found = locations_of(tio.LabelSampler(size, "seg", probabilities), subject, 20_000)
    assert_drawn_from(found, centres_to_starts(exact, size))


@pytest.mark.filterwarnings("ignore:Using TorchIO images without a SubjectsLoader")
def test_whole_subjects_are_batched_as_torchio_does(torchio: Any) -> None:
    subjects = [in_memory(5, 6, 7, seed=n) for n in range(2)]
    theirs = torchio.SubjectsDataset([in_torchio(torchio, subject) for subject in subjects])
    for ours, other in ((tio.SubjectsLoader, torchio.SubjectsLoader), (DataLoader, DataLoader)):
        [found] = ours(tio.SubjectsDataset(subjects), batch_size=2)
        [wanted] = other(theirs, batch_size=2)
        for name in ("t1", "seg"):
            assert torch.equal(found[name][tio.DATA], wanted[name][torchio.DATA])


def test_torchio_refuses_images_with_different_affines_too(torchio: Any) -> None:
    voxels = torch.zeros(1, 9, 9, 9)
    moved = torchio.LabelMap(tensor=voxels, affine=np.diag([1.0, 1, 1.1, 1]))
    with pytest.raises(RuntimeError, match="not in the same space"):
        torchio.UniformSampler(4)(torchio.Subject(t1=torchio.ScalarImage(tensor=voxels), seg=moved))


def test_the_constants_of_torchio_are_here(torchio: Any) -> None:
    names = [name for name in tio.__all__ if name.isupper()]
    assert {"DATA", "LOCATION", "CHANNELS_DIMENSION"} < set(names)
    assert [getattr(tio, name) for name in names] == [getattr(torchio, name) for name in names]


@pytest.mark.parametrize("workers", [0, 1])
def test_transforms_of_torchio_act_on_subjects_and_then_on_patches(torchio: Any, workers: int) -> None:
    subject = in_memory(9, 9, 9)
    transform = torchio.Compose(
        [torchio.RescaleIntensity((0, 1)), tio.RandomFlip(axes=0, flip_probability=1)]
    )
    dataset = tio.SubjectsDataset([subject], transform=transform)
    for patch in tio.Queue(dataset, 5, 3, tio.UniformSampler(PATCH), num_workers=workers):
        box = tuple(slice(a, a + PATCH) for a in patch[tio.LOCATION].tolist()[:3])
        assert torch.equal(patch.seg.data, subject.seg.data[:, *box].flip(1))
        low, high = subject.t1.data.min(), subject.t1.data.max()
        wanted = (subject.t1.data[:, *box].flip(1) - low) / (high - low)
        torch.testing.assert_close(patch.t1.data, wanted.float())


def test_a_subclass_of_a_torchio_transform_runs_on_patches(torchio: Any) -> None:
    class Doubled(torchio.Transform):  # type: ignore[misc]
        def apply_transform(self, subject: Any) -> Any:
            subject.t1.set_data(2 * subject.t1.data)
            return subject

    subject = in_memory(9, 9, 9)
    with pytest.raises(
        OptionError, match=r"Doubled is not known here.*from_torchio\(Doubled\(...\), on='patch'\)"
    ):
        tio.SubjectsDataset([subject], transform=Doubled())
    dataset = tio.SubjectsDataset([subject], transform=from_torchio(Doubled(), on="patch"))
    for patch in [*tio.Queue(dataset, 5, 3, tio.UniformSampler(PATCH)), dataset[0].whole()]:
        ini, fin = patch[tio.LOCATION].reshape(2, 3).tolist()
        box = tuple(slice(a, b) for a, b in zip(ini, fin, strict=True))
        assert torch.equal(patch.t1.data, 2 * subject.t1.data[:, *box])


def test_names_that_are_no_transforms_are_attribute_errors(torchio: Any) -> None:
    with pytest.raises(AttributeError, match="RandomFoo"):
        tio.RandomFoo  # noqa: B018 - the access is what is tested
    assert not hasattr(tio, "__path__")


def test_images_have_the_names_that_scripts_use_around_patches() -> None:
    affine = np.diag([-1.0, 2, 3, 1])
    affine[:3, 3] = 4, 5, 6
    image = tio.ScalarImage(tensor=torch.arange(24).reshape(1, 2, 3, 4), affine=affine)
    assert image.origin == (4, 5, 6)
    assert image.orientation == ("L", "A", "S")
    np.testing.assert_array_equal(image.numpy(), image.data)
    subject = tio.Subject(t1=image, age=4)
    subject.add_image(tio.LabelMap(tensor=torch.zeros(1, 2, 3, 4, dtype=torch.uint8)), "seg")
    assert list(subject) == ["t1", "seg", "age"]
    assert subject.seg.kind == "label"


def test_datasets_and_utils_are_those_of_the_installed_torchio(torchio: Any, tmp_path: Path) -> None:
    assert tio.datasets is torchio.datasets
    assert tio.utils is torchio.utils
    path = tmp_path / "t1.nii.gz"
    nib.Nifti1Image(np.arange(1000, dtype=np.float32).reshape(10, 10, 10), np.eye(4)).to_filename(path)
    theirs = torchio.Subject(
        t1=torchio.ScalarImage(path), seg=torchio.LabelMap(tensor=torch.ones(1, 10, 10, 10)), age=3
    )
    dataset = tio.SubjectsDataset([theirs])
    assert dataset[0].age == 3
    patches = list(tio.Queue(dataset, 4, 4, tio.UniformSampler(4)))
    for patch in patches:
        ini, fin = patch[tio.LOCATION].reshape(2, 3).tolist()
        box = (slice(None), *(slice(a, b) for a, b in zip(ini, fin, strict=True)))
        torch.testing.assert_close(patch.t1.data, theirs.t1.data[box].float())


def test_a_subject_is_plotted_by_torchio(torchio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        torchio.ScalarImage, "plot", lambda self, **options: drawn.append((self.shape, options))
    )
    tio.Subject(t1=tio.ScalarImage(tensor=torch.zeros(1, 4, 5, 6))).plot(show=False)
    assert drawn == [((1, 4, 5, 6), {"show": False})]


def test_a_transform_is_called_with_a_subject_or_an_image_as_in_torchio(torchio: Any) -> None:
    own, real = in_memory(9, 10, 11, age=5), {}
    for name, image in own.images.items():
        make = {"scalar": torchio.ScalarImage, "label": torchio.LabelMap}[image.kind]
        real[name] = make(tensor=image.data, affine=image.affine)
    for name, arguments in (("RandomFlip", {"flip_probability": 1}), ("CropOrPad", {"target_shape": 6}),
                            ("RandomMotion", {}), ("RandomAffine", {}), ("ZNormalization", {})):  # fmt: skip
        torch.manual_seed(3)
        wanted = getattr(torchio, name)(**arguments)(torchio.Subject(real))
        torch.manual_seed(3)
        transform = getattr(tio, name)(**arguments)
        found = transform(own)
        assert isinstance(found, tio.Subject)
        assert found["age"] == 5
        for key, image in found.images.items():
            torch.testing.assert_close(image.data.float(), wanted[key].data.float())
            np.testing.assert_allclose(image.affine, wanted[key].affine)
            assert image[tio.TYPE] == own.images[key][tio.TYPE]
        assert isinstance(transform, getattr(torchio, name))
        assert repr(transform) == repr(getattr(torchio, name)(**arguments))
        assert type(pickle.loads(pickle.dumps(transform))) is type(transform)
    flipped = tio.RandomFlip(axes=(0, 1), flip_probability=1)(own.images["t1"])
    assert isinstance(flipped, tio.ScalarImage)
    assert torch.equal(flipped.data, own.images["t1"].data.flip(1, 2))
    assert isinstance(tio.Compose([tio.ToCanonical(), tio.RandomFlip()])(own), tio.Subject)
    assert isinstance(tio.RandomFlip()(torch.zeros(1, 4, 4, 4)), torch.Tensor)
