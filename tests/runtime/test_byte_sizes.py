"""Numbers of bytes, formatted and parsed as people write them, and memory limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.errors import MemoryLimitError, OptionError
from zpatch.runtime.byte_sizes import format_bytes, parse_bytes, refuse_above


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("17", 17),
        ("17 B", 17),
        ("64k", 64_000),
        ("500MB", 500_000_000),
        ("2 GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        ("3 Gi", 3 * 2**30),
        ("1.5 KiB", 1536),
        (" 1 TB ", 10**12),
        ("1 TiB", 2**40),
    ],
)
def test_bytes_are_read_with_decimal_and_binary_units_in_any_case(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from([("k", 3), ("MB", 6), ("gb", 9), ("T", 12)]))
def test_a_decimal_fraction_is_read_exactly(whole: int, thousandths: int, unit: tuple[str, int]) -> None:
    name, power = unit
    text = f"{whole}.{thousandths:03} {name}"
    assert parse_bytes(text) == (1000 * whole + thousandths) * 10 ** (power - 3)


@given(st.integers(0, 2**53))
def test_an_integer_or_its_text_is_a_number_of_bytes(count: int) -> None:
    assert parse_bytes(count) == parse_bytes(str(count)) == parse_bytes(f"{count} B") == count


@pytest.mark.parametrize(
    "text", ["", "much", "GiB", "-1", "1e3", "2 PiB", "2 i", "2 ib", "1,5 GB", "1 2", "inf"]
)
def test_text_that_is_not_a_number_of_bytes_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match="is not a number of bytes; write it like '2 GiB'") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3_300_000_000, "3.1 GiB"),
        (2**40, "1.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_binary_unit_that_fits(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**50))
def test_bytes_that_are_shown_can_be_read_again_to_the_shown_precision(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("count", [2**20 - 1, 2**30 - 1, 2**40 - 1])
def test_a_number_just_below_a_unit_is_shown_as_one_of_it(count: int) -> None:
    assert format_bytes(count).startswith("1.0 ")


def test_a_plan_above_the_limit_is_refused_with_both_numbers_and_advice() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        refuse_above(2**30, 3 * 2**30, "converting", "choose a smaller --chunk")
    assert str(caught.value) == (
        "converting needs 3.0 GiB, more than the limit of 1.0 GiB; choose a smaller --chunk"
    )


def test_a_plan_at_the_limit_is_not_refused_and_one_byte_more_is() -> None:
    refuse_above(2**30, 2**30, "converting", "choose a smaller --chunk")
    with pytest.raises(MemoryLimitError):
        refuse_above(2**30, 2**30 + 1, "converting", "choose a smaller --chunk")


def test_without_a_limit_nothing_is_refused() -> None:
    refuse_above(None, 2**60, "converting", "choose a smaller --chunk")


def test_a_limit_of_zero_refuses_every_plan_above_zero() -> None:
    with pytest.raises(MemoryLimitError, match="limit of 0 B"):
        refuse_above(0, 1, "converting", "choose a smaller --chunk")
