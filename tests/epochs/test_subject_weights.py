"""Weights of subjects: exact counts in each epoch, the mean over epochs, all ranks together, resumed."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from streams import items, small_subjects, stream

import zpatch as zp
from zpatch.epochs.subject_weights import SubjectWeights
from zpatch.errors import OptionError

WEIGHTS = [0.0, 1.0, 2.5, 0.5, 4.0, 1.0, 0.25]
SUBJECTS = small_subjects(len(WEIGHTS), size=6)
SAMPLER = zp.UniformSampler(3)

integers = st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any)
numbers = st.lists(st.floats(0, 1e300, allow_subnormal=False) | st.just(0.1), min_size=1, max_size=30).filter(
    any
)
starts = st.floats(0, 1, exclude_max=True)


@given(integers, starts, st.randoms())
def test_visits_are_the_share_rounded_down_or_up_and_as_many_as_subjects(
    weights: list[int], start: float, random: Any
) -> None:
    order = np.array(random.sample(range(len(weights)), len(weights)))
    visits = SubjectWeights.of(weights).visits(order, start)
    assert visits.sum() == len(weights)
    for subject, count in zip(order, visits.tolist(), strict=True):
        share = Fraction(len(weights) * weights[subject], sum(weights))
        assert share.__floor__() <= count <= share.__ceil__()


@given(numbers, starts)
def test_any_weights_give_as_many_visits_as_subjects(weights: list[float], start: float) -> None:
    visits = SubjectWeights.of(weights).visits(np.arange(len(weights)), start)
    assert visits.sum() == len(weights)
    assert (visits[np.array(weights) == 0] == 0).all()
    shares = len(weights) * np.array(weights) / sum(weights)
    assert (np.abs(visits - shares) < 1 + 1e-6).all()


@given(st.integers(1, 300), st.sampled_from([1.0, 0.1, 1 / 3, 1e-300, 7e200]), starts)
def test_equal_weights_give_each_subject_once(count: int, weight: float, start: float) -> None:
    assert (SubjectWeights.of([weight] * count).visits(np.arange(count), start) == 1).all()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any))
def test_the_mean_number_of_visits_is_exactly_the_share(weights: list[int]) -> None:
    """Visits are constant between multiples of 1 / sum: their mean over all starts is a sum."""
    found, total = SubjectWeights.of(weights), sum(weights)
    visits = sum(found.visits(np.arange(len(weights)), (n + 0.5) / total) for n in range(total))
    assert visits.tolist() == [len(weights) * weight for weight in weights]  # type: ignore[union-attr]


def test_a_hundred_thousand_weights_are_no_trouble() -> None:
    weights = np.random.default_rng(0).exponential(size=100_000)
    visits = SubjectWeights.of(weights).visits(np.arange(100_000), 0.3)
    shares = 100_000 * weights / weights.sum()
    assert visits.sum() == 100_000
    assert (np.abs(visits - shares) < 1 + 1e-6).all()


# In a queue


def counts_of(epochs: int, world_size: int, **options: Any) -> tuple[Counter[int], set[int]]:
    """How many patches each subject has in some epochs of all ranks, and how many each rank gives."""
    found: Counter[int] = Counter()
    lengths = set()
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size} if world_size > 1 else {}
        queue = zp.Queue(SUBJECTS, SAMPLER, patches_per_volume=2, subject_weights=WEIGHTS, **ranks, **options)
        for epoch in range(epochs):
            numbers = [draw.subject for draw in queue.plan(epoch).draws() for _ in draw.numbers]
            lengths.add(len(numbers))
            found.update(numbers)
    return found, lengths


@pytest.mark.parametrize(
    ("world_size", "uneven", "shuffle"),
    [(1, "pad", True), (1, "pad", False), (2, "pad", True), (2, "drop", True), (3, "drop", True)],
)
def test_subjects_come_in_proportion_to_their_weights_over_all_ranks(
    world_size: int, uneven: str, shuffle: bool
) -> None:
    found, lengths = counts_of(300, world_size, uneven=uneven, shuffle_subjects=shuffle)
    assert len(lengths) == 1
    assert 0 not in found
    counts = np.array([found[n] / 2 for n in range(1, 7)])
    expected = np.array(WEIGHTS[1:]) / sum(WEIGHTS) * counts.sum()
    assert chisquare(counts, expected).pvalue > 1e-4
    assert chisquare(counts, np.full(6, counts.sum() / 6)).pvalue < 1e-10  # the law can fail


def test_visits_of_a_subject_draw_different_patches_on_all_ranks() -> None:
    for epoch in range(5):
        drawn: list[tuple[int, int, int]] = []
        for rank in range(3):
            queue = zp.Queue(SUBJECTS, SAMPLER, subject_weights=WEIGHTS, rank=rank, world_size=3)
            draws = list(queue.plan(epoch).draws())
            drawn += [(draw.subject, draw.visit, n) for draw in draws for n in draw.numbers]
        assert len(set(drawn)) == len(drawn) == 90
        for subject in {subject for subject, *_ in drawn}:
            visits = sorted({visit for one, visit, _ in drawn if one == subject})
            assert visits == list(range(len(visits)))


def test_visits_that_are_repeated_to_make_ranks_equal_draw_different_patches_too() -> None:
    subjects = [*small_subjects(3, size=12), *small_subjects(5, size=6)[3:]]
    grid = zp.GridSampler(patch_size=6)
    drawn = []
    for rank in range(2):
        queue = zp.Queue(subjects, grid, subject_weights=[1, 1, 2, 3, 3], rank=rank, world_size=2)
        draws = list(queue.plan(1).draws())
        drawn += [(draw.subject, draw.visit, n) for draw in draws for n in draw.numbers]
    assert len(set(drawn)) == len(drawn)


def test_visits_of_one_subject_are_apart_and_without_shuffling_one_after_the_other() -> None:
    weights = [5.0, *[1.0] * 5]
    queue = zp.Queue(SUBJECTS[:6], SAMPLER, subject_weights=weights)
    orders = [queue.subject_order(epoch).tolist() for epoch in range(40)]
    assert {order.count(0) for order in orders} == {3}
    assert any(order[n] == 0 != order[n + 1] for order in orders for n in range(4) if order[n + 2] == 0)
    queue = zp.Queue(SUBJECTS[:6], SAMPLER, subject_weights=weights, shuffle_subjects=False)
    for epoch in range(5):
        order = queue.subject_order(epoch).tolist()
        assert order == sorted(order)
        assert order[:3] == [0, 0, 0]


def test_equal_weights_visit_each_subject_once_in_an_epoch() -> None:
    queue = zp.Queue(SUBJECTS, SAMPLER, subject_weights=[0.1] * 7)
    for epoch in range(10):
        assert sorted(queue.subject_order(epoch).tolist()) == list(range(7))


def test_a_weighted_stream_is_the_same_for_any_workers_and_is_resumed_at_any_patch() -> None:
    options: dict[str, Any] = {
        "patches_per_volume": 3,
        "max_length": 5,
        "subject_weights": WEIGHTS,
        "seed": 3,
    }
    alone = stream(SUBJECTS, SAMPLER, **options)
    assert len(alone) == 21
    for workers in (1, 2):
        assert stream(SUBJECTS, SAMPLER, num_workers=workers, **options) == alone
    for consumed in range(0, 21, 7):
        queue = zp.Queue(SUBJECTS, SAMPLER, **options)
        patches = iter(queue)
        for _ in range(consumed):
            next(patches)
        again = zp.Queue(SUBJECTS, SAMPLER, **options)
        again.load_state_dict(queue.state_dict())
        assert items(again) == alone[consumed:]


def test_names_and_numbers_give_the_same_weights_also_where_bad_subjects_are_left_out() -> None:
    subjects = [*SUBJECTS[:3], *small_subjects(1, size=2), *SUBJECTS[3:]]
    subjects[3].name = "small"
    numbers = [*WEIGHTS[:3], 9.0, *WEIGHTS[3:]]
    names = {subject.name: weight for subject, weight in zip(subjects, numbers, strict=True)}
    with pytest.warns(UserWarning, match="1 of 8 subjects cannot be used, and are left out"):
        left = zp.Queue(subjects, SAMPLER, subject_weights=np.array(numbers), on_bad="skip")  # type: ignore[arg-type]
    by_name = zp.Queue(SUBJECTS, SAMPLER, subject_weights={**names, "another": 5})
    plain = zp.Queue(SUBJECTS, SAMPLER, subject_weights=WEIGHTS)
    assert left.state_dict() == by_name.state_dict() == plain.state_dict()
    assert left.plan(3).same_as(plain.plan(3))
    assert by_name.plan(3).same_as(plain.plan(3))


def test_a_state_is_of_its_weights() -> None:
    plain = zp.Queue(SUBJECTS, SAMPLER)
    weighted = zp.Queue(SUBJECTS, SAMPLER, subject_weights=WEIGHTS)
    for state in (plain.state_dict(), zp.Queue(SUBJECTS, SAMPLER, subject_weights=[1] * 7).state_dict()):
        with pytest.raises(OptionError, match="the state is of another stream: subject_weights was"):
            weighted.load_state_dict(state)
    assert "subject_weights" not in plain.state_dict()["fingerprint"]  # as versions without weights save it


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, 2], "subject_weights has 2 weights for 7 subjects"),
        ([0] * 7, "must not be 0 for all subjects"),
        ([1, 1, 1, -1, 1, 1, 1], r"finite numbers, at least 0, one for each subject, not -1\.0"),
        ([1, 1, 1, float("nan"), 1, 1, 1], "not nan"),
        ([1, float("inf"), 1, 1, 1, 1, 1], "not inf"),
        (np.ones((7, 2)), r"not of shape \(7, 2\)"),
        (["a"] * 7, "subject_weights must be numbers"),
        ({"sub-00": 1, "sub-01": 1}, "subject_weights has no 'sub-02' and 4 others; give each subject"),
        ({f"sub-{n:02}": -1 for n in range(7)}, "at least 0"),
    ],
)
def test_weights_that_are_wrong_are_errors(weights: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        zp.Queue(SUBJECTS, SAMPLER, subject_weights=weights)


@pytest.mark.parametrize(
    "options", [{"class_balance": {"seg": {1: 1}}}, {"subject_sampler": [0], "shuffle_subjects": False}]
)
def test_two_ways_to_say_how_often_subjects_come_are_an_error(options: Any) -> None:
    with pytest.raises(OptionError, match=r"subject_weights and .* both say how often subjects come"):
        zp.Queue(SUBJECTS, zp.LabelSampler(3, "seg"), subject_weights=WEIGHTS, **options)
