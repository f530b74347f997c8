"""Which level is read for micrometres per pixel, over a table of cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.errors import OptionError
from zpatch.slides.slide_levels import TAKEN_AS_IS, checked_mpp, level_for, whole_factor

PYRAMID = [(0.25, 0.25), (1.0, 1.0), (4.0, 4.0)]
UNEVEN = [(0.25, 0.5), (1.0, 2.0)]
CLOSE = [(0.5, 0.5), (0.51, 0.51), (1.0, 1.0)]


@pytest.mark.parametrize(
    ("sizes", "wanted", "level", "as_it_is"),
    [
        (PYRAMID, (0.25, 0.25), 0, True),
        (PYRAMID, (0.24, 0.24), 0, True),
        (PYRAMID, (0.26, 0.26), 0, True),
        (PYRAMID, (0.27, 0.27), 0, False),
        (PYRAMID, (0.5, 0.5), 0, False),
        (PYRAMID, (0.94, 0.94), 0, False),
        (PYRAMID, (0.96, 0.96), 1, True),
        (PYRAMID, (1.0, 1.0), 1, True),
        (PYRAMID, (1.049, 1.049), 1, True),
        (PYRAMID, (1.06, 1.06), 1, False),
        (PYRAMID, (3.9, 3.9), 2, True),
        (PYRAMID, (100, 100), 2, False),
        (PYRAMID, (0.3, 2.0), 0, False),
        (PYRAMID, (1.0, 2.0), 1, False),
        (UNEVEN, (0.25, 0.5), 0, True),
        (UNEVEN, (0.5, 0.5), 0, False),
        (UNEVEN, (1.0, 1.0), 0, False),
        (UNEVEN, (2.0, 2.0), 1, False),
        (UNEVEN, (1.0, 2.0), 1, True),
        (CLOSE, (0.5, 0.5), 1, True),
        ([(0.5, 0.5)], (3.0, 3.0), 0, False),
        ([(0.5, 0.5), (0.5, 0.5)], (0.5, 0.5), 0, True),
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(
    sizes: list[tuple[float, float]], wanted: tuple[float, float], level: int, as_it_is: bool
) -> None:
    assert level_for(sizes, wanted, "a.svs") == (level, as_it_is)


@pytest.mark.parametrize(("sizes", "wanted"), [(PYRAMID, 0.2), (UNEVEN, 0.3), ([(2.0, 2.0)], 1.9)])
def test_what_is_finer_than_every_level_is_refused(sizes: list[tuple[float, float]], wanted: float) -> None:
    with pytest.raises(OptionError, match=r"a\.svs: mpp=.* is finer than its finest level, .*ask for") as e:
        level_for(sizes, (wanted, wanted), "a.svs")
    assert e.value.option == "mpp"


@given(
    st.lists(st.floats(0.1, 50), min_size=1, max_size=6),
    st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)),
)
def test_nothing_is_enlarged_by_more_than_what_counts_as_equal(
    steps: list[float], wanted: tuple[float, float]
) -> None:
    sizes = [(size, size) for size in sorted(steps)]
    if min(wanted) * (1 + TAKEN_AS_IS) < sizes[0][0]:
        with pytest.raises(OptionError):
            level_for(sizes, wanted, "a.svs")
        return
    level, as_it_is = level_for(sizes, wanted, "a.svs")
    assert sizes[level][0] <= min(wanted) * (1 + TAKEN_AS_IS)
    assert not any(size[0] <= min(wanted) * (1 + TAKEN_AS_IS) for size in sizes[level + 1 :]) or (
        sizes[level] in sizes[level + 1 :]
    )
    assert as_it_is == all(abs(sizes[level][0] - w) <= TAKEN_AS_IS * w for w in wanted)


@given(st.integers(1, 200_000), st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32, 64]), st.booleans())
def test_whole_factors_are_found_whether_lengths_were_rounded_down_or_up(
    finest: int, factor: int, up: bool
) -> None:
    length = -(-finest // factor) if up else finest // factor
    if length >= 2 * factor:
        assert whole_factor(finest, length) == factor


@pytest.mark.parametrize(
    "value", [0, -1, float("nan"), float("inf"), "fine", None, (1,), (1, 2, 3), (1, 0), {}]
)
def test_micrometres_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match="mpp must be one positive number of micrometres per pixel, or two"):
        checked_mpp(value, "mpp")  # type: ignore[arg-type]
