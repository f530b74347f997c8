"""The levels of a pyramid: sizes, micrometres per pixel, and which one is read for those that are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from zpatch.errors import OptionError

TAKEN_AS_IS = 0.05  # relative difference of pixel sizes below which nothing is resampled

Pair = tuple[float, float]


class SlideLevel(NamedTuple):
    """One level of a slide: its size in pixels, and the mean of its micrometres per pixel along x and y.

    ``mpp`` is None where the file does not state any.
    """

    width: int
    height: int
    mpp: float | None


def whole_factor(finest: int, length: int) -> float:
    """By how much a level of ``length`` pixels is coarser than the ``finest`` one, along one axis.

    Writers round the lengths of levels: a power of two or another whole number is taken where it gives the
    same length, rounded down or up.

    >>> whole_factor(40001, 10000), whole_factor(1000, 333), whole_factor(1000, 300)
    (4.0, 3.0, 3.3333333333333335)
    """
    factor = finest / length
    for whole in (2 ** round(math.log2(factor)), round(factor)):
        if whole >= 1 and math.floor(finest / whole) <= length <= math.ceil(finest / whole):
            return float(whole)
    return factor


def level_for(sizes: Sequence[Pair], wanted: Pair, path: object) -> tuple[int, bool]:
    """The number of the level that is read for some micrometres per pixel, and whether it is taken as it is.

    ``sizes`` are those of the levels, along x and y, finest first. It is the coarsest level of those that are
    at least as fine as is wanted, so that nothing is enlarged; within 5 % it is taken as it is, otherwise it
    is to be resampled. Raises OptionError where no level is fine enough.

    >>> sizes = [(0.25, 0.25), (1.0, 1.0), (4.0, 4.0)]
    >>> [level_for(sizes, (mpp, mpp), "a.svs") for mpp in (0.25, 0.5, 0.97, 1.04, 1.06, 8.0)]
    [(0, True), (0, False), (1, True), (1, True), (1, False), (2, False)]
    """
    fine = [
        number
        for number, size in enumerate(sizes)
        if all(has <= want * (1 + TAKEN_AS_IS) for has, want in zip(size, wanted, strict=True))
    ]
    if not fine:
        finest = format_mpp(sizes[0])
        raise OptionError(
            f"{path}: mpp={format_mpp(wanted)} is finer than its finest level, {finest} micrometres per "
            f"pixel; ask for mpp={finest} or more",
            option="mpp",
        )
    chosen = max(fine, key=lambda number: (math.prod(sizes[number]), -number))
    close = all(abs(h - w) <= TAKEN_AS_IS * w for h, w in zip(sizes[chosen], wanted, strict=True))
    return chosen, close


def checked_mpp(value: float | Sequence[float], option: str) -> Pair:
    """Micrometres per pixel along x and y: one positive number, or two."""
    try:
        numbers = [float(n) for n in value] if isinstance(value, Sequence) else [float(value)] * 2
        is_sound = len(numbers) == 2 and all(0 < n < math.inf for n in numbers)
    except (TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise OptionError(
            f"{option} must be one positive number of micrometres per pixel, or two (x, y), not {value!r}",
            option=option,
        )
    x, y = numbers
    return x, y


def format_mpp(mpp: Pair) -> str:
    """Micrometres per pixel as text.

    >>> format_mpp((0.25, 0.25)), format_mpp((0.2528, 0.25))
    ('0.25', '0.2528 x 0.25')
    """
    x, y = mpp
    return f"{x:.4g}" if math.isclose(x, y, rel_tol=1e-4) else f"{x:.4g} x {y:.4g}"
