"""The balance of classes over a cohort: centres have the given shares, however rare a class is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.stats import chisquare
from streams import items, stream

import zpatch as zp
from zpatch.errors import OptionError, QueueError, UnknownNameError

COUNT, SIZE, PATCH = 200, 7, 3
SHARES = {1: 1, 2: 1, 3: 2}
BALANCE = {"seg": SHARES}
LABELS = zp.LabelSampler(PATCH, "seg")


def voxels_of(classes: list[int], number: int) -> np.ndarray[Any, Any]:
    """A label map with some voxels of classes that are allowed centres, more of the first ones."""
    labels = np.zeros((SIZE,) * 3, np.uint8)
    for n, label in enumerate(classes):
        labels[1 + n, 1 : 6 - n, 1 + number % 5] = label
    return labels


def classes_of(number: int) -> list[int]:
    """Class 1 in all subjects but one in five, 2 in a third, and 3 in one of a hundred."""
    rules = (number % 5 != 0, number % 3 == 0, number % 100 == 7)
    return [label for label, has in zip((1, 2, 3), rules, strict=True) if has]


def subject_of(number: int) -> zp.Subject:
    labels = voxels_of(classes_of(number), number)
    return zp.Subject(name=f"sub-{number:03}", t1=zp.ScalarImage(labels + 1), seg=zp.LabelMap(labels))


COHORT = [subject_of(number) for number in range(COUNT)]


def centres(
    sampler: zp.RandomSampler, world_size: int = 1, epochs: int = 3, **options: Any
) -> tuple[Counter[int], Counter[str]]:
    """How often each class is in the centre of a patch, and each subject comes, over all ranks."""
    found: Counter[int] = Counter()
    subjects: Counter[str] = Counter()
    lengths = set()
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size} if world_size > 1 else {}
        with zp.Queue(COHORT, sampler, patches_per_volume=4, **ranks, **options) as queue:
            for epoch in range(epochs):
                queue.set_epoch(epoch)
                patches = list(queue)
                lengths.add(len(patches))
                found.update(int(patch.seg.data[0, 1, 1, 1]) for patch in patches)
                subjects.update(patch.subject for patch in patches)
    assert len(lengths) == 1
    return found, subjects


def pvalue(found: Counter[int]) -> float:
    counts = np.array([found[label] for label in SHARES])
    return float(chisquare(counts, counts.sum() * np.array([1, 1, 2]) / 4).pvalue)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_classes_come_in_their_shares_over_all_ranks(world_size: int) -> None:
    found, subjects = centres(LABELS, world_size, class_balance=BALANCE)
    assert set(found) == set(SHARES)
    assert pvalue(found) > 1e-4
    bare = {subject.name for number, subject in enumerate(COHORT) if not classes_of(number)}
    assert bare
    assert not bare & set(subjects)


def test_without_balance_a_rare_class_is_rare() -> None:
    usable = [subject for number, subject in enumerate(COHORT) if classes_of(number)]
    with zp.Queue(usable, zp.LabelSampler(PATCH, "seg", SHARES), patches_per_volume=4) as queue:
        found = Counter(int(patch.seg.data[0, 1, 1, 1]) for patch in queue)
    assert found[3] < 0.05 * found.total()
    assert pvalue(found) < 1e-10


def test_in_a_mixture_the_draws_by_label_have_the_shares() -> None:
    """Uniform draws hit a class too: those are a known number of voxels, and are taken off."""
    mixed = zp.MixedSampler([(1, zp.UniformSampler(PATCH)), (3, LABELS)])
    with zp.Queue(COHORT, mixed, class_balance=BALANCE, patches_per_volume=30) as queue:
        plan, chosen = queue.plan(0), queue.patch_sampler
        assert isinstance(chosen, zp.MixedSampler)
        weights = Counter(plan.visits.subjects.tolist())
        expected = np.zeros(3)
        for number, visits in weights.items():
            labels = COHORT[number].seg.data[0, 1:-1, 1:-1, 1:-1]
            rates = chosen.parts[1][1].label_probabilities  # type: ignore[attr-defined]
            total = sum(rates[label] for label in classes_of(number))
            for n, label in enumerate(SHARES):
                by_label = rates[label] / total if label in classes_of(number) else 0
                expected[n] += 30 * visits * (np.mean(labels == label) / 4 + 0.75 * by_label)
        found = Counter(int(patch.seg.data[0, 1, 1, 1]) for patch in queue)
    counts = np.array([found[label] for label in SHARES])
    assert abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    by_label = counts / (30 * COUNT)
    assert abs(by_label - 0.75 * np.array([0.25, 0.25, 0.5])).max() < 0.04
    assert not {number for number in weights if not classes_of(number)}


def test_a_balanced_stream_is_the_same_for_any_workers_and_is_resumed_at_any_patch() -> None:
    subjects = COHORT[:12]
    options: dict[str, Any] = {
        "patches_per_volume": 3,
        "max_length": 5,
        "class_balance": {"seg": {1: 1, 3: 1}},
    }
    alone = stream(subjects, LABELS, **options)
    assert len(alone) == 36
    for workers in (1, 2):
        assert stream(subjects, LABELS, num_workers=workers, **options) == alone
    for consumed in range(0, 36, 7):
        queue = zp.Queue(subjects, LABELS, **options)
        patches = iter(queue)
        for _ in range(consumed):
            next(patches)
        again = zp.Queue(subjects, LABELS, **options)
        again.load_state_dict(queue.state_dict())
        assert items(again) == alone[consumed:]


def test_a_store_is_balanced_by_its_records_without_reading_voxels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 3, 7, 9):
        folder = tmp_path / "nii" / f"sub-{number}"
        folder.mkdir(parents=True)
        for name in ("t1", "seg"):
            labels = voxels_of(classes_of(number), number)
            nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / f"{name}.nii.gz")
    zp.convert(tmp_path / "nii", tmp_path / "store")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("voxels are read")

    with monkeypatch.context() as patch:
        patch.setattr(zp.Image, "read_group", refuse)
        queue = zp.Queue(zp.Cohort(tmp_path / "store"), LABELS, class_balance=BALANCE, patches_per_volume=40)
        with pytest.raises(AssertionError, match="voxels are read"):
            zp.Queue([subject_of(number) for number in (3, 7)], LABELS, class_balance=BALANCE)
    with queue:
        found = Counter(int(patch.seg.data[0, 1, 1, 1]) for patch in queue)
    assert set(found) == set(SHARES)


def test_a_label_sampler_without_a_name_is_of_the_balanced_map() -> None:
    ones = zp.LabelMap(np.ones((SIZE,) * 3, np.uint8))
    subjects = [zp.Subject(name=one.name, mask=ones, **one.images) for one in COHORT[:8]]
    named, unnamed = (
        stream(subjects, sampler, class_balance=BALANCE) for sampler in (LABELS, zp.LabelSampler(PATCH))
    )
    assert named == unnamed


def test_subjects_of_no_class_are_no_error_and_are_still_one_without_balance() -> None:
    with pytest.raises(QueueError, match="no voxel of the wanted classes"):
        stream(COHORT[:10], zp.LabelSampler(PATCH, "seg", SHARES))
    assert zp.Queue(COHORT[:10], LABELS, class_balance=BALANCE).num_subjects == 10


def test_bad_subjects_are_left_out_before_classes_are_counted() -> None:
    small = zp.Subject(
        name="small", t1=zp.ScalarImage(np.ones((2, 2, 2))), seg=zp.LabelMap(np.full((2, 2, 2), 3, np.uint8))
    )
    bare = zp.Subject(name="bare", t1=zp.ScalarImage(np.zeros((7, 7, 7))))
    with pytest.raises(UnknownNameError, match="2 of 10 subjects cannot be used"):
        zp.Queue([bare, *COHORT[:8], small], LABELS, class_balance=BALANCE)
    with pytest.warns(UserWarning, match="2 of 10 subjects cannot be used, and are left out"):
        left = zp.Queue([bare, *COHORT[:8], small], LABELS, class_balance=BALANCE, on_bad="skip")
    assert left.state_dict() == zp.Queue(COHORT[:8], LABELS, class_balance=BALANCE).state_dict()


@pytest.mark.parametrize(
    ("sampler", "balance", "words"),
    [
        (zp.UniformSampler(3), BALANCE, r"UniformSampler\(.*\) has none without label_probabilities; say "),
        (zp.LabelSampler(3, "seg", {1: 1}), BALANCE, r"say LabelSampler\(\(3, 3, 3\), 'seg'\)"),
        (zp.LabelSampler(3, "other"), BALANCE, "a LabelSampler of 'seg' draws"),
        (zp.GridSampler(patch_size=3), BALANCE, "has none without label_probabilities"),
        (LABELS, {"seg": {1: 1, 9: 1}}, "no subject has class 9 in 'seg'; correct class_balance"),
        (LABELS, {"seg": {1: -1}}, "the shares of class_balance must be finite numbers, at least 0"),
        (LABELS, {"seg": {1: 0}}, "a share above 0"),
        (LABELS, {"seg": {}}, "a share above 0"),
        (LABELS, {}, "class_balance must be classes of one label map"),
        (LABELS, {"seg": {1: 1}, "t1": {1: 1}}, "class_balance must be classes of one label map"),
        (LABELS, {"seg": [1, 2]}, "class_balance must be classes of one label map"),
    ],
)
def test_a_balance_that_cannot_be_is_an_error(sampler: Any, balance: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        zp.Queue(COHORT[:8], sampler, class_balance=balance)


def test_a_class_of_no_share_need_not_be_there() -> None:
    queue = zp.Queue(COHORT[:8], LABELS, class_balance={"seg": {1: 1, 9: 0}})
    assert "label_probabilities={1:" in repr(queue.patch_sampler)


def test_resampled_maps_are_balanced_by_the_classes_of_the_maps_they_are_made_of(cohort: zp.Cohort) -> None:
    coarse = cohort.map(lambda subject: subject.resampled(8.0))
    sampler = zp.LabelSampler(4, "seg", None)
    with zp.Queue(coarse, sampler, class_balance={"seg": {1: 1, 2: 3}}, patches_per_volume=100) as queue:
        found = Counter(int(patch.seg.data[0, 2, 2, 2]) for patch in queue)
    assert set(found) == {1, 2}
    assert chisquare([found[1], found[2]], [100, 300]).pvalue > 1e-4
