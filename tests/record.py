"""Which cases tests try, and a record of what they found: a line of JSON for each test that ended.

With ``--record FILE`` each test that ends adds a line, and tests that passed before, at the same commit, are
left out: a run of hours is resumed by the same command. The scoreboard of scripts/prove is written from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pytest

Case = TypeVar("Case")
TRIES = "tries"


class Some(Protocol):
    """All cases of a test, or in the quick run ``quick`` of them: the first, the last and others between."""

    def __call__(self, cases: Sequence[Case], quick: int) -> list[Case]: ...


def some_of(cases: Sequence[Case], quick: int) -> list[Case]:
    """See `Some`; of one case, that in the middle."""
    count = len(cases)
    places = np.linspace(0, count - 1, quick) if quick > 1 else np.array([count // 2])
    return [cases[place] for place in places.round().astype(int)] if count > quick else list(cases)


def passed(record: Path, commit: str | None = None) -> set[str]:
    """The tests of a record that passed or were skipped when they ran last, if asked at one commit only."""
    outcomes = {line["test"]: line for line in lines(record)}
    good = (line for line in outcomes.values() if line["outcome"] in ("passed", "skipped"))
    return {line["test"] for line in good if commit in (None, line["commit"])}


def lines(record: Path) -> list[dict[str, Any]]:
    """What a record holds, without a last line that was cut off."""
    if not record.exists():
        return []
    whole, _, _ = record.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


class Record:
    """A plugin that adds to a record, and leaves out tests that are done or that were not asked for."""

    def __init__(self, file: Path, commit: str, done: set[str], chosen: str, writes: bool) -> None:
        self._file = file
        self._commit = commit
        self._done = done
        self._chosen = re.compile(chosen)
        self._writes = writes

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what need not run."""
        run: list[pytest.Item] = []
        left_out: list[pytest.Item] = []
        for item in items:
            wanted = self._chosen.search(item.nodeid) and item.nodeid not in self._done
            (run if wanted else left_out).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = run

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a line for a test that ran, was skipped or failed on its way there or back."""
        if not self._writes or (report.when != "call" and report.passed):
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "tries": sum(count for name, count in report.user_properties if name == TRIES),
            "seconds": round(report.duration, 2),
            "commit": self._commit,
            "why": "" if report.passed else str(report.longreprtext)[-2000:],
        }
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
