"""Labels of a cohort: each has one colour."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from zpatch.report.labels import LabelColours


@given(st.lists(st.integers(-(2**63) + 1, 2**63 - 1), max_size=300))
def test_a_label_has_one_colour_and_neighbouring_labels_differ(values: list[int]) -> None:
    colours, present = LabelColours(values), sorted({*values} - {0})
    found = [colours.of(value) for value in present]
    assert len(set(found)) == min(len(found), 254)
    assert all(a != b for a, b in itertools.pairwise(found))
    assert colours.numbers(np.array(0)) == 0
