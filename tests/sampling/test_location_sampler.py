"""The patches of a table: each row once in a visit, from any kind of table, with errors that name the row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from streams import items, small_subjects, stream

import zpatch as zp
from zpatch.errors import OptionError, PatchLocationError, UnknownNameError

SUBJECTS = small_subjects(4)  # of 12 voxels on each axis
TABLE = [
    ("sub-02", 6, 5, 4),
    ("sub-00", 2, 2, 2),
    ("sub-02", 2, 10, 3),
    ("sub-00", 2, 2, 2),
    ("sub-02", 9, 9, 9),
]
PLACES = {"sub-00": [(0, 0, 0)] * 2, "sub-02": [(4, 3, 2), (0, 8, 1), (7, 7, 7)]}


class Frame:
    """Like a table of pandas or polars: it has columns, and iterating it does not give rows."""

    columns = ("k", "j", "i", "subject", "note")

    def __getitem__(self, name: str) -> list[Any]:
        return [dict(zip(("subject", "i", "j", "k"), row, strict=True)).get(name) for row in TABLE]

    def __iter__(self) -> Any:
        return iter(self.columns)


KINDS: dict[str, Any] = {
    "tuples": TABLE,
    "lists": [list(row) for row in TABLE],
    "an iterator": iter(TABLE),
    "dictionaries": [dict(zip(("subject", "i", "j", "k"), row, strict=True), note=1) for row in TABLE],
    "columns": {name: [row[n] for row in TABLE] for n, name in enumerate(("subject", "i", "j", "k"))},
    "a frame": Frame(),
    "objects": np.array(TABLE, dtype=object),
    "a structured array": np.array(TABLE, dtype=[("subject", "U9"), ("i", "i4"), ("j", "u1"), ("k", "i8")]),
}


@pytest.mark.parametrize("table", KINDS.values(), ids=KINDS)
def test_every_kind_of_table_gives_the_same_patches(table: Any) -> None:
    sampler = zp.LocationSampler(4, table)
    assert repr(sampler) == repr(zp.LocationSampler(4, TABLE))
    assert len(sampler) == 5
    for subject in SUBJECTS:
        assert [place.index for place in sampler.locations(subject)] == PLACES.get(subject.name, [])


def test_patches_are_read_where_the_rows_say() -> None:
    for at, first in (("centre", (4, 3, 2)), ("first", (6, 5, 4))):
        patch = next(zp.LocationSampler(4, TABLE[:1], at=at)(SUBJECTS[2]))  # type: ignore[arg-type]
        assert patch.location == zp.PatchLocation(first, (4, 4, 4))
        box = tuple(slice(a, a + 4) for a in first)
        assert np.array_equal(patch.t1.data[0].numpy(), SUBJECTS[2].t1.data[(0, *box)])


@pytest.mark.parametrize("world_size", [1, 2])
def test_in_a_queue_each_row_comes_once_in_an_epoch(world_size: int) -> None:
    found: Counter[tuple[str, tuple[int, int, int]]] = Counter()
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size} if world_size > 1 else {}
        with zp.Queue(SUBJECTS, zp.LocationSampler(4, TABLE), patches_per_volume=99, **ranks) as queue:
            assert len(queue) == (5 if world_size == 1 else 3)  # the rank of two rows repeats one
            found.update((patch.subject, patch.location.index) for patch in queue)
    expected = Counter((name, place) for name, places in PLACES.items() for place in places)
    expected["sub-00", (0, 0, 0)] += world_size - 1
    assert found == expected


def test_subjects_without_rows_give_no_patches_even_if_they_are_too_small() -> None:
    small = small_subjects(6, size=3)[5]
    with zp.Queue([small, *SUBJECTS], zp.LocationSampler(4, TABLE)) as queue:
        assert len(list(queue)) == 5
    with pytest.raises(OptionError, match="2 subjects cannot be dealt out to 3 ranks"):
        zp.Queue(SUBJECTS, zp.LocationSampler(4, TABLE), rank=0, world_size=3)


def test_the_stream_is_the_same_for_any_workers_and_is_resumed_at_any_patch() -> None:
    table = [(f"sub-0{n % 3}", 2 + n % 7, 3 + n % 5, 2 + n % 8) for n in range(29)]
    sampler = zp.LocationSampler(4, table)
    options: dict[str, Any] = {"max_length": 6, "seed": 2}
    alone = stream(SUBJECTS, sampler, epochs=[0, 1], **options)
    assert len(alone) == 58
    assert alone[:29] != alone[29:]
    for workers in (1, 2):
        assert stream(SUBJECTS, sampler, epochs=[0, 1], num_workers=workers, **options) == alone
    for consumed in range(0, 29, 7):
        queue = zp.Queue(SUBJECTS, sampler, **options)
        patches = iter(queue)
        for _ in range(consumed):
            next(patches)
        again = zp.Queue(SUBJECTS, zp.LocationSampler(4, table), **options)
        again.load_state_dict(queue.state_dict())
        assert items(again) == alone[consumed:29]
    other = zp.Queue(SUBJECTS, zp.LocationSampler(4, table[:-1]), **options)
    with pytest.raises(OptionError, match="the state is of another stream: sampler was"):
        other.load_state_dict(queue.state_dict())


def test_weights_say_how_often_the_rows_of_a_subject_come() -> None:
    weights = {"sub-00": 3, "sub-01": 0, "sub-02": 1, "sub-03": 0}
    with zp.Queue(SUBJECTS, zp.LocationSampler(4, TABLE), subject_weights=weights) as queue:
        assert Counter(patch.subject for patch in queue) == {"sub-00": 6, "sub-02": 3}


def test_with_padding_only_the_centre_is_inside() -> None:
    corner = [("sub-00", 0, 11, 5)]
    with pytest.raises(
        PatchLocationError, match=r"row \(0, 11, 5\) of subject 'sub-00': the patch is not ins"
    ):
        zp.LocationSampler(4, corner).locations(SUBJECTS[0])
    [patch] = zp.LocationSampler(4, corner, padding_mode="constant", fill=7)(SUBJECTS[0])
    assert patch.location.index == (-2, 9, 3)
    assert (patch.t1.data[0, :2] == 7).all()
    assert patch.t1.data[0, 2, 2, 2] == SUBJECTS[0].t1.data[0, 0, 11, 5]
    for row in ((-1, 5, 5), (5, 12, 5)):
        sampler = zp.LocationSampler(4, [("sub-00", *row)], padding_mode="edge")
        with pytest.raises(PatchLocationError, match="its centre is not inside the volume of"):
            list(sampler(SUBJECTS[0]))


def test_a_queue_says_at_once_which_rows_are_wrong() -> None:
    with pytest.raises(
        UnknownNameError, match="no subject 'sub-04' in the queue, leave out its rows; did you"
    ):
        zp.Queue(SUBJECTS, zp.LocationSampler(4, [*TABLE, ("sub-04", 5, 5, 5)]))
    wrong = zp.LocationSampler(4, [*TABLE, ("sub-00", 5, 5, 11)])
    with pytest.raises(PatchLocationError, match=r"1 of 4 subjects cannot be used:\n.*row \(5, 5, 11\)"):
        zp.Queue(SUBJECTS, wrong)
    with (
        pytest.warns(UserWarning, match="1 of 4 subjects cannot be used, and are left out"),
        zp.Queue(SUBJECTS, wrong, on_bad="skip") as queue,
    ):
        assert {patch.subject for patch in queue} == {"sub-02"}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], "has no rows"),
        ([("a", 1, 2)], r"it has 3 columns"),
        ([("a", 1, 2, 3, 4)], r"it has 5 columns"),
        ([("a", 1, 2, 3), ("a", 1)], "ValueError"),
        ([("a", 1.5, 2, 3)], "i, j, k must be integers"),
        ([("a", "1", 2, 3)], "i, j, k must be integers"),
        ([(1, 1, 2, 3)], "a subject is 1"),
        ([{"subject": "a", "i": 1, "j": 2}], "KeyError: 'k'"),
        (7, "TypeError"),
        (None, r"rows of a subject's name and three integers, as \[\('sub-01', 40, 52, 31\)\]"),
    ],
)
def test_another_table_is_an_error(table: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        zp.LocationSampler(4, table)


def test_another_place_in_the_patch_is_an_error() -> None:
    with pytest.raises(OptionError, match="at must be 'centre' or 'first', not 'middle'"):
        zp.LocationSampler(4, TABLE, at="middle")  # type: ignore[arg-type]


def test_a_row_of_any_of_many_alike_subjects_is_checked_before_the_first_patch(cohort: zp.Cohort) -> None:
    assert len(set(cohort.first_alike().tolist())) < len(cohort)
    for name in cohort.names:
        rows = [(other, 12, 12, 12) for other in cohort.names if other != name]
        with pytest.raises(PatchLocationError, match=name):
            zp.Queue(cohort, zp.LocationSampler(4, [*rows, (name, 10**6, 0, 0)]))
