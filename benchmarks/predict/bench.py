"""Predicting a volume patch by patch: against peers and the floor, memory, and two processes."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.measure import Server, in_fresh_process, times_as_long
from benchmarks.predict.limits import RUNS, peak_of
from benchmarks.predict.peers import (
    CLASSES,
    FLOOR,
    NETWORKS,
    OVERLAP,
    PATCH,
    PATCHLY,
    SLIDING_WINDOW,
    ZARR_MERGER,
    ZPATCH,
    Contender,
    contenders,
)
from benchmarks.predict.runs import COSTLY_PATCH
from benchmarks.read.peers import convert
from benchmarks.stage import MIB, Goal, Options, goals, mib, seconds, table

ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SWEPT_PLANE, SWEPT = (256, 256), (320, 608, 1184)  # the longest axis is swept; patches fit all
LARGER = (512, 512, 512)
SLOPE_MIB = 1.0  # of peak memory for 1,000 more planes (500 MiB of scores) that counts as none
LIMIT_BYTES = 512 * MIB
PATCHES_ALONE = 25

WHY = (
    "Stages that stream memory limit zpatch, not arithmetic: of 512^3 voxels the network writes 3.1 GB of "
    "scores, which are read once, and 58 % of the voxels are covered by several patches, 2.7 on average. "
    "Sums are read and written each time. Only zpatch counts, compresses, hashes and syncs labels.\n\n"
    "MONAI's time for as many, by a profile of one run (5.4 s of CPU): 27 % is the system that "
    "provides 2 GiB for scores and counts page by page, 20 % the sums, 20 % the division by counts, 19 % the "
    "network, 8 % classes and file, 4 % the cast of the volume. The system's part was 2.0 to 2.8 s in three "
    "runs on one machine: it depends on the kernel, and so does the ratio."
)

NOT_SHOWN = (
    "The cheap networks of the contest copy, negate and fill, so the times are those of everything but the "
    "model. A real model adds the same seconds to each, as the U-Net shows; its labels are not compared, as "
    "they depend on the windows.",
    "Only zpatch reads compressed voxels, and writes them compressed, with checksums, statistics and fsync. "
    "The others read a memory map of the raw volume, and write one plain file.",
    "MONAI's windows are constant and patchly's Gaussian, as neither has Hann's: no more arithmetic. "
    "Labels are compared at every voxel, scores are not.",
    "The volume fits the grid of patches: no peer has to pad it, and no patch is moved back from its end.",
    "Memory of processes is sampled every 20 ms, so a shorter peak may be missed. It counts anonymous and "
    "shared pages, not those of mapped files.",
)


def run(options: Options) -> str:
    """All figures, as Markdown."""
    parts = _contest(options), _sweep(options), _limit(options), _limited_runs(options), _processes(options)
    shutil.rmtree(options.stores)
    return "\n\n".join(parts)


# zpatch, its peers and the floor on one volume: time and memory.


def _contest(options: Options) -> str:
    """The contest with each network; memory is measured with one."""
    side = 320 if options.quick else 512  # three patches on an axis, or five
    parts = [
        _contest_of("keeps", side, options, "a network of negligible cost that keeps the order of axes"),
        _contest_of("contiguous", side, options, "the same, into contiguous memory"),
        _profile("contiguous", side, options),
        _contest_of("unet", 320, options, "a small U-Net"),
    ]
    return "\n\n".join(parts)


def _contest_of(network: str, side: int, options: Options, what: str) -> str:
    head, stores = data.plain_head(options.data, (side,) * 3), _tidied(options)
    files = head, stores / "store", stores / "output"
    convert(head / "source", stores / "store")
    is_costly = network == "unet"
    there = [c for c in contenders(NETWORKS[network]) if c.installed and not (is_costly and c.slow)]
    fast = [contender.name for contender in there if not contender.slow]
    slow = [ZPATCH, *(contender.name for contender in there if contender.slow)]
    taken = {} if len(slow) == 1 else _turns(slow, 1 if options.quick else 3, network, files)
    ratios = {name: times_as_long(taken[name], taken[ZPATCH]) for name in taken}
    times = _turns(fast, 2 if options.quick or is_costly else 7, network, files)
    ratios |= {name: times_as_long(times[name], times[ZPATCH]) for name in times}
    taken |= times
    held = _held_in_contest(there, options, files) if network == "keeps" else {}
    rows = [
        (c, seconds(taken[c.name]), f"{ratios[c.name]:.2f}", mib(held[c.name]) if held else "")
        if c.name in taken
        else (c.name, "not measured" if c.installed else "not installed", "", "")
        for c in contenders(NETWORKS[network])
    ]
    heading = (
        f"### {side}^3 int16, {PATCH}-patches, overlap {OVERLAP}, hann, {CLASSES} classes, argmax; {what}"
    )
    head_row = (
        "one core, page cache warm",
        "seconds: median (least to most)",
        "time / zpatch's",
        "peak above imports MiB",
    )
    of_time = [] if is_costly else _time_goals(times, ratios)
    reached = goals(*of_time, *(_memory_goals(held) if held else []))
    return "\n\n".join([heading, table(head_row, rows), *([] if is_costly else [reached])])


def _profile(network: str, side: int, options: Options) -> str:
    """Where the time of zpatch goes; the store of the last contest is still there."""
    head, stores = data.plain_head(options.data, (side,) * 3), options.stores
    files = head, stores / "store", stores / "output"
    spent = in_fresh_process("predict.stages:cpu_by_stage", network, *files, env=ENV).value
    total = sum(spent.values())
    rows = [
        (stage, f"{one:.2f}", f"{100 * one / total:.0f} %")
        for stage, one in sorted(spent.items(), key=lambda item: -item[1])
    ]
    heading = f"### Why: the CPU time of zpatch in that contest, {total:.2f} s in all"
    return "\n\n".join([heading, table(("stage", "seconds of CPU", "share"), rows), WHY])


def _held_in_contest(those: Sequence[Contender], options: Options, files: Sequence[Path]) -> dict[str, int]:
    """The peak of each contender above its imports."""
    held = {}
    for contender in those:
        peak, base = _held_and_base(options, "memory_of", contender.name, *files)
        held[contender.name] = peak - base
    return held


def _turns(names: Sequence[str], turns: int, network: str, files: Sequence[Path]) -> dict[str, list[float]]:
    """Seconds of predictions by each contender, in turns, each in its own process, after a checked one."""
    servers = {name: Server("predict.runs:predictions_of", name, network, *files, env=ENV) for name in names}
    try:
        for server in servers.values():
            server.ask("check")
        times: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(turns):
            for name, server in servers.items():
                times[name].append(server.ask("turn"))
    finally:
        for server in servers.values():
            server.close()
    return times


def _time_goals(times: Mapping[str, Sequence[float]], ratios: Mapping[str, float]) -> Iterator[Goal]:
    for name, bound in {SLIDING_WINDOW: 1.5, ZARR_MERGER: 8, PATCHLY: 2}.items():
        if name in ratios:
            yield Goal(f"as fast as {name}", ratios[name], bound, "times", at_least=True)
    yield Goal("time beside the floor's", times_as_long(times[ZPATCH], times[FLOOR]), 1.1, "times")


def _memory_goals(held: Mapping[str, int]) -> Iterable[Goal]:
    if SLIDING_WINDOW in held:
        share = held[ZPATCH] / held[SLIDING_WINDOW]
        yield Goal(f"peak beside that of {SLIDING_WINDOW}", share, 0.25, "times")


def _held_and_base(options: Options, function: str, *arguments: object) -> tuple[int, int]:
    """Peak memory of a function, and the memory of an idle process with the same imports."""
    modules = options.stores / "modules"
    held = _fresh(function, modules, *arguments)
    return held, _fresh("memory_of_imports", modules)


def _fresh(function: str, *arguments: object) -> Any:
    return in_fresh_process(f"predict.runs:{function}", *arguments, env=ENV).value


# Memory of zpatch: against its plan, against the volume's length, and under a limit.


def _sweep(options: Options) -> str:
    lengths = SWEPT[:2] if options.quick else SWEPT
    shapes = [(*SWEPT_PLANE, length) for length in lengths] + ([] if options.quick else [LARGER])
    rows, shares, peaks_mib = [], [], []
    for shape in shapes:
        store, output = _long_store(shape, options)
        held, base = _held_and_base(options, "memory_of_zpatch", store, output, PATCH, "")
        stated = _fresh("stated_bytes", store, PATCH)
        shares.append((held - base) / stated)
        peaks_mib.append((held - base) / MIB)
        rows.append((_text(shape), mib(stated), mib(held - base), f"{shares[-1]:.2f}"))
    slope = 1000 * float(np.polyfit(lengths, peaks_mib[: len(lengths)], 1)[0])
    head_row = ("", "stated by the plan MiB", "peak above imports MiB", "share of it")
    return "\n\n".join(
        [
            f"### Memory against the length of the volume, {PATCH}-patches",
            table(head_row, rows),
            goals(
                Goal("peak over the bytes stated by the plan, at most", max(shares), 1, "times"),
                Goal("and at least", min(shares), 0.6, "times", at_least=True),
                Goal("slope against the length (0, but for noise)", slope, SLOPE_MIB, "MiB for 1,000 planes"),
            ),
        ]
    )


def _limit(options: Options) -> str:
    shape = (256, 256, 512) if options.quick else (1024, 1024, 1024)
    store, output = _long_store(shape, options)
    held, base = _held_and_base(options, "memory_of_zpatch", store, output, PATCH, LIMIT_BYTES)
    head_row = ("volume MiB", "`max_memory` MiB", "peak MiB", "of which imports MiB")
    row = (mib(2 * math.prod(shape)), mib(LIMIT_BYTES), mib(held), mib(base))
    return "\n\n".join(
        [
            f"### Under a limit of memory, {_text(shape)}, {PATCH}-patches",
            table(head_row, [row]),
            goals(Goal("peak of the process", held / MIB, LIMIT_BYTES / MIB, "MiB")),
        ]
    )


def _limited_runs(options: Options) -> str:
    """The whole tree of processes of the command, with a limit that is near to what it needs."""
    rows, shares = [], []
    for run in RUNS[::10] if options.quick else RUNS:
        store, output = _long_store(run.shape, options)
        peak = peak_of(run, store, output)
        shares.append(peak.bytes / MIB / run.limit_mib)
        rows.append(
            (run, run.limit_mib, mib(peak.bytes), "no plan fits" if peak.refused else f"{shares[-1]:.2f}")
        )
    heading = "### Under a limit of memory: `zpatch predict`, its interpreter, libraries and jobs"
    head_row = ("", "`--max-memory` MiB", "peak of all processes MiB", "share of it")
    goal = Goal("peak of all processes over the limit, at most", max(shares), 1, "times")
    return "\n\n".join([heading, table(head_row, rows), goals(goal)])


def _long_store(shape: data.Shape, options: Options) -> tuple[Path, Path]:
    """A store of a long volume, alone in the folder for stores, and the path of its prediction."""
    stores = _tidied(options)
    convert(data.long_volume(options.data, shape), stores / "store")
    return stores / "store", stores / "output"


def _text(shape: data.Shape) -> str:
    return " x ".join(map(str, shape))


def _tidied(options: Options) -> Path:
    """The folder for stores, empty."""
    shutil.rmtree(options.stores, ignore_errors=True)
    options.stores.mkdir(parents=True)
    return options.stores


# One process or two.


def _processes(options: Options) -> str:
    shape, turns = ((160, 160, 256), 1) if options.quick else ((160, 160, 2048), 3)
    store, output = _long_store(shape, options)
    times: dict[int, list[float]] = {1: [], 2: []}
    labels = set()
    for turn in range(turns):
        for jobs, taken in times.items():
            # Memory is not sampled: that would take time from two busy processes.
            server = Server("predict.runs:costly_predictions", store, jobs, env=ENV)
            found = server.ask(f"{output}-{turn}-{jobs}")
            server.close()
            taken.append(found["seconds"])
            labels.add(found["labels"])
    assert len(labels) == 1, "two processes and one gave different voxels"
    faster = times_as_long(times[1], times[2])
    rows = [
        ("one process", seconds(times[1]), ""),
        ("two processes, their start included", seconds(times[2]), f"{faster:.2f}"),
        ("the most that is possible here: the network alone", "", f"{_network_alone(turns):.2f}"),
    ]
    heading = f"### Two processes, {_text(shape)}, {COSTLY_PATCH}-patches, a small network of convolutions"
    head_row = (
        "two cores, a thread for each process",
        "seconds: median (least to most)",
        "times as fast as one",
    )
    goal = Goal("two processes as fast as one", faster, 1.7, "times", at_least=True)
    return "\n\n".join([heading, table(head_row, rows), goals(goal)])


def _network_alone(turns: int) -> float:
    """The speed of two processes relative to one, running the network alone."""
    servers = [Server("predict.runs:costly_patches", env=ENV) for _ in range(2)]

    def ask(server: Server) -> float:
        taken: float = server.ask(str(PATCHES_ALONE))
        return taken

    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ask, servers))
            return 2 * statistics.median(ask(servers[0]) / max(pool.map(ask, servers)) for _ in range(turns))
    finally:
        for server in servers:
            server.close()
