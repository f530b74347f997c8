"""The record of tests: which cases are tried, what is left out when it is resumed, and the scoreboard."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prove
import pytest
from record import Record, passed, some_of


@pytest.mark.parametrize(
    ("quick", "chosen"),
    [(1, [5]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (99, list(range(10)))],
)
def test_some_cases_are_the_first_the_last_and_others_between(quick: int, chosen: list[int]) -> None:
    assert some_of(range(10), quick) == chosen


def report(test: str, outcome: str = "passed", when: str = "call", tries: int = 0) -> Any:
    counted = [("tries", tries)] if tries else []
    said = {"nodeid": test, "outcome": outcome, "when": when, "duration": 1.0, "longreprtext": "E: why"}
    return SimpleNamespace(**said, passed=outcome == "passed", user_properties=counted)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A record of two commits: one test passed, one failed first, one failed after it had passed."""
    file = tmp_path / "record.jsonl"
    old, new = (Record(file, commit, set(), "", writes=True) for commit in ("old", "new"))
    for record, reports in (
        (old, [report("a"), report("b", "failed"), report("flip", tries=500)]),
        (new, [report("b"), report("c", when="setup"), report("c"), report("c", "failed", "teardown")]),
    ):
        for one in reports:
            record.pytest_runtest_logreport(one)
    return file


def test_tests_that_passed_are_left_out_and_a_line_that_was_cut_off_does_not_count(file: Path) -> None:
    with file.open("a") as lines:
        lines.write('{"test": "d", "outc')
    assert passed(file) == {"a", "b", "flip"}
    assert passed(file, "new") == {"b"}
    items = [report(name) for name in ("a", "b", "c", "d")]
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    Record(file, "new", passed(file, "new"), "[abc]", True).pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == ["a", "c"]


def test_the_scoreboard_counts_tries_and_names_failures(file: Path) -> None:
    last = {line["test"]: line for line in map(json.loads, file.read_text().splitlines())}
    text = prove.scoreboard(list(last.values()))
    assert "of commit new, old" in text
    assert "| all of them | 4 | 503 | 0 | 1 |" in text
    assert next(line for line in text.splitlines() if line.startswith("| damage")).count(
        "| 1 | 500 | 0 | 0 |"
    )
    assert text.endswith("- `c`: E: why\n")


def test_the_scoreboard_sums_the_runs_of_each_fuzzer_at_its_last_commit() -> None:
    run = {"target": "lz4", "sanitizers": "memory", "executions": 1500, "seconds": 1800.0, "crashes": 0}
    old, new = ({**run, "crashes": crashes, "commit": commit} for commit, crashes in (("old", 1), ("new", 0)))
    text = prove.scoreboard([], [old, {**old, "sanitizers": ""}, new, new])
    assert text.endswith(
        "| lz4 | atheris | 1,500 | 0.50 | 1 | old |\n| lz4 | memory | 3,000 | 1.00 | 0 | new |\n"
    )
    assert "Fuzzers" not in prove.scoreboard([])


@pytest.mark.parametrize("promise", prove.PROMISES, ids=lambda promise: promise.name)
def test_each_test_belongs_to_one_promise(promise: prove.Promise, request: pytest.FixtureRequest) -> None:

    names = [item.nodeid for item in request.session.items]
    ours = [name for name in names if prove.promise_of(name) is promise]
    assert ours == [name for name in names if re.search(prove.only(promise), name)]
