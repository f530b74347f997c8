"""The epoch plan: each patch once, in a place of its own, resumed at any patch, dealt out evenly."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.epochs.epoch_plan import UNEVEN, Draw, EpochPlan, Share, Uneven, Visits
from zpatch.errors import OptionError

Wanted = tuple[int, int, int]  # subject, visit, number


def plan_of(
    patches: list[int],
    *,
    subjects: list[int] | None = None,
    total: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    group: int = 4,
    buffer: int = 10,
    shuffle: bool = True,
) -> EpochPlan:
    """A plan with a number of patches for each subject."""
    return EpochPlan(
        seed=seed,
        epoch=epoch,
        visits=Visits.of(np.array(range(len(patches)) if subjects is None else subjects, dtype=np.int64)),
        patches=np.array(patches, dtype=np.int64),
        total=sum(patches) if total is None else total,
        group=group,
        buffer=buffer,
        shuffle=shuffle,
    )


@st.composite
def plans(draw: Any) -> EpochPlan:
    patches = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    # Where subjects are too few to go round, one is in the order more than once.
    subjects = draw(
        st.permutations(range(len(patches)))
        | st.lists(st.integers(0, 2), min_size=len(patches), max_size=len(patches))
    )
    return plan_of(
        [patches[subject % len(patches)] for subject in subjects],
        subjects=subjects,
        total=draw(st.integers(1, 2 * sum(patches))),
        seed=draw(st.integers(-(2**63), 2**64)),
        epoch=draw(st.integers(0, 2**32)),
        group=draw(st.integers(1, 8)),
        buffer=draw(st.integers(1, 40)),
        shuffle=draw(st.booleans()),
    )


def arriving(plan: EpochPlan) -> list[Wanted]:
    """The patches that are read, in order, computed without the code of the plan."""
    visits: Counter[int] = Counter()
    found: list[Wanted] = []
    while len(found) < plan.total:
        for subject, count in zip(plan.visits.subjects.tolist(), plan.patches.tolist(), strict=True):
            found += [(subject, visits[subject], number) for number in range(count)]
            visits[subject] += 1
    return found[: plan.total]


def read_by(draws: list[Draw]) -> dict[int, Wanted]:
    """The patches of some draws, by their places in the order of handing out."""
    return {
        place: (draw.subject, draw.visit, number)
        for draw in draws
        for place, number in zip(draw.places, draw.numbers, strict=True)
    }


def places_of(draws: list[Draw]) -> list[int]:
    """The places of patches, in the order in which they are read."""
    return [place for draw in draws for place in draw.places]


# The order in which patches are handed out


@given(plans())
def test_each_patch_has_a_place_of_its_own(plan: EpochPlan) -> None:
    assert sorted(places_of(list(plan.draws()))) == list(range(plan.total))


@given(plans())
def test_no_patch_is_handed_out_far_from_its_place_in_the_order_of_reading(plan: EpochPlan) -> None:
    for number, place in enumerate(places_of(list(plan.draws()))):
        assert abs(place - number) < plan.buffer


@given(plans())
def test_without_shuffling_patches_are_handed_out_as_they_are_read(plan: EpochPlan) -> None:
    plan = dataclasses.replace(plan, shuffle=False)
    assert places_of(list(plan.draws())) == list(range(plan.total))


@given(plans())
def test_a_plan_is_a_function_of_its_fields(plan: EpochPlan) -> None:
    again = dataclasses.replace(plan, visits=Visits.of(plan.visits.subjects.copy()))
    assert plan.same_as(again)
    assert list(plan.draws()) == list(again.draws())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epoch": 1},
        {"visits": Visits.of(np.array([1, 0, 2]))},
        {"visits": Visits(*np.array([[0, 1, 2], [0, 0, 1], [1, 1, 1]]))},
        {"visits": Visits(*np.array([[0, 1, 2], [0, 0, 0], [1, 1, 2]]))},
        {"patches": np.array([6, 4, 5])},
        {"total": 14},
        {"group": 5},
        {"buffer": 11},
        {"shuffle": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_plans_that_differ_in_a_field_are_not_the_same(change: dict[str, Any]) -> None:
    plan = plan_of([5, 5, 5])
    assert not dataclasses.replace(plan, **change).same_as(plan)
    assert not plan.same_as(None)


def test_seeds_and_epochs_have_different_orders() -> None:
    orders = {
        tuple(places_of(list(plan_of([30], seed=s, epoch=e).draws()))) for s in range(5) for e in range(5)
    }
    assert len(orders) == 25


# What is read


@given(plans())
def test_draws_read_each_patch_once_in_the_order_of_subjects(plan: EpochPlan) -> None:
    draws = list(plan.draws())
    assert [(d.subject, d.visit, number) for d in draws for number in d.numbers] == arriving(plan)
    assert {draw.epoch for draw in draws} == {plan.epoch}


@given(plans())
def test_patches_read_together_are_of_one_visit_and_at_most_a_group(plan: EpochPlan) -> None:
    draws = list(plan.draws())
    assert all(1 <= len(draw.numbers) <= plan.group for draw in draws)
    # As few groups as there can be: all but the last of a visit are full.
    visits = Counter((subject, visit) for subject, visit, _ in arriving(plan))
    assert len(draws) == sum(-(-count // plan.group) for count in visits.values())


@given(plans())
def test_draws_after_any_number_consumed_read_exactly_the_rest(plan: EpochPlan) -> None:
    whole = read_by(list(plan.draws()))
    for consumed in range(plan.total + 1):
        draws = list(plan.draws(consumed))
        left = {place: wanted for place, wanted in whole.items() if place >= consumed}
        assert list(read_by(draws).items()) == list(left.items())
        assert all(1 <= len(draw.numbers) <= plan.group for draw in draws)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_that_is_resumed_near_its_end_takes_little_memory(shuffle: bool) -> None:
    plan = plan_of([20] * 1000, shuffle=shuffle)
    next(plan.draws(1))
    tracemalloc.start()
    draws = plan.draws(19_900)
    assert next(draws).subject >= 990
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200_000  # a list of the epoch's places would take 600 kB


@given(plans())
def test_a_subject_that_is_visited_again_gives_other_patches(plan: EpochPlan) -> None:
    read = read_by(list(plan.draws())).values()
    assert len(set(read)) == plan.total  # the place of each in the random streams is its own
    for subject in set(plan.visits.subjects.tolist()):
        visits = sorted({visit for s, visit, _ in read if s == subject})
        assert visits == list(range(len(visits)))


# Shares


@st.composite
def cohorts(draw: Any, equal: bool | None = None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """The order of an epoch, the number of patches of each subject, and a number of ranks."""
    world_size = draw(st.integers(1, 5))
    count = draw(st.integers(world_size, 17))
    few = st.just(draw(st.integers(1, 9)))
    numbers = few if equal else st.integers(1, 9)
    patches = draw(st.lists(numbers, min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    return np.array(order), np.array(patches), world_size


def shares(
    order: np.ndarray[Any, Any], patches: np.ndarray[Any, Any], world_size: int, uneven: Uneven
) -> tuple[list[list[int]], set[int]]:
    """The subjects of each rank, and the number of patches of a rank."""
    dealt = [Share(rank, world_size, uneven).deal(order, patches) for rank in range(world_size)]
    return [visits.subjects.tolist() for visits, _ in dealt], {total for _, total in dealt}


@given(cohorts())
def test_padding_gives_every_subject_and_repeats_as_few_as_can_be(cohort: Any) -> None:
    order, patches, world_size = cohort
    mine, totals = shares(*cohort, "pad")
    dealt = Counter(subject for subjects in mine for subject in subjects)
    assert set(dealt) == set(order.tolist())
    assert sum(dealt.values()) == -(-len(order) // world_size) * world_size
    assert max(dealt.values()) <= 2
    assert {len(subjects) for subjects in mine} == {-(-len(order) // world_size)}
    assert totals == {max(patches[subjects].sum() for subjects in mine)}


@given(cohorts())
def test_dropping_gives_no_subject_twice_and_leaves_out_as_few_as_can_be(cohort: Any) -> None:
    order, patches, world_size = cohort
    mine, totals = shares(*cohort, "drop")
    dealt = [subject for subjects in mine for subject in subjects]
    assert len(set(dealt)) == len(dealt) == len(order) // world_size * world_size
    assert set(dealt) <= set(order.tolist())
    assert totals == {min(patches[subjects].sum() for subjects in mine)}


@given(cohorts())
def test_error_refuses_subjects_that_cannot_be_divided_evenly(cohort: Any) -> None:
    order, patches, world_size = cohort
    padded, _ = shares(*cohort, "pad")
    even = len({patches[subjects].sum() for subjects in padded}) == 1
    if len(order) % world_size:
        with pytest.raises(OptionError, match=f"{len(order)} subjects cannot be divided evenly"):
            Share(0, world_size, "error").check(len(order))
    elif even:
        assert shares(*cohort, "error") == shares(*cohort, "drop") == shares(*cohort, "pad")
    else:
        with pytest.raises(OptionError, match=r"the ranks' subjects have .* patches; say uneven="):
            shares(*cohort, "error")


@given(cohorts(equal=True), st.sampled_from(UNEVEN))
def test_ranks_take_the_order_in_turns(cohort: Any, uneven: Uneven) -> None:
    order, _, world_size = cohort
    if uneven == "error" and len(order) % world_size:
        return
    mine, _ = shares(*cohort, uneven)
    in_turns = [subject for turn in zip(*mine, strict=True) for subject in turn]
    assert in_turns[: len(order)] == order.tolist()[: len(in_turns)]
    assert in_turns[len(order) :] == order.tolist()[: max(0, len(in_turns) - len(order))]


@given(cohorts(), st.sampled_from(UNEVEN))
def test_a_single_process_gets_the_order_unchanged(cohort: Any, uneven: Uneven) -> None:
    order, patches, _ = cohort
    visits, total = Share(uneven=uneven).deal(order, patches)
    assert visits.subjects.tolist() == order.tolist()
    assert total == patches.sum()


@given(cohorts())
def test_ranks_of_unequal_grids_give_as_many_patches_and_padding_leaves_none_out(cohort: Any) -> None:
    order, patches, world_size = cohort
    for uneven in ("pad", "drop"):
        counts = set()
        for rank in range(world_size):
            visits, total = Share(rank, world_size, uneven).deal(order, patches)  # type: ignore[arg-type]
            subjects = visits.subjects
            plan = plan_of(patches[subjects].tolist(), subjects=subjects.tolist(), total=total)
            read = read_by(list(plan.draws()))
            counts.add(len(read))
            once = {(s, 0, n) for s in subjects.tolist() for n in range(patches[s])}
            assert once <= set(read.values()) if uneven == "pad" else set(read.values()) <= once
        assert len(counts) == 1


@pytest.mark.parametrize("uneven", UNEVEN)
def test_fewer_subjects_than_ranks_are_always_refused(uneven: Uneven) -> None:
    with pytest.raises(OptionError, match="2 subjects cannot be dealt out to 3 ranks; use fewer processes"):
        Share(0, 3, uneven).check(2)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0), (1, 1)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(OptionError, match=f"rank must be from 0 to {world_size - 1} of {world_size}"):
        Share(rank, world_size)


def test_an_unknown_word_for_uneven_is_refused() -> None:
    with pytest.raises(OptionError, match="uneven must be one of pad, drop, error, not 'trim'"):
        Share(uneven="trim")  # type: ignore[arg-type]
