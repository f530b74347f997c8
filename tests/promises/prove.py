"""The promises of zpatch, the tests that hold each of them, and the scoreboard of a run in full counts.

Run by scripts/prove. Each test belongs to the first promise whose expression it matches.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
RECORD = ROOT / ".prove" / "record.jsonl"
FUZZED = ROOT / ".prove" / "fuzz.jsonl"  # by scripts/fuzz
SCOREBOARD = ROOT / "benchmarks" / "reliability.md"
sys.path.insert(0, str(TESTS))

from record import lines, passed  # noqa: E402 - tests are no package

OUTCOMES = ("passed", "skipped", "failed")


class Promise(NamedTuple):
    """What is promised, and a regular expression of the tests that hold it."""

    name: str
    text: str
    tests: str


PROMISES = (
    Promise(
        "any order",
        "After any commands, kills, damage and repairs a store is what a model of it says",
        r"test_life_of_a_store",
    ),
    Promise(
        "time",
        "Clocks set back, busy processors, stopped processes: no false hang, no second writer, no lost lock",
        r"test_time\.py",
    ),
    Promise(
        "ranks",
        "Processes of torch.distributed get disjoint, equal, reproducible shares",
        r"test_ranks|test_the_example_trains_on_two_ranks",
    ),
    Promise(
        "clusters",
        "A cluster, also one that loses workers in mid-run, gives the bytes of one process",
        r"cluster|test_prediction_scaling",
    ),
    Promise(
        "killed conversions",
        "A conversion killed at any publishing step or moment is finished by the same command, byte for byte",
        r"test_faults\.py.*(killed|ctrl_c|cut_anywhere|leftovers)|before_folders.*killed_conversion",
    ),
    Promise(
        "killed predictions",
        "The same for a prediction, for its levels and for its repair",
        r"test_prediction_\w+\.py.*(killed|ctrl_c|in_flight)|test_shard_ledger.*kill|before_folders.*killed_pred",
    ),
    Promise(
        "full disks",
        "A disk that is full at any write is one clear line, and a rerun finishes",
        r"disk|may_not_grow",
    ),
    Promise("writers", "Of two writers on one store the second is refused", r"second_writer|new_writer"),
    Promise("conversions", "Only what has changed is converted again", r"test_faults\.py"),
    Promise(
        "damage",
        "Flipped bits, deleted, truncated and swapped files are found, named, and mended where possible",
        r"test_prediction_damage|test_verification|flip|damage",
    ),
    Promise(
        "inputs",
        "An input that goes away or is replaced under a prediction is an error, never other voxels",
        r"test_missing_inputs|test_input_files",
    ),
    Promise(
        "bad files",
        "A malformed, truncated or hostile file fails its case in one line; the good cases convert",
        r"test_bad_input|volume_files/|gzip|test_parser_corpora",
    ),
    Promise(
        "queue faults",
        "A worker that is killed, exits or hangs is a clear error; workers and memory end with their parent",
        r"test_queue_faults|test_shared_slots",
    ),
    Promise(
        "queue streams",
        "The stream of patches is the same with any number of workers, start method and interruption",
        r"tests/epochs/|tests/loading/|tests/sampling/|test_ecosystem",
    ),
    Promise(
        "memory",
        "A plan's stated memory, and a limit that was given, are kept; neither grows with the volume",
        r"memory|test_prediction_limits",
    ),
    Promise("round trips", "Files come back from a store byte for byte", r"test_round_trip|before_folders"),
    Promise(
        "reading",
        "Voxels are read as zarr-python reads them, from any layout, codec and order of axes",
        r"tests/images/|tests/sources/|tests/resampling/|tests/chunks/|test_compiled_corpora|test_viewers",
    ),
    Promise(
        "predictions",
        "Blended results are those of numpy, scipy and MONAI, and failures are said",
        r"tests/prediction/|tests/blending/|tests/networks/|test_prediction|test_against_monai|test_slides",
    ),
    Promise("everything else", "All other tests", r""),
)


@click.command()
@click.option("--part", "parts", multiple=True, help="Run this promise only; may be repeated.")
@click.option("--list", "lists", is_flag=True, help="Name the promises and run nothing.")
@click.option("--keep", is_flag=True, help="Leave out what passed at earlier commits too.")
@click.option("--workers", default=2, show_default=True, help="Tests that run at a time.")
def prove(parts: Sequence[str], lists: bool, keep: bool, workers: int) -> None:
    """Run the tests of promises in full counts, and write the scoreboard.

    Tests that passed at this commit are not run again: after an interruption the same command goes on.
    """
    if lists:
        for promise in PROMISES:
            click.echo(f"{promise.name}: {promise.text}")
        return
    chosen = [promise_named(part) for part in parts]
    commit = the_commit()
    RECORD.parent.mkdir(exist_ok=True)
    common = ["--full", "-q", f"--record={RECORD}", f"--record-at={commit}"]
    common += ["--record-keeps"] if keep else []
    for promise in chosen or [None]:
        matching = [f"--matching={only(promise)}"] if promise else []
        for which in (["-m", "not alone", "-n", str(workers), "--dist", "worksteal"], ["-m", "alone"]):
            subprocess.run([sys.executable, "-m", "pytest", *common, *matching, *which], cwd=ROOT)
    results = list({line["test"]: line for line in lines(RECORD)}.values())
    SCOREBOARD.write_text(scoreboard(results, lines(FUZZED)))
    missed = [line["test"] for line in results if line["test"] not in passed(RECORD)]
    click.echo(f"{SCOREBOARD.relative_to(ROOT)} is written; {len(missed)} tests failed")
    sys.exit(bool(missed))


def promise_named(name: str) -> Promise:
    for promise in PROMISES:
        if promise.name == name:
            return promise
    raise click.BadParameter(f"no promise is named {name!r}; --list names them")


def only(promise: Promise) -> str:
    """An expression of the tests that belong to a promise, and to none before it."""
    before = [other.tests for other in PROMISES[: PROMISES.index(promise)]]
    return rf"^(?!.*({'|'.join(before)})).*({promise.tests})" if before else promise.tests


def promise_of(test: str) -> Promise:
    return next(promise for promise in PROMISES if re.search(promise.tests, test))


def the_commit() -> str:
    """The commit that is checked out, of which nothing is changed."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", f":!{SCOREBOARD.relative_to(ROOT)}")
    if changed:
        raise click.ClickException(f"a scoreboard is of a commit; commit or remove first:\n{changed}")
    return git("rev-parse", "--short=12", "HEAD")


def scoreboard(results: Sequence[dict[str, Any]], fuzzed: Sequence[dict[str, Any]] = ()) -> str:
    """The results as Markdown: a row for each promise, the failures, and a row for each fuzzer that ran."""
    rows = [
        row(promise, [line for line in results if promise_of(line["test"]) is promise])
        for promise in PROMISES
    ]
    failed = [line for line in results if line["outcome"] == "failed"]
    commits = sorted({line["commit"] for line in results})
    text = f"""# Reliability: what was tried, how often, and what failed

Written by `scripts/prove` on {datetime.date.today()}, of commit {", ".join(commits)}; {platform.machine()},
{os.cpu_count()} processors, Linux {platform.release().split("-")[0]}, Python {platform.python_version()},
numpy {version("numpy")}, torch {version("torch")}, zarr {version("zarr")}.

A test whose cases are counted (kills, moments, flipped bits) counts as many tries as it has cases; any other
is one try, laws of hypothesis among them (400 examples each). Skipped tests need what this machine does not
have: a GPU, TorchIO 2, the viewers.

| promise | what is promised | tests | tries | skipped | failed | hours |
|---|---|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
| | all of them | {totals(results)} |

## Failures

"""
    return text + ("".join(map(failure, failed)) or "None.\n") + (fuzzers(fuzzed) if fuzzed else "")


def fuzzers(fuzzed: Sequence[dict[str, Any]]) -> str:
    """A row for each fuzzer: the sum of its runs at the commit at which it ran last."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in fuzzed:
        group = runs.setdefault((line["target"], line["sanitizers"] or "atheris"), [])
        group[:] = [*(before for before in group if before["commit"] == line["commit"]), line]
    rows = [
        f"| {target} | {how} | {sum(line['executions'] for line in group):,} "
        f"| {sum(line['seconds'] for line in group) / 3600:.2f} | {sum(line['crashes'] for line in group)} "
        f"| {group[-1]['commit']} |"
        for (target, how), group in sorted(runs.items())
    ]
    return f"""
## Fuzzers

Written by `scripts/fuzz`: inputs that a fuzzer made, and those that crashed, failed or took too long.

| target | under | inputs | hours | crashes | commit |
|---|---|---:|---:|---:|---|
{chr(10).join(rows)}
"""


def row(promise: Promise, results: Sequence[dict[str, Any]]) -> str:
    return f"| {promise.name} | {promise.text} | {totals(results)} |"


def totals(results: Sequence[dict[str, Any]]) -> str:
    count = {outcome: [line for line in results if line["outcome"] == outcome] for outcome in OUTCOMES}
    ran = [*count["passed"], *count["failed"]]
    tries = sum(line["tries"] or 1 for line in ran)
    hours = sum(line["seconds"] for line in results) / 3600
    figures: Iterable[str] = (
        str(len(ran)),
        f"{tries:,}",
        str(len(count["skipped"])),
        str(len(count["failed"])),
    )
    return " | ".join([*figures, f"{hours:.2f}"])


def failure(line: dict[str, Any]) -> str:
    why = line["why"].strip().splitlines() or [""]
    return f"- `{line['test']}`: {why[-1]}\n"


if __name__ == "__main__":
    prove()
