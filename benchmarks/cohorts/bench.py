"""Cohorts of up to 100,000 subjects: seconds and memory of what is done with them, and how these grow."""

from __future__ import annotations

import functools
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.cohorts import stores
from benchmarks.cohorts.pricing import simulated_runs
from benchmarks.cohorts.runs import READ, READERS
from benchmarks.cohorts.stores import Made, Subject
from benchmarks.measure import FreshRun, in_fresh_process
from benchmarks.stage import MIB, Goal, Options, goals, mib, seconds, table

START = 10  # subjects: what a command takes for them is its fixed start
SIZES, QUICK_SIZES = (1_000, 10_000, 100_000), (100, 1_000)
MOST_FOLDERS = 10_000
MOST_EXPONENT = 1.1
QUEUE = "zpatch.loading.patch_queue", "zpatch.sampling.samplers"  # with torch
LEAST_GROWTH_S, LEAST_GROWTH = 0.005, 0.1  # and of the fixed start: below these, it is noise
OPEN, LOOK_UP, INFO, RESUME = "Cohort(path)", "cohort[name]", "zpatch info --include NAME --json", "resume"

NOT_SHOWN = (
    "All subjects of the large cohorts are copies of one tiny case, with short statistics. Records of label "
    "maps with many classes are longer.",
    f"Commands that look at the files of a store are measured up to {MOST_FOLDERS:,} subjects: a tree for "
    "more takes longer to make than all else here. Files are in the page cache, and on one local disk.",
    "The parquet table holds a few facts of each image, without checksums, statistics, affines and sources; "
    "nothing in it is verified.",
)

Times = dict[int, list[float]]  # seconds by the number of subjects


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that is timed: a ``function`` of runs.py, or the arguments of a command of zpatch.

    It is done for stores of at most ``most`` subjects. ``base`` are the modules above which memory counts.
    ``is_peer`` if zpatch has no part in it.
    """

    name: str
    function: str
    arguments: Callable[[Made], Sequence[object]]
    most: int = max(SIZES)
    base: tuple[str, ...] = ("zpatch.images.cohort",)
    is_peer: bool = False

    def run(self, made: Made) -> FreshRun:
        return in_fresh_process(f"cohorts.runs:{self.function}", *self.arguments(made))

    def seconds_of(self, run: FreshRun) -> float:
        """The time of a command with that of its process, or that of the function alone."""
        return run.seconds if self.function == "command" else float(run.value["seconds"])


def _of_store(name: str, function: str, *base: str) -> Operation:
    return Operation(name, function, lambda made: [made.store], base=base or ("zpatch.images.cohort",))


def _command(name: str, *arguments: str, after: Sequence[str] = (), most: int = max(SIZES)) -> Operation:
    return Operation(
        name, "command", lambda made: [*arguments, made.store, *after], most, base=("zpatch.cli",)
    )


OPERATIONS = (
    _of_store(OPEN, "open_cohort"),
    _of_store(LOOK_UP, "look_up"),
    _of_store("cohort.split", "split"),
    _of_store("cohort.where", "choose"),
    _of_store("cohort.table", "rows"),
    _of_store("Queue(cohort, ...) and its first state_dict()", "queue_state", *QUEUE),
    _of_store("queue.plan(epoch)", "epoch_plan", *QUEUE),
    Operation(
        f"zpatch.convert with nothing to do ({RESUME})", "resume", lambda made: [made.store, made.table]
    ),
    Operation(INFO, "command", lambda made: ["info", made.store, "--include", _one(made), "--json"]),
    _command("zpatch verify --quick", "verify", after=["--quick", "--quiet"], most=MOST_FOLDERS),
    Operation(
        "zpatch report",
        "command",
        lambda made: ["report", made.store, "-o", made.store.with_name("report.html"), "--quiet"],
        MOST_FOLDERS,
    ),
)
PEERS = (
    Operation(
        "zarr-python, consolidated metadata",
        "open_consolidated",
        lambda made: [made.store.with_name("consolidated")],
        MOST_FOLDERS,
        base=("zarr",),
        is_peer=True,
    ),
    *(
        Operation(name, function, lambda made: [made.parquet], base=("pyarrow.dataset",), is_peer=True)
        for name, function in (
            ("pyarrow, read the parquet table", "read_parquet"),
            ("pyarrow, the rows of one subject, from the file", "look_up_parquet"),
            ("pyarrow, by split, age and label, in memory", "choose_parquet"),
        )
    ),
)


def _one(made: Made) -> str:
    return Subject(123 % made.subjects).name


def run(options: Options) -> str:
    """All figures, as Markdown."""
    sizes = QUICK_SIZES if options.quick else SIZES
    large = _Results(2 if options.quick else 5)
    for subjects in (START, *sizes):
        folder = options.stores / f"cohort-{subjects}"
        made = _made(folder, subjects)
        large.measure(made, is_largest=subjects == sizes[-1])
        shutil.rmtree(folder)
    return "\n\n".join([large.text(sizes[-1]), large.growth(sizes), simulated_runs(options)])


def _made(folder: Path, subjects: int) -> Made:
    made = stores.make(folder, subjects, min(subjects, MOST_FOLDERS))
    stores.write_parquet(made)
    if subjects <= MOST_FOLDERS:
        stores.write_consolidated(made)
    made.parquet.with_name("name").write_text(_one(made))
    return made


class _Results:
    """Times and peaks of all operations, by the number of subjects."""

    def __init__(self, repetitions: int) -> None:
        self._repetitions = repetitions
        self._runs: dict[tuple[Operation, int], list[FreshRun]] = {}
        self._bases: dict[tuple[str, ...], int] = {}
        self._first: dict[int, float] = {}
        self._manifest_bytes = 0
        self._shared = (0, 0)

    def measure(self, made: Made, *, is_largest: bool) -> None:
        """Run everything on a store, in turns; the first opening, which may write a table, for itself."""
        self._first[made.subjects] = OPERATIONS[0].seconds_of(OPERATIONS[0].run(made))
        for _ in range(self._repetitions):
            for operation in (*OPERATIONS, *PEERS):
                if made.subjects <= operation.most:
                    self._runs.setdefault((operation, made.subjects), []).append(operation.run(made))
        if is_largest:
            self._manifest_bytes = made.manifest_bytes
            fresh = functools.partial(in_fresh_process, "cohorts.runs:shared_bytes")
            self._shared = fresh(made.store).value, fresh("").value

    def times(self, operation: Operation, subjects: int) -> list[float]:
        """Seconds of each run; none if it cannot be done."""
        runs = self._runs.get((operation, subjects), [])
        return [operation.seconds_of(run) for run in runs if run.value is not None]

    def most_measured(self, operation: Operation) -> int:
        """The most subjects with which an operation was run."""
        return max(subjects for done, subjects in self._runs if done is operation)

    def above_imports(self, operation: Operation) -> float:
        """The median peak with the most subjects, above that of the imports."""
        if operation.base not in self._bases:
            self._bases[operation.base] = in_fresh_process(
                "cohorts.runs:import_only", *operation.base
            ).peak_bytes
        runs = self._runs[operation, self.most_measured(operation)]
        return statistics.median(run.peak_bytes for run in runs) - self._bases[operation.base]

    def text(self, largest: int) -> str:
        """The table of the largest store, and the goals."""
        heading = (
            f"### {largest:,} subjects x 2 images (manifest of {mib(self._manifest_bytes)} MiB)\n\n"
            "One new process each. Functions are timed without imports, commands with the whole process."
        )
        first = f"{self._first[largest]:.3f}"
        rows = [(f"{OPEN}, the first time", first, "", ""), *map(self._row, (*OPERATIONS, *PEERS))]
        head = ("", "subjects", "seconds: median (least to most)", "peak above imports MiB")
        rows = [(rows[0][0], f"{largest:,}", first, ""), *rows[1:]]
        return "\n\n".join([heading, table(head, rows), goals(*self._goals(largest))])

    def _row(self, operation: Operation) -> tuple[str, ...]:
        subjects = self.most_measured(operation)
        times = self.times(operation, subjects)
        shown = _fine(times) if times else "cannot be done"
        return operation.name, f"{subjects:,}", shown, mib(self.above_imports(operation))

    def _goals(self, largest: int) -> Iterable[Goal]:
        by_name = {operation.name: operation for operation in OPERATIONS}
        median = {name: self._median(op, largest) for name, op in by_name.items()}
        yield Goal(OPEN, median[OPEN], 0.15, "s")
        yield Goal(f"{OPEN}: peak above imports", self.above_imports(OPERATIONS[0]) / MIB, 64, "MiB")
        with_cohorts, without = self._shared
        yield Goal(
            f"{READERS} processes that open it and read {READ} subjects: shares above imports, together",
            (with_cohorts - without) / MIB,
            200,
            "MiB",
        )
        yield Goal(LOOK_UP, 1e3 * median[LOOK_UP], 0.2, "ms")
        resumed = next(name for name in by_name if RESUME in name)
        yield Goal(resumed, median[resumed], 12, "s")
        yield Goal(INFO, median[INFO], 0.5, "s")

    def _median(self, operation: Operation, subjects: int) -> float:
        times = self.times(operation, subjects)
        return statistics.median(times) if times else math.nan

    def growth(self, sizes: Sequence[int]) -> str:
        """Seconds by the number of subjects, and the fitted exponents."""
        rows, exponents = [], {}
        for operation in (*OPERATIONS, *PEERS):
            medians = {n: self._median(operation, n) for n in (START, *sizes)}
            exponent = exponent_of(medians)
            if exponent is not None and not operation.is_peer:
                exponents[operation.name] = exponent
            shown = (f"{value:.4f}" if not math.isnan(value) else "" for value in medians.values())
            rows.append((operation.name, *shown, "flat" if exponent is None else f"{exponent:.2f}"))
        heading = (
            "### Growth with the cohort, seconds\n\n"
            f"The time for {START} subjects is the fixed start. The exponent is the slope of a line of least "
            "squares through the logarithms of what larger cohorts take above it, of all of them where that "
            f"is over {1e3 * LEAST_GROWTH_S:g} ms and {LEAST_GROWTH:.0%} of the start; flat where fewer than "
            "two are."
        )
        head = ("", *(f"{n:,}" for n in (START, *sizes)), "exponent")
        most = max(exponents, key=exponents.__getitem__, default="")
        goal = Goal(f"largest exponent ({most})", exponents.get(most, 0), MOST_EXPONENT, "")
        return "\n\n".join([heading, table(head, rows), goals(goal)])


def exponent_of(medians: Mapping[int, float]) -> float | None:
    """The exponent of what is above the time for the fewest subjects; None if that is not measurable.

    >>> exponent_of({10: 0.5, 1_000: 0.6, 10_000: 1.5, 100_000: 10.5})
    1.0
    >>> exponent_of({10: 0.5, 1_000: 0.5, 10_000: 0.501})
    """
    start = medians[min(medians)]
    least = max(LEAST_GROWTH_S, LEAST_GROWTH * start)
    above = {n: value - start for n, value in medians.items() if value - start > least}
    if len(above) < 2:
        return None
    slope, _ = np.polyfit(np.log(list(above)), np.log(list(above.values())), 1)
    return round(float(slope), 3)


def _fine(times: Sequence[float]) -> str:
    """As seconds, with microseconds where a median is below 10 ms."""
    if statistics.median(times) >= 0.01:
        return seconds(times)
    return f"{statistics.median(times):.6f} ({min(times):.6f} to {max(times):.6f})"
