"""Values of a report as text: all values of a store have a readable text."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zpatch as zp
from zpatch.report.texts import (
    DASH,
    amount_text,
    count_text,
    image_text,
    number_text,
    plain_text,
    skipped_text,
    visible,
)


@given(st.text())
def test_all_characters_of_a_text_are_visible(text: str) -> None:
    shown = str(visible(text))
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in shown)
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, DASH), ("9", DASH), (12345, "12\u202f345"), (12345.6, "12\u202f346"), (-0.5, "\u22120.5")],
)
def test_numbers_have_four_digits_and_other_values_are_a_dash(value: object, text: str) -> None:
    assert number_text(value) == text


def test_numbers_that_are_none_have_a_text_too() -> None:
    assert (number_text(math.nan), number_text(math.inf), number_text(-1e300)) == (
        "nan", "inf", "\u22121e+300",
    )  # fmt: skip


def test_values_of_json_have_a_plain_text() -> None:
    assert plain_text([1, None, False, "a", {"b": [1]}]) == f'1, {DASH}, no, a, {{"b": [1]}}'


def test_an_image_is_described_by_kind_shape_spacing_type_and_source(cohort: zp.Cohort) -> None:
    record = cohort["sub-01"].t1.record
    text = image_text(record)
    assert text.startswith("scalar \u00b7 ")
    assert text.endswith(" mm \u00b7 int16 \u00b7 sub-01/t1.nii.gz")
    assert "channels" not in text


def test_labels_have_a_volume_where_voxels_have_a_size_in_mm(cohort: zp.Cohort) -> None:
    record = cohort["sub-01"].seg.record
    voxel_ml = math.prod(cohort["sub-01"].seg.spacing) / 1000
    assert amount_text(record, 10) == f"{10 * voxel_ml:.3g} ml"
    assert amount_text(dataclasses.replace(record, spatial_unit="micrometer"), 10) == "10 voxels"


@pytest.mark.parametrize("skipped", [None, 0, -1, 10**12, "many"])
def test_skipped_voxels_are_counted_only_where_their_number_is_possible(
    cohort: zp.Cohort, skipped: Any
) -> None:
    record = cohort["sub-01"].t1.record
    assert skipped_text(dataclasses.replace(record, stats={"skipped": skipped})) == ""
    half = math.prod(record.spatial_shape) // 2
    assert skipped_text(dataclasses.replace(record, stats={"skipped": half})) == (
        f"{count_text(half)} voxels (50%)"
    )
