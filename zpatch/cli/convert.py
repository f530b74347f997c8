"""``zpatch convert``."""

from __future__ import annotations

import time
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from zpatch.cli import EXIT_SOME_FAILED
from zpatch.cli.options import (
    STORE,
    Bytes,
    Millimetres,
    cluster_timeout_option,
    exclude_option,
    in_flags,
    include_option,
    json_option,
    talk_options,
)
from zpatch.cli.progress import Progress, is_quiet, print_json, say, show_table
from zpatch.runtime.byte_sizes import format_bytes

if TYPE_CHECKING:
    from zpatch.conversion.conversion import CaseOutcome, ConversionReport
    from zpatch.conversion.conversion_plan import ConversionPlan


@click.command("convert", short_help="Convert NIfTI, NRRD or MetaImage files into a chunked Zarr store.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("store", type=STORE)
@click.option(
    "--label-pattern",
    "label_patterns",
    multiple=True,
    metavar="GLOB",
    help="File names that are label maps; may be repeated. Without it: names that end in seg, dseg, "
    "label, labels or mask, and files in folders called labels*.",
)
@click.option(
    "--sampling-pattern",
    "sampling_patterns",
    multiple=True,
    metavar="GLOB",
    help="File names that are sampling maps (weights for WeightedSampler); may be repeated.",
)
@click.option(
    "--codec",
    type=click.Choice(["lz4", "lz4hc", "zstd", "none"]),
    default="lz4",
    show_default=True,
    help="lz4 is the fastest to write (label maps: lz4hc), lz4hc is faster to read, zstd is smaller, none "
    "does not compress.",
)
@click.option(
    "--chunk", type=click.IntRange(1, 512), default=32, show_default=True, help="Side of a chunk in voxels."
)
@click.option(
    "--format",
    type=click.Choice(["auto", "bids", "nnunet", "msd", "json", "csv", "glob"]),
    default="auto",
    show_default=True,
    help="The convention of SOURCE; auto detects it.",
)
@include_option
@exclude_option
@click.option(
    "--affine",
    type=click.Choice(["sform", "qform"]),
    default="sform",
    show_default=True,
    help="The affine to take where a header has both.",
)
@click.option(
    "--orient", metavar="CODES", help="Turn volumes so that their axes point to RAS, say; export turns back."
)
@click.option(
    "--spacing",
    type=Millimetres(),
    help="Resample images to voxels of this size in mm: 1, or 1x1x3 along I, J, K, after --orient.",
)
@click.option(
    "--interpolation",
    type=click.Choice(["linear", "cubic"]),
    default="linear",
    show_default=True,
    help="For --spacing; label maps get the nearest voxel.",
)
@click.option("--antialias", is_flag=True, help="For --spacing: smooth the axes whose voxels grow.")
@click.option("--pyramid", is_flag=True, help="Add coarser levels for viewers, each half of the one before.")
@click.option("--limit", type=click.IntRange(1), help="Convert at most this many cases.")
@click.option("--strict", is_flag=True, help="Let a warning fail its case.")
@click.option("-j", "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Cases at a time.")
@click.option("--scheduler", metavar="WHERE", help="Run on a Dask cluster: tcp://... or a scheduler file.")
@cluster_timeout_option
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), help="Write a JSON line for each case."
)
@click.option(
    "--max-memory", type=Bytes(), help="Write smaller shards, or refuse, if it needs more: '2 GiB'."
)
@click.option("--dry-run", is_flag=True, help="Print the plan, and do nothing.")
@click.option(
    "--overwrite", is_flag=True, help="Start over; with --include or --exclude replace only those subjects."
)
@json_option
@talk_options
def convert_command(
    source: Path,
    store: Path,
    scheduler: str | None,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
    json: bool,
    **options: Any,
) -> int:
    """Convert a cohort of NIfTI, NRRD or MetaImage files SOURCE into a store STORE.

    Files are streamed slab by slab, whatever their size. Voxels, affine and, of NIfTI, the header are kept
    exactly: 'zpatch export' gives the same NIfTI files back. Files of .nrrd, .nhdr, .mha and .mhd, compressed
    or with their voxels in other files, are taken wherever .nii.gz is.

    \b
    SOURCE is one of
      a BIDS folder, nnU-Net 2 raw, Medical Decathlon   found by their dataset files
      a MONAI datalist .json, a .csv or .tsv            columns: subject, split, one for each image
      <subject>/<image>.nii[.gz]                        sub-01/t1.nii.gz, sub-01/seg.nii.gz
      <subject>_<image>.nii[.gz]                        if several files share a <subject>
      <subject>.nii[.gz]                                one image each, called 'image'

    Run the same command again after an interruption, or when files were added or changed: only missing and
    changed cases are converted. A case with a bad file is left out, and one line says why; the others are
    converted and the exit code is 3.

    \b
    Examples:
      zpatch convert scans/ cohort.zarr --jobs 4
      zpatch convert scans/ cohort.zarr --label-pattern '*lesion*' --codec lz4hc
      zpatch convert cohort.csv cohort.zarr --dry-run
    """
    from zpatch.conversion.conversion import committed, run_conversion
    from zpatch.conversion.conversion_options import ConvertOptions
    from zpatch.conversion.conversion_plan import plan_conversion
    from zpatch.images.mixtures import compared_images, mixtures
    from zpatch.store.store import open_store
    from zpatch.store.store_writer import check_can_create

    check_can_create(store, overwrite=overwrite, resume=True)
    plan = plan_conversion(source, ConvertOptions(**options), done=None if overwrite else committed(store))
    say(str(plan))
    for note in plan.notes:
        say(f"note: {note}")
    if dry_run:
        _print_plan(plan, json)
        return EXIT_SOME_FAILED if plan.failures else 0
    started = time.monotonic()
    with CaseReport(report) as lines, Progress("converting", plan.voxel_bytes) as progress:
        done = run_conversion(
            plan,
            store,
            overwrite=overwrite,
            scheduler=scheduler,
            progress=progress,
            on_case=lines.add,
        )
    for image, text in mixtures(compared_images(open_store(store).manifest)):
        say(f"note: {image}: {text}")
    if json:
        print_json(done.to_json())
    else:
        _print_summary(done, time.monotonic() - started)
    return EXIT_SOME_FAILED if done.failures else 0


class CaseReport:
    """Prints each failed case at once, and writes the outcome of each case to a file of JSON lines."""

    def __init__(self, path: Path | None) -> None:
        self._stream = path.open("w") if path else None

    def add(self, outcome: CaseOutcome) -> None:
        """Add a case that was converted or has failed."""
        if outcome.reason:
            say(f"failed: {outcome.subject}: {in_flags(outcome.reason)}", always=True)
        if self._stream:
            print(dumps(outcome.to_json()), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._stream:
            self._stream.close()


def _print_plan(plan: ConversionPlan, json: bool) -> None:
    if json:
        print_json(plan.to_json())
        return
    rows: list[tuple[str, ...]] = [("subject", "image", "kind", "shape I x J x K", "dtype", "shards", "file")]
    for image in plan.images:
        shape = "x".join(map(str, image.dims))
        where = str(image.source.path)
        rows.append(
            (image.subject, image.source.name, image.source.kind, shape, str(image.file.dtype),
             str(image.shard_files), where)
        )  # fmt: skip
    show_table(rows)
    for subject in plan.done:
        say(f"already converted: {subject}")
    for failure in plan.failures:
        say(f"will be left out: {failure.subject}: {in_flags(failure.reason)}", always=True)


def _print_summary(report: ConversionReport, elapsed_s: float) -> None:
    warned = [(r.subject, r.image, warning) for r in report.records for warning in r.warnings]
    for subject, image, warning in warned:
        say(f"warning: {subject}/{image}: {warning}")
    voxels = sum(record.voxel_bytes for record in report.records)
    stored = sum(record.stored_bytes for record in report.records)
    converted = len(report.outcomes) - len(report.failures)
    rows: list[tuple[str, ...]] = [
        ("", "subjects", "images", "voxels", "stored", "ratio", "per second"),
        (
            "converted",
            str(converted),
            str(len(report.records)),
            format_bytes(voxels),
            format_bytes(stored),
            f"{voxels / max(stored, 1):.1f}",
            format_bytes(voxels / max(elapsed_s, 1e-9)),
        ),
    ]
    others = {"already converted": len(report.done), "failed": len(report.failures), "warnings": len(warned)}
    rows += [(what, str(count), "", "", "", "", "") for what, count in others.items() if count]
    if not is_quiet():
        show_table(rows, err=True)
    click.echo(report.store)
