"""The folder of an image that is being written, and its Zarr metadata."""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.codec import CODECS
from zpatch.chunks.shard_writer import write_shard
from zpatch.digests import FileSeal, Json, digest
from zpatch.runtime.whole_file import sync
from zpatch.store import image_record
from zpatch.store.image_record import ImageRecord
from zpatch.store.names import HISTOGRAM, INDEX, RAW_HEADER, ROOT_DOCUMENT
from zpatch.store.store import TOOL, sharded_array


class StagedImage:
    """An image that is being written, in a separate folder.

    ``seals`` are the seals of shards that are already written, by their path relative to the folder.
    """

    def __init__(self, folder: Path, seals: Mapping[str, FileSeal] = MappingProxyType({})) -> None:
        self.folder = folder
        self._seals = dict(seals)

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
        seal = write_shard(array, shard, voxels, record.codec)
        self._seals[array.shard_file(shard).relative_to(self.folder).as_posix()] = seal

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
            "ome": image_record.ome_attributes(record),
            TOOL: {k: v for k, v in record.to_json().items() if k != "files"},
        }
        (self.folder / ROOT_DOCUMENT).write_bytes(group_document(attributes))
        for file in sorted(self.folder.rglob("*")):
            if file.is_dir():
                sync(file)
                continue
            key = file.relative_to(self.folder).as_posix()
            if key not in self._seals:
                sync(file)
                content = file.read_bytes()
                self._seals[key] = FileSeal(len(content), digest(content))
        sync(self.folder)
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
