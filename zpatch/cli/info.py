"""``zpatch info``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zpatch.cli.image_info import show_image
from zpatch.cli.options import STORE, include_option, json_option, talk_options
from zpatch.cli.progress import print_json, show, show_table
from zpatch.runtime.byte_sizes import format_bytes

if TYPE_CHECKING:
    from zpatch.records.image_record import ImageRecord
    from zpatch.store.store import Store


@click.command("info", short_help="Show what a store holds.")
@click.argument("store", type=STORE)
@include_option
@click.option("--limit", type=click.IntRange(1), default=40, show_default=True, help="Images to list.")
@json_option
@talk_options
def info_command(store: Path, include: tuple[str, ...], limit: int, json: bool) -> None:
    """Show what STORE holds: subjects, images, shapes, sizes, compression, statistics and warnings; of
    predictions also the network that made them, and where their inputs were.

    Only the manifest is read, however large the store is. STORE may also be one file that is read in place:
    of a slide its levels, micrometres per pixel, tiles and associated images are shown.

    \b
    Examples:
      zpatch info cohort.zarr
      zpatch info cohort.zarr --include 'sub-0*' --json
      zpatch info case.svs
    """
    if store.is_file():
        show_image(store, json=json)
        return
    from zpatch.images.mixtures import ComparedImage, mixtures
    from zpatch.records.names import chosen
    from zpatch.store.store import open_store

    opened = open_store(store)
    shown = chosen("subject", opened.manifest.table.subjects[:], include, (), f"store {store}")
    records = list(opened.records.of(shown))
    if json:
        print_json({"store": str(store), **opened.attributes, "images": [_as_json(r) for r in records]})
        return
    show(_headline(opened, records))
    mixed = [f"{image}: {text}" for image, text in mixtures(map(ComparedImage.of, records))]
    for line in (*_resampled(records), *_origins(records), *mixed):
        show(line)
    if records:
        show()
        show_table(_with_content([_HEADING, *(_row(record) for record in records[:limit])]))
    if len(records) > limit:
        show(f"... and {len(records) - limit} more (--limit)")
    for record in records:
        for warning in record.warnings:
            show(f"warning: {record.subject}/{record.image}: {warning}")


MOST_LABELS = 8  # values of a label map that are listed

_HEADING = (
    "subject",
    "image",
    "split",
    "kind",
    "shape I x J x K",
    "dtype",
    "spacing mm",
    "axes",
    "stored",
    "ratio",
    "min",
    "mean",
    "max",
    "labels",
)


def _with_content(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A table without the columns in which only the heading has a text."""
    kept = [column for column in range(len(_HEADING)) if any(row[column] for row in rows[1:])]
    return [tuple(row[column] for column in kept) for row in rows]


def _headline(store: Store, records: Sequence[ImageRecord]) -> str:
    voxels = sum(record.voxel_bytes for record in records)
    stored = sum(record.stored_bytes for record in records)
    subjects = len({record.subject for record in records})
    codecs = ", ".join(sorted({record.codec for record in records})) or "none"
    return (
        f"{store.path}: format {store.attributes['format']}, {subjects} subjects, {len(records)} images, "
        f"{format_bytes(voxels)} of voxels in {format_bytes(stored)} ({codecs})"
    )


def _origins(records: Sequence[ImageRecord]) -> list[str]:
    """A line for each network that made some predictions: its name, its file, and where its inputs were."""
    from zpatch.records.image_record import common_folder

    inputs: dict[tuple[str, str | None, str], list[str | None]] = {}
    for made in (record.provenance for record in records if record.provenance):
        inputs.setdefault((made.model, made.model_path, made.version), []).extend(made.inputs.values())
    return [
        f"predicted by {name} ({path or 'in memory'}) from {common_folder(paths) or 'memory'}, by zpatch {by}"
        for (name, path, by), paths in inputs.items()
    ]


def _resampled(records: Sequence[ImageRecord]) -> list[str]:
    """A line for each kind of resampling: how it was done, and the voxel sizes of the files."""
    import numpy as np

    from zpatch.geometry.affines import spacing_mm
    from zpatch.geometry.voxel_grid import format_spacing

    files: dict[str, set[str]] = {}
    for record in records:
        if (made := record.resampled) is not None:
            antialias = ", antialiased" if made.antialias else ""
            how = f"to {format_spacing(made.spacing)} mm ({made.interpolation}{antialias})"
            shape, spacing = "x".join(map(str, made.shape)), spacing_mm(np.array(made.affine))
            files.setdefault(how, set()).add(f"{shape} of {format_spacing(spacing)}")
    return [
        f"resampled {how} from {', '.join(sorted(natives)[:3])}{', ...' if len(natives) > 3 else ''} mm"
        for how, natives in files.items()
    ]


def _row(record: ImageRecord) -> tuple[str, ...]:
    import numpy as np

    from zpatch.geometry.affines import spacing_mm
    from zpatch.images.mixtures import orientation_of

    channels, *_ = record.shape_czyx
    shape = "x".join(map(str, record.spatial_shape)) + (f" x{channels}" if channels > 1 else "")
    unit = "" if record.spatial_unit == "millimeter" else f" {record.spatial_unit or 'unknown unit'}"
    values = [record.stats.get(name) for name in ("min", "mean", "max")]
    return (
        record.subject,
        record.image,
        record.split or "",
        record.kind,
        shape,
        np.dtype(record.dtype).name,
        "x".join(f"{s:.3g}" for s in spacing_mm(record.affine_array)) + unit,
        orientation_of(record),
        format_bytes(record.stored_bytes),
        f"{record.voxel_bytes / max(record.stored_bytes, 1):.1f}",
        *("-" if value is None else f"{value:.4g}" for value in values),
        _labels(record),
    )


def _labels(record: ImageRecord) -> str:
    """The values of a label map, by the statistics of the manifest."""
    found = record.stats.get("labels")
    if not isinstance(found, dict):
        return ""
    values = sorted(found, key=lambda value: (len(value), value))
    if len(values) > MOST_LABELS:
        return f"{' '.join(values[: MOST_LABELS - 1])} ... {len(values)} values"
    return " ".join(values)


def _as_json(record: ImageRecord) -> dict[str, Any]:
    from zpatch.images.mixtures import orientation_of

    value = record.to_json()
    return {
        **value,
        "shape": list(record.spatial_shape),
        "shape_axes": "IJK",
        "channels": record.shape_czyx[0],
        "stored_shape": value["shape"],
        "orientation": orientation_of(record),
        "files": len(value["files"]),
        "voxel_bytes": record.voxel_bytes,
        "stored_bytes": record.stored_bytes,
    }
