"""``zpatch convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zpatch.cli import EXIT_SOME_FAILED
from zpatch.cli.options import (
    STORE,
    Bytes,
    exclude_option,
    include_option,
    json_option,
    overwrite_option,
    print_json,
    say,
    table,
    talk_options,
)
from zpatch.cli.progress import Progress
from zpatch.memory import format_bytes

if TYPE_CHECKING:
    from zpatch.conversion import ConversionReport
    from zpatch.conversion_plan import ConversionPlan


@click.command("convert", short_help="Convert NIfTI files into a chunked Zarr store.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("store", type=STORE)
@click.option(
    "--label-pattern",
    multiple=True,
    metavar="GLOB",
    help="File names that are label maps; may be repeated. Without it: names that end in seg, dseg, "
    "label, labels or mask, and files in folders called labels*.",
)
@click.option(
    "--sampling-pattern",
    multiple=True,
    metavar="GLOB",
    help="File names that are sampling maps (weights for WeightedSampler); may be repeated.",
)
@click.option(
    "--codec",
    type=click.Choice(["lz4", "lz4hc", "zstd", "none"]),
    default="lz4",
    show_default=True,
    help="lz4 is the fastest to write, lz4hc faster to read, zstd smaller, none for copies out of the map.",
)
@click.option(
    "--chunk", type=click.IntRange(1, 512), default=32, show_default=True, help="Side of a chunk in voxels."
)
@include_option
@exclude_option
@click.option("--max-memory", type=Bytes(), help="Refuse to start where more would be needed, as '2 GiB'.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@overwrite_option
@json_option
@talk_options
def convert_command(
    source: Path,
    store: Path,
    label_pattern: tuple[str, ...],
    sampling_pattern: tuple[str, ...],
    codec: str,
    chunk: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    max_memory: int | None,
    dry_run: bool,
    overwrite: bool,
    json: bool,
) -> int:
    """Convert the NIfTI files of a folder SOURCE into a store STORE.

    Files are streamed slab by slab, whatever their size, and voxels, header and affine are kept exactly:
    'zpatch export' gives the same files back.

    \b
    SOURCE holds one of
      <subject>/<image>.nii[.gz]     sub-01/t1.nii.gz, sub-01/seg.nii.gz
      <subject>_<image>.nii[.gz]     where several files share a <subject>
      <subject>.nii[.gz]             one image each, called 'image'

    A case whose files are bad is left out, with one line that says why; the others are converted and the
    exit code is 3.

    \b
    Examples:
      zpatch convert scans/ cohort.zarr
      zpatch convert scans/ cohort.zarr --label-pattern '*lesion*' --codec lz4hc
      zpatch convert scans/ cohort.zarr --dry-run
    """
    from zpatch.conversion import run_conversion
    from zpatch.conversion_plan import ConvertOptions, plan_conversion
    from zpatch.store_writer import check_can_create

    check_can_create(store, overwrite=overwrite)
    options = ConvertOptions(
        codec=codec,
        chunk=chunk,
        label_patterns=label_pattern,
        sampling_patterns=sampling_pattern,
        include=include,
        exclude=exclude,
        max_memory=max_memory,
    )
    plan = plan_conversion(source, options)
    say(str(plan))
    if dry_run:
        _print_plan(plan, json)
        return EXIT_SOME_FAILED if plan.failures else 0
    with Progress("converting", plan.voxel_bytes) as progress:
        report = run_conversion(plan, store, overwrite=overwrite, progress=progress)
    for failure in report.failures:
        click.echo(f"failed: {failure.subject}: {failure.reason}", err=True)
    if json:
        print_json(report.to_json())
    else:
        _print_summary(report)
    return EXIT_SOME_FAILED if report.failures else 0


def _print_plan(plan: ConversionPlan, json: bool) -> None:
    if json:
        print_json(plan.to_json())
        return
    rows: list[tuple[str, ...]] = [("subject", "image", "kind", "shape", "dtype", "shards", "file")]
    for image in plan.images:
        shape = "x".join(map(str, image.file.dims))
        where = str(image.source.path)
        rows.append(
            (image.subject, image.source.name, image.source.kind, shape, str(image.file.dtype),
             str(image.shard_files), where)
        )  # fmt: skip
    click.echo(table(rows))
    for failure in plan.failures:
        click.echo(f"will be left out: {failure.subject}: {failure.reason}", err=True)


def _print_summary(report: ConversionReport) -> None:
    for record in report.records:
        for warning in record.warnings:
            say(f"warning: {record.subject}/{record.image}: {warning}")
    voxels = sum(record.voxel_bytes for record in report.records)
    stored = sum(record.stored_bytes for record in report.records)
    subjects = len({record.subject for record in report.records})
    failed = f"; {len(report.failures)} subjects failed" if report.failures else ""
    say(
        f"{subjects} subjects, {len(report.records)} images, {format_bytes(voxels)} of voxels in "
        f"{format_bytes(stored)}{failed}"
    )
    click.echo(f"{report.store}")
