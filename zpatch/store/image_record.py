"""The on-disk contract: names, records, manifest lines and OME-Zarr metadata.

Everything here is data; nothing touches a file. `store.py` writes and reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import numpy as np

from zpatch.errors import DamageError, OptionError, SourceError
from zpatch.geometry.boxes import Affine, Triple, spacing_mm
from zpatch.geometry.orientation import AS_STORED, Orientation

FORMAT = 1

Kind = Literal["scalar", "label", "sampling"]
Json = dict[str, Any]

KINDS: tuple[str, ...] = get_args(Kind)
AXES = ("zyx", "czyx", "tzyx")

ROOT_DOCUMENT = "zarr.json"
MANIFEST = "manifest.jsonl"
STAGING = ".staging"
UNFINISHED = ".unfinished"
LOCK = ".lock"
RAW_HEADER = "nifti"
INDEX = "index"
HISTOGRAM = "histogram"

# Never the last key of a line: "checksum" and "chunks" sort after it.
_CHECK = re.compile(rb'"check":"([0-9a-f]{32})",')
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str, what: str) -> None:
    """Refuse a subject or image name that could not be a folder everywhere."""
    if not _NAME.fullmatch(name) or name.casefold() in (ROOT_DOCUMENT, MANIFEST):
        raise SourceError(
            f"{what} name {name!r} is not usable: it must start with a letter or digit and hold only "
            f"letters, digits, '.', '_' and '-' (at most 128), and not be a file of the store itself"
        )


def check_names_differ(names: Iterable[str], what: str) -> None:
    """Refuse names that differ in case only: some file systems cannot tell them apart."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise SourceError(f"{what} names {other!r} and {name!r} differ in case only; rename one")


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec preset: blosc's compressor, its level, and whether bytes are shuffled first."""

    compressor: str
    level: int
    shuffle: bool = True


CODECS: Mapping[str, Codec | None] = {
    "lz4": Codec("lz4", 5),
    "lz4hc": Codec("lz4hc", 4),  # above that it takes ever longer, for little
    "zstd": Codec("zstd", 5),
    "none": None,
}


def check_codec(name: str) -> None:
    """Refuse a codec that is no preset; nothing else is ever decoded."""
    if name not in CODECS:
        raise OptionError(f"codec must be one of {', '.join(CODECS)}, not {name!r}")


def codec_for(preset: str, kind: Kind) -> str:
    """The preset for images of a kind in a cohort that is converted with ``preset``.

    LZ4HC makes label maps half as large as LZ4 does, and they are read faster.
    """
    return "lz4hc" if kind == "label" and preset == "lz4" else preset


def new_digest(data: bytes = b"") -> hashlib.blake2b:
    """The hash of the format, blake2b-128, to be fed bytes as they come."""
    return hashlib.blake2b(data, digest_size=16)


def digest(data: bytes) -> str:
    """blake2b-128 of some bytes, in hexadecimal."""
    return new_digest(data).hexdigest()


def compact_json(value: Json) -> str:
    """JSON with sorted keys and no spaces; NaN and infinity are errors."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sealed_line(value: Json) -> str:
    """A manifest line: compact JSON with ``check``, the digest of the line without that field."""
    return compact_json({**value, "check": digest(compact_json(value).encode())})


def check_seal(line: bytes | memoryview, where: str) -> None:
    """Refuse a manifest line that is not the one that was written."""
    check = _CHECK.search(line)
    if check is None:
        raise DamageError(f"{where} is not a manifest line; restore the file from a copy")
    if check[1].decode() != digest(bytes(line[: check.start()]) + bytes(line[check.end() :])):
        raise DamageError(f"{where} does not match its checksum; restore the file from a copy")


def unsealed(line: bytes | memoryview, where: str) -> Json:
    """The value of a manifest line, once its check holds."""
    check_seal(line, where)
    value = json.loads(bytes(line))
    del value["check"]
    return dict(value)


@dataclass(frozen=True, slots=True)
class Source:
    """The fingerprint of the file an image came from; ``path`` is relative to the source folder."""

    path: str
    bytes: int
    mtime_ns: int
    checksum: str


@dataclass(frozen=True, slots=True)
class FileSeal:
    """What a file must be: its length and the blake2b-128 of its bytes."""

    bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Level:
    """A coarser level of a pyramid: shape, chunks and shards in stored axis order."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """All that is known of one committed image; a line of the manifest.

    ``shape``, ``chunks`` and ``shards`` are in stored axis order, named by ``axes`` (``zyx``, ``czyx`` or
    ``tzyx``). ``dtype`` is the little-endian type of the stored, unscaled voxels; ``slope`` and ``inter``
    turn them into values. ``affine`` maps (I, J, K) to mm and came from ``affine_source``.
    ``source_dtype`` is the type in the source file where voxels were cast, ``colours`` how many channels
    are one voxel there (3 of RGB). ``orientation`` is how the volume was turned from its file. ``levels``
    are coarser ones, each half of the one before. ``stats`` are of scaled values. ``inputs`` is a digest
    of what a prediction was made from.
    ``files`` covers every file of the image's group, by its path in it.
    """

    subject: str
    image: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    axes: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    codec: str
    affine: tuple[tuple[float, ...], ...]
    affine_source: str = "none"
    spatial_unit: str | None = "millimeter"
    slope: float = 1.0
    inter: float = 0.0
    source_dtype: str | None = None
    colours: int = 1
    orientation: Orientation = AS_STORED
    levels: tuple[Level, ...] = ()
    split: str | None = None
    meta: Json = field(default_factory=dict)
    stats: Json = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    source: Source | None = None
    inputs: str | None = None
    files: Mapping[str, FileSeal] = field(default_factory=dict)

    @property
    def shape_czyx(self) -> tuple[int, int, int, int]:
        """Stored shape with a channel axis, of length 1 where the array has none."""
        return padded_to_4d(self.shape)

    @property
    def spatial_shape(self) -> Triple:
        """Extent along I, J, K in voxels."""
        _, nz, ny, nx = self.shape_czyx
        return nx, ny, nz

    @property
    def voxel_bytes(self) -> int:
        """Size of the voxels, uncompressed."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """Size of all files of the image."""
        return sum(seal.bytes for seal in self.files.values())

    @property
    def contents(self) -> str:
        """A digest of all files of the image."""
        return digest("".join(seal.checksum for _, seal in sorted(self.files.items())).encode())

    @property
    def affine_array(self) -> Affine:
        """The affine as a 4 x 4 array."""
        return np.array(self.affine, dtype=np.float64)

    def to_json(self) -> Json:
        """The record as plain JSON."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        value["source"] = dataclasses.asdict(self.source) if self.source else None
        value["orientation"] = dataclasses.asdict(self.orientation)
        value["levels"] = [dataclasses.asdict(level) for level in self.levels]
        value["files"] = {key: [seal.bytes, seal.checksum] for key, seal in self.files.items()}
        return value

    @classmethod
    def from_json(cls, value: Json, where: str) -> Self:
        """The record of a manifest line; what does not fit the contract is damage."""
        try:
            value = {
                **value,
                **{key: tuple(value[key]) for key in ("shape", "chunks", "shards", "warnings")},
                "affine": tuple(map(tuple, value["affine"])),
                "source": Source(**value["source"]) if value["source"] else None,
                "orientation": Orientation(**{k: tuple(v) for k, v in value["orientation"].items()}),
                "levels": tuple(
                    Level(**{key: tuple(shape) for key, shape in level.items()}) for level in value["levels"]
                ),
                "files": {key: FileSeal(*seal) for key, seal in value["files"].items()},
            }
            record = cls(**value)
            record._check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DamageError(f"{where} is no image record ({error})") from error
        return record

    def _check(self) -> None:
        check_name(self.subject, "subject")
        check_name(self.image, "image")
        check_codec(self.codec)
        if self.kind not in KINDS or self.axes not in AXES:
            raise ValueError(f"kind {self.kind!r}, axes {self.axes!r}")
        if np.dtype(self.dtype).kind not in "biufc" or self.dtype[0] not in "<|":
            raise ValueError(f"dtype {self.dtype!r}")
        turned = self.orientation
        if sorted(turned.axes) != [0, 1, 2] or not all(isinstance(flip, bool) for flip in turned.flips):
            raise ValueError(f"orientation {turned}")
        if self.affine_array.shape != (4, 4) or self.colours < 1:
            raise ValueError(f"affine {self.affine}, colours {self.colours}")
        _check_shapes(self.shape, self.chunks, self.shards, len(self.axes))
        for level in self.levels:
            _check_shapes(level.shape, level.chunks, level.shards, len(self.axes))


def _check_shapes(
    shape: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...], ndim: int
) -> None:
    for extent in (shape, chunks, shards):
        if len(extent) != ndim or not all(isinstance(n, int) and n > 0 for n in extent):
            raise ValueError(f"a shape of {extent} with {ndim} axes")
    if any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise ValueError(f"shards {shards} are not whole chunks {chunks}")


def padded_to_4d(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A stored shape with a channel axis in front where it has none."""
    c, z, y, x = (1,) * (4 - len(shape)) + tuple(shape)
    return c, z, y, x


_AXIS_TYPES = {"z": "space", "y": "space", "x": "space", "c": "channel", "t": "time"}


def ome_attributes(record: ImageRecord) -> Json:
    """OME-Zarr 0.5 metadata: what that format can say, which is axes, scale and translation.

    The whole affine stands in the image record and in the raw NIfTI header. A voxel size of zero is
    written as 1, as the format allows no other; an unknown unit is left out.
    """
    axes: list[Json] = [{"name": name, "type": _AXIS_TYPES[name]} for name in record.axes]
    for axis in axes:
        if axis["type"] == "space" and record.spatial_unit:
            axis["unit"] = record.spatial_unit
    leading = len(record.axes) - 3
    i, j, k = (s if np.isfinite(s) and s > 0 else 1.0 for s in spacing_mm(record.affine_array))
    x, y, z = np.nan_to_num(record.affine_array[:3, 3]).tolist()
    datasets = []
    for number in range(len(record.levels) + 1):
        # A coarse voxel's centre lies between those of the fine ones that it stands for.
        factors = [2.0**number if n > 1 else 1.0 for n in record.shape[leading:]]
        scale = [s * f for s, f in zip((k, j, i), factors, strict=True)]
        shift = [o + s * (f - 1) / 2 for o, s, f in zip((z, y, x), (k, j, i), factors, strict=True)]
        transformations = [
            {"type": "scale", "scale": [1.0] * leading + scale},
            {"type": "translation", "translation": [0.0] * leading + shift},
        ]
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
    return {
        "version": "0.5",
        "multiscales": [{"name": record.image, "axes": axes, "datasets": datasets}],
    }
