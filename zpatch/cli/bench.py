"""``zpatch bench``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zpatch.cli.options import (
    STORE,
    Voxels,
    in_flags,
    include_option,
    json_option,
    talk_options,
)
from zpatch.cli.progress import Progress, print_json, say, show_table
from zpatch.errors import OptionError
from zpatch.runtime.byte_sizes import format_bytes

if TYPE_CHECKING:
    from zpatch.bench.benchmark_plan import BenchmarkPlan
    from zpatch.bench.benchmark_report import BenchmarkReport, PackingFigures

QUEUE = {"patches": 1000, "num_workers": 2, "batch_size": 8, "max_length": 300}
KEPT_SHARE = 0.01
BUSY = 0.3  # processes on each core


@click.command("bench", short_help="Measure how fast patches are read, and advise faster settings.")
@click.argument("store", type=STORE)
@click.option(
    "--patch-size", type=Voxels(), help="One number or I,J,K.  [default: 96, or what fits into all volumes]"
)
@click.option(
    "--patches-per-volume", type=click.IntRange(1), default=10, show_default=True,
    help="Patches read together, as in a queue; at most 32.",
)  # fmt: skip
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="NAME",
    help="Read this image; may be repeated.  [default: all]",
)
@include_option
@click.option(
    "-j", "--jobs", type=click.IntRange(1),
    help="Processes to measure with, besides a single one.  [default: the number of cores]",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
    help="Approximate duration of each measurement.",
)  # fmt: skip
@click.option(
    "--queue", is_flag=True,
    help="Run a queue instead, for one epoch after one that warms it up, and print where its time goes.",
)  # fmt: skip
@click.option(
    "--workers", "num_workers", type=click.IntRange(0), help="Worker processes of the queue.  [default: 2]"
)
@click.option("--batch-size", type=click.IntRange(1), help="Patches in a batch of the queue.  [default: 8]")
@click.option(
    "--max-length", type=click.IntRange(1), help="Patches in the buffer of the queue.  [default: 300]"
)
@click.option(
    "--transform", metavar="FACTORY",
    help="package.module:factory; called without arguments, it returns the transform of the queue.",
)  # fmt: skip
@click.option(
    "--patches", type=click.IntRange(1), help="Patches in each epoch of the queue, about.  [default: 1000]"
)
@json_option
@talk_options
def bench_command(
    store: Path,
    patch_size: int | tuple[int, ...] | None,
    patches_per_volume: int,
    images: tuple[str, ...],
    include: tuple[str, ...],
    jobs: int | None,
    seconds: float,
    queue: bool,
    num_workers: int | None,
    batch_size: int | None,
    max_length: int | None,
    transform: str | None,
    patches: int | None,
    json: bool,
) -> None:
    """Measure how many patches per second are read from STORE on this machine, and advise faster settings.

    Random patches of random subjects are read as the workers of a queue read them, in one process and in
    several: cold, after the files were dropped from the system's page cache, and warm. The advice for
    converting follows from the bytes decoded for each byte delivered, and from other chunks and codecs
    tried on a sample of the voxels. Nothing is written to STORE. Of a slide, the speed of reading alone is
    measured.

    With --queue a zpatch.Queue gives batches to a loop that does nothing with them, and the table of
    queue.stats() is printed: which share of the time of its workers is fetching, decoding, padding or the
    transform, and in one sentence what would make it faster. -j and --seconds do not apply.

    \b
    Examples:
      zpatch bench cohort.zarr
      zpatch bench cohort.zarr --patch-size 128,128,64 --patches-per-volume 4 -j 8
      zpatch bench cohort.zarr --image t1 --json
      zpatch bench case.svs --patch-size 512
      zpatch bench cohort.zarr --queue --workers 4 --batch-size 8 --transform mymodule:augmentation
    """
    given = {
        "num_workers": num_workers,
        "batch_size": batch_size,
        "max_length": max_length,
        "transform": transform,
        "patches": patches,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if options and not queue:
        raise OptionError(f"{next(iter(options))} is for a queue; say queue=True", option=next(iter(options)))
    if queue and store.is_file():
        raise OptionError("queue=True takes a store; of a slide, reading is measured", option="queue")
    if store.is_file():
        _bench_slide(store, patch_size, patches_per_volume, jobs, seconds, json=json)
        return
    from zpatch.bench.advice import advice
    from zpatch.bench.benchmark import run_benchmark
    from zpatch.bench.benchmark_plan import plan_benchmark
    from zpatch.images.cohort import Cohort

    plan = plan_benchmark(
        Cohort(store).matching(include),
        images=images,
        patch_size=patch_size,
        patches_per_volume=patches_per_volume,
        jobs=jobs,
        seconds=seconds,
    )
    if queue:
        _bench_queue(plan, QUEUE | options | {"patches_per_volume": patches_per_volume}, json=json)
        return
    say(str(plan))
    with Progress("measuring", round(plan.about_s * 1000), unit="ms") as progress:
        report = run_benchmark(plan, progress)
    lines = advice(report)
    if json:
        print_json({**report.to_json(), "advice": lines})
        return
    for note in _notes(report):
        say(f"note: {note}")
    show_table(_speeds(report))
    click.echo()
    click.echo(_packings_heading(report))
    show_table(_packings(report))
    click.echo()
    for line in lines:
        click.echo(line)


def _bench_queue(plan: BenchmarkPlan, options: dict[str, Any], *, json: bool) -> None:
    """Run a queue over the subjects of a plan, and show where its time goes."""
    from zpatch.bench.benchmark_plan import shape_text
    from zpatch.bench.queue_trial import queue_trial

    named = ", ".join(f"{name}={value!r}" for name, value in options.items())
    say(f"a queue of patches of {shape_text(plan.patch_size)}: {in_flags(named)}")
    stats = queue_trial(plan, **options)
    if json:
        print_json({"patch_size": plan.patch_size, **options, **stats.to_json()})
    else:
        click.echo(in_flags(str(stats)))


def _bench_slide(
    path: Path,
    patch_size: int | tuple[int, ...] | None,
    group: int,
    jobs: int | None,
    seconds: float,
    *,
    json: bool,
) -> None:
    """Measure a slide, and show its speeds."""
    from zpatch.bench.advice import rate_text
    from zpatch.bench.slide_reading import slide_patch_size, slide_speeds
    from zpatch.images.open_subjects import open_subjects

    [subject] = open_subjects(path)
    size = slide_patch_size(subject, patch_size)
    say(f"{path}: patches of {' x '.join(map(str, size[:2]))} pixels, {group} together")
    speeds = list(slide_speeds(path, subject, size, group=group, jobs=jobs, seconds=seconds))
    if json:
        print_json({"slide": str(path), "patch_size": size, "speeds": [asdict(speed) for speed in speeds]})
        return
    rows = [("processes", "patches/s cold", "patches/s warm", "each")]
    for speed in speeds:
        cold = rate_text(speed.cold) if speed.cold else "-"
        each = rate_text(speed.warm / speed.processes)
        rows.append((str(speed.processes), cold, rate_text(speed.warm), each))
    show_table(rows)


def _notes(report: BenchmarkReport) -> Iterator[str]:
    plan, first, last = report.plan, report.speeds[0], report.speeds[-1]
    if report.load > BUSY:
        yield "other programs keep this machine busy: figures are lower and less certain than on an idle one"
    if first.cold is None:
        yield "this system cannot drop files from its page cache, so cold reads were not measured"
    elif last.cold is None:
        yield f"there are fewer subjects than {last.processes} processes, so these were not measured cold"
    if (kept := max(speed.kept for speed in report.speeds)) > KEPT_SHARE:
        yield f"the system kept {kept:.0%} of the files in its page cache: cold reads are partly warm"
    if plan.is_tried and any(figures.patches_per_s is None for figures in report.packings):
        yield "chunks marked - were not tried, as planning such patches would take much memory"


def _speeds(report: BenchmarkReport) -> list[tuple[str, ...]]:
    """A row for each number of processes that was measured, and for estimates in between."""
    from zpatch.bench.advice import rate_text

    rows: list[tuple[str, ...]] = [
        ("processes", "patches/s cold", "patches/s warm", "each", "voxels/s", "disk/s")
    ]
    measured = {speed.processes: speed for speed in report.speeds}
    most = report.speeds[-1].processes
    between = {2**n for n in range(1, most.bit_length())}
    for count in sorted({*measured, *(n for n in between if n < most)}):
        warm, speed = report.warm_with(count), measured.get(count)
        cold = rate_text(speed.cold) if speed and speed.cold else "-"
        disk = format_bytes(speed.disk_bytes_per_s) if speed and speed.disk_bytes_per_s else "-"
        rows.append(
            (
                str(count) if speed else f"{count} (guessed)",
                cold,
                rate_text(warm),
                rate_text(warm / count),
                format_bytes(warm * report.patch_bytes),
                disk,
            )
        )
    return rows


def _packings_heading(report: BenchmarkReport) -> str:
    heading = "bytes decoded for each byte delivered"
    if report.plan.is_tried:
        heading += "; patches/s of one process, warm, as tried on a sample, and how many times the files"
    return heading


def _packings(report: BenchmarkReport) -> list[tuple[str, ...]]:
    """A row for each chunk: figures that follow from geometry, then the measured ones of each codec."""
    now = report.packings[0]
    codecs = list(dict.fromkeys(f.codec for f in report.packings)) if report.plan.is_tried else []
    by_chunk: dict[int | None, dict[str | None, PackingFigures]] = {}
    for figures in sorted(report.packings, key=lambda figures: figures.chunk or 0):
        by_chunk.setdefault(figures.chunk, {})[figures.codec] = figures
    heading = ["chunk", f"{report.plan.group} together", "one by one"]
    rows: list[tuple[str, ...]] = [
        (*heading, *(_mark(codec or "mixed", codec == now.codec) for codec in codecs))
    ]
    for chunk, by_codec in by_chunk.items():
        [first, *_] = by_codec.values()
        ratios = f"{first.decoded_per_delivered:.2f}", f"{first.patch_by_patch:.2f}"
        cells = [_cell(by_codec.get(codec)) for codec in codecs]
        rows.append((_mark(str(chunk or "other"), chunk == now.chunk), *ratios, *cells))
    return rows


def _mark(text: str, is_stored: bool) -> str:
    return f"{text} (stored)" if is_stored else text


def _cell(figures: PackingFigures | None) -> str:
    from zpatch.bench.advice import rate_text

    if figures is None or figures.patches_per_s is None or figures.size is None:
        return "-"
    return f"{rate_text(figures.patches_per_s)}, {figures.size:.2f}x"
