"""Numbers of bytes as people write them, and refusing to exceed a limit."""

from __future__ import annotations

import re
from fractions import Fraction

from zpatch.errors import MemoryLimitError, OptionError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("kmgt", start=1)}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """A number of bytes from ``"2 GiB"``, ``"500MB"``, ``"64k"`` or an integer.

    >>> parse_bytes("1.5 KiB")
    1536
    """
    if isinstance(text, int):
        return text
    match = _BYTES.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise OptionError(f"{text!r} is not a number of bytes; write it like '2 GiB' or '500 MB'")
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """A number of bytes for people.

    >>> format_bytes(3_300_000_000)
    '3.1 GiB'
    """
    if round(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if round(count, 1) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def refuse_above(limit: int | None, needed: int, what: str, advice: str) -> None:
    """Raise where ``what`` needs more bytes than the limit."""
    if limit is not None and needed > limit:
        raise MemoryLimitError(
            f"{what} needs {format_bytes(needed)}, more than the limit of {format_bytes(limit)}; {advice}"
        )
