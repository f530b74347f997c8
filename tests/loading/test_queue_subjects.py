"""A queue says at once, and all together, which of its subjects cannot give a patch."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from streams import small_subjects

import zpatch as zp
from zpatch.errors import NothingToDrawError, OptionError, PatchSizeError, QueueError, UnknownNameError


def subject_of(name: str, shape: tuple[int, int, int] = (12, 12, 12), **images: zp.Image) -> zp.Subject:
    zeros = np.zeros(shape, np.uint8)
    return zp.Subject.of({"t1": zp.ScalarImage(zeros), "seg": zp.LabelMap(zeros), **images}, name=name)


GOOD = [subject_of(name) for name in ("a", "b", "c")]
SMALL = subject_of("small", (12, 6, 12))
MIXED = subject_of("mixed", t2=zp.ScalarImage(np.zeros((6, 6, 6))))
BARE = zp.Subject(name="bare", t1=zp.ScalarImage(np.zeros((12, 12, 12))))


def queue_of(subjects: Any, sampler: Any = None, **options: Any) -> zp.Queue:
    sampler = zp.UniformSampler(8) if sampler is None else sampler
    return zp.Queue(subjects, sampler, patches_per_volume=1, **options)


def test_all_subjects_that_cannot_be_used_are_named_in_one_error() -> None:
    with pytest.raises(PatchSizeError) as failed:
        queue_of([GOOD[0], SMALL, GOOD[1], MIXED, BARE, GOOD[2]])
    text = str(failed.value)
    assert text.startswith("3 of 6 subjects cannot be used:\n")
    assert "patch of 8 voxels does not fit axis J of 'small' (6 voxels)" in text
    assert (
        "the images of subject 'mixed' differ in shape (t1 (12, 12, 12), seg (12, 12, 12), t2 (6, 6, 6))"
        in text
    )
    assert "subject 'bare' has no 'seg', as most have (it has: t1)" in text
    assert text.endswith("say on_bad='skip' to leave them out")


def test_with_skip_they_are_left_out_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="3 of 6 subjects cannot be used, and are left out") as warned:
        queue = queue_of([GOOD[0], SMALL, GOOD[1], MIXED, BARE, GOOD[2]], on_bad="skip")
    assert len(warned) == 1
    assert sorted(patch.subject for patch in queue) == ["a", "b", "c"]
    assert queue.num_subjects == 3


def test_where_none_is_left_skip_is_an_error_too() -> None:
    with pytest.raises(PatchSizeError, match="2 of 2 subjects cannot be used"):
        queue_of([SMALL, SMALL], on_bad="skip")


def test_padding_or_a_transform_make_them_usable() -> None:
    assert len(queue_of([*GOOD, SMALL], zp.UniformSampler(8, padding_mode="edge"))) == 4
    assert len(queue_of([*GOOD, BARE], transform=lambda patch: patch)) == 4


def test_one_subject_alone_gets_its_own_error() -> None:
    with pytest.raises(PatchSizeError, match=r"^patch of 8 voxels does not fit axis J of 'small'"):
        queue_of([SMALL])


@pytest.mark.parametrize(
    ("sampler", "kind", "words"),
    [
        (zp.WeightedSampler(8, "wait"), UnknownNameError, "no image 'wait' in subject 'a'"),
        (zp.LabelSampler(8, "sag"), UnknownNameError, "no image 'sag' in subject 'a'; did you mean 'seg'"),
        (zp.GridSampler(patch_size=16), PatchSizeError, "3 of 3 subjects"),
        (zp.UniformSampler(8, context=(2,)), OptionError, "image 't1' of subject 'a'"),
    ],
)
def test_what_a_sampler_needs_is_checked_in_all_subjects(
    sampler: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as failed:
        queue_of(GOOD, sampler)
    assert str(failed.value).startswith("3 of 3 subjects cannot be used")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> zp.Cohort:
    """Four subjects, whose label maps have the classes 1 and 2, 1, 2 and none."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, labels in (("a", [1, 2]), ("b", [1]), ("c", [2]), ("d", [])):
        volume = np.zeros((12, 12, 12), np.uint8)
        volume[6, 6, : len(labels)] = labels
        nib.Nifti1Image(volume, np.eye(4)).to_filename(folder / f"{name}_seg.nii.gz")
        nib.Nifti1Image(volume, np.eye(4)).to_filename(folder / f"{name}_t1.nii.gz")
    zp.convert(folder, folder / "store", format="glob")
    return zp.Cohort(folder / "store")


def test_subjects_without_a_wanted_class_are_found_by_the_manifest(labelled: zp.Cohort) -> None:
    sampler = zp.LabelSampler(4, "seg", {1: 1})
    with pytest.raises(NothingToDrawError, match="2 of 4 subjects") as failed:
        queue_of(labelled, sampler)
    for name in "cd":
        assert f"'seg' of subject '{name}' has no voxel of the wanted classes (1)" in str(failed.value)
    with pytest.warns(UserWarning, match="left out"):
        queue = queue_of(labelled, sampler, on_bad="skip")
    assert isinstance(queue.subjects, zp.Cohort)
    assert queue.subjects.names == ["a", "b"]


def test_a_class_that_no_subject_has_is_an_error_though_others_are_there(labelled: zp.Cohort) -> None:
    with pytest.raises(OptionError, match="no subject has class 7 in 'seg'; correct label_probabilities"):
        queue_of(labelled[:3], zp.LabelSampler(4, "seg", {1: 1, 2: 1, 7: 1}))
    assert queue_of(labelled[:3], zp.LabelSampler(4, "seg", {0: 1, 1: 1, 2: 1, 7: 0})).num_subjects == 3
    with pytest.warns(UserWarning, match="no subject has class 7"):
        queue_of(labelled[:3], zp.LabelSampler(4, "seg", {1: 1, 2: 1, 7: 1}), on_bad="skip")


def test_a_mixture_needs_one_sampler_that_can_draw(labelled: zp.Cohort) -> None:
    label = zp.LabelSampler(4, "seg", {1: 1})
    assert queue_of(labelled, zp.MixedSampler([(1, zp.UniformSampler(4)), (1, label)])).num_subjects == 4
    with pytest.raises(NothingToDrawError, match="2 of 4"):
        queue_of(labelled, zp.MixedSampler([(1, label), (2, label)]))


def test_no_file_but_the_manifest_is_read_to_check(labelled: zp.Cohort, tmp_path: Path) -> None:
    store = shutil.copytree(labelled.store.path, tmp_path / "store")
    cohort = zp.Cohort(store)
    for folder in store.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    assert queue_of(cohort[:3], zp.LabelSampler(4, "seg", {1: 1, 2: 1})).num_subjects == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((zp.UniformSampler(8), GOOD), r"the subjects come first: Queue\(subjects, patch_sampler\)"),
        ((GOOD, zp.UniformSampler), r"needs a patch sampler, as UniformSampler\(96\)"),
        ((GOOD, 96), r"needs a patch sampler, as UniformSampler\(96\), not 96"),
        ((GOOD[0], zp.UniformSampler(8)), r"'a' is a single one"),
        (("cohort.zarr", zp.UniformSampler(8)), r"is a path; say Queue\(zpatch.Cohort\("),
    ],
)
def test_arguments_in_each_others_place_say_what_is_wanted(arguments: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        zp.Queue(*arguments)


@pytest.mark.parametrize("dataset", [GOOD[0], GOOD, "cohort.zarr"], ids=["subject", "list", "path"])
def test_a_loader_of_subjects_says_to_make_a_queue_of_them(dataset: Any) -> None:
    with pytest.raises(
        OptionError, match=r"say SubjectsLoader\(Queue\(subjects, patch_sampler\), batch_size=2\)"
    ):
        zp.SubjectsLoader(dataset, batch_size=2)


def test_samplers_of_what_is_no_subject_say_what_is_wanted(labelled: zp.Cohort) -> None:
    with pytest.raises(OptionError, match=r"SubjectsLoader\(Queue\("):
        zp.SubjectsLoader(labelled)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"over one subject, not Cohort.*GridSampler\(cohort\[0\]"):
        zp.GridSampler(labelled, 4)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"from one subject, as cohort\[0\], not from Cohort"):
        next(zp.UniformSampler(4)(labelled))  # type: ignore[arg-type]


def test_a_transform_of_another_library_is_refused_with_how_to_wrap_it() -> None:
    tio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    with pytest.raises(OptionError, match=r"transform=from_torchio\(RandomFlip\(...\)\)"):
        queue_of(GOOD, transform=tio.RandomFlip())
    monai = pytest.importorskip("monai.transforms", reason="MONAI is not installed")
    with pytest.raises(OptionError, match=r"transform=from_monai\(RandFlipd\(...\)\)"):
        queue_of(GOOD, transform=monai.RandFlipd(["t1"]))
    with pytest.raises(OptionError, match="transform must be a function of a patch, not 5"):
        queue_of(GOOD, transform=5)


def test_skip_does_not_go_with_a_subject_sampler() -> None:
    with pytest.raises(OptionError, match="numbers of subjects, which on_bad='skip' would change"):
        queue_of(GOOD, subject_sampler=[0], shuffle_subjects=False, on_bad="skip")
    with pytest.raises(OptionError, match="on_bad must be one of error, skip, not 'drop'"):
        queue_of(GOOD, on_bad="drop")


# Threads, and errors of workers


def test_a_second_thread_gets_an_error_at_once() -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(zp.UniformSampler):
        def starts(self, *arguments: Any) -> Any:
            started.set()
            go_on.wait(20)
            return super().starts(*arguments)

    found: list[Any] = []
    with queue_of(small_subjects(3), Slow(4)) as queue:
        thread = threading.Thread(target=lambda: found.extend(queue))
        thread.start()
        assert started.wait(20)
        with pytest.raises(
            QueueError, match="iterated by another thread; give each thread a queue of its own"
        ):
            next(iter(queue))
        go_on.set()
        thread.join(20)
    assert len(found) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_is_short_and_its_cause_has_the_traceback(workers: int) -> None:
    def broken(patch: zp.Patch) -> zp.Patch:
        raise ValueError("no good")

    subjects = small_subjects(1)
    if workers:  # the first patch is transformed here, to know its size
        queue = zp.Queue(subjects, zp.LabelSampler(4, "seg", {99: 1}), num_workers=1, patches_per_volume=1)
        reason, frame = "no voxel of the wanted classes", "in starts"
    else:
        queue = zp.Queue(subjects, zp.UniformSampler(4), transform=broken, patches_per_volume=1)
        reason, frame = "ValueError: no good", "in broken"
    with queue, pytest.raises(QueueError, match=f"^subject 'sub-00' failed in epoch 0: .*{reason}") as failed:
        next(iter(queue))
    assert "Traceback" not in str(failed.value)
    assert frame in str(failed.value.__cause__)
