"""The door to zarr: a store on disk, opened from its manifest alone, and images that others wrote.

Writing is `store_writer.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch import schema
from zpatch.errors import DamageError, NotAStoreError, StoreError
from zpatch.manifest import Key, read_manifest
from zpatch.schema import FileSeal, ImageRecord, Json
from zpatch.shards import ShardedArray

TOOL = "zpatch"


@dataclass(frozen=True, slots=True)
class Store:
    """A store as its manifest describes it; immutable, and no file is held open.

    ``path`` is absolute, so that a change of the working directory cannot make it another store.
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
    return store_of(root, root_attributes(root))


def store_of(root: Path, attributes: Json) -> Store:
    """The store as its manifest says, whatever its root document."""
    manifest = read_manifest(root / schema.MANIFEST)
    return Store(root.absolute(), attributes, manifest.records, manifest.documents)


def is_store(path: Path) -> bool:
    """Whether a folder is a zpatch store of any format."""
    with contextlib.suppress(StoreError):
        _root_group(path)
        return True
    return False


def _root_group(root: Path) -> Json:
    document = root / schema.ROOT_DOCUMENT
    try:
        text = document.read_bytes()
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


def root_attributes(root: Path) -> Json:
    """What a store's root document says of it."""
    attributes = _root_group(root)
    if attributes["format"] > schema.FORMAT:
        raise StoreError(
            f"{root}: it is a store of format {attributes['format']}, and this zpatch reads up to "
            f"{schema.FORMAT}; install a newer zpatch"
        )
    return attributes


def sharded_array(folder: Path, record: ImageRecord, level: int = 0) -> ShardedArray:
    """The voxels of the image in ``folder``, or those of a coarser level of it."""
    array = record.levels[level - 1] if level else record
    return ShardedArray(
        path=folder / str(level),
        shape=schema.padded_to_4d(array.shape),
        dtype=np.dtype(record.dtype),
        chunks=schema.padded_to_4d(array.chunks),
        shards=schema.padded_to_4d(array.shards),
        codec=record.codec,
        ndim=len(record.shape),
        contents=record.contents,
    )


def read_small_array(folder: Path, name: str, files: Mapping[str, FileSeal]) -> NDArray[Any]:
    """A small array of an image, its raw header or a table of its index, compared with its seals."""
    import zarr

    try:
        for key, seal in files.items():
            if key.startswith(f"{name}/") and schema.digest((folder / key).read_bytes()) != seal.checksum:
                raise ValueError("its contents have changed")
        values = np.asarray(zarr.open_array(folder / name, mode="r")[:])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DamageError(
            f"damaged store: {folder / name} cannot be read ({error}); "
            f"run 'zpatch verify' on the store, then convert the image again"
        ) from error
    return values


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
        node: Any = zarr.open(path, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise NotAStoreError(f"{path}: it is no Zarr array or OME-Zarr image ({error})") from None
    if isinstance(node, zarr.Array):
        return describe_zarr_array(node)
    attributes: Json = dict(node.attrs)
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
