"""What a stage is given and what it gives back: sizes and a folder in, Markdown out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure, and the folder for made data and for stores."""

    data: Path
    quick: bool = False
    full: bool = False

    @property
    def stores(self) -> Path:
        """Where stores are written that are thrown away."""
        return self.data / "stores"


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that was to be reached: at least or at most ``bound``."""

    what: str
    measured: float
    bound: float
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it was."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> tuple[str, str, str, str]:
        """Its line in a table of goals."""
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
    """The median of some times, and from where to where they went."""
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


def mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / MIB:.1f}"


def bytes_below(path: Path) -> int:
    """Bytes of all files of a store."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
