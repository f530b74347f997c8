"""The simulated runs as tables: assumptions, what the coordinator does, and the price of 100 TB."""

from __future__ import annotations

from benchmarks import data
from benchmarks.cohorts.simulation import CLASSES, OVERLAP, PATCH, SHAPE, Figures, assumed
from benchmarks.measure import in_fresh_process
from benchmarks.stage import Goal, Options, goals, mib, table

CASES, QUICK_CASES = 100_000, 300
TRACED = 2_000  # cases of the runs whose memory is traced, which takes longer
MOST_MICROSECONDS = 100
PATCHES_EACH_SECOND = 20.0  # of one worker
TB = 1e12
PREDICTED_TB = 100


def simulated_runs(options: Options) -> str:
    """A conversion and a prediction on 1,000 simulated workers, and the price of 100 TB."""
    cases = QUICK_CASES if options.quick else CASES
    traced = min(TRACED, cases)
    source = options.stores / "simulated"
    data.write_tiny_subject(source / "sub")
    runs = {
        "convert": _measured("convert", cases, traced, source),
        "predict": _measured("predict", cases, traced),
    }
    heading = (
        f"### A simulated cluster, {cases:,} cases\n\n"
        f"Assumptions: {assumed('convert')}; for `predict`, tasks of {assumed('predict').task_s:g} s. The "
        "client of Dask is simulated, and tasks do nothing; all other bookkeeping is zpatch's own. Records "
        "of results are those of two tiny images. Every result arrived exactly once. Dask's own scheduler is "
        "not in these figures: its documentation states about 1 ms of overhead for each task "
        "([distributed.dask.org](https://distributed.dask.org/en/latest/)), in another process. Commits, "
        "which rename folders and sync the manifest, are not either. Memory is what Python's objects take "
        f"more for each task, from {traced // 3:,} to {traced:,} cases."
    )
    rows = [(name, *_row(run)) for name, run in runs.items()]
    head = (
        "",
        "tasks",
        "begun again",
        "of these, killed",
        "simulated hours",
        "coordinator: s",
        "microseconds a task",
        "bytes a task",
    )
    reached = [
        Goal(f"coordinator's time for a task, {name}", _microseconds(run), MOST_MICROSECONDS, "microseconds")
        for name, run in runs.items()
    ]
    return "\n\n".join([heading, table(head, rows), goals(*reached), _price(runs["predict"])])


def _measured(kind: str, cases: int, traced: int, *arguments: object) -> Figures:
    """The figures of a run, with the growth of memory over two smaller ones."""

    def run(*more: object) -> Figures:
        found: Figures = in_fresh_process(f"cohorts.simulation:{kind}", *arguments, *more).value
        return found

    few, many = (run(n, "traced") for n in (traced // 3, traced))
    return run(cases) | {
        "bytes_of_task": (many["held_bytes"] - few["held_bytes"]) / (many["tasks"] - few["tasks"])
    }


def _microseconds(run: Figures) -> float:
    return 1e6 * run["coordinator_seconds"] / run["tasks"]


def _row(run: Figures) -> tuple[str, ...]:
    return (
        f"{run['tasks']:,}",
        f"{run['begun_again']:,}",
        f"{run['deaths']:,}",
        f"{run['hours']:.1f}",
        f"{run['coordinator_seconds']:.1f}",
        f"{_microseconds(run):.0f}",
        f"{run['bytes_of_task']:.0f}",
    )


def _price(run: Figures) -> str:
    """What 100 TB of such volumes take."""
    volumes = PREDICTED_TB * TB / run["bytes_in"]
    tasks, patches = volumes * run["regions"], volumes * run["patches_run"]
    shards = volumes * run["shards"]
    workers = assumed("predict").workers
    entry = in_fresh_process("cohorts.simulation:ledger_bytes").value["entry_bytes"]
    again = run["begun_again"] / run["tasks"]
    rows = [
        ("volumes", f"{volumes:,.0f} of {' x '.join(map(str, SHAPE[::-1]))} int16 voxels"),
        ("tasks (regions)", f"{tasks:,.0f}: {run['regions']:.0f} for each volume"),
        ("patches", f"{patches:,.0f}, of which {1 - run['patches'] / run['patches_run']:.1%} are run twice"),
        ("shards, and entries in the ledgers", f"{shards:,.0f}, {shards * entry / TB:.3f} TB of entries"),
        (
            "entries that are there at a time",
            f"{workers * run['shards'] * entry / 1e9:.2f} GB at most, as a subject's go when it is committed",
        ),
        ("planning, before any task", f"{volumes * run['plan_seconds'] / 3600:.2f} h of the coordinator"),
        (
            "bookkeeping",
            f"{tasks * _microseconds(run) / 1e6:,.0f} s, {mib(tasks * run['bytes_of_task'])} MiB",
        ),
        (
            f"hours of {workers:,} workers at {PATCHES_EACH_SECOND:g} patches/s each",
            f"{patches / PATCHES_EACH_SECOND / workers / 3600:.1f}, and {again:.2%} of the tasks again, "
            "which skip the shards that are written",
        ),
        ("read", f"{patches * PATCH**3 * 2 / TB:,.0f} TB of voxels at most, {PREDICTED_TB} TB if cached"),
        ("written", f"{volumes * run['bytes_out'] / TB:,.0f} TB of labels before compression"),
    ]
    heading = (
        f"#### The price of {PREDICTED_TB} TB\n\n"
        f"Patches of {PATCH}, overlap {OVERLAP}, {CLASSES} classes, argmax, shards as planned, on the same "
        "cluster."
    )
    return "\n\n".join([heading, table(("", ""), rows)])
