"""TorchIO 2's patch API on zpatch: the examples of its documentation, with what the native API gives.

The last test runs those that need TorchIO 2, if that is installed in a separate folder.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from streams import item, items
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import zpatch as zp
import zpatch.compat.torchio2 as tio
from zpatch.compat.transforms import is_torchio_2
from zpatch.errors import OptionError, PatchSizeError
from zpatch.sampling.patch_sampler import read_patches

TORCHIO_2_FOLDER = Path(sys.prefix) / "torchio-2"  # alone in it, as it goes by the same name
PATCH_SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where NIfTI files are converted to."""
    monkeypatch.setenv("ZPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def torchio_2() -> Any:
    torchio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    if not is_torchio_2(torchio):
        pytest.skip("the TorchIO that is installed is not TorchIO 2")
    return torchio


@pytest.fixture
def subject() -> tio.Subject:
    return subject_of(0)


@pytest.fixture
def subjects() -> list[tio.Subject]:
    return [subject_of(seed) for seed in range(5)]


def subject_of(seed: int, shape: tuple[int, int, int] = (24, 20, 18)) -> tio.Subject:
    rng = np.random.default_rng(seed)
    affine = np.diag([2.0, 1.5, 1, 1])
    return tio.Subject(
        t1=tio.ScalarImage(torch.from_numpy(rng.normal(size=(1, *shape)).astype(np.float32)), affine=affine),
        seg=tio.LabelMap(rng.choice(3, shape, p=[0.8, 0.18, 0.02]).astype(np.uint8), affine=affine),
        weights=tio.ScalarImage(rng.random(shape), affine=affine),
        age=40 + seed,
    )


def seed_of_torch(seed: int) -> int:
    """What a sampler that is iterated is seeded by, after ``torch.manual_seed(seed)``."""
    return int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(seed)))


# The examples of the documentation


@pytest.mark.filterwarnings("ignore:the loop refers to more:UserWarning")
def test_training_with_a_queue_gives_the_patches_of_the_native_queue(cohort_source: Path) -> None:
    paths = sorted(cohort_source.rglob("*t1.nii*"))
    subjects = [tio.Subject(t1=tio.ScalarImage(path)) for path in paths]
    sampler = tio.UniformSampler(subjects[0], patch_size=PATCH_SIZE)
    queue = tio.Queue(subjects, patch_sampler=sampler, max_length=30, patches_per_volume=5, num_workers=2)
    loader = tio.SubjectsLoader(queue, batch_size=8)
    with queue:
        found = [[batch.t1.data for batch in loader] for _ in range(2)]
    named = [zp.Subject(t1=one.t1, name=f"subject-{n}") for n, one in enumerate(subjects)]
    with zp.Queue(named, zp.UniformSampler(PATCH_SIZE), 30, 5) as native:
        wanted = [[batch.t1.data for batch in zp.SubjectsLoader(native, 8)] for _ in range(2)]
    assert [len(epoch) for epoch in found] == [len(loader)] * 2
    for batches, expected in zip(found, wanted, strict=True):
        assert all(itertools.starmap(torch.equal, zip(batches, expected, strict=True)))


@pytest.mark.parametrize(
    ("sampler", "native"),
    [
        (lambda one: tio.UniformSampler(one, 8, num_patches=20), zp.UniformSampler(8)),
        (
            lambda one: tio.WeightedSampler(one, patch_size=8, probability_map="weights", num_patches=20),
            zp.WeightedSampler(8, "weights"),
        ),
        (
            lambda one: tio.LabelSampler(
                one, patch_size=8, label_name="seg", label_probabilities={0: 0.5, 1: 0.5}, num_patches=20
            ),
            zp.LabelSampler(8, "seg", {0: 0.5, 1: 0.5}),
        ),
    ],
)
def test_a_sampler_is_a_dataset_of_the_patches_of_the_native_sampler(
    subject: tio.Subject, sampler: Any, native: Any
) -> None:
    torch.manual_seed(3)
    batches = list(tio.SubjectsLoader(sampler(subject), batch_size=8))
    torch.manual_seed(3)
    drawn = list(sampler(subject))
    assert items(drawn) == items(native(subject, 20, rng=seed_of_torch(3)))
    assert [batch.batch_size for batch in batches] == [8, 8, 4]
    assert batches[0].t1.data.shape == (8, 1, 8, 8, 8)


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
def test_dense_inference_gives_the_volume_as_the_native_aggregator(subject: tio.Subject, mode: str) -> None:
    sampler = tio.GridSampler(subject, patch_size=8, patch_overlap=4)
    aggregator = tio.PatchAggregator(spatial_shape=subject.spatial_shape, overlap_mode=mode, patch_overlap=4)
    grid = zp.GridSampler(subject, 8, 4)
    native = zp.PatchAggregator(subject.spatial_shape, mode, grid=grid)
    for batch in tio.SubjectsLoader(sampler, batch_size=4):
        locations = [batch.metadata["patch_location"][i] for i in range(batch.batch_size)]
        assert locations == batch.patch_location
        aggregator.add_batch(batch.t1.data, locations)
    for patches in zp.SubjectsLoader(grid, 4):
        native.add_batch(patches.t1.data, patches.patch_location)
    result = aggregator.get_output()
    torch.testing.assert_close(result, subject.t1.data)
    torch.testing.assert_close(result, native.get_output())


def test_downsampled_and_several_outputs_are_aggregated(subject: tio.Subject) -> None:
    sampler = tio.GridSampler(subject, patch_size=8, patch_overlap=4)
    small = tio.PatchAggregator(subject.spatial_shape, "average", output_shape=(12, 10, 9))
    several = tio.PatchAggregator(subject.spatial_shape, "average")
    for batch in tio.SubjectsLoader(sampler, batch_size=4):
        data, locations = batch.t1.data, batch.metadata["patch_location"]
        small.add_batch(torch.nn.functional.avg_pool3d(data, 2), locations)
        several.add_batch({"segmentation": data > 0, "embedding": torch.cat([data, -data], 1)}, locations)
    wanted = torch.nn.functional.avg_pool3d(subject.t1.data, 2)
    torch.testing.assert_close(small.get_output(), wanted)
    assert torch.equal(several.get_output("segmentation") > 0.5, subject.t1.data > 0)
    torch.testing.assert_close(several.get_output("embedding")[1:], -subject.t1.data)


def test_distributed_training_shares_subjects_out(subjects: list[tio.Subject]) -> None:
    seen: list[list[str]] = []
    for rank in range(2):
        subject_sampler = DistributedSampler(subjects, num_replicas=2, rank=rank, shuffle=True)
        sampler = tio.UniformSampler(subjects[0], 8)
        queue = tio.Queue(subjects, sampler, 30, 4, shuffle_subjects=False, subject_sampler=subject_sampler)
        loader = tio.SubjectsLoader(queue, batch_size=4)
        for epoch in range(2):
            subject_sampler.set_epoch(epoch)
            ages = [age for batch in loader for age in batch.metadata["age"]]
            assert len(ages) == queue.patches_per_epoch == len(subject_sampler) * 4
            assert set(Counter(ages).values()) == {4}
            seen.append(sorted(set(ages)))
    for epoch in range(2):
        assert sorted({*seen[epoch], *seen[2 + epoch]}) == [40, 41, 42, 43, 44]
    assert seen[0] != seen[1]


def test_whole_subjects_of_a_dataset_are_batched_with_their_metadata(subjects: list[tio.Subject]) -> None:
    for loader in (
        tio.SubjectsLoader(subjects, batch_size=2, num_workers=1),
        DataLoader(subjects, batch_size=2, collate_fn=tio.collate_subjects),  # type: ignore[arg-type]
    ):
        batches: list[tio.SubjectsBatch] = list(loader)
        assert [batch.metadata["age"] for batch in batches] == [[40, 41], [42, 43], [44]]
        assert torch.equal(batches[1].t1.data, torch.stack([subjects[n].t1.data for n in (2, 3)]))


# The replacements of TorchIO's classes


SIGNATURES = {
    tio.GridSampler: ["subject", "patch_size", "patch_overlap", "padding_mode", "fill"],
    tio.UniformSampler: ["subject", "patch_size", "num_patches"],
    tio.WeightedSampler: ["subject", "patch_size", "probability_map", "num_patches"],
    tio.LabelSampler: ["subject", "patch_size", "label_name", "label_probabilities", "num_patches"],
    tio.PatchAggregator: ["spatial_shape", "overlap_mode", "patch_overlap", "output_shape"],
    tio.Queue: [
        "subjects", "patch_sampler", "max_length", "patches_per_volume", "num_workers", "shuffle_subjects",
        "shuffle_patches", "transform", "subject_sampler",
    ],
    tio.PatchLocation: ["index", "size", "subject_index"],
}  # fmt: skip


def positional(cls: Any) -> list[str]:
    parameters = inspect.signature(cls).parameters.values()
    return [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("cls", SIGNATURES)
def test_arguments_have_torchios_names_and_order(cls: type) -> None:
    assert positional(cls) == SIGNATURES[cls]


def test_an_image_may_be_a_nifti_file_a_zpatch_image_or_voxels(
    cohort_source: Path, cohort: zp.Cohort, tmp_path: Path
) -> None:
    compressed = min(cohort_source.rglob("*t1.nii.gz"))
    voxels = np.asarray(nib.load(compressed).dataobj)
    for source in (compressed, str(compressed), voxels, torch.from_numpy(voxels.astype(np.float32))):
        image = tio.ScalarImage(source, affine=np.diag([3, 3, 3, 1]))
        assert isinstance(image, zp.ScalarImage)
        np.testing.assert_allclose(image.data[0].numpy(), voxels, rtol=1e-6)
        np.testing.assert_array_equal(image.affine, np.diag([3, 3, 3, 1]))
    np.testing.assert_allclose(tio.ScalarImage(compressed).affine, nib.load(compressed).affine)
    stored = tio.ScalarImage(cohort[0].t1)
    assert stored.record == cohort[0].t1.record
    np.testing.assert_array_equal(stored.affine, cohort[0].t1.affine)
    assert isinstance(stored.rescaled(2, 0), tio.ScalarImage)
    assert tio.LabelMap(cohort[0].seg).kind == "label"


def test_a_nifti_label_map_is_converted_as_one(cohort_source: Path) -> None:
    labels = tio.LabelMap(min(cohort_source.rglob("*seg.nii*")))
    assert labels.kind == "label"
    assert labels.record is not None
    assert labels.record.kind == "label"
    assert not labels.data.is_floating_point()


def test_a_subject_has_images_and_metadata() -> None:
    subject = tio.Subject(t1=tio.ScalarImage(np.zeros((4, 4, 4))), name="sub-7", age=45)
    assert (subject.name, subject.age, subject.metadata) == ("sub-7", 45, {"name": "sub-7", "age": 45})
    assert list(subject.images) == ["t1"]
    assert subject["t1"] is subject.t1
    with pytest.raises(AttributeError, match="no image 't2'"):
        subject.t2  # noqa: B018


def test_a_sampler_is_callable_on_another_subject(subjects: list[tio.Subject]) -> None:
    sampler = tio.LabelSampler(subjects[0], 8, "seg", num_patches=3)
    assert {patch.metadata["age"] for patch in sampler(subjects[1])} == {41}
    assert len(list(sampler(subjects[1]))) == 3
    assert len(list(sampler(subjects[1], 5))) == 5
    endless = tio.UniformSampler(subjects[0], 8)
    assert len(list(itertools.islice(endless, 40))) == 40


def test_patches_have_torchios_names(subject: tio.Subject) -> None:
    grid = tio.GridSampler(subject, 8)
    for patch in (grid[0], next(iter(grid)), next(iter(tio.UniformSampler(subject, 8)))):
        assert patch.patch_location == patch.location
        assert (patch.shape, patch.spatial_shape) == ((1, 8, 8, 8), (8, 8, 8))
        assert patch.metadata == {"age": 40}


def test_samplers_that_are_iterated_follow_torchs_generator(subject: tio.Subject) -> None:
    sampler = tio.UniformSampler(subject, 8, num_patches=4)
    torch.manual_seed(0)
    first, second = list(sampler), list(sampler)
    torch.manual_seed(0)
    assert items(sampler) == items(first)
    assert items(first) != items(second)


def test_a_queue_of_a_cohort_knows_the_metadata_of_its_subjects(cohort: zp.Cohort) -> None:
    changed = cohort.map(with_name_as_metadata)
    with tio.Queue(changed, tio.UniformSampler(cohort[0], 8), patches_per_volume=2) as queue:
        assert queue.num_subjects == len(cohort)
        for patch in queue:
            assert patch.metadata["called"] == patch.subject
        for batch in tio.SubjectsLoader(queue, batch_size=3):
            assert batch.metadata["called"] == batch.subjects


def with_name_as_metadata(subject: zp.Subject) -> zp.Subject:
    return zp.Subject.of(subject.images, name=subject.name, metadata={"called": subject.name})


def test_subjects_of_one_name_get_different_names(subjects: list[tio.Subject]) -> None:
    with tio.Queue(subjects, tio.UniformSampler(subjects[0], 8), patches_per_volume=2) as queue:
        assert Counter(patch.metadata["age"] for patch in queue) == dict.fromkeys(range(40, 45), 2)


@pytest.mark.filterwarnings("ignore:the loop refers to more:UserWarning")
def test_a_loader_gives_batches_of_a_queue_as_its_patches_come(subjects: list[tio.Subject]) -> None:
    sampler = tio.LabelSampler(subjects[0], 8, "seg", {1: 1, 2: 1})
    with tio.Queue(subjects, sampler, 7, 3, seed=5) as queue:
        patches = list(queue)
        queue.set_epoch(0)
        batches = list(tio.SubjectsLoader(queue, batch_size=4, drop_last=True))
    assert [batch.batch_size for batch in batches] == [4, 4, 4]
    assert torch.equal(
        torch.cat([b.t1.data for b in batches]), torch.stack([p.t1.data for p in patches[:12]])
    )
    assert [n for b in batches for n in b.metadata["age"]] == [p.metadata["age"] for p in patches[:12]]


def test_a_function_of_patches_is_a_transform_too(subjects: list[tio.Subject]) -> None:
    def negative(patch: zp.Patch) -> zp.Patch:
        return patch.with_data(t1=-patch.t1.data)

    sampler = tio.UniformSampler(subjects[0], 8)
    with tio.Queue(subjects, sampler, transform=negative) as queue, tio.Queue(subjects, sampler) as plain:
        for changed, patch in zip(queue, plain, strict=True):
            assert torch.equal(changed.t1.data, -patch.t1.data)


def test_a_loader_stacks_by_itself(subjects: list[tio.Subject]) -> None:
    with pytest.raises(OptionError, match="SubjectsLoader sets collate_fn"):
        tio.SubjectsLoader(subjects, collate_fn=list)


def test_each_iteration_is_an_epoch_also_after_one_that_was_broken_off(subjects: list[tio.Subject]) -> None:
    sampler = tio.UniformSampler(subjects[0], 8)
    with tio.Queue(subjects, sampler, 7, 3) as queue, tio.Queue(subjects, sampler, 7, 3) as same:
        found = [items(itertools.islice(queue, 4)), items(queue)]
        [batch] = itertools.islice(tio.SubjectsLoader(queue, batch_size=4), 1)
        found += [items(queue), items(queue)]
        for epoch, wanted in zip((0, 1, 3, 4), found, strict=True):
            same.set_epoch(epoch)
            assert wanted == items(same)[: len(wanted)]
        same.set_epoch(2)
        assert batch.patch_location == [patch.location for patch in itertools.islice(same, 4)]
        running = iter(queue)
        next(running)
        queue.set_epoch(1)
        assert items(queue) == found[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_of_a_subject_sampler_is_the_one_that_was_set(
    subjects: list[tio.Subject], workers: int
) -> None:
    order: Any = DistributedSampler(subjects, num_replicas=1, rank=0, shuffle=True)
    sampler = tio.UniformSampler(subjects[0], 8)
    found = []
    with tio.Queue(subjects, sampler, 9, 1, workers, False, False, subject_sampler=order) as queue:
        for epoch in (5, 2, 2):
            order.set_epoch(epoch)
            patches = list(queue)
            assert [patch.metadata["age"] for patch in patches] == [40 + number for number in order]
            found.append(sorted(items(patches)))
        assert queue.subject_sampler is order
    assert found[1] != found[2]  # other patches of the same subjects
    with pytest.raises(OptionError, match="iterated anew for each epoch"):
        tio.Queue(subjects, sampler, shuffle_subjects=False, subject_sampler=iter([0, 1]))


def test_a_queue_resumes_where_a_state_was_taken(subjects: list[tio.Subject]) -> None:
    def start() -> tuple[Any, tio.Queue]:
        order: Any = DistributedSampler(subjects, num_replicas=2, rank=1, shuffle=True)
        sampler = tio.UniformSampler(subjects[0], 8)
        return order, tio.Queue(subjects, sampler, 7, 3, shuffle_subjects=False, subject_sampler=order)

    order, queue = start()
    order.set_epoch(5)
    patches = iter(queue)
    items(itertools.islice(patches, 4))
    state = json.loads(json.dumps(queue.state_dict()))
    wanted = [items(patches)]
    order.set_epoch(6)
    wanted.append(items(queue))
    order, queue = start()
    queue.load_state_dict(state)
    order.set_epoch(5)
    found = [items(queue)]
    order.set_epoch(6)
    found.append(items(queue))
    assert found == wanted
    assert [len(part) for part in found] == [5, 9]
    other = tio.Queue(subjects, queue.patch_sampler, 7, 3, shuffle_subjects=False, subject_sampler=[0])
    with pytest.raises(OptionError, match="subject_sampler was"):
        other.load_state_dict(state)


def test_a_queue_takes_no_more_patches_of_a_subject_than_its_sampler_gives(
    subjects: list[tio.Subject],
) -> None:
    for own, wanted in ((3, 3), (20, 10), (None, 10)):
        with tio.Queue(subjects, tio.UniformSampler(subjects[0], 8, num_patches=own)) as queue:
            assert Counter(patch.metadata["age"] for patch in queue) == dict.fromkeys(range(40, 45), wanted)
            assert queue.patches_per_epoch == 5 * wanted


def test_name_and_split_of_a_subject_keep_their_values() -> None:
    image = tio.ScalarImage(np.zeros((8, 8, 8)))
    subject = tio.Subject(t1=image, split="train", name=7)
    assert (subject.split, subject.name) == ("train", 7)
    assert subject.metadata == {"split": "train", "name": 7}
    with tio.Queue([subject], tio.UniformSampler(subject, 4), num_workers=1) as queue:
        assert {patch.metadata["name"] for patch in queue} == {7}
    assert (tio.Subject(t1=image).split, tio.Subject(t1=image).name) == (None, "subject")


def test_an_image_is_saved_as_a_nifti_file(subject: tio.Subject, tmp_path: Path) -> None:
    for name, suffix in (("t1", ".nii.gz"), ("seg", ".nii")):
        image = getattr(subject, name)
        image.save(tmp_path / f"{name}{suffix}")
        again = type(image)(tmp_path / f"{name}{suffix}")
        assert torch.equal(again.data, image.data)
        np.testing.assert_allclose(again.affine, image.affine)


def test_modules_of_torchio_are_imported_from_as_before() -> None:
    program = "from zpatch.compat.torchio2.loader import SubjectsLoader as loader; print(loader.__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("zpatch.compat.torchio2", 0), done.stderr
    assert tio.loader.SubjectsLoader is tio.SubjectsLoader
    assert tio.data.UniformSampler is tio.UniformSampler


@pytest.mark.parametrize("name", tio.__all__)
def test_pickles_name_classes_by_the_public_module_or_by_their_own(name: str) -> None:
    """A pickle of an earlier version has ``zpatch.compat.torchio2``."""
    cls = getattr(tio, name)
    assert pickle.loads(f"czpatch.compat.torchio2\n{name}\n.".encode()) is cls
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_queue_refuses_a_single_subject(subject: tio.Subject) -> None:
    with pytest.raises(OptionError, match=r"is a single one; say Queue\(\[subject\], ...\)"):
        tio.Queue(subject, tio.UniformSampler(subject, 8))  # type: ignore[arg-type]


# Where this follows the documentation of 2.x, and intended differences


def test_hann_weights_give_a_constant_back_exactly() -> None:
    subject = tio.Subject(t1=tio.ScalarImage(np.ones((21, 16, 13), np.float32)))
    aggregator = tio.PatchAggregator(subject.spatial_shape, "hann")
    for batch in tio.SubjectsLoader(tio.GridSampler(subject, 8, 4), batch_size=5):
        aggregator.add_batch(batch.t1.data, batch.patch_location)
    torch.testing.assert_close(aggregator.get_output(), torch.ones(1, 21, 16, 13))


def test_every_place_where_a_patch_of_even_size_fits_is_drawn() -> None:
    subject = tio.Subject(weights=tio.ScalarImage(np.ones((6, 4, 4))))
    torch.manual_seed(0)
    sampler = tio.WeightedSampler(subject, 4, "weights", num_patches=60)
    assert {patch.patch_location.index for patch in sampler} == {(i, 0, 0) for i in range(3)}


def test_classes_have_their_shares_independent_of_their_size() -> None:
    labels = np.ones((20, 20, 20), np.uint8)
    labels[10, 10, 10] = 2
    subject = tio.Subject(seg=tio.LabelMap(labels))
    torch.manual_seed(0)
    sampler = tio.LabelSampler(subject, 3, "seg", {1: 0.5, 2: 0.5}, num_patches=400)
    of_two = sum(int(patch.seg.data[0, 1, 1, 1]) == 2 for patch in sampler)
    assert 150 < of_two < 250  # binomial, 5 standard deviations


def test_workers_share_the_patches_of_a_sampler(subject: tio.Subject) -> None:
    sampler = tio.UniformSampler(subject, 8, num_patches=7)
    batches = list(tio.SubjectsLoader(sampler, batch_size=1, num_workers=2))
    assert len(batches) == 7
    assert len({batch.patch_location[0] for batch in batches}) > 4


def test_padding_is_cropped_by_an_aggregator_of_the_volumes_shape(subject: tio.Subject) -> None:
    sampler = tio.GridSampler(subject, 8, 4, padding_mode="reflect")
    aggregator = tio.PatchAggregator(sampler.subject.spatial_shape, patch_overlap=4)
    for batch in tio.SubjectsLoader(sampler, batch_size=20):
        aggregator.add_batch(batch.t1.data, batch.patch_location)
    assert torch.equal(aggregator.get_output(), subject.t1.data)


def test_a_patch_that_is_larger_than_the_volume_is_an_error(subject: tio.Subject) -> None:
    with pytest.raises(PatchSizeError, match="patch of 40 voxels does not fit axis I"):
        next(iter(tio.UniformSampler(subject, 40)))


def test_transforms_are_those_of_torchio_2_or_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchio", None)
    with pytest.raises(AttributeError, match="no 'Flip' here; a TorchIO transform needs TorchIO"):
        tio.Flip  # noqa: B018


# With TorchIO 2


def test_torchio_2_takes_the_same_arguments(torchio_2: Any) -> None:
    for cls in SIGNATURES:
        assert positional(getattr(torchio_2, cls.__name__)) == SIGNATURES[cls]


def test_torchio_2_trains_with_the_transforms_of_its_example(
    torchio_2: Any, subjects: list[tio.Subject]
) -> None:
    transform = tio.Compose([tio.Flip(axes=(0,), p=0.5), tio.Noise(std=0.1)])
    sampler = tio.UniformSampler(subjects[0], patch_size=8)
    epochs = []
    for workers in (0, 2):
        with tio.Queue(subjects, sampler, 300, 10, num_workers=workers, transform=transform) as queue:
            epochs.append([item(patch) for patch in queue])
    with tio.Queue(subjects, sampler) as queue:
        plain = list(queue)
    assert epochs[0] == epochs[1]
    assert [place for _, place, _ in epochs[0]] == [patch.location.index for patch in plain]
    assert epochs[0] != items(plain)


def test_torchio_2_takes_no_more_patches_than_the_sampler_gives(torchio_2: Any) -> None:
    theirs = torchio_2.Subject(t1=torchio_2.ScalarImage(torch.zeros(1, 9, 9, 9)))
    for own, wanted in ((3, 3), (20, 10), (None, 10)):
        sampler = torchio_2.UniformSampler(theirs, 8, num_patches=own)
        assert len(list(torchio_2.Queue([theirs], sampler))) == wanted


def test_torchio_2_has_the_same_grid(torchio_2: Any) -> None:
    for shape, size, overlap in itertools.product([(24, 20, 18), (9, 8, 17)], [8, (4, 5, 6)], [0, 2]):
        theirs = torchio_2.Subject(t1=torchio_2.ScalarImage(torch.zeros(1, *shape)))
        wanted = torchio_2.GridSampler(theirs, size, overlap).locations
        found = tio.GridSampler(subject_of(0, shape), size, overlap).locations
        assert [(at.index, at.size) for at in found] == [(at.index, at.size) for at in wanted]


@pytest.mark.parametrize("mode", ["crop", "average"])
def test_torchio_2_aggregates_to_the_same_voxels(torchio_2: Any, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    locations = tio.GridSampler(subject_of(0), 8, 4).locations
    patches = torch.rand(len(locations), 2, 8, 8, 8, generator=generator)
    ours = tio.PatchAggregator((24, 20, 18), mode, 4)
    theirs = torchio_2.PatchAggregator((24, 20, 18), mode, 4)
    ours.add_batch(patches, locations)
    theirs.add_batch(patches, locations)
    torch.testing.assert_close(ours.get_output(), theirs.get_output(), atol=1e-6, rtol=0)


def test_torchio_2_reads_the_same_voxels(torchio_2: Any, subject: tio.Subject) -> None:
    theirs = torchio_2.Subject(t1=torchio_2.ScalarImage(subject.t1.data, affine=subject.t1.affine))
    for patch in torchio_2.UniformSampler(theirs, 8, num_patches=5):
        at = tio.PatchLocation(patch.patch_location.index, patch.patch_location.size)
        [found] = read_patches(subject, [at])
        assert torch.equal(found.t1.data, patch.t1.data)
        np.testing.assert_allclose(found.t1.affine, np.array(patch.t1.affine))


def test_torchio_2_differs_from_its_documentation_as_stated(torchio_2: Any) -> None:
    ones = torch.ones(1, 10, 10, 10)
    aggregator = torchio_2.PatchAggregator((10, 10, 10), "hann")
    subject = torchio_2.Subject(t1=torchio_2.ScalarImage(ones))
    for patch in torchio_2.GridSampler(subject, 4, 2):
        aggregator.add_batch(patch.t1.data[None], [patch.patch_location])
    assert aggregator.get_output().min() < 0.1
    sampler = torchio_2.WeightedSampler(subject, 4, "t1", num_patches=300)
    assert max(patch.patch_location.index[0] for patch in sampler) == 5  # the last that fits is 6
    labels = torch.ones(1, 20, 20, 20, dtype=torch.uint8)
    labels[0, 10, 10, 10] = 2
    both = torchio_2.Subject(seg=torchio_2.LabelMap(labels))
    drawn = torchio_2.LabelSampler(both, 3, "seg", {1: 0.5, 2: 0.5}, num_patches=100)
    assert sum(int(patch.seg.data[0, 1, 1, 1]) == 2 for patch in drawn) < 5


@pytest.mark.skipif(not TORCHIO_2_FOLDER.exists(), reason="TorchIO 2 is not installed beside TorchIO 1")
def test_all_that_needs_the_second_torchio_passes_with_it() -> None:
    chosen = "torchio_2_ or (transforms and torchio)"
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    files = [__file__, str(Path(__file__).with_name("test_compat_transforms.py"))]
    environment = {**os.environ, "PYTHONPATH": str(TORCHIO_2_FOLDER)}
    done = subprocess.run(
        [*program, *files], env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_a_transform_is_called_with_a_subject_or_an_image_as_in_torchio() -> None:
    torchio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    if not is_torchio_2(torchio):
        pytest.skip("the TorchIO that is installed is not TorchIO 2")
    t1 = torch.arange(9 * 8 * 7).reshape(1, 9, 8, 7).float()
    own = tio.Subject(t1=tio.ScalarImage(t1), seg=tio.LabelMap((t1 > 9).int()), age=5)
    found = tio.Compose([tio.Flip(axes=0, flip_probability=1), tio.Standardize()])(own)
    wanted = torchio.Compose([torchio.Flip(axes=0, flip_probability=1), torchio.Standardize()])(
        torchio.Subject(t1=torchio.ScalarImage(t1), seg=torchio.LabelMap((t1 > 9).int()))
    )
    assert isinstance(found, tio.Subject)
    assert found.age == 5
    torch.testing.assert_close(found.t1.data, wanted.t1.data)
    assert torch.equal(found.seg.data, wanted.seg.data.int())
    flipped = tio.Flip(axes=(0, 1), flip_probability=1)(own.t1)
    assert torch.equal(flipped.data, t1.flip(1, 2))
