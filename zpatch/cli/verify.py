"""``zpatch verify``."""

from __future__ import annotations

from pathlib import Path

import click

from zpatch.cli import EXIT_DAMAGED
from zpatch.cli.options import STORE, json_option, talk_options
from zpatch.cli.progress import Progress, print_json, say, show
from zpatch.runtime.byte_sizes import format_bytes


@click.command("verify", short_help="Check every stored byte against the manifest.")
@click.argument("store", type=STORE)
@click.option("--quick", is_flag=True, help="Check only the presence and length of files, and all zarr.json.")
@json_option
@talk_options
def verify_command(store: Path, quick: bool, json: bool) -> int:
    """Check that every file in the manifest of STORE is present, with the bytes that were written.

    Damaged and missing files are named, one on each line, and the exit code is 4; it is also 4 if a
    prediction is unfinished.

    \b
    Examples:
      zpatch verify cohort.zarr
      zpatch verify cohort.zarr --quick
    """
    from zpatch.store.verification import sealed_bytes, verify

    with Progress("verifying", 0 if quick else sealed_bytes(store)) as progress:
        report = verify(store, quick=quick, progress=progress)
    if json:
        print_json(report.to_json())
    for damage in report.damages:
        show(f"damaged: {store / damage.file}: {damage.what}", err=True)
    for subject in report.missing_subjects:
        show(f"incomplete: subject {subject!r} was never committed", err=True)
    if report.writer:
        say(f"{report.writer} is writing to this store: what it has not committed yet is not verified")
    for leftover in () if report.writer else report.leftovers:
        say(f"leftover of interrupted work, harmless: {store / leftover}")
    if report.ok:
        how = "presence and length" if quick else "every byte"
        say(f"{report.images} images, {report.files} files, {format_bytes(report.bytes)}: {how} as written")
        return 0
    faults = len(report.damages) + len(report.missing_subjects)
    say(f"{faults} faults; {'verify again when it has ended' if report.writer else report.remedy}")
    return EXIT_DAMAGED
