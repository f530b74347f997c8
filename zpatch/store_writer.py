"""Writing a store: image by image, under a lock, so that a crash leaves what was committed and nothing else.

An image is written under ``.staging``, synced, renamed into place, and only then entered in
``manifest.jsonl``. That line is the commit: what has no line does not exist.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch import schema
from zpatch.errors import StoreError, StoreExistsError, StoreLockedError
from zpatch.schema import FileSeal, ImageRecord, Json
from zpatch.shards import close_shards, write_shard
from zpatch.store import TOOL, is_store, sharded_array


def check_can_create(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a place that is taken: by anything, or with ``overwrite`` by anything but a store."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_store(path):
        raise StoreExistsError(f"{path}: there is something else there; choose another name")
    if not overwrite:
        raise StoreExistsError(
            f"{path}: it exists already; say --overwrite to start over, or choose another name"
        )


class StoreWriter:
    """The one writer of a store: a context manager that holds its lock and clears staging at its end."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path.absolute()
        self._lock = lock
        self._staging = self.path / schema.STAGING
        self._documents: set[str] = set()

    @classmethod
    def create(cls, path: Path, attributes: Json, *, overwrite: bool = False) -> Self:
        """Make a new store and take its lock; with ``overwrite`` in the place of an older one."""
        check_can_create(path, overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{path}: it cannot be made ({error.strerror})") from None
        lock = _take_lock(path)
        _clear(path)
        writer = cls(path, lock)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        writer._write_group("", {"format": schema.FORMAT, "created": created, **attributes})
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._lock.close()

    def abandon(self) -> None:
        """Remove the whole store, of a run that came to nothing."""
        shutil.rmtree(self.path, ignore_errors=True)

    def stage(self) -> StagedImage:
        """A fresh place to write one image to."""
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return StagedImage(folder)

    def commit(self, images: Sequence[tuple[StagedImage, ImageRecord]]) -> list[ImageRecord]:
        """Move the finished images of a subject into the store, then enter all of them in the manifest."""
        sealed = [staged.finish(record) for staged, record in images]
        for (staged, _), record in zip(images, sealed, strict=True):
            if f"{record.subject}/{schema.ROOT_DOCUMENT}" not in self._documents:
                attributes = {"subject": record.subject, "split": record.split, "meta": record.meta}
                self._write_group(record.subject, attributes)
            staged.folder.rename(self.path / record.subject / record.image)
            _sync_folder(self.path / record.subject)
        self._append(*(record.to_json() for record in sealed))
        return sealed

    def _write_group(self, name: str, attributes: Json) -> None:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        content = _group_document({TOOL: attributes})
        document = folder / schema.ROOT_DOCUMENT
        partial = document.with_name(f"{schema.ROOT_DOCUMENT}.partial")
        partial.write_bytes(content)
        _sync_file(partial)
        partial.rename(document)
        _sync_folder(folder)
        key = f"{name}/{schema.ROOT_DOCUMENT}".lstrip("/")
        self._append({"document": key, "bytes": len(content), "checksum": schema.digest(content)})
        self._documents.add(key)

    def _append(self, *values: Json) -> None:
        """Enter lines in the manifest, in one write: the images of a subject are there together."""
        lines = "".join(schema.sealed_line(value) + "\n" for value in values)
        with (self.path / schema.MANIFEST).open("ab", buffering=0) as stream:
            stream.write(lines.encode())
            os.fsync(stream.fileno())


class StagedImage:
    """An image that is being written, in a folder of its own below ``.staging``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seals: dict[str, FileSeal] = {}

    def write_shard(self, record: ImageRecord, shard: tuple[int, ...], voxels: NDArray[Any]) -> None:
        """Write one shard, whole: ``voxels`` is (c, z, y, x)."""
        array = sharded_array(self.folder, record)
        seal = write_shard(array, shard, voxels)
        self._seals[array.shard_file(shard).relative_to(self.folder).as_posix()] = seal

    def write_raw_header(self, raw_header: bytes) -> None:
        """Keep a NIfTI header as nifti-zarr does: an array of its bytes."""
        self._write_small_array(schema.RAW_HEADER, np.frombuffer(raw_header, dtype=np.uint8))

    def write_index(self, tables: Mapping[str, NDArray[Any]]) -> None:
        """Keep a label or weight index: small arrays in a group."""
        if tables:
            folder = self.folder / schema.INDEX
            folder.mkdir()
            (folder / schema.ROOT_DOCUMENT).write_bytes(_group_document({}))
        for name, table in tables.items():
            self._write_small_array(f"{schema.INDEX}/{name}", table)

    def finish(self, record: ImageRecord) -> ImageRecord:
        """Write the metadata, sync everything, and return the record with all files sealed."""
        _write_array_metadata(self.folder, record)
        attributes = {
            "ome": schema.ome_attributes(record),
            TOOL: {k: v for k, v in record.to_json().items() if k != "files"},
        }
        (self.folder / schema.ROOT_DOCUMENT).write_bytes(_group_document(attributes))
        for file in sorted(self.folder.rglob("*")):
            if file.is_dir():
                _sync_folder(file)
                continue
            key = file.relative_to(self.folder).as_posix()
            if key not in self._seals:
                _sync_file(file)
                content = file.read_bytes()
                self._seals[key] = FileSeal(len(content), schema.digest(content))
        _sync_folder(self.folder)
        return dataclasses.replace(record, files=dict(sorted(self._seals.items())))

    def discard(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_small_array(self, name: str, values: NDArray[Any]) -> None:
        import zarr

        array = zarr.create_array(
            store=self.folder / name,
            shape=values.shape,
            chunks=(max(len(values), 1),),
            dtype=values.dtype,
            compressors=None,
            fill_value=0,
            zarr_format=3,
            config={"write_empty_chunks": True},
        )
        array[:] = values


def _write_array_metadata(folder: Path, record: ImageRecord) -> None:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    preset = schema.CODECS[record.codec]
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
    zarr.create_array(
        store=folder / schema.VOXELS,
        shape=record.shape,
        chunks=record.chunks,
        shards=record.shards,
        dtype=record.dtype,
        compressors=compressors,
        fill_value=0,
        dimension_names=list(record.axes),
        zarr_format=3,
        config={"write_empty_chunks": True},
    )


def _group_document(attributes: Json) -> bytes:
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2, allow_nan=False).encode()


def _take_lock(path: Path) -> IO[str]:
    lock = (path / schema.LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise StoreLockedError(f"{path}: {holder} is writing to it; wait until it has ended") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _clear(path: Path) -> None:
    """Remove all of a store but its lock; the manifest first, so that nothing half there looks whole."""
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name != schema.MANIFEST):
        close_shards(entry)
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != schema.LOCK:
            entry.unlink()


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
