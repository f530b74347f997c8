"""The folder of an image that is being written, and its Zarr metadata."""

from __future__ import annotations

import colorsys
import dataclasses
import json
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.codec import CODECS
from zpatch.chunks.shard_writer import write_shard
from zpatch.digests import FileSeal, Json, digest
from zpatch.geometry.affines import spacing_mm
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import HISTOGRAM, INDEX, RAW_HEADER, ROOT_DOCUMENT
from zpatch.runtime.whole_file import sync
from zpatch.store.store import TOOL, sharded_array

SYNCS_AT_ONCE = 8  # a file system commits several at once
MOST_COLOURS = 256  # in the metadata of a label map
GOLDEN_ANGLE = 0.381966  # of a turn: hues that far apart differ most

_AXIS_TYPES = {"z": "space", "y": "space", "x": "space", "c": "channel", "t": "time"}


class StagedImage:
    """An image that is being written, in a separate folder.

    ``seals`` are the seals of shards that are already written, by their path relative to the folder. A thread
    syncs the shards that are written here; ``finish`` waits for it.
    """

    def __init__(self, folder: Path, seals: Mapping[str, FileSeal] = MappingProxyType({})) -> None:
        self.folder = folder
        self._seals = dict(seals)
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="zpatch-sync")
        self._syncs: list[Future[None]] = []

    @classmethod
    def below(cls, staging: Path) -> Self:
        """An image in a new folder below ``staging``."""
        folder = staging / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return cls(folder)

    def write_shard(
        self, record: ImageRecord, shard: tuple[int, ...], voxels: NDArray[Any], *, level: int = 0
    ) -> None:
        """Write one shard, whole: ``voxels`` is (c, z, y, x)."""
        array = sharded_array(self.folder, record, level)
        seal = write_shard(array, shard, voxels, record.codec, is_synced=False)
        file = array.shard_file(shard)
        self._syncs.append(self._disk.submit(sync, file))
        self._seals[file.relative_to(self.folder).as_posix()] = seal

    def write_raw_header(self, raw_header: bytes) -> None:
        """Write a NIfTI header as in nifti-zarr: an array of its bytes."""
        self._write_small_array(RAW_HEADER, np.frombuffer(raw_header, dtype=np.uint8))

    def write_index(self, tables: Mapping[str, NDArray[Any]]) -> None:
        """Write a label or weight index: small arrays in a group."""
        if tables:
            folder = self.folder / INDEX
            folder.mkdir()
            (folder / ROOT_DOCUMENT).write_bytes(group_document({}))
        for name, table in tables.items():
            self._write_small_array(f"{INDEX}/{name}", table)

    def write_histogram(self, histogram: NDArray[np.float64]) -> None:
        """Write the histogram, from which statistics of a cohort are computed."""
        self._write_small_array(HISTOGRAM, histogram, compressors="auto")

    def finish(self, record: ImageRecord) -> ImageRecord:
        """Write the metadata, sync everything, and return the record with all files sealed."""
        for level in range(len(record.levels) + 1):
            _write_array_metadata(self.folder, record, level)
        attributes = {
            "ome": ome_attributes(record),
            TOOL: {k: v for k, v in record.to_json().items() if k != "files"},
        }
        (self.folder / ROOT_DOCUMENT).write_bytes(group_document(attributes))
        places = [self.folder, *self.folder.rglob("*")]
        files = {place.relative_to(self.folder).as_posix(): place for place in places if place.is_file()}
        unsealed = {key: file for key, file in files.items() if key not in self._seals}
        folders = [place for place in places if place.is_dir()]
        with ThreadPoolExecutor(SYNCS_AT_ONCE, thread_name_prefix="zpatch-sync") as pool:
            synced = pool.map(sync, [*unsealed.values(), *folders])
            for key, file in unsealed.items():
                content = file.read_bytes()
                self._seals[key] = FileSeal(len(content), digest(content))
            list(synced)
        for future in self._syncs:
            future.result()
        self._disk.shutdown()
        return dataclasses.replace(record, files=dict(sorted(self._seals.items())))

    def discard(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_small_array(self, name: str, values: NDArray[Any], compressors: Any = None) -> None:
        import zarr

        array = zarr.create_array(
            store=self.folder / name,
            shape=values.shape,
            chunks=tuple(max(n, 1) for n in values.shape),
            dtype=values.dtype,
            compressors=compressors,
            fill_value=0,
            zarr_format=3,
            config={"write_empty_chunks": True},
        )
        array[:] = values


def _write_array_metadata(folder: Path, record: ImageRecord, level: int) -> None:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    preset = CODECS[record.codec]
    itemsize = np.dtype(record.dtype).itemsize
    compressors: list[Any] = [Crc32cCodec()]
    if preset is not None:
        blosc = BloscCodec(
            cname=preset.compressor,  # type: ignore[arg-type]
            clevel=preset.level,
            shuffle="shuffle" if preset.shuffle else "noshuffle",
            typesize=itemsize,
        )
        compressors.insert(0, blosc)
    array = record.levels[level - 1] if level else record
    zarr.create_array(
        store=folder / str(level),
        shape=array.shape,
        chunks=array.chunks,
        shards=array.shards,
        dtype=record.dtype,
        compressors=compressors,
        fill_value=0,
        dimension_names=list(record.axes),
        zarr_format=3,
        config={"write_empty_chunks": True},
    )


def group_document(attributes: Json) -> bytes:
    """The ``zarr.json`` of a group."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2, allow_nan=False).encode()


def ome_attributes(record: ImageRecord) -> Json:
    """OME-Zarr 0.5 metadata: axes, and the scale and translation of each level.

    OME-Zarr 0.5 has no affines: the whole affine is in the image record and in the raw NIfTI header. A voxel
    size of zero is written as 1, because scales must be positive; an unknown unit is left out. A label map
    is marked as such, with a colour for each label that it has.
    """
    axes: list[Json] = [{"name": name, "type": _AXIS_TYPES[name]} for name in record.axes]
    for axis in axes:
        if axis["type"] == "space" and record.spatial_unit:
            axis["unit"] = record.spatial_unit
    leading = len(record.axes) - 3
    i, j, k = (s if np.isfinite(s) and s > 0 else 1.0 for s in spacing_mm(record.affine_array))
    x, y, z = np.nan_to_num(record.affine_array[:3, 3]).tolist()
    datasets = []
    factors, shapes = [1.0] * 3, [record.shape, *(level.shape for level in record.levels)]
    for number, shape in enumerate(shapes):
        # The centre of a coarse voxel is the mean of the centres of the fine voxels that it covers.
        scale = [s * f for s, f in zip((k, j, i), factors, strict=True)]
        shift = [o + s * (f - 1) / 2 for o, s, f in zip((z, y, x), (k, j, i), factors, strict=True)]
        transformations = [
            {"type": "scale", "scale": [1.0] * leading + scale},
            {"type": "translation", "translation": [0.0] * leading + shift},
        ]
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
        factors = [f * 2 if n > 1 else f for f, n in zip(factors, shape[leading:], strict=True)]
    multiscale = {"name": record.image, "axes": axes, "datasets": datasets}
    label = {"image-label": _image_label(record)} if record.kind == "label" else {}
    return {"version": "0.5", **label, "multiscales": [multiscale]}


def _image_label(record: ImageRecord) -> Json:
    """The ``image-label`` of OME-Zarr 0.5: a colour by the value of each label, the same in all images."""
    labels = record.stats.get("labels", {}) if record.shape_czyx[0] == 1 else {}
    values = sorted(map(int, labels))
    if len(values) > MOST_COLOURS or not any(values):
        return {"version": "0.5"}
    return {"version": "0.5", "colors": [{"label-value": v, "rgba": _rgba(v)} for v in values]}


def _rgba(value: int) -> list[int]:
    """Red, green, blue and opacity of a label, 0 to 255; label 0 is transparent."""
    colour = colorsys.hls_to_rgb(value * GOLDEN_ANGLE % 1, 0.55, 0.9)
    return [*(round(255 * part) for part in colour), 255] if value else [0, 0, 0, 0]
