"""OME-Zarr images and Zarr arrays that other programs wrote, of either version of the format.

Arrays in local files with the usual codecs are read as those of a zpatch store, from memory-mapped files. All
other arrays are read through zarr: the same voxels, slower.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.codec import ChunkCodec, Compressor
from zpatch.chunks.file_mark import FileMark
from zpatch.chunks.layout import MOST_CHUNKS_READ, chunk_counts, unreadable
from zpatch.chunks.sharded_array import ChunkFiles, ShardedArray
from zpatch.digests import Json
from zpatch.errors import NotAStoreError, OptionError, StoreError
from zpatch.records.image_record import ImageRecord
from zpatch.runtime.guarded_files import read_document
from zpatch.sources.lazy_array import ZARR_ERRORS, CheckedZarr
from zpatch.store.store import TOOL

CHANNEL_AXES = "ct"
LETTERS = {"time": "t", "channel": "c", "channels": "c"}  # of axes that are called by a word
SAMPLED_FILES = 16
_COMPRESSORS: Mapping[str, Compressor] = {name: name for name in ("blosc", "zstd", "gzip", "zlib")}


@dataclass(frozen=True, slots=True, eq=False)
class ZarrImage:
    """A Zarr array, and its OME-Zarr metadata.

    ``axes`` are its dimension names, or empty; ``scale`` and ``translation`` have a number for each axis, in
    ``unit``.
    """

    array: Any
    axes: str = ""
    scale: tuple[float, ...] | None = None
    translation: tuple[float, ...] | None = None
    unit: str | None = None


def open_image_folder(path: Path) -> ImageRecord | ZarrImage:
    """Open a folder: an image of a zpatch store, an OME-Zarr image or a level of one, or a Zarr array."""
    import zarr

    try:
        for folder in (path.parent, path):
            _check_documents(folder)
        node: Any = zarr.open(path, mode="r")
    except ZARR_ERRORS as error:
        raise NotAStoreError(f"{path}: it is no Zarr array or OME-Zarr image ({error})") from None
    if isinstance(node, zarr.Array):
        with contextlib.suppress(*ZARR_ERRORS):
            return _level_of(zarr.open_group(path.parent, mode="r"), path.name)
        return zarr_image(node)
    own = node.attrs.get(TOOL)
    if isinstance(own, dict) and "image" in own:
        return ImageRecord.from_json({**own, "files": {}}, str(path))
    try:
        return _level_of(node, None)
    except ZARR_ERRORS as error:
        raise NotAStoreError(
            f"{path}: it is a Zarr group but no OME-Zarr image; name an image or an array in it"
        ) from error


def _check_documents(folder: Path) -> None:
    """Raise OSError for metadata that zarr would wait for, as for a pipe, or read without end."""
    for name in ("zarr.json", ".zarray", ".zgroup", ".zattrs"):
        if (folder / name).exists():
            read_document(folder / name, follow=True)


def _level_of(group: Any, name: str | None) -> ZarrImage:
    """A level of an OME-Zarr image by its name, or the finest level."""
    attributes: Json = dict(group.attrs)
    multiscale = attributes.get("ome", attributes)["multiscales"][0]
    named = {dataset["path"]: dataset for dataset in multiscale["datasets"]}
    dataset = multiscale["datasets"][0] if name is None else named[name]
    axes = "".join(_letter(axis["name"], axis.get("type")) for axis in multiscale["axes"])
    transforms = {t["type"]: _numbers(t[t["type"]], axes) for t in dataset["coordinateTransformations"]}
    units = {axis.get("unit") for axis in multiscale["axes"] if axis["name"] in "zyx"}
    unit = units.pop() if len(units) == 1 else None
    if (folder := folder_of(group)) is not None:
        _check_documents(folder / dataset["path"])
    scale, translation = transforms.get("scale"), transforms.get("translation")
    array = group[dataset["path"]]
    if not hasattr(array, "dtype"):
        raise TypeError(f"{dataset['path']} is a group")
    return ZarrImage(array, axes, scale, translation, unit if isinstance(unit, str) else None)


def _numbers(values: Any, axes: str) -> tuple[float, ...]:
    """A finite number for each axis; anything else raises TypeError or ValueError."""
    if not isinstance(values, list) or not all(type(n) in (int, float) for n in values):
        raise TypeError(f"{values!r} are no numbers")
    if len(values) < len(axes) or not all(abs(n) <= sys.float_info.max for n in values):
        raise ValueError(f"{values} has no finite number for each of {len(axes)} axes")
    return tuple(map(float, values))


def zarr_image(array: Any) -> ZarrImage:
    """An open Zarr array, with its dimension names; those of version 2 are written by xarray."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    return ZarrImage(array, "".join(map(_letter, names)) if isinstance(names, list | tuple) else "")


def _letter(name: Any, kind: str | None = None) -> str:
    """One of t, c, z, y, x for the name of an axis, and OME's type of it; ``?`` for others."""
    letter = LETTERS.get(str(name).lower(), str(name).lower())
    return letter if letter in tuple("tczyx") else LETTERS.get(str(kind), "?")


@dataclass(frozen=True, slots=True)
class StoredAxes:
    """The axes of an array by name: ``kept[n]`` is the number of the array's axis that is ``names[n]``.

    ``names`` are c, z, y and x in stored order, with the names that the array does not have first; their
    number is None. ``channel`` is the letter of the array's own axis that is c: c or t. One axis of the array
    may not be kept: of it, only ``place`` is read.
    """

    names: str
    kept: tuple[int | None, ...]
    channel: str = "c"
    place: int = 0

    @classmethod
    def of(cls, array: Any, axes: str, time: int | None = None) -> StoredAxes:
        """The axes of an array, named by ``axes``, slowest first: y, x, and optionally z, c and t.

        Of c and t, one that is of length 1 is not kept; if neither is, ``time`` is read.
        """
        shape = tuple(array.shape)
        if not (len(axes) == len(shape) == len(set(axes)) and set("yx") <= set(axes) <= set("tczyx")):
            raise OptionError(
                f"the axes of a Zarr array of shape {shape} are {repr(axes) if axes else 'not named'}; say "
                f"axes= with one letter for each: y, x, perhaps z, and perhaps c or t, as in axes='zyx'",
                option="axes",
            )
        length = dict(zip(axes, shape, strict=True))
        if time is not None:
            check_chosen("time", [time], length.get("t", 1), "time points")
        channels = [a for a in axes if a in CHANNEL_AXES]
        place = 0
        if len(channels) > 1:
            alone = [a for a in channels if length[a] == 1]
            if not alone and time is None:
                raise OptionError(
                    f"{folder_of(array) or array} has {length['t']} time points and {length['c']} channels; "
                    f"say time=N for one of 0 to {length['t'] - 1}",
                    option="time",
                )
            place = 0 if alone or time is None else time
            channels.remove((alone or ["t"])[0])
        kept = {"c" if a in CHANNEL_AXES else a: n for n, a in enumerate(axes) if a in [*"zyx", *channels]}
        missing = [a for a in "czyx" if a not in kept]
        names, numbers = "".join([*missing, *kept]), (None,) * len(missing) + tuple(kept.values())
        return cls(names, numbers, channels[0] if channels else "c", place)

    def four(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """A shape of the array, as four axes; an axis that the array does not have is of length 1."""
        a, b, c, d = (1 if number is None else int(shape[number]) for number in self.kept)
        return a, b, c, d


def check_chosen(option: str, chosen: Sequence[int], length: int, what: str) -> None:
    """Raise OptionError if a chosen time point or channel is none of those that there are."""
    for number in chosen:
        if not 0 <= number < length:
            allowed, there = (f"0 to {length - 1}", length) if length > 1 else ("0", "no")
            raise OptionError(
                f"{option} must be {allowed} (there are {there} {what}), not {number}", option=option
            )


def folder_of(array: Any) -> Path | None:
    """The folder of an array's files; None for an array that is not on a local file system."""
    from zarr.storage import LocalStore

    if not isinstance(array.store, LocalStore):
        return None
    return Path(array.store.root, array.path).absolute()


def metadata_mark(array: Any) -> FileMark | None:
    """The mark of an array's metadata file; None if it has none on a local file system."""
    folder = _folder_of_files(array)
    if folder is None:
        return None
    return FileMark.of_metadata(folder / ("zarr.json" if array.metadata.zarr_format == 3 else ".zarray"))


def sampled_files(array: Any) -> list[Path]:
    """Files of chunks or shards at up to 16 evenly spaced places of an array, whether they exist or not."""
    folder = _folder_of_files(array)
    if folder is None:
        return []
    grid = chunk_counts(tuple(array.shape), tuple(array.shards or array.chunks))
    return [folder / array.metadata.encode_chunk_key(place) for place in evenly_spaced(grid)]


def evenly_spaced(grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Up to 16 places of a grid, evenly spaced in C order."""
    numbers = np.unique(np.linspace(0, math.prod(grid) - 1, SAMPLED_FILES).astype(np.int64))
    return [tuple(map(int, np.unravel_index(number, grid))) for number in numbers if math.prod(grid)]


def _folder_of_files(array: Any) -> Path | None:
    """The folder of an array, also of one that is read through fsspec, as dask does; None if not local."""
    if (folder := folder_of(array)) is not None:
        return folder
    system = getattr(array.store, "fs", None)
    protocol = getattr(getattr(system, "sync_fs", system), "protocol", ())
    is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
    return Path(array.store.path, array.path).absolute() if is_local else None


def sharded_array_of(array: Any, axes: StoredAxes) -> ShardedArray | None:
    """The array as ``gather`` reads it from files; None for an array that only zarr can read."""
    path = folder_of(array)
    if path is None:
        return None
    metadata: Json = array.metadata.to_dict()
    fill = 0 if array.fill_value is None else array.fill_value
    stored = _of_v2(metadata) if metadata["zarr_format"] == 2 else _of_v3(metadata)
    if stored is None or np.dtype(array.dtype).kind not in "biufc":
        return None
    chunks, shards, codec, order = stored.chunks, stored.shards, stored.codec, stored.byte_order
    if any((chunks[n], shards[n]) != (1, 1) for n in range(array.ndim) if n not in axes.kept):
        return None  # a chunk would have voxels along an axis that is not kept
    _check_chunks(array, str(path), chunks, shards)
    axis_of = {number: axis for axis, number in enumerate(axes.kept) if number is not None}
    return ShardedArray(
        path=path,
        shape=axes.four(array.shape),
        dtype=np.dtype(array.dtype).newbyteorder(order),
        chunks=axes.four(chunks),
        shards=axes.four(shards),
        codec=codec,
        files=ChunkFiles(
            tuple(axis_of.get(number) for number in range(array.ndim)),
            stored.prefix,
            stored.separator,
            stored.index,
            stored.index_checksum,
            axes.place,
        ),
        name=str(path),
        fill=fill,
        contents=repr((array.shape, chunks, shards, array.dtype, order, codec, fill, axes)),
        metadata=metadata_mark(array),
    )


def dask_array_of(array: Any, axes: StoredAxes) -> Any:
    """The array (C, I, J, K) as a dask array that reads through zarr."""
    import dask.array as da
    from dask.base import tokenize

    place, chunks = str(folder_of(array) or array), array.chunks
    _check_chunks(array, place, chunks, chunks)
    if max(chunk_counts(array.shape, chunks)) > MOST_CHUNKS_READ:
        raise StoreError(
            f"{place}: over {MOST_CHUNKS_READ} chunks along an axis; write it anew with other chunks"
        )
    name = f"from-zarr-{tokenize(array, chunks)}"
    left_out = tuple(axes.place if n not in axes.kept else slice(None) for n in range(array.ndim))
    kept = da.from_array(CheckedZarr(array, place), chunks, name=name)[left_out]
    four = kept[(None,) * axes.kept.count(None)]
    return four.transpose([axes.names.index(name) for name in "cxyz"])


def _check_chunks(array: Any, place: str, chunks: Sequence[int], shards: Sequence[int]) -> None:
    if min(*chunks, *shards) < 1:
        raise StoreError(f"{place}: its shards {shards} or chunks {chunks} have no voxels; write it anew")
    if problem := unreadable(array.shape, chunks, shards, array.dtype.itemsize):
        raise StoreError(f"{place}: {problem}; write it anew with other chunks")


@dataclass(frozen=True, slots=True)
class _Stored:
    """How an array is stored, from its metadata: shapes in its own axes, and the fields of ChunkFiles."""

    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    codec: ChunkCodec
    byte_order: str
    prefix: str
    separator: str
    index: str | None = None
    index_checksum: bool = False


def _of_v2(metadata: Json) -> _Stored | None:
    packed = metadata["compressor"] or {"id": "none"}
    if metadata["order"] != "C" or metadata["filters"] or packed["id"] not in ("none", *_COMPRESSORS):
        return None
    chunks = tuple(metadata["chunks"])
    order = ">" if str(metadata["dtype"]).startswith(">") else "<"
    codec = ChunkCodec(_COMPRESSORS.get(packed["id"], "none"), checksum=False, within=packed.get("cname"))
    return _Stored(chunks, chunks, codec, order, "", metadata["dimension_separator"])


def _of_v3(metadata: Json) -> _Stored | None:
    keys = metadata["chunk_key_encoding"]
    if metadata["chunk_grid"]["name"] != "regular" or metadata.get("storage_transformers"):
        return None
    separator = keys.get("configuration", {}).get("separator", "/" if keys["name"] == "default" else ".")
    prefix = "c" if keys["name"] == "default" else ""
    shards = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = list(metadata["codecs"])
    if keys["name"] not in ("default", "v2") or codecs[0]["name"] != "sharding_indexed":
        encoding = _encoding(codecs) if keys["name"] in ("default", "v2") else None
        return encoding and _Stored(shards, shards, *encoding, prefix, separator)
    sharding = codecs[0]["configuration"]
    encoding, index = _encoding(list(sharding["codecs"])), _encoding(list(sharding["index_codecs"]))
    if len(codecs) > 1 or encoding is None or index is None:
        return None
    index_codec, index_order = index
    if index_codec.compressor != "none" or index_order != "<":
        return None
    location = str(sharding.get("index_location", "end"))
    chunks = tuple(sharding["chunk_shape"])
    return _Stored(chunks, shards, *encoding, prefix, separator, location, index_codec.checksum)


def _encoding(codecs: list[Json]) -> tuple[ChunkCodec, str] | None:
    """Codec and byte order of a chain: bytes, optional compressor, optional crc32c; None for others."""
    names = [codec["name"] for codec in codecs]
    if names[:1] != ["bytes"]:
        return None
    checksum = names[-1] == "crc32c"
    between = names[1 : len(names) - checksum]
    if len(between) > 1 or not set(between) <= {"blosc", "zstd", "gzip"}:
        return None
    endian = codecs[0].get("configuration", {}).get("endian") or "little"
    compressor = _COMPRESSORS[between[0]] if between else "none"
    within = codecs[1].get("configuration", {}).get("cname") if between else None
    return ChunkCodec(compressor, checksum, within), "<" if endian == "little" else ">"
