"""Other voxel sizes: reading resampled patches, converting with a spacing, and predicting there and back."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.measure import FreshRun, Server, in_fresh_process, times_as_long
from benchmarks.predict.runs import remove
from benchmarks.read.peers import convert
from benchmarks.space import converting, predicting, reading
from benchmarks.space.reading import VOXEL_MM
from benchmarks.stage import MIB, Goal, Options, goals, mib, seconds, table

ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SMALL: data.Shape = (140, 140, 60)  # whole voxels of both sizes, on which all peers agree
SLOPE_MIB = 1.0  # of peak memory for each GiB of voxels: what counts as none
MOST_OTHER_LABELS = 1e-4  # share of voxels whose two best classes are alike but for rounding

NOT_SHOWN = (
    "Resampled patches begin where voxels of both grids coincide, as `interpolate` has no other places: "
    "multiples of 7, 7 and 6 voxels. For zpatch, scipy and `grid_sample` all places take the same time.",
    "TorchIO's volume is in memory as float32; reading its file and converting its voxels are not timed. Its "
    "time is for one group of ten patches; with more patches of each volume it is shared by more.",
    "All interpolate linearly. nnU-Net takes splines of order 3 for images, which scikit-image is slower at.",
    "SimpleITK and scikit-image hold the whole volume, and write a plain `.npy` without compression, "
    "checksums, statistics or fsync; zpatch does all these.",
    "nnU-Net's order is written in few lines for this comparison, and is faster and smaller than nnU-Net: "
    "torch resamples instead of scikit-image, in float32 instead of float64.",
    "The U-Net is small; a larger one adds the same seconds to both output grids of zpatch, and to the peer.",
    "On the model's grid the output is smaller: fewer voxels are reduced, compressed and written.",
)


def run(options: Options) -> str:
    """All figures, as Markdown."""
    parts = [_reading(options), _converting(options), _conversion_memory(options), _predicting(options)]
    shutil.rmtree(options.stores)
    return "\n\n".join(parts)


def _shape(options: Options) -> data.Shape:
    return (256, 256, 160) if options.quick else (512, 512, 300)


def _tidied(options: Options) -> Path:
    """The folder for stores, empty."""
    shutil.rmtree(options.stores, ignore_errors=True)
    options.stores.mkdir(parents=True)
    return options.stores


def _text(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


# Reading.


def _reading(options: Options) -> str:
    head, store = data.plain_head(options.data, _shape(options), VOXEL_MM), _tidied(options) / "store"
    convert(head / "source", store)
    there = [contender for contender in reading.CONTENDERS if contender.installed]
    fast = [contender.name for contender in there if not contender.slow]
    slow = [reading.ZPATCH, *(contender.name for contender in there if contender.slow)]
    fast_plan, slow_plan = ((2, 1), (2, 1)) if options.quick else ((15, 2), (3, 1))
    if options.quick:  # all in one process
        times = slow_times = _reading_times(head, store, [*fast, *slow[1:]], fast_plan)
    else:
        times = _reading_times(head, store, fast, fast_plan)
        slow_times = _reading_times(head, store, slow, slow_plan)
    ratios = {
        name: times_as_long(found[name], found[reading.ZPATCH])
        for found in (slow_times, times)
        for name in found
    }
    of_group = {name: [taken / slow_plan[1] for taken in found] for name, found in slow_times.items()}
    of_group |= {name: [taken / fast_plan[1] for taken in found] for name, found in times.items()}
    rows = [
        (c, seconds(of_group[c.name]), f"{ratios[c.name]:.2f}")
        if c in there
        else (c.name, "not installed", "")
        for c in reading.CONTENDERS
    ]
    heading = (
        f"### Groups of {reading.TOGETHER} random {reading.PATCH}-patches at {reading.SPACING:g} mm, linear, "
        f"of {_text(_shape(options))} int16 voxels of {_text(VOXEL_MM)} mm"
    )
    head_row = ("one core, page cache warm", "seconds a group: median (least to most)", "time / zpatch's")
    return "\n\n".join([heading, table(head_row, rows), goals(*_reading_goals(ratios, times))])


def _reading_times(
    head: Path, store: Path, names: Sequence[str], plan: tuple[int, int]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = in_fresh_process(
        "space.reading:reading_times", head, store, json.dumps(names), *plan, env=ENV
    ).value
    return found


def _reading_goals(ratios: Mapping[str, float], times: Mapping[str, Sequence[float]]) -> Iterable[Goal]:
    for name, bound in {reading.INTERPOLATE: 1.5, reading.SCIPY: 5, reading.TORCHIO: 5}.items():
        if name in ratios:
            yield Goal(f"as fast as {name}", ratios[name], bound, "times", at_least=True)
    beside = times_as_long(times[reading.ZPATCH], times[reading.NATIVE])
    yield Goal("time beside that of a group that is not resampled", beside, 2.5, "times")


# Converting.


def _converting(options: Options) -> str:
    source, stores = data.head(options.data, _shape(options), VOXEL_MM), _tidied(options)
    small = data.head(options.data, SMALL, VOXEL_MM)
    there = [contender for contender in converting.CONTENDERS if contender.installed]
    taken = _conversion_times([contender.name for contender in there], small, source, stores, options)
    ratios = {name: times_as_long(found, taken[converting.ZPATCH]) for name, found in taken.items()}
    voxel_bytes = data.voxel_bytes(source)
    rows = [
        (
            c,
            seconds(taken[c.name]),
            f"{voxel_bytes / 1e6 / statistics.median(taken[c.name]):.0f}",
            f"{ratios[c.name]:.2f}",
        )
        if c in there
        else (c.name, "not installed", "", "")
        for c in converting.CONTENDERS
    ]
    heading = (
        f"### Resampling a `.nii.gz` of {_text(_shape(options))} int16 voxels of {_text(VOXEL_MM)} mm to "
        f"{reading.SPACING:g} mm, linear"
    )
    head_row = ("one core", "seconds: median (least to most)", "MB/s of voxels read", "time / zpatch's")
    reached = [
        Goal(f"as fast as {name}", ratios[name], bound, "times", at_least=True)
        for name, bound in {converting.SITK: 1, converting.SKIMAGE: 5}.items()
        if name in ratios
    ]
    return "\n\n".join([heading, table(head_row, rows), goals(*reached)])


def _conversion_times(
    names: Sequence[str], small: Path, source: Path, stores: Path, options: Options
) -> dict[str, list[float]]:
    """Seconds of contenders in turns, each in its own process, after one that is not timed."""
    servers: dict[str, Server] = {}
    try:
        for number, name in enumerate(names):
            folder = stores / f"turns-{number}"
            folder.mkdir()
            servers[name] = Server("space.converting:conversions_of", name, small, source, folder, env=ENV)
        _asked(servers, 1)
        return _asked(servers, 1 if options.quick else 5)
    finally:
        for server in servers.values():
            server.close()


def _asked(servers: Mapping[str, Server], turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(turns):
        for name, server in servers.items():
            times[name].append(server.ask("turn"))
    return times


def _conversion_memory(options: Options) -> str:
    head = data.head(options.data, _shape(options), VOXEL_MM)
    planes = (300, 600) if options.quick else (600, 2400)  # more than the slabs that are held
    longer = {n: data.long_volume(options.data, (512, 512, n), VOXEL_MM) for n in planes}
    modules = _fresh_conversion("modules_after", converting.ZPATCH, head, options).value
    base = in_fresh_process("convert.bench:import_only", *modules).peak_bytes
    rows: list[tuple[object, ...]] = []
    above = {}
    for name in (converting.PLAIN, converting.ZPATCH):
        above[name] = _fresh_conversion("convert_once", name, head, options).peak_bytes - base
        stated = converting.stated_bytes(name, head)
        rows.append((name, mib(data.voxel_bytes(head)), mib(stated), mib(above[name])))
    peaks = []
    for source in longer.values():
        runs = [_fresh_conversion("convert_once", converting.ZPATCH, source, options) for _ in range(3)]
        peaks.append(statistics.median(run.peak_bytes for run in runs) - base)
        stated = converting.stated_bytes(converting.ZPATCH, source)
        rows.append(
            (
                f"{converting.ZPATCH}, a longer file",
                mib(data.voxel_bytes(source)),
                mib(stated),
                mib(peaks[-1]),
            )
        )
    for contender in converting.CONTENDERS:
        if contender.package != "zpatch" and contender.installed and not options.quick:
            peak = _fresh_conversion("convert_once", contender.name, head, options).peak_bytes
            rows.append((contender, mib(data.voxel_bytes(head)), "", mib(peak - base)))
    gib = [data.voxel_bytes(source) / 2**30 for source in longer.values()]
    slope = float(np.polyfit(gib, [peak / MIB for peak in peaks], 1)[0])
    resampled = converting.stated_bytes(converting.ZPATCH, head)
    more = resampled - converting.stated_bytes(converting.PLAIN, head)
    _tidied(options)
    head_row = ("", "voxels MiB", "stated by `--dry-run` MiB", "peak above zpatch's imports MiB")
    return "\n\n".join(
        [
            "### Peak memory of a conversion in a fresh process",
            table(head_row, rows),
            goals(
                Goal(
                    "peak with spacing, at most what is stated",
                    above[converting.ZPATCH] / MIB,
                    resampled / MIB,
                    "MiB",
                ),
                Goal(
                    "and above the peak without, at most what is stated more",
                    (above[converting.ZPATCH] - above[converting.PLAIN]) / MIB,
                    more / MIB,
                    "MiB",
                ),
                Goal("slope against the volume (0, but for noise)", slope, SLOPE_MIB, "MiB for each GiB"),
            ),
        ]
    )


def _fresh_conversion(function: str, name: str, source: Path, options: Options) -> FreshRun:
    output = _tidied(options) / "memory.npy"
    return in_fresh_process(f"space.converting:{function}", name, source, output)


# Predicting.


def _predicting(options: Options) -> str:
    shape: data.Shape = (208, 208, 120) if options.quick else (512, 512, 300)  # no patch is padded
    head, stores = data.plain_head(options.data, shape, VOXEL_MM), _tidied(options)
    store = stores / "store"
    convert(head / "source", store)
    names = [contender.name for contender in predicting.CONTENDERS]
    outputs = {name: stores / f"output-{number}" for number, name in enumerate(names)}
    servers = {
        name: Server("space.predicting:predictions_of", name, head, store, outputs[name], env=ENV)
        for name in names
    }
    try:
        for server in servers.values():
            server.ask("keep")
        compared = outputs[predicting.NATIVE], outputs[predicting.LOGITS]
        other: float = _fresh("other_labels", *compared)
        assert other <= MOST_OTHER_LABELS, f"{other:.2%} of the labels differ from those of the peer"
        times = _asked(servers, 1 if options.quick else 2)
    finally:
        for server in servers.values():
            server.close()
    for output in outputs.values():
        remove(output)
    measured = names[:1] if options.quick else names  # a short volume's peaks show nothing of the peer
    held, stated = _prediction_memory(measured, head, stores)
    ratios = {name: times_as_long(taken, times[predicting.NATIVE]) for name, taken in times.items()}
    rows = [
        (
            name,
            seconds(times[name]),
            f"{ratios[name]:.2f}",
            mib(stated[name]) if name in stated else "",
            mib(held[name]) if name in held else "",
        )
        for name in names
    ]
    alone = _fresh("network_seconds", head)
    rows.append((f"the network alone, {alone['patches']} patches", f"{alone['seconds']:.3f}", "", "", ""))
    heading = (
        f"### {_text(shape)} int16 voxels of {_text(VOXEL_MM)} mm, predicted at "
        f"{predicting.SPACING:g} mm: {predicting.PATCH}-patches, overlap {predicting.OVERLAP}, hann, "
        f"{predicting.CLASSES} classes, argmax, a small U-Net"
    )
    head_row = (
        "one core, page cache warm",
        "seconds: median (least to most)",
        "time / zpatch's",
        "stated by the plan MiB",
        "peak above imports MiB",
    )
    differ = f"On the scan's own grid, {other:.1e} of zpatch's labels differ from those of nnU-Net's order."
    return "\n\n".join(
        [heading, table(head_row, rows), differ, goals(*_prediction_goals(times, held, stated))]
    )


def _prediction_memory(
    names: Sequence[str], head: Path, stores: Path
) -> tuple[dict[str, int], dict[str, int]]:
    """The peaks of contenders above their imports, and what the plans of zpatch state."""
    held = {}
    modules, store, output = stores / "modules", stores / "store", stores / "output"
    for name in names:
        peak = _fresh("memory_of", modules, name, head, store, output)
        base = in_fresh_process("predict.runs:memory_of_imports", modules, env=ENV).value
        held[name] = peak - base
    return held, _fresh("stated_bytes", store)


def _prediction_goals(
    times: Mapping[str, Sequence[float]], held: Mapping[str, int], stated: Mapping[str, int]
) -> Iterable[Goal]:
    native = predicting.NATIVE
    yield Goal(
        "time beside that of the model's grid",
        times_as_long(times[native], times[predicting.MODEL]),
        1.3,
        "times",
    )
    yield Goal("peak over the bytes stated by the plan", held[native] / stated[native], 1, "times")
    if predicting.LOGITS in held:
        share = held[native] / held[predicting.LOGITS]
        yield Goal("peak beside that of nnU-Net's order", share, 0.1, "times")


def _fresh(function: str, *arguments: object) -> Any:
    return in_fresh_process(f"space.predicting:{function}", *arguments, env=ENV).value
