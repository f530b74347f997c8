"""``zpatch export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zpatch.cli.options import (
    STORE,
    exclude_option,
    include_option,
    json_option,
    overwrite_option,
    talk_options,
)
from zpatch.cli.progress import Progress, print_json, say
from zpatch.runtime.byte_sizes import format_bytes


@click.command("export", short_help="Write images of a store as NIfTI or OME-TIFF.")
@click.argument("store", type=STORE)
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--image", "images", multiple=True, metavar="GLOB", help="Only images that match; may be repeated."
)
@include_option
@exclude_option
@click.option(
    "--suffix",
    type=click.Choice([".nii.gz", ".nii", ".ome.tif"]),
    default=".nii.gz",
    show_default=True,
    help="The ending of the files: NIfTI, compressed or not, or tiled OME-TIFF with the levels of the store.",
)
@overwrite_option
@json_option
@talk_options
def export_command(
    store: Path,
    dest: Path,
    overwrite: bool,
    json: bool,
    **options: Any,
) -> None:
    """Write images of STORE as NIfTI files DEST/<subject>/<image>.nii.gz.

    If DEST ends in .nii, .nii.gz or .ome.tif, a single image is written to that file; OME-TIFF is for viewers
    of slides, such as QuPath. Converted images keep the
    voxels, header, affine, slope and extensions of their source files; of those that were converted with
    --spacing the stored voxels are written, under a header that says so.

    \b
    Examples:
      zpatch export cohort.zarr nifti/
      zpatch export out.zarr results/ --image prediction --suffix .nii
      zpatch export out.zarr seg.nii.gz --include sub-01 --image prediction
      zpatch export out.zarr case.ome.tif
    """
    from zpatch.conversion.store_export import check_free, export_image, plan_export
    from zpatch.store.store import open_store

    opened = open_store(store)
    planned = plan_export(opened, dest, **options)
    check_free(planned, overwrite=overwrite)
    total = sum(exported.record.voxel_bytes for exported in planned)
    with Progress("exporting", total) as progress:
        for exported in planned:
            export_image(opened, exported.record, exported.path, progress=progress)
    if json:
        print_json([str(exported.path) for exported in planned])
        return
    for exported in planned:
        click.echo(exported.path)
    say(f"{len(planned)} images, {format_bytes(total)} of voxels")
    if resampled := sum(exported.record.resampled is not None for exported in planned):
        say(f"{resampled} of them were resampled as they were converted: they are on the grid of the store")
