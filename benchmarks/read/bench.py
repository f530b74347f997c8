"""Reading random patches and drawing their centres, compared with peers and the limits of the machine."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import data
from benchmarks.measure import in_fresh_process, times_as_long
from benchmarks.read.peers import (
    BLOSC2,
    CONTENDERS,
    CONTIGUOUS,
    DASK,
    FLOOR,
    MEMORY_MAP,
    PRESET,
    TENSORSTORE,
    ZARR,
    ZPATCH,
    ZPATCH_NONE,
    Contender,
    contender_of,
    convert,
)
from benchmarks.read.runs import CENTRES, CLASSES, LABEL_PATCH, TORCHIO, Plan
from benchmarks.stage import MIB, Goal, Options, bytes_below, goals, mib, seconds, table

CHUNKS = (16, 32, 64)
CODECS = ("lz4", "lz4hc", "zstd", "none")
SHARDS_MIB = (8, 128)  # beside 32, the default

NOT_SHOWN = (
    "One volume that fits in memory is read, in a process that does nothing else; a training run opens many "
    "subjects, and its other work needs caches and cores.",
    "Warm figures are for files in the page cache. Cold figures are for this machine's disk, after its pages "
    "were dropped: the host of a virtual machine may still hold them, and a network file system differs.",
    "For the first time means: one group of a store whose files this process has not read, but which are in "
    "the page cache. The store is opened before the clock starts; zpatch opens its shards afterwards.",
    "blosc2 is opened once. nnU-Net opens a case again for each patch, which is slower. tensorstore's cache "
    "is off: with a cache that holds the whole volume, it reads voxels that are decoded already.",
    "The volume's noise makes half of its bits incompressible for any codec. Codecs differ more on smoother "
    "images.",
    "Label maps are the cells of random points in a head, in steps of voxels that grow with the map. "
    "TorchIO's time is for positions only, from a map in memory, without cutting out patches.",
    "Two threads have two cores only while nothing else runs.",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups of ``together`` random cubes, ``patch`` voxels a side, of a volume of ``shape`` (x, y, z)."""

    letter: str
    shape: data.Shape
    patch: int
    together: int

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{self.letter}: groups of {self.together} random {self.patch}-patches of {shape} int16"


def run(options: Options) -> str:
    """All figures, as Markdown."""
    a = Workload("A", (256,) * 3 if options.quick else (512,) * 3, 64, 16)
    b = Workload("B", (240, 240, 160), 96, 10)
    parts = [_reading(a, options), _reading(b, options)]
    parts += [_threads(a, options), _drawing(options), _defaults((a, b), options)]
    return "\n\n".join(parts)


# Reading: zpatch, its peers and the lower bounds, on the same boxes.


def _reading(workload: Workload, options: Options) -> str:
    head, stores = data.plain_head(options.data, workload.shape), _tidied(options)
    there = [contender for contender in CONTENDERS if contender.installed]
    for contender in there:
        if not (stores / contender.store).exists():
            contender.make(head, stores / contender.store)
    fast = [contender.name for contender in there if not contender.slow]
    slow = [ZPATCH, *(contender.name for contender in there if contender.slow)]
    of = functools.partial(_measured, "reading_times", head, stores)
    fast_plan = _plan(workload, fast, *((5, 4) if options.quick else (31, 8)))
    slow_plan = _plan(workload, slow, *((2, 1) if options.quick else (5, 2)))
    times, slow_times = of(fast_plan), of(slow_plan)
    ratios = {
        name: times_as_long(found[name], found[ZPATCH]) for found in (slow_times, times) for name in found
    }
    rates = {name: _rate(found, slow_plan) for name, found in slow_times.items()}
    rates |= {name: _rate(found, fast_plan) for name, found in times.items()}
    first = _first_times(there, head, stores, workload, options)
    rows = [
        (c, rates[c.name], f"{ratios[c.name]:.2f}", *_first_columns(c.name, first, workload))
        if c in there
        else (c.name, "not installed", "", "", "")
        for c in CONTENDERS
    ]
    cold = _cold(head, stores, workload, options)
    patches = "patches/s: median (least to most)"
    head_row = (
        "one core, page cache warm", f"chunks seen before: {patches}", "time / zpatch's",
        f"each chunk for the first time: {patches}", "time / zpatch's",
    )  # fmt: skip
    reached = [
        *_reading_goals(workload, times, ratios),
        *_first_goals(
            workload,
            first,
            {name: statistics.median(found) / fast_plan.groups for name, found in times.items()},
        ),
    ]
    return "\n\n".join([f"### {workload}", table(head_row, rows), goals(*reached), cold])


def _first_times(
    there: Sequence[Contender], head: Path, stores: Path, workload: Workload, options: Options
) -> dict[str, list[float]]:
    """Seconds of each contender that reads voxels, for one group of a store that it has not read before."""
    fast = [c.name for c in there if not c.slow and not c.bare]
    slow = [ZPATCH, *(c.name for c in there if c.slow)]
    few, many = (2, 5) if options.quick else (5, 61)
    of = functools.partial(_measured, "first_times", head, stores)
    found: dict[str, list[float]] = of(_plan(workload, slow, few, 1)) | of(_plan(workload, fast, many, 1))
    return found


def _first_columns(name: str, first: dict[str, list[float]], workload: Workload) -> tuple[str, str]:
    if name not in first:
        return "", ""
    ratio = statistics.median(first[name]) / statistics.median(first[ZPATCH])
    return _rate(first[name], _plan(workload, [], 1, 1)), f"{ratio:.2f}"


def _first_goals(workload: Workload, first: dict[str, list[float]], seen: dict[str, float]) -> Iterable[Goal]:
    """The goals of reading each chunk for the first time; ``seen`` are seconds of a group read before."""
    if BLOSC2 in first:
        bound = {"A": 1.0, "B": 1.7}[workload.letter]
        ratio = times_as_long(first[BLOSC2], first[ZPATCH])
        yield Goal(f"first time: as fast as {BLOSC2}", ratio, bound, "times", at_least=True)
    for name in (ZPATCH, ZPATCH_NONE):
        yield Goal(
            f"{name}: first time, of chunks seen before",
            statistics.median(first[name]) / seen[name],
            1.3,
            "times",
        )


def _reading_goals(
    workload: Workload, times: dict[str, list[float]], ratios: dict[str, float]
) -> Iterable[Goal]:
    bounds: dict[str, dict[str, float]] = {
        "A": {BLOSC2: 1.2, "tensorstore": 2, ZARR: 15, DASK: 50, FLOOR: 1},
        "B": {BLOSC2: 2, "tensorstore": 2, FLOOR: 0.75},
    }
    tensorstores = [ratios[name] for name in TENSORSTORE if name in ratios]
    ratios = ratios | ({"tensorstore": min(tensorstores)} if tensorstores else {})
    for name, bound in bounds[workload.letter].items():
        if name in ratios:
            what = "the faster tensorstore" if name == "tensorstore" else name
            yield Goal(f"as fast as {what}", ratios[name], bound, "times", at_least=True)
    of_map = times_as_long(times[MEMORY_MAP], times[ZPATCH_NONE])
    yield Goal(f"{ZPATCH_NONE}: as fast as {MEMORY_MAP}", of_map, 0.6, "times", at_least=True)
    turned = times_as_long(times[CONTIGUOUS], times[ZPATCH])
    yield Goal("contiguous (C, I, J, K), of stored order", turned, 1.15, "times")


def _cold(head: Path, stores: Path, workload: Workload, options: Options) -> str:
    names = [name for name in (ZPATCH, ZPATCH_NONE, BLOSC2, MEMORY_MAP) if contender_of(name).installed]
    plan = _plan(workload, names, 2 if options.quick else 7, 1)
    found = _measured("cold_times", head, stores, plan)
    if not found["dropped"]:
        return "Cold: this file system does not drop its pages, so cold reads cannot be measured here."
    rows = [
        (
            name,
            _rate(cold, plan),
            _rate(found["warm"][name], plan),
            f"{times_as_long(cold, found['cold'][ZPATCH]):.2f}",
        )
        for name, cold in found["cold"].items()
    ]
    head_row = ("one group, from the path on", "cold: patches/s", "warm: patches/s", "cold time / zpatch's")
    return table(head_row, rows)


def _plan(workload: Workload, names: Iterable[str], repetitions: int, groups: int) -> Plan:
    return Plan(list(names), repetitions, groups, workload.patch, workload.together)


def _rate(times: Sequence[float], plan: Plan) -> str:
    rates = [plan.groups * plan.together / taken for taken in times]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _tidied(options: Options) -> Path:
    """The folder for stores, empty."""
    shutil.rmtree(options.stores, ignore_errors=True)
    options.stores.mkdir(parents=True)
    return options.stores


def _measured(function: str, head: Path, stores: Path, plan: Plan) -> Any:
    return in_fresh_process(f"read.runs:{function}", head, stores, json.dumps(asdict(plan))).value


# Two threads, and the cost of graph and scheduling.


def _threads(workload: Workload, options: Options) -> str:
    head, stores = data.plain_head(options.data, workload.shape), _tidied(options)
    contender_of(ZPATCH).make(head, stores / ZPATCH)
    plan = _plan(workload, [], *((5, 4) if options.quick else (31, 8)))
    threads = _measured("thread_times", head, stores, plan)
    graph = _measured("graph_times", head, stores, plan)
    faster = {
        "two threads, each its own groups": 2 * times_as_long(threads["one"], threads["two"]),
        "what two threads can be here: hashing, without Python": 2
        * times_as_long(threads["hashing, one"], threads["hashing, two"]),
        'one group, `scheduler="threads"`': times_as_long(threads["one"], threads["scheduler"]),
    }
    cost = 100 * statistics.median(1 - b / a for a, b in zip(graph["graph"], graph["direct"], strict=True))
    rows = [(name, f"{ratio:.2f}") for name, ratio in faster.items()]
    return "\n\n".join(
        [
            f"### Threads and Dask, {workload.letter}, {ZPATCH}",
            table(("all cores", "times one thread"), rows),
            goals(
                Goal("two threads as fast as one", next(iter(faster.values())), 1.7, "times", at_least=True),
                Goal("graph and scheduling, of a group's time on one core", cost, 10, "%"),
            ),
        ]
    )


# Drawing centres from a label map.


def _drawing(options: Options) -> str:
    sides = (128, 256) if options.quick else (256, 512, 1024) if options.full else (256, 512)
    against, often, in_turns = (256, 5, 1) if options.quick else (512, 21, 2)
    stores = _tidied(options)
    sources = {side: data.label_map(options.data, side, CLASSES) for side in sides}
    rows: list[Sequence[str]] = []
    above = {}
    for side, source in sources.items():
        store = stores / str(side)
        convert(source, store, codec=PRESET)
        times = in_fresh_process("read.runs:draw_times", "", store, side, often).value["zpatch"]
        base, peak = (
            in_fresh_process(f"read.runs:{name}", store).peak_bytes for name in ("open_labels", "draw_labels")
        )
        above[side] = (peak - base) / MIB
        rows.append((f"zpatch, {side}^3", seconds(times), mib(peak), f"{above[side]:.1f}"))
    reached = [Goal(f"memory of a draw from {against}^3", above[against], 64, "MiB")]
    name = f"TorchIO, {against}^3, map in memory"
    if importlib.util.find_spec("torchio") is None:
        rows.append((name, "not installed", "", ""))
    else:
        store = stores / str(against)
        both = in_fresh_process("read.runs:draw_times", sources[against], store, against, in_turns)
        times, ours = both.value[TORCHIO], both.value["zpatch"]
        rows.append((f"{name}, {version('torchio')}", seconds(times), mib(both.peak_bytes), ""))
        reached.insert(0, Goal("as fast as TorchIO", times_as_long(times, ours), 200, "times", at_least=True))
    heading = f"### {CENTRES:,} centres of {LABEL_PATCH}-patches from a label map with {CLASSES} classes"
    head_row = ("one core", "seconds: median (least to most)", "peak MiB", "above opening it MiB")
    return "\n\n".join([heading, table(head_row, rows), goals(*reached)])


# Choosing the defaults.


def _defaults(workloads: Sequence[Workload], options: Options) -> str:
    chunks, codecs = ((32, 64), ("lz4", "none")) if options.quick else (CHUNKS, CODECS)
    layouts = {f"chunk {chunk}, {codec}": (codec, chunk, 32) for chunk in chunks for codec in codecs}
    layouts |= {f"shards of {size} MiB, {PRESET}": (PRESET, 32, size) for size in SHARDS_MIB}
    columns: dict[str, list[str]] = {name: [name] for name in layouts}
    stores = _tidied(options)
    for workload in workloads:
        head = data.plain_head(options.data, workload.shape)
        voxel_bytes = 2 * math.prod(workload.shape)
        for name, (codec, chunk, shard_mib) in layouts.items():
            store = stores / workload.letter / name
            os.sync()
            begin = time.perf_counter()
            with mock.patch("zpatch.conversion.conversion_options.SHARD_BYTES", shard_mib * MIB):
                convert(head / "source", store, codec=codec, chunk=chunk)
            rate = voxel_bytes / 1e6 / (time.perf_counter() - begin)
            if workload is workloads[0]:
                columns[name] += [f"{rate:.0f}", f"{bytes_below(store) / voxel_bytes:.1%}"]
        plan = _plan(workload, layouts, *((3, 2) if options.quick else (15, 4)))
        for name, times in _measured("reading_times", head, stores / workload.letter, plan).items():
            columns[name].append(_rate(times, plan))
    _tidied(options)
    head_row = ("", "converting: MB/s", "stored", *(f"patches/s, {w.letter}" for w in workloads))
    return "\n\n".join(["### Choosing the defaults", table(head_row, columns.values())])
