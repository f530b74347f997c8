"""The door to zarr: a store on disk, opened from its manifest alone, and written image by image.

An image is written under ``.staging``, synced, renamed into place, and only then entered in
``manifest.jsonl``. That line is the commit: what has no line does not exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch import schema
from zpatch.errors import (
    DamageError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreLockedError,
)
from zpatch.schema import FileSeal, ImageRecord, Json
from zpatch.shards import ShardedArray, close_shards, write_shard

TOOL = "zpatch"

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Store:
    """A store as its manifest describes it; immutable, and no file is held open.

    ``records`` are the committed images by (subject, image) in the order of the manifest; ``documents``
    are the sealed files outside the images, by path below the store; ``attributes`` are the root's.
    """

    path: Path
    attributes: Json
    records: Mapping[Key, ImageRecord]
    documents: Mapping[str, FileSeal]

    def image_path(self, record: ImageRecord) -> Path:
        """The folder of an image."""
        return self.path / record.subject / record.image


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for reading. Reads its root document and its manifest, and nothing else."""
    root = Path(path)
    attributes = _root_attributes(root)
    records: dict[Key, ImageRecord] = {}
    documents: dict[str, FileSeal] = {}
    for where, value in _manifest_lines(root / schema.MANIFEST):
        if "document" in value:
            documents[value["document"]] = FileSeal(value["bytes"], value["checksum"])
        else:
            record = ImageRecord.from_json(value, where)
            records[record.subject, record.image] = record
    return Store(root, attributes, records, documents)


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


def is_store(path: Path) -> bool:
    """Whether a folder is a zpatch store of any format."""
    with contextlib.suppress(StoreError):
        _root_group(path)
        return True
    return False


def _root_group(root: Path) -> Json:
    document = root / schema.ROOT_DOCUMENT
    try:
        text = document.read_text()
    except FileNotFoundError:
        what = "it does not exist" if not root.exists() else "it is no zpatch store (no zarr.json)"
        raise NotAStoreError(f"{root}: {what}; make one with 'zpatch convert SOURCE STORE'") from None
    except OSError as error:
        raise NotAStoreError(f"{root}: it cannot be opened ({error.strerror})") from None
    try:
        attributes = json.loads(text)["attributes"][TOOL]
        attributes["format"] += 0
    except (ValueError, KeyError, TypeError):
        raise NotAStoreError(
            f"{root}: it is Zarr but no zpatch store (its zarr.json says nothing of zpatch)"
        ) from None
    return dict(attributes)


def _root_attributes(root: Path) -> Json:
    attributes = _root_group(root)
    if attributes["format"] > schema.FORMAT:
        raise StoreError(
            f"{root}: it is a store of format {attributes['format']}, and this zpatch reads up to "
            f"{schema.FORMAT}; install a newer zpatch"
        )
    return attributes


def _manifest_lines(path: Path) -> Iterator[tuple[str, Json]]:
    """The lines of a manifest and where each stands; a torn last line is passed over."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    whole, _, _torn = data.rpartition(b"\n")
    for number, line in enumerate(whole.decode(errors="replace").split("\n"), start=1):
        if line:
            where = f"{path}, line {number}"
            yield where, schema.unsealed(line, where)


class StoreWriter:
    """The one writer of a store: a context manager that holds its lock and clears staging at its end."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock
        self._staging = path / schema.STAGING
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

    def stage(self) -> StagedImage:
        """A fresh place to write one image to."""
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return StagedImage(folder)

    def commit(self, staged: StagedImage, record: ImageRecord) -> ImageRecord:
        """Move a finished image into the store and enter it in the manifest."""
        record = staged.finish(record)
        if f"{record.subject}/{schema.ROOT_DOCUMENT}" not in self._documents:
            attributes = {"subject": record.subject, "split": record.split, "meta": record.meta}
            self._write_group(record.subject, attributes)
        target = self.path / record.subject / record.image
        staged.folder.rename(target)
        _sync_folder(target.parent)
        self._append(record.to_json())
        return record

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

    def _append(self, value: Json) -> None:
        with (self.path / schema.MANIFEST).open("ab") as stream:
            stream.write(schema.sealed_line(value).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


class StagedImage:
    """An image that is being written, in a folder of its own below ``.staging``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seals: dict[str, FileSeal] = {}

    def array(self, record: ImageRecord) -> ShardedArray:
        """The voxels' place while they are staged."""
        return sharded_array(self.folder, record)

    def write_shard(self, record: ImageRecord, shard: tuple[int, ...], voxels: NDArray[Any]) -> None:
        """Write one shard, whole: ``voxels`` is (c, z, y, x)."""
        array = self.array(record)
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


def sharded_array(folder: Path, record: ImageRecord) -> ShardedArray:
    """The voxels of the image in ``folder``."""
    return ShardedArray(
        path=folder / schema.VOXELS,
        shape=record.shape_czyx,
        dtype=np.dtype(record.dtype),
        chunks=schema.padded_to_4d(record.chunks),
        shards=schema.padded_to_4d(record.shards),
        codec=record.codec,
        ndim=len(record.shape),
    )


def read_small_array(folder: Path, name: str) -> NDArray[Any]:
    """A small array of an image: its raw header, or a table of its index."""
    import zarr

    try:
        values = np.asarray(zarr.open_array(folder / name, mode="r")[:])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DamageError(
            f"damaged store: {folder / name} cannot be read ({error}); "
            f"run 'zpatch verify' on the store, then convert the image again"
        ) from error
    return values


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
    entries: Iterable[Path] = sorted(path.iterdir(), key=lambda entry: entry.name != schema.MANIFEST)
    for entry in entries:
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


@dataclass(frozen=True, slots=True, eq=False)
class ZarrVoxels:
    """An array that any Zarr library wrote, with what its metadata says of it.

    ``axes`` are its dimension names or empty; ``scale`` and ``translation`` are per axis, from OME-Zarr.
    """

    array: Any
    axes: str
    scale: tuple[float, ...] | None
    translation: tuple[float, ...] | None


def open_image_folder(path: Path) -> ImageRecord | ZarrVoxels:
    """An image by its folder: one that zpatch wrote, any OME-Zarr image, or any Zarr array."""
    import zarr

    try:
        node = zarr.open(path, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise NotAStoreError(f"{path}: it is no Zarr array or OME-Zarr image ({error})") from None
    if isinstance(node, zarr.Array):
        return describe_zarr_array(node)
    attributes = dict(node.attrs)
    if "image" in (own := attributes.get(TOOL, {})):
        return ImageRecord.from_json({**own, "files": {}}, str(path))
    ome = attributes.get("ome", attributes)
    try:
        multiscale = ome["multiscales"][0]
        dataset = multiscale["datasets"][0]
        axes = "".join(axis["name"] for axis in multiscale["axes"])
        transforms = {t["type"]: tuple(t[t["type"]]) for t in dataset["coordinateTransformations"]}
        array = node[dataset["path"]]
    except (KeyError, IndexError, TypeError):
        raise NotAStoreError(
            f"{path}: it is a Zarr group but no OME-Zarr image; name an image or an array in it"
        ) from None
    return ZarrVoxels(array, axes, transforms.get("scale"), transforms.get("translation"))


def describe_zarr_array(array: Any) -> ZarrVoxels:
    """What an open Zarr array says of itself."""
    names = getattr(array.metadata, "dimension_names", None) or ()
    return ZarrVoxels(array, "".join(n or "?" for n in names), None, None)
