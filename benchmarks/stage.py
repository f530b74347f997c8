"""The options of a stage, and the Markdown of its results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure, and the folder ``data`` for generated data and for stores."""

    data: Path
    quick: bool = False
    full: bool = False

    @property
    def stores(self) -> Path:
        """The folder of stores, which are removed after each measurement."""
        return self.data / "stores"


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal for a figure: at least or at most ``bound``, in ``unit``."""

    what: str
    measured: float
    bound: float
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the goal was reached."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> tuple[str, str, str, str]:
        """The goal's row in a table."""
        sign = ">=" if self.at_least else "<="
        goal = f"{sign} {self.bound:.4g} {self.unit}"
        return self.what, goal, f"{self.measured:.3g} {self.unit}", "yes" if self.reached else "**no**"


def goals(*those: Goal) -> str:
    """A table of goals."""
    return table(("figure", "goal", "measured", "reached"), (goal.row() for goal in those))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def seconds(times: Sequence[float]) -> str:
    """The median of some times, and their least and most."""
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / MIB:.1f}"


def bytes_below(path: Path) -> int:
    """Bytes of all files of a store."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
