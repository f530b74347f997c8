"""Slides in JPEG tiles: random groups of patches, a sweep, and the memory of readers and of a prediction."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import in_fresh_process, times_as_long
from benchmarks.slides import pictures, predicting, reading
from benchmarks.slides.pictures import Size
from benchmarks.slides.reading import LIMIT, MONAI, OPENSLIDE, ZARR, ZPATCH
from benchmarks.stage import MIB, Goal, Options, goals, mib, table

ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
LIMIT_MIB = 1024
BOUNDS = {LIMIT: 0.85, OPENSLIDE: 1.5, ZARR: 3.0, MONAI: 5.0}

Times = Mapping[str, Mapping[str, Sequence[float]]]

NOT_SHOWN = (
    "The slides repeat 300 different tiles of one picture in random order, on each level. Tiles of glass "
    "decode faster.",
    "The limit decodes from memory into one tile, at an address that suits libjpeg-turbo; it reads no file, "
    "and gives no patches.",
    "MONAI's tifffile backend decodes the whole level for every patch: its time is that of one patch, and "
    "its peak grows with the level.",
    "zpatch gives each channel as a plane, as networks take it; the others give pixels of three bytes.",
    "tifffile through zarr and tiffslide decode a tile again for each patch of a group that needs it; the "
    "cache of openslide is on.",
)


def run(options: Options) -> str:
    """All figures, as Markdown."""
    size: Size = (10240, 7680) if options.quick else (40000, 30000)
    slide = pictures.slide(options.data, size)
    parts = [_reading(slide, size, options), _sweep(slide, options), _prediction(options)]
    shutil.rmtree(options.stores, ignore_errors=True)
    return "\n\n".join(parts)


def _text(size: Size) -> str:
    return f"{size[0]:,} x {size[1]:,}"


# Random groups.


def _reading(slide: Path, size: Size, options: Options) -> str:
    there = [contender for contender in reading.CONTENDERS if _can_run(contender, slide)]
    fast = [contender.name for contender in there if not contender.few]
    few = [ZPATCH, *(contender.name for contender in there if contender.few)]
    rounds, groups = (5, 1) if options.quick else (21, 2)
    times = _times(slide, fast, rounds, groups)
    slow = _times(slide, few, 1 if options.quick else 2, 1)
    all_times = {**slow, **times}
    ratios = {
        name: times_as_long(found[name]["processor"], found[ZPATCH]["processor"])
        for found in (slow, times)
        for name in found
    }
    shown = (ZPATCH, OPENSLIDE) if options.quick else [c.name for c in there if not c.bare]
    held = {name: _peak(slide, name) for name in shown}
    rows = [
        (
            contender,
            _rate(all_times[contender.name]["clock"]),
            f"{1e3 * statistics.median(all_times[contender.name]['processor']):.2f}",
            f"{ratios[contender.name]:.2f}",
            mib(held[contender.name]) if contender.name in held else "",
        )
        if contender in there
        else (contender.name, "not measured" if contender.installed else "not installed", "", "", "")
        for contender in reading.CONTENDERS
    ]
    heading = (
        f"### Groups of {reading.TOGETHER} random {reading.PATCH}-patches of {_text(size)} RGB pixels in "
        f"JPEG tiles of {pictures.TILE}"
    )
    head = (
        "one core, page cache warm",
        "patches/s: median (least to most)",
        "processor ms a patch",
        "processor time / zpatch's",
        "peak above opening it MiB",
    )
    return "\n\n".join([heading, table(head, rows), goals(*_reading_goals(ratios))])


def _can_run(contender: reading.Contender, slide: Path) -> bool:
    """Whether it is installed, and there is memory for the whole level twice, which some hold."""
    import psutil  # type: ignore[import-untyped]

    needed = 3 * predicting.decoded_bytes(slide) if contender.few else 0
    return contender.installed and psutil.virtual_memory().available > needed


def _times(slide: Path, names: Sequence[str], rounds: int, groups: int) -> Times:
    found: Times = in_fresh_process(
        "slides.reading:reading_times", slide, json.dumps(names), rounds, groups, env=ENV
    ).value
    return found


def _rate(seconds: Sequence[float]) -> str:
    rates = [1 / taken for taken in seconds]
    return f"{statistics.median(rates):,.4g} ({min(rates):,.4g} to {max(rates):,.4g})"


def _peak(slide: Path, name: str) -> int:
    opened, read = (
        in_fresh_process("slides.reading:read_some", slide, name, groups, env=ENV).peak_bytes
        for groups in (0, 3)
    )
    return read - opened


def _reading_goals(ratios: Mapping[str, float]) -> Iterable[Goal]:
    for name, bound in BOUNDS.items():
        if name in ratios:
            yield Goal(f"as fast as {name}", ratios[name], bound, "times", at_least=True)


# A sweep.


def _sweep(slide: Path, options: Options) -> str:
    columns, rounds = (3, 2) if options.quick else (4, 4)
    found: dict[str, Any] = in_fresh_process("slides.reading:sweep", slide, columns, rounds, env=ENV).value
    times: Times = found["times"]
    rows = [
        (
            reading.contender_of(name),
            _rate(taken["clock"]),
            f"{1e3 * statistics.median(taken['processor']):.2f}",
            f"{times_as_long(taken['processor'], times[ZPATCH]['processor']):.2f}",
        )
        for name, taken in times.items()
    ]
    heading = (
        f"### A sweep: {found['patches']} patches of {reading.SWEPT}, overlap {reading.OVERLAP}, "
        f"{columns} columns of the grid"
    )
    head = (
        "one core, page cache warm",
        "patches/s: median (least to most)",
        "processor ms a patch",
        "processor time / zpatch's",
    )
    share = found["decoded"] / found["tiles"]
    return "\n\n".join(
        [
            heading,
            table(head, rows),
            goals(Goal(f"times that each of {found['tiles']:,} tiles is decoded", share, 1, "times")),
        ]
    )


# A prediction.


def _prediction(options: Options) -> str:
    size: Size = (20000, 16000) if options.quick else (100000, 80000)
    slide, stores = pictures.slide(options.data, size), options.stores
    shutil.rmtree(stores, ignore_errors=True)
    stores.mkdir(parents=True)
    modules = stores / "modules"
    found = in_fresh_process(
        "slides.predicting:predict_slide", slide, stores / "output", modules, env=ENV
    ).value
    base = in_fresh_process("predict.runs:memory_of_imports", modules, env=ENV).value
    heading = (
        f"### Predicting {_text(size)} RGB pixels with `max_memory` of {predicting.LIMIT}: "
        f"{predicting.PATCH}-patches, overlap {predicting.OVERLAP}, hann, 2 classes, argmax"
    )
    head = (
        "decoded MiB",
        "stated by the plan MiB",
        "peak above imports MiB",
        "peak of all processes MiB",
        "seconds",
        "of the processor",
        "megapixels/s",
    )
    row = (
        mib(predicting.decoded_bytes(slide)),
        mib(found["stated"]),
        mib(found["peak"] - base),
        mib(found["peak"]),
        f"{found['clock']:.0f}",
        f"{found['processor']:.0f}",
        f"{math.prod(size) / 1e6 / found['clock']:.1f}",
    )
    return "\n\n".join(
        [
            heading,
            table(head, [row]),
            goals(
                Goal("peak of all processes", found["peak"] / MIB, LIMIT_MIB, "MiB"),
                Goal(
                    "peak over the bytes stated by the plan",
                    (found["peak"] - base) / found["stated"],
                    1,
                    "times",
                ),
            ),
        ]
    )
