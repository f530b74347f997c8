"""Samplers pad volumes that are smaller than the patch, and users write samplers of their own."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from streams import accepts_nothing, is_even, items, small_subjects, stream

import zpatch as zp
from zpatch.errors import OptionError, PatchLocationError, PatchSizeError, QueueError
from zpatch.sampling.randomness import rng as address_rng
from zpatch.work_counts import Work, worked

SHAPE = (5, 12, 9)
MODES = {"constant": {"constant_values": -7}, "edge": {}, "reflect": {}, "symmetric": {}, "wrap": {}}


def subject_of(shape: Any = SHAPE) -> zp.Subject:
    rng = np.random.default_rng(0)
    t1 = rng.integers(0, 100, shape).astype(np.int16)
    labels = rng.integers(0, 3, shape).astype(np.uint8)
    return zp.Subject(name="a", t1=zp.ScalarImage(t1), seg=zp.LabelMap(labels), where=zp.SamplingMap(t1))


def samplers(patch_size: Any, **options: Any) -> list[zp.RandomSampler]:
    return [
        zp.UniformSampler(patch_size, **options),
        zp.WeightedSampler(patch_size, "where", **options),
        zp.LabelSampler(patch_size, "seg", {1: 1, 2: 3}, **options),
        zp.MixedSampler(
            [(1, zp.UniformSampler(patch_size, **options)), (1, zp.LabelSampler(patch_size, **options))]
        ),
    ]


def padded(voxels: NDArray[Any], patch: NDArray[Any], mode: str, options: dict[str, Any]) -> NDArray[Any]:
    missing = np.maximum(patch - voxels.shape, 0)
    return np.pad(voxels, [(n // 2, n - n // 2) for n in missing], mode=mode, **options)  # type: ignore[call-overload]


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.sampled_from(list(MODES)),
    st.integers(0, 2**32),
)
def test_patches_are_those_of_the_padded_volume(shape: Any, patch_size: Any, mode: str, seed: int) -> None:
    subject, patch = subject_of(shape), np.array(patch_size)
    before = np.maximum(patch - shape, 0) // 2
    t1 = padded(subject.t1.data[0], patch, mode, MODES[mode])
    seg = padded(subject.seg.data[0], patch, mode, {"constant_values": 0} if mode == "constant" else {})
    sampler = zp.UniformSampler(patch_size, padding_mode=mode, fill=-7)
    for taken in sampler(subject, 3, rng=seed):
        first = taken.location.index + before
        assert (first >= 0).all()
        assert (first + patch <= t1.shape).all()
        box = tuple(slice(a, a + p) for a, p in zip(first, patch, strict=True))
        np.testing.assert_array_equal(taken.t1.data[0].numpy(), t1[box])
        np.testing.assert_array_equal(taken.seg.data[0].numpy(), seg[box])
        corner = subject.t1.affine @ [*taken.location.index, 1]
        np.testing.assert_allclose(taken.t1.affine[:, 3], corner)


@pytest.mark.parametrize("number", range(4))
def test_a_short_axis_has_one_place_and_the_law_of_the_others_holds(number: int) -> None:
    subject = subject_of()
    sampler = samplers((8, 4, 4), padding_mode="edge")[number]
    starts = np.array([place.index for place in sampler.locations(subject, 20_000, rng=1)])
    assert set(starts[:, 0].tolist()) == {-1}
    seg, where = subject.seg.data[0], subject.where.data[0].astype(float)
    uniform = np.ones(SHAPE)
    classes = [(seg == c) / (seg[:, 2:11, 2:8] == c).sum() for c in (1, 2)]
    nonzero = (seg != 0) / (seg[:, 2:11, 2:8] != 0).sum()
    law = [uniform, where, classes[0] + 3 * classes[1], uniform / (5 * 9 * 6) + nonzero][number]
    expected = law[:, 2:11, 2:8].sum(axis=0)
    seen = np.zeros(expected.shape)
    np.add.at(seen, (starts[:, 1], starts[:, 2]), 1)
    possible = expected > 0
    assert not seen[~possible].any()
    assert chisquare(seen[possible], (expected * 20_000 / expected.sum())[possible]).pvalue > 1e-4


def test_a_volume_that_is_large_enough_is_not_padded_and_gives_the_same_patches() -> None:
    subject = subject_of()
    for plain, mode in zip(samplers(4), samplers(4, padding_mode="wrap"), strict=True):
        assert plain.locations(subject, 50, rng=3) == mode.locations(subject, 50, rng=3)


@pytest.mark.parametrize("number", range(4))
def test_without_a_mode_the_error_names_the_axis_and_the_remedy(number: int) -> None:
    with pytest.raises(PatchSizeError, match=r"axis I of 'a' \(5 voxels\).*say padding_mode='constant'"):
        samplers(8)[number].locations(subject_of(), 1)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(OptionError, match="padding_mode must be one of constant"):
        zp.UniformSampler(4, padding_mode="mirror")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_queue_pads_small_subjects_among_large_ones(workers: int) -> None:
    subjects = [subject_of((4, 12, 9)), zp.Subject.of(subject_of((12, 12, 12)).images, name="b")]
    sampler = zp.UniformSampler(8, padding_mode="constant", fill=-7)
    with zp.Queue(subjects, sampler, patches_per_volume=4, num_workers=workers) as queue:
        patches = {(patch.subject, patch.location.index): patch for patch in queue}
    for (name, index), patch in patches.items():
        [expected] = sampler.read(subjects[name == "b"], [patch.location])
        np.testing.assert_array_equal(patch.t1.data.numpy(), expected.t1.data.numpy().astype(np.float32))
        assert (index[0] == -2) == (name == "a")


def test_padding_shows_in_the_repr_by_which_a_queue_knows_its_stream() -> None:
    shown = [repr(one) for mode in (None, "edge") for one in samplers(4, padding_mode=mode)]
    assert len(set(shown)) == 8
    assert shown[0] == "UniformSampler(patch_size=(4, 4, 4))"
    assert shown[4] == "UniformSampler(patch_size=(4, 4, 4), padding_mode='edge', fill=0)"


def named(name: str) -> zp.Subject:
    ones, zeros = np.ones((10, 10, 10)), np.zeros((10, 10, 10), np.uint8)
    return zp.Subject(name=name, t1=zp.ScalarImage(ones), seg=zp.LabelMap(zeros))


class Corners(zp.RandomSampler):
    """A strategy of a user: one of two opposite corners."""

    def starts(self, subject: zp.Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        last = np.subtract(subject.spatial_shape, self.patch_size)
        return rng.integers(0, 2, size=(count, 1)) * last


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_of_ones_own_works_in_a_queue_and_is_resumed(workers: int) -> None:
    subjects = [named(name) for name in "abc"]

    def queue() -> zp.Queue:
        return zp.Queue(subjects, Corners(4), patches_per_volume=6, num_workers=workers)

    with queue() as whole, queue() as first, queue() as second:
        wanted = [(patch.subject, patch.location.index) for patch in whole]
        seen = []
        for patch in first:
            seen.append((patch.subject, patch.location.index))
            if len(seen) == 7:
                break
        second.load_state_dict(first.state_dict())
        seen += [(patch.subject, patch.location.index) for patch in second]
    assert seen == wanted
    assert {index for _, index in wanted} == {(0, 0, 0), (6, 6, 6)}


class Wrong(zp.RandomSampler):
    def __init__(self, starts: Any, **options: Any) -> None:
        super().__init__(4, **options)
        self.given = starts

    def starts(self, subject: zp.Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return np.array(self.given)


@pytest.mark.parametrize(
    ("starts", "kind", "words"),
    [
        ([[0.0, 0.0, 0.0]], OptionError, r"Wrong.starts must give integers of shape \(1, 3\).*not float64"),
        ([0, 0, 0], OptionError, r"of shape \(1, 3\)"),
        ([[0, 7, 0]], PatchLocationError, r"a patch from 7 to 11 on axis J of 'a' \(10 voxels\)"),
        ([[0, 0, -1]], PatchLocationError, r"a patch from -1 to 3 on axis K"),
    ],
)
def test_locations_that_cannot_be_are_an_error_that_names_the_sampler(
    starts: Any, kind: type, words: str
) -> None:
    with pytest.raises(kind, match=words):
        Wrong(starts).locations(named("a"), 1)


def test_with_padding_a_sampler_of_ones_own_may_reach_over_the_border() -> None:
    [patch] = Wrong([[-2, 0, 8]], padding_mode="constant", fill=5)(named("a"), 1)
    assert patch.t1.data[0, :, 0, 0].tolist() == [5, 5, 1, 1] or patch.t1.data[0, :, 0, 0].tolist()[2:] == [
        1,
        1,
    ]
    assert patch.t1.data[0, :2].unique().tolist() == [5]
    assert patch.seg.data[0, :2].unique().tolist() == [0]


# Acceptance by content


PLACES = zp.Subject(name="a", t1=zp.ScalarImage(np.arange(10 * 9 * 8).reshape(10, 9, 8).astype(np.int16)))


def refusals() -> tuple[int, int]:
    """How many locations were rejected so far, and how many patches were taken all the same."""
    counts = worked()
    return counts[Work.REJECTED], counts[Work.EXHAUSTED]


def with_accept(accept: Any, **options: Any) -> list[zp.RandomSampler]:
    options = {"accept": accept, **options}
    return [
        zp.UniformSampler(3, **options),
        zp.WeightedSampler(3, "where", **options),
        zp.LabelSampler(3, "seg", {1: 1, 2: 3}, **options),
        zp.MixedSampler([(1, zp.UniformSampler(3)), (1, zp.LabelSampler(3))], **options),
    ]


def test_accepted_locations_have_the_distribution_of_those_that_are_accepted() -> None:
    found = zp.UniformSampler(3, accept=is_even, max_rejections=60).locations(PLACES, 6000, rng=1)
    starts = np.array([place.index for place in found])
    number = np.ravel_multi_index(tuple(starts.T), (8, 7, 6))
    accepted = np.arange(8 * 7 * 6) % 6 % 2 == 0  # voxels are even where k is
    counts = np.bincount(number, minlength=8 * 7 * 6)
    assert counts.sum() == counts[accepted].sum() == 6000
    assert chisquare(counts[accepted]).pvalue > 1e-4


@pytest.mark.parametrize("number", range(4))
def test_each_sampler_gives_what_is_accepted(number: int) -> None:
    sampler = with_accept(lambda patch: patch.t1.data[0, 1, 1, 1] > 30, max_rejections=100)[number]
    patches = list(sampler(subject_of((9, 9, 9)), 16, rng=3))
    assert len(patches) == 16
    assert all(patch.t1.data[0, 1, 1, 1] > 30 for patch in patches)
    plain = list(with_accept(None)[number](subject_of((9, 9, 9)), 16, rng=3))
    kept = [a.location == b.location for a, b in zip(patches, plain, strict=True)]
    assert kept == [bool(patch.t1.data[0, 1, 1, 1] > 30) for patch in plain]  # no other is drawn again


@pytest.mark.parametrize("number", range(4))
def test_a_patch_is_drawn_again_without_the_others(number: int) -> None:
    sampler, subject = (
        with_accept(lambda patch: patch.t1.data[0, 1, 1, 1] > 60)[number],
        subject_of((9, 9, 9)),
    )
    whole = sampler.numbered(subject, range(20), 20, address_rng(3, 1))
    for some in ([0], [7], [19, 2], list(range(5, 15))):
        assert sampler.numbered(subject, some, 20, address_rng(3, 1)) == [whole[n] for n in some]


def test_rejections_are_bounded_and_counted() -> None:
    before, seen = refusals(), []

    def accept(patch: zp.Patch) -> bool:
        seen.append(patch.location.index)
        return False

    [place] = zp.UniformSampler(3, accept=accept, max_rejections=5).locations(PLACES, 1, rng=0)
    assert [now - then for now, then in zip(refusals(), before, strict=True)] == [5, 1]
    assert len(seen) == 6
    assert place.index == seen[-1]
    zp.UniformSampler(3, accept=lambda patch: True).locations(PLACES, 9)
    assert [now - then for now, then in zip(refusals(), before, strict=True)] == [5, 1]


def test_candidates_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, read = zp.UniformSampler(3, accept=is_even, max_rejections=30), []
    plain = sampler.read

    def counting(subject: zp.Subject, places: Any) -> list[zp.Patch]:
        read.append(len(places))
        return plain(subject, places)

    monkeypatch.setattr(sampler, "read", counting)
    sampler.locations(PLACES, 16, rng=0)
    assert read[0] == 16
    assert read == sorted(read, reverse=True)
    assert len(read) < 12


@pytest.mark.parametrize("answer", [np.True_, torch.tensor(True), torch.tensor([[True]]), True])
def test_answers_of_any_type_of_booleans_are_taken(answer: Any) -> None:
    assert len(zp.UniformSampler(3, accept=lambda patch: answer).locations(PLACES, 2)) == 2


@pytest.mark.parametrize("answer", [None, 1, 0.0, "yes", torch.tensor(3), np.int64(1)])
def test_other_answers_are_an_error(answer: Any) -> None:
    with pytest.raises(OptionError, match="accept must give True or False, not ") as failed:
        zp.UniformSampler(3, accept=lambda patch: answer).locations(PLACES, 2)
    assert "of subject 'a'" in failed.value.__notes__[0]


def test_an_error_of_accept_names_the_patch() -> None:
    def fails(patch: zp.Patch) -> bool:
        raise ArithmeticError("no luck")

    sampler = zp.UniformSampler(3, accept=fails)
    with pytest.raises(ArithmeticError) as failed:
        sampler.locations(PLACES, 1, rng=0)
    [place] = zp.UniformSampler(3).locations(PLACES, 1, rng=0)
    assert failed.value.__notes__ == [f"in accept= of the patch at {place.index} of subject 'a'"]
    with pytest.raises(QueueError, match=r"subject 'a' failed in epoch 0: .* in accept= of the patch at"):
        list(zp.Queue([PLACES], sampler))


def test_it_is_shown_by_name_so_that_states_are_compared() -> None:
    assert repr(zp.UniformSampler(3, accept=is_even)) == (
        f"UniformSampler(patch_size=(3, 3, 3), accept={'<function is_even>'!r}, max_rejections=20)"
    )
    mixed = zp.MixedSampler([(1, zp.UniformSampler(3))], accept=is_even, max_rejections=3)
    assert repr(mixed).endswith("], accept='<function is_even>', max_rejections=3)")
    assert "accept" not in repr(zp.UniformSampler(3))
    state = zp.Queue([PLACES], zp.UniformSampler(3, accept=is_even)).state_dict()
    with pytest.raises(OptionError, match="the state is of another stream: sampler was"):
        zp.Queue([PLACES], zp.UniformSampler(3)).load_state_dict(state)


def test_the_stream_is_the_same_for_any_workers_and_is_resumed_at_any_patch() -> None:
    subjects, sampler = small_subjects(3), zp.UniformSampler(3, accept=is_even, max_rejections=4)
    options: dict[str, Any] = {"patches_per_volume": 7, "max_length": 5, "seed": 4}
    alone = stream(subjects, sampler, **options)
    assert alone != stream(subjects, zp.UniformSampler(3), **options)
    assert stream(subjects, pickle.loads(pickle.dumps(sampler)), **options) == alone
    for workers in (1, 2):
        assert stream(subjects, sampler, num_workers=workers, **options) == alone
    for consumed in range(0, 21, 7):
        queue = zp.Queue(subjects, sampler, **options)
        patches = iter(queue)
        for _ in range(consumed):
            next(patches)
        again = zp.Queue(subjects, sampler, **options)
        again.load_state_dict(queue.state_dict())
        assert items(again) == alone[consumed:]


def test_where_workers_are_spawned_it_must_be_picklable() -> None:
    sampler = zp.UniformSampler(3, accept=lambda patch: True)
    with (
        zp.Queue(small_subjects(2), sampler, num_workers=1, start_method="spawn") as queue,
        pytest.raises(QueueError, match="cannot be sent to a worker"),
    ):
        next(iter(queue))


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(OptionError, match="accept must be a function of a patch, not 3"):
        zp.UniformSampler(3, accept=3)  # type: ignore[arg-type]
    for number in (0, -1, 2.5, None):
        with pytest.raises(OptionError, match="max_rejections must be an integer of at least 1, not"):
            zp.UniformSampler(3, max_rejections=number)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="accept= is for the whole mixture; say MixedSampler"):
        zp.MixedSampler([(1, zp.UniformSampler(3, accept=accepts_nothing))])
