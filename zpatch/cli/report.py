"""``zpatch report``."""

from __future__ import annotations

from pathlib import Path

import click

from zpatch.cli import EXIT_DAMAGED
from zpatch.cli.options import (
    STORE,
    exclude_option,
    include_option,
    json_option,
    talk_options,
)
from zpatch.cli.progress import Progress, print_json, say, show
from zpatch.runtime.byte_sizes import format_bytes


@click.command("report", short_help="Write a page with pictures of a store.")
@click.argument("store", type=STORE)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default="report.html", show_default=True,
    help="The page to write; an existing report is replaced.",
)  # fmt: skip
@include_option
@exclude_option
@click.option(
    "--limit", type=click.IntRange(0), default=25, show_default=True, help="How many subjects have pictures."
)
@json_option
@talk_options
def report_command(
    store: Path, output: Path, include: tuple[str, ...], exclude: tuple[str, ...], limit: int, json: bool
) -> int:
    """Write an HTML page about STORE: planes of each image with the outlines of labels, histograms,
    statistics and problems. Of a slide, a thumbnail with the outline of its tissue, and its levels.

    The page is a single file that needs no network and no other file. If files of the store are damaged or
    missing, the page lists them and the exit code is 4.

    \b
    Examples:
      zpatch report cohort.zarr
      zpatch report out.zarr --output predictions.html --include 'sub-0*' --limit 100
      zpatch report case.svs
    """
    if store.is_file():
        from zpatch.report.slide_report import write_slide_report

        written = write_slide_report(store, output)
        if json:
            print_json(written.to_json())
        else:
            click.echo(written.output)
        say(f"tissue: {written.tissue:.0%} of the slide; {format_bytes(written.bytes)}")
        return 0
    from zpatch.images.cohort import Cohort
    from zpatch.report.report import write_report

    subjects = min(limit, len(Cohort(store).matching(include, exclude)))
    with Progress("drawing", subjects, unit="subjects") as progress:
        report = write_report(store, output, include=include, exclude=exclude, limit=limit, progress=progress)
    for problem in report.problems:
        if problem.is_damage:
            show(problem.text, err=True)
    if json:
        print_json(report.to_json())
    else:
        click.echo(report.output)
    say(f"{report.subjects} subjects, {len(report.problems)} problems, {format_bytes(report.bytes)}")
    return EXIT_DAMAGED if report.damaged else 0
