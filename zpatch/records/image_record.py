"""The record of an image, which is its line in the manifest.

Everything here is data: no file is read or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Self, get_args

import numpy as np

from zpatch.chunks.codec import check_codec
from zpatch.chunks.layout import unreadable
from zpatch.chunks.levels import Level
from zpatch.digests import FileSeal, Json, digest
from zpatch.errors import DamageError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple, padded_to_4d
from zpatch.geometry.orientation import AS_STORED, Orientation
from zpatch.records.names import check_name

Kind = Literal["scalar", "label", "sampling"]

KINDS: tuple[str, ...] = get_args(Kind)
MOST = sys.float_info.max
AXES = ("zyx", "czyx", "tzyx")


def codec_for(preset: str, kind: Kind) -> str:
    """The preset for images of a kind in a cohort that is converted with ``preset``.

    With LZ4HC label maps are half as large as with LZ4, and are read faster.
    """
    return "lz4hc" if kind == "label" and preset == "lz4" else preset


@dataclass(frozen=True, slots=True)
class SourceFingerprint:
    """The fingerprint of the file that an image was converted from.

    ``path`` is relative to the source folder; ``bytes``, ``mtime_ns`` and ``checksum`` (blake2b-128) are
    those of the file, or of both files of a .hdr/.img pair.
    """

    path: str
    bytes: int
    mtime_ns: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a prediction was made by and from, for people: it does not decide whether one is resumed.

    ``model`` is the name of the network, and ``model_path`` its file; ``inputs`` are the paths of the images
    by name. A path is None for what was in memory. ``version`` is that of zpatch.
    """

    model: str
    model_path: str | None
    inputs: Mapping[str, str | None]
    version: str

    def check(self) -> None:
        """Raise ValueError unless all values are of their types."""
        paths = (self.model_path, *self.inputs.values())
        names = (self.model, self.version, *self.inputs)
        if not (
            all(isinstance(n, str) for n in names) and all(p is None or isinstance(p, str) for p in paths)
        ):
            raise ValueError(f"provenance {self}")


@dataclass(frozen=True, slots=True)
class Resampled:
    """How an image was resampled as it was converted, and the grid of its file.

    ``spacing`` is the one that was asked for, in mm along I, J, K of the store. ``shape`` (I, J, K) and
    ``affine`` are those of the file, ``header`` is its NIfTI header in base64, without extensions.
    """

    spacing: tuple[float, ...]
    interpolation: str
    antialias: bool
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    header: str

    @classmethod
    def from_json(cls, value: Json) -> Self:
        """The value of a manifest line; raises TypeError, KeyError or ValueError for any other."""
        found = cls(**value)
        spacing, shape, affine = tuple(found.spacing), tuple(found.shape), tuple(map(tuple, found.affine))
        numbers = (*spacing, *(n for row in affine for n in row))
        if not all(map(_is_number, numbers)) or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"resampled {value}")
        if (len(spacing), len(shape), [*map(len, affine)]) != (3, 3, [4] * 4):
            raise ValueError(f"resampled {value}")
        if not isinstance(found.interpolation, str) or not isinstance(found.header, str):
            raise TypeError(f"resampled {value}")
        return cls(spacing, found.interpolation, bool(found.antialias), shape, affine, found.header)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """All metadata of one committed image; a line of the manifest.

    ``shape``, ``chunks`` and ``shards`` are in stored axis order, named by ``axes`` (``zyx``, ``czyx`` or
    ``tzyx``). ``dtype`` is the little-endian type of the stored, unscaled voxels; ``slope`` and ``inter``
    turn them into values. ``affine`` maps (I, J, K) to mm; ``affine_source`` says whether it is the sform or
    the qform of its NIfTI header, or made of voxel sizes. ``source_dtype`` is the type in the source file
    where voxels were cast, ``colours`` the number of channels that make one voxel of the file (3 for RGB).
    ``orientation`` is how the volume was turned from its file, ``resampled`` how it was resampled before
    that. ``levels`` are the coarser levels of a pyramid, each half of the one before. ``stats`` are
    statistics of scaled values. ``inputs`` is a digest of the model, options and input of a prediction,
    ``provenance`` says where they came from. ``files`` are the seals of all files in the image's folder, by
    path relative to it.
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
    resampled: Resampled | None = None
    levels: tuple[Level, ...] = ()
    split: str | None = None
    meta: Json = field(default_factory=dict)
    stats: Json = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    source: SourceFingerprint | None = None
    inputs: str | None = None
    provenance: Provenance | None = None
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
        """The record as plain JSON; without provenance and ``resampled``, if it has none, as before."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        value["source"] = dataclasses.asdict(self.source) if self.source else None
        value["orientation"] = dataclasses.asdict(self.orientation)
        value["levels"] = [dataclasses.asdict(level) for level in self.levels]
        value["files"] = {key: [seal.bytes, seal.checksum] for key, seal in self.files.items()}
        for key in ("provenance", "resampled"):
            if (made := value.pop(key)) is not None:
                value[key] = dataclasses.asdict(made)
        return value

    @classmethod
    def from_json(cls, value: Json, where: str) -> Self:
        """The record of a manifest line; a line that is not a valid record raises ``DamageError``."""
        try:
            value = {
                **value,
                **{key: tuple(value[key]) for key in ("shape", "chunks", "shards", "warnings")},
                "affine": tuple(map(tuple, value["affine"])),
                "source": SourceFingerprint(**value["source"]) if value["source"] else None,
                "provenance": Provenance(**made) if (made := value.get("provenance")) else None,
                "resampled": Resampled.from_json(how) if (how := value.get("resampled")) else None,
                "orientation": Orientation(**{k: tuple(v) for k, v in value["orientation"].items()}),
                "levels": tuple(
                    Level(**{key: tuple(shape) for key, shape in level.items()}) for level in value["levels"]
                ),
                "files": {key: FileSeal(*seal) for key, seal in value["files"].items()},
            }
            record = cls(**value)
            record._check()
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise DamageError(f"{where} is no image record ({error})") from error
        return record

    def _check(self) -> None:
        self._check_types()
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
        if self.provenance is not None:
            self.provenance.check()
        itemsize = np.dtype(self.dtype).itemsize
        for array in (Level(self.shape, self.chunks, self.shards), *self.levels):
            _check_shapes(array, len(self.axes), itemsize)
        for key, seal in self.files.items():
            check_sealed_file(key, seal)

    def _check_types(self) -> None:
        """Raise TypeError for a field of another type than the annotation of this class says."""
        texts = (self.subject, self.image, self.kind, self.dtype, self.axes, self.codec, self.affine_source)
        perhaps = (self.spatial_unit, self.source_dtype, self.split, self.inputs)
        if not all(isinstance(text, str) for text in (*texts, *self.warnings)):
            raise TypeError("a text that is none")
        if not all(text is None or isinstance(text, str) for text in perhaps):
            raise TypeError(f"unit, type, split or inputs {perhaps}")
        numbers = (self.slope, self.inter, *(n for row in self.affine for n in row))
        if not all(map(_is_number, numbers)) or type(self.colours) is not int:
            raise TypeError("a number that is none")
        if not isinstance(self.meta, dict) or not isinstance(self.stats, dict):
            raise TypeError("meta or stats that are no object")
        if not _is_statistic(self.stats):
            raise TypeError("statistics that are no numbers")
        if self.source is not None and not isinstance(self.source.path, str):
            raise TypeError(f"a source {self.source}")


def _is_number(value: object) -> bool:
    return type(value) in (float, int) and -MOST <= value <= MOST  # type: ignore[operator]


def _is_statistic(value: object) -> bool:
    """Whether a value is a number, None, or a list or object of such values."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            if not (_is_number(inner) or _is_statistic(inner)):
                return False
        return True
    return value is None or _is_number(value)


@lru_cache(maxsize=4096)
def _is_path_below(key: str) -> bool:
    """Whether a text is the path of a file below its folder; those of many images are the same."""
    steps = key.split("/") if key.isprintable() else [""]
    return all(steps) and not {".", ".."} & set(steps) and "\\" not in key


def check_sealed_file(key: object, seal: FileSeal) -> None:
    """Raise ValueError unless ``key`` is the path of a file below its folder, and its seal is one."""
    if not isinstance(key, str) or not _is_path_below(key):
        raise ValueError(f"a file {key!r}")
    if type(seal.bytes) is not int or seal.bytes < 0 or not isinstance(seal.checksum, str):
        raise ValueError(f"a seal of {key!r} that is none")


@lru_cache(maxsize=1024)
def _check_shapes(array: Level, ndim: int, itemsize: int) -> None:
    """Raise ValueError for shapes that no array can have; images of a cohort have few different ones."""
    for extent in (array.shape, array.chunks, array.shards):
        if len(extent) != ndim or not all(type(n) is int and n > 0 for n in extent):
            raise ValueError(f"a shape of {extent} with {ndim} axes")
    if problem := unreadable(array.shape, array.chunks, array.shards, itemsize):
        raise ValueError(problem)


def common_folder(paths: Iterable[str | None]) -> str | None:
    """The innermost path that some paths share; None if there is none.

    >>> common_folder(["/data/cohort.zarr/ann/t1", None, "/data/cohort.zarr/bob/t1"])
    '/data/cohort.zarr'
    """
    known = [path for path in paths if path]
    with contextlib.suppress(ValueError):  # paths of two drives, or none at all
        return os.path.commonpath(known)
    return None
