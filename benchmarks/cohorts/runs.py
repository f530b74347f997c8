"""What is timed, each function in a fresh process; imports are not timed."""

from __future__ import annotations

import importlib
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import held_bytes

LOOKUPS = 1000
READERS, READ = 16, 8  # processes, and the subjects that each reads

Answer = dict[str, float]


def import_only(*modules: str) -> None:
    """Import modules."""
    for module in modules:
        importlib.import_module(module)


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = function()
    return time.perf_counter() - begin, found


def _cohort(path: str) -> Any:
    from zpatch import Cohort

    return Cohort(path)


def open_cohort(path: str) -> Answer:
    """Open a cohort."""
    from zpatch import Cohort

    seconds, cohort = _timed(lambda: Cohort(path))
    return {"seconds": seconds, "subjects": len(cohort)}


def look_up(path: str) -> Answer:
    """Access random subjects of an open cohort, each for the first time; seconds of one."""
    cohort = _cohort(path)
    names = random.Random(0).sample(cohort.names, min(LOOKUPS, len(cohort)))
    times = [_timed(lambda name=name: cohort[name])[0] for name in names]
    return {"seconds": statistics.median(times), "subjects": len(cohort)}


def split(path: str) -> Answer:
    """One split of an open cohort."""
    cohort = _cohort(path)
    seconds, part = _timed(lambda: cohort.split("train"))
    return {"seconds": seconds, "subjects": len(part)}


def choose(path: str) -> Answer | None:
    """Subjects by split, metadata and labels; None where cohorts cannot do that."""
    cohort = _cohort(path)
    if not hasattr(cohort, "where"):
        return None
    labels = {"seg": [3]}
    seconds, part = _timed(lambda: cohort.where(split="train", age=lambda a: a > 40, labels=labels))
    return {"seconds": seconds, "subjects": len(part)}


def rows(path: str) -> Answer | None:
    """All plain rows of a cohort; None where cohorts have none."""
    cohort = _cohort(path)
    if not hasattr(cohort, "table"):
        return None
    seconds, table = _timed(lambda: cohort.table)
    return {"seconds": seconds, "subjects": len(table)}


def queue_state(path: str) -> Answer:
    """A queue over a cohort, and its first state."""
    from zpatch import Queue, UniformSampler

    cohort, sampler = _cohort(path), UniformSampler(8)
    seconds, queue = _timed(lambda: _with_state(Queue(cohort, sampler)))
    return {"seconds": seconds, "subjects": queue.num_subjects}


def _with_state(queue: Any) -> Any:
    queue.state_dict()
    return queue


def epoch_plan(path: str) -> Answer:
    """The plan of an epoch, of a queue that exists."""
    from zpatch import Queue, UniformSampler

    queue = Queue(_cohort(path), UniformSampler(8))
    seconds, plan = _timed(lambda: queue.plan(0))
    return {"seconds": seconds, "subjects": len(plan.visits.subjects)}


def resume(path: str, table: str) -> Answer:
    """Convert a cohort that is converted already."""
    from zpatch import convert

    seconds, report = _timed(lambda: convert(table, path))
    assert not report.outcomes, report.outcomes[0]
    return {"seconds": seconds, "subjects": len(report.done)}


def command(*arguments: str) -> int:
    """A command of zpatch."""
    import zpatch.cli

    code = zpatch.cli.run(list(arguments))
    assert code == 0, f"zpatch {' '.join(arguments)}: exit code {code}"
    return code


def shared_bytes(path: str) -> int:
    """Memory of processes, forked after the imports, that each open a cohort and read some subjects.

    Their proportional shares are summed. With an empty path they read nothing.
    """
    from zpatch.images.cohort import Cohort

    said, ready = os.pipe()
    pids = []
    for number in range(READERS):
        if not (pid := os.fork()):
            cohort = Cohort(path) if path else None
            found = [] if cohort is None else [cohort[(number + n) * 7 % len(cohort)] for n in range(READ)]
            os.write(ready, b".")
            time.sleep(600)  # until it is killed
            os._exit(len(found))
        pids.append(pid)
    try:
        heard = b""
        while len(heard) < READERS:
            heard += os.read(said, READERS)
        return held_bytes(pids, ("Pss:",))
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


# The peers.


def open_consolidated(path: str) -> Answer:
    """zarr-python's group of a cohort, from its consolidated metadata."""
    import zarr

    seconds, group = _timed(lambda: zarr.open_group(path, mode="r", use_consolidated=True))
    held = group.metadata.consolidated_metadata.metadata
    return {"seconds": seconds, "subjects": len(held)}


def read_parquet(path: str) -> Answer:
    """A parquet table of the facts of a cohort."""
    import pyarrow.dataset  # noqa: F401  # else by the first read
    import pyarrow.parquet as pq

    seconds, table = _timed(lambda: pq.read_table(path, memory_map=True))
    return {"seconds": seconds, "subjects": table.num_rows // 2}


def look_up_parquet(path: str) -> Answer:
    """The rows of one subject of a parquet table, read by a filter."""
    import pyarrow.dataset  # noqa: F401  # else by the first read
    import pyarrow.parquet as pq

    name = Path(path).with_name("name").read_text()
    filters = [("subject", "==", name)]
    seconds, table = _timed(lambda: pq.read_table(path, filters=filters, memory_map=True))
    assert table.num_rows == 2
    return {"seconds": seconds, "subjects": 1}


def choose_parquet(path: str) -> Answer:
    """Subjects by split and age, and by a label, of a parquet table that is in memory."""
    import pyarrow.compute as pc
    import pyarrow.dataset  # noqa: F401  # else by the first read
    import pyarrow.parquet as pq

    table = pq.read_table(path)

    def chosen() -> int:
        rows = table.filter(
            (pc.field("split") == "train") & (pc.field("age") > 40) & (pc.field("kind") == "label")
        )
        return sum(3 in labels for labels in rows.column("labels").to_pylist())

    seconds, found = _timed(chosen)
    return {"seconds": seconds, "subjects": found}
