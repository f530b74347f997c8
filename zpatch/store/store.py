"""The door to zarr: a store on disk, opened from its manifest alone.

Writing is `store_writer.py`'s; images that others wrote are `zarr_images.py`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.codec import codec_of
from zpatch.chunks.sharded_array import ChunkFiles, ShardedArray
from zpatch.digests import FileSeal, Json, digest, parsed_json
from zpatch.errors import DamageError, NotAStoreError, StoreError
from zpatch.geometry.boxes import padded_to_4d
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest import Manifest, Records, open_manifest
from zpatch.records.names import FORMAT, MANIFEST, ROOT_DOCUMENT
from zpatch.runtime.guarded_files import is_behind_link, read_document

TOOL = "zpatch"
MOST_PACKED_BYTES = 2**28  # of a small array that is compressed, such as a histogram
MOST_TABLE_BYTES = 2**32


@dataclass(frozen=True, slots=True)
class Store:
    """A store as its manifest describes it; immutable. Its manifest is held open, and no other file.

    ``path`` is absolute, so that a change of the working directory cannot make it another store.
    ``attributes`` are those of the root document.
    """

    path: Path
    attributes: Json
    manifest: Manifest

    @property
    def records(self) -> Records:
        """The committed images by (subject, image), in the order of the manifest."""
        return self.manifest.records

    @property
    def documents(self) -> Mapping[str, FileSeal]:
        """The sealed files outside the images, by path relative to the store."""
        return self.manifest.documents

    def image_path(self, record: ImageRecord) -> Path:
        """The folder of an image; one that is a link raises DamageError."""
        folder = self.path / record.subject / record.image
        if is_behind_link(self.path, folder):
            raise DamageError(f"damaged: {folder} is a link, and a store has none; restore it from a copy")
        return folder


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for reading. Only its root document and the table of its manifest are read."""
    root = Path(path)
    return Store(root.absolute(), root_attributes(root), open_manifest((root / MANIFEST).absolute()))


def is_store(path: Path) -> bool:
    """Whether a folder is a zpatch store of any format."""
    with contextlib.suppress(StoreError):
        _root_group(path)
        return True
    return False


def _root_group(root: Path) -> Json:
    document = root / ROOT_DOCUMENT
    try:
        text = read_document(document)
    except FileNotFoundError:
        what = "it does not exist" if not root.exists() else "it is no zpatch store (no zarr.json)"
        raise NotAStoreError(f"{root}: {what}; make one with 'zpatch convert SOURCE STORE'") from None
    except OSError as error:
        raise NotAStoreError(f"{root}: it cannot be opened ({error.strerror})") from None
    try:
        attributes = dict(parsed_json(text)["attributes"][TOOL])
        if not isinstance(attributes["format"], int):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise NotAStoreError(
            f"{root}: it is Zarr but no zpatch store (its zarr.json has no attributes of zpatch)"
        ) from None
    return attributes


def root_attributes(root: Path) -> Json:
    """The attributes of zpatch in the root document; a newer format raises ``StoreError``."""
    attributes = _root_group(root)
    if attributes["format"] > FORMAT:
        raise StoreError(
            f"{root}: it is a store of format {attributes['format']}, and this zpatch reads up to "
            f"{FORMAT}; install a newer zpatch"
        )
    return attributes


def sharded_array(folder: Path, record: ImageRecord, level: int = 0) -> ShardedArray:
    """The array of the image in ``folder``, or of its coarser level of that number."""
    array = record.levels[level - 1] if level else record
    return ShardedArray(
        path=folder / str(level),
        shape=padded_to_4d(array.shape),
        dtype=np.dtype(record.dtype),
        chunks=padded_to_4d(array.chunks),
        shards=padded_to_4d(array.shards),
        codec=codec_of(record.codec),
        files=ChunkFiles(axes=tuple(range(4 - len(record.shape), 4))),
        name=f"image {record.image!r} of subject {record.subject!r}",
        remedy=_remedy(folder, record),
        contents=record.contents,
    )


def _remedy(folder: Path, record: ImageRecord) -> str:
    """The commands that show all damage, and repair a damaged image."""
    root = folder.parent.parent
    again = f"'zpatch convert SOURCE {root} --overwrite --include {record.subject}'"
    if record.inputs is not None:
        again = "the same 'zpatch predict' command, with --verify,"
    elif record.source is None:
        again = "the command that wrote it, with --overwrite,"
    return f"run 'zpatch verify {root}' to see all damage; {again} repairs it"


def read_small_array(folder: Path, name: str, files: Mapping[str, FileSeal]) -> NDArray[Any]:
    """A small array of an image (its raw header or a table of its index), compared with its seals."""
    try:
        for key, seal in files.items():
            if key.startswith(f"{name}/") and digest(read_document(folder / key)) != seal.checksum:
                raise ValueError("its contents have changed")
        values = _plain_array(folder / name)
        if values is None:
            import zarr

            array = zarr.open_array(folder / name, mode="r")
            if array.nbytes > MOST_PACKED_BYTES:
                raise ValueError(f"it has {array.nbytes} bytes, more than {MOST_PACKED_BYTES}")
            values = np.asarray(array[:])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise DamageError(
            f"damaged store: {folder / name} cannot be read ({error}); "
            f"run 'zpatch verify' on the store, then convert the image again"
        ) from error
    return values


def _plain_array(folder: Path) -> NDArray[Any] | None:
    """An array of one uncompressed chunk, as tables of an index are; None for any other array."""
    document = parsed_json(read_document(folder / ROOT_DOCUMENT))
    whole = {"name": "regular", "configuration": {"chunk_shape": document["shape"]}}
    names = [codec["name"] for codec in document["codecs"]]
    little = document["codecs"][0].get("configuration", {"endian": "little"}) == {"endian": "little"}
    if document["chunk_grid"] != whole or names != ["bytes"] or not little or 0 in document["shape"]:
        return None
    file = folder.joinpath("c", *"0" * len(document["shape"]))
    dtype = np.dtype(document["data_type"]).newbyteorder("<")
    return np.frombuffer(read_document(file, most=MOST_TABLE_BYTES), dtype).reshape(document["shape"])
