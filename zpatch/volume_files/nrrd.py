"""NRRD files (.nrrd, .nhdr): a header of ``field: value`` lines, and voxels behind it or in other files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import VolumeFileError
from zpatch.geometry.affines import Affine
from zpatch.volume_files.byte_streams import Compression
from zpatch.volume_files.data_files import (
    FROM_END,
    count_of_files,
    found_files,
    numbered_names,
    numbers_at_end,
    start_after_lines,
    start_from_end,
)
from zpatch.volume_files.text_header import (
    LPS,
    REPAIR,
    Fields,
    HeaderLines,
    checked_sides,
    ras_affine,
    shown,
    unit_of,
    usable_spacing,
    volume_of,
)
from zpatch.volume_files.volume_file import VolumeFile
from zpatch.volume_files.voxel_parts import VoxelPart, checked_parts


def _type_names() -> dict[str, str]:
    names = {"float": "f4", "double": "f8", "signed char": "i1", "uchar": "u1", "unsigned char": "u1"}
    for size, words in ((2, ("short",)), (4, ("int",)), (8, ("longlong", "long long"))):
        for word in words:
            names |= dict.fromkeys((word, f"signed {word}"), f"i{size}")
            names |= dict.fromkeys((f"u{word}", f"unsigned {word}"), f"u{size}")
    for word in ("short", "long long"):
        names |= {f"{sign}{word} int": names[f"{sign}{word}"] for sign in ("", "signed ", "unsigned ")}
    for size in (1, 2, 4, 8):
        names |= dict.fromkeys((f"int{8 * size}", f"int{8 * size}_t"), f"i{size}")
        names |= dict.fromkeys((f"uint{8 * size}", f"uint{8 * size}_t"), f"u{size}")
    return names


_TYPES = _type_names()
_ENCODINGS: Mapping[str, Compression] = {"raw": "", "gzip": "gzip", "gz": "gzip"}
_SIGNS: Mapping[str, tuple[int, int, int]] = {  # of the axes of a space in RAS
    **dict.fromkeys(("right-anterior-superior", "ras", "rast"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las", "last"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps", "lpst"), LPS),
}
_OF_SPACE = ("domain", "space", "???", "none")
_MAGIC = re.compile("NRRD000[1-5]")
_LINE = re.compile(r"([^:]+):(=?)\s*(.*)")
_VECTOR = re.compile(r"none|\(([^()]*)\)")
_LIST = re.compile(r"LIST(?:\s+([0-9]{1,2}))?")
_ALIASES = {
    "datafile": "data file",
    "lineskip": "line skip",
    "byteskip": "byte skip",
    "axismins": "axis mins",
    "centers": "centerings",
}


def read_nrrd(path: Path) -> VolumeFile:
    """Read and check the header of an NRRD file.

    Axes of space are I, J and K in the order of the file, and turned from the space of the file into RAS;
    a space without a name of its axes is taken as LPS, as in SimpleITK. An axis without a direction, or of
    a kind that is none of space, holds channels.
    """
    lines = HeaderLines(path, "an NRRD file")
    fields, listed = _fields(lines)
    sides = checked_sides(path, fields.whole("sizes"))
    if fields.whole("dimension", 1) != [len(sides)]:
        raise fields.odd("dimension")
    dtype = _voxel_type(fields)
    warnings: list[str] = []
    parts = checked_parts(_parts(lines, fields, listed, sides, dtype.itemsize), warnings)
    axes = _Axes.of(fields, sides)
    unit, factor = unit_of(_unit(fields, axes))
    affine = _affine(fields, axes, factor, warnings)
    spatial = (*(sides[axis] for axis in axes.spatial), 1, 1)[:3]
    return volume_of(
        path,
        (*spatial, *(sides[axis] for axis in (*axes.inner, *axes.outer))),
        dtype,
        parts,
        affine,
        has_directions=axes.steps is not None,
        unit=unit,
        has_time=axes.has_time,
        components=math.prod(sides[axis] for axis in axes.inner),
        component_axis=sum(axis < inner for inner in axes.inner for axis in axes.spatial),
        warnings=warnings,
    )


def _fields(lines: HeaderLines) -> tuple[Fields, list[str]]:
    """The fields of the header, and the names after ``data file: LIST``."""
    if not _MAGIC.fullmatch(next(lines, "")):
        raise lines.refused("it does not start with NRRD0001 to NRRD0005")
    texts: dict[str, str] = {}
    for line in lines:
        if not line:
            break
        if line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise lines.refused(f"{shown(line)} is not of the form 'field: value'")
        name = parts[1].strip().lower()
        if not parts[2]:
            texts[_ALIASES.get(name, name)] = parts[3].strip()
        if _LIST.fullmatch(texts.get("data file", "")):
            return Fields(lines.path, texts), [name for name in lines if name]
    else:
        if "data file" not in texts:
            raise lines.refused("its header does not end with an empty line")
    return Fields(lines.path, texts), []


def _voxel_type(fields: Fields) -> np.dtype[Any]:
    name = fields.text("type")
    code = _TYPES.get(" ".join(name.lower().split()))
    if code is None:
        raise VolumeFileError(f"{fields.path}: unknown voxel type {shown(name)}; {REPAIR}")
    endian = fields.text("endian").lower()
    if endian not in ("little", "big") and (endian or not code.endswith("1")):
        raise fields.odd("endian")
    return np.dtype((">" if endian == "big" else "<") + code)


@dataclass(frozen=True, slots=True)
class _Axes:
    """What the axes of a file are: those of space, and of channels before and after the last one of these.

    ``steps`` are the ways from a voxel to the next one along the axes of space, a row for each; None if only
    voxel sizes are known. Channels along an axis of one voxel are left out.
    """

    spatial: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    steps: NDArray[np.float64] | None
    has_time: bool

    @classmethod
    def of(cls, fields: Fields, sides: Sequence[int]) -> _Axes:
        kinds = fields.text("kinds").lower().split() or ["domain"] * len(sides)
        if len(kinds) != len(sides):
            raise fields.odd("kinds")
        vectors = _vectors(fields, "space directions")
        steps = None
        if vectors is None:
            spatial = [axis for axis, kind in enumerate(kinds) if kind in _OF_SPACE][:3]
        elif len(vectors) != len(sides):
            raise fields.odd("space directions")
        else:
            spatial = [axis for axis, vector in enumerate(vectors) if vector is not None]
            given = [vector for vector in vectors if vector is not None]
            if len(spatial) > 3 or len({len(vector) for vector in given}) > 1:
                raise fields.odd("space directions")
            steps = np.array(given)
        if not spatial:
            raise VolumeFileError(f"{fields.path}: none of its axes is one of space; {REPAIR}")
        others = [axis for axis, side in enumerate(sides) if axis not in spatial and side > 1]
        inner = tuple(axis for axis in others if axis < spatial[-1])
        outer = tuple(axis for axis in others if axis > spatial[-1])
        if len(inner) > 1:
            raise VolumeFileError(
                f"{fields.path}: it has {len(inner)} axes of channels before its last axis of space, and one "
                f"is read; save it with channels as the last axes"
            )
        has_time = [kinds[axis] for axis in others] == ["time"]
        return cls(tuple(spatial), inner, outer, steps, has_time)


def _vectors(fields: Fields, name: str) -> list[tuple[float, ...] | None] | None:
    """The vectors of a field, None for one of NaN or ``none``; None if the header does not have the field."""
    text = fields.text(name).lower()
    if not text:
        return None
    if _VECTOR.sub("", text).strip():
        raise fields.odd(name)
    try:
        found = [
            tuple(map(float, match[1].split(","))) if match[1] else None for match in _VECTOR.finditer(text)
        ]
    except ValueError:
        raise fields.odd(name) from None
    return [None if vector is None or all(map(math.isnan, vector)) else _of_three(vector) for vector in found]


def _of_three(vector: tuple[float, ...]) -> tuple[float, ...] | None:
    """A vector without its fourth dimension, as of time; None if it has no other."""
    if len(vector) != 4:
        return vector
    return vector[:3] if any(vector[:3]) else None


def _affine(fields: Fields, axes: _Axes, factor: float, warnings: list[str]) -> Affine:
    if axes.steps is None:
        warnings.append("it has no space directions: only voxel sizes are known")
        spacing, origin = _spacing_and_origin(fields, axes.spatial, warnings)
        return ras_affine(fields.path, np.diag(spacing) * factor, origin * factor, LPS)
    space = fields.text("space").lower().removesuffix("-time")
    if space not in _SIGNS and (space or fields.whole("space dimension") == [3]):
        warnings.append(f"its space is {shown(space) if space else 'not named'}: taken as LPS")
    origin = np.zeros(axes.steps.shape[1])
    found = _vectors(fields, "space origin") or [tuple(origin)]
    if len(found) > 1 or (found[0] is not None and len(found[0]) != len(origin)):
        raise fields.odd("space origin")
    if found[0] is not None:
        origin = np.array(found[0])
    elif "nan" in fields.text("space origin").lower():
        warnings.append("its space origin is not known: taken as 0")
    return ras_affine(fields.path, axes.steps * factor, origin * factor, _SIGNS.get(space, LPS))


def _spacing_and_origin(
    fields: Fields, spatial: Sequence[int], warnings: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Voxel sizes, and the centre of the first voxel, of a file without directions."""
    dimension = len(fields.whole("sizes"))
    chosen = list(spatial)
    given, mins = fields.real(dimension, "spacings"), fields.real(dimension, "axis mins")
    spacing = np.ones(len(chosen)) if given is None else usable_spacing(given[chosen], warnings)
    origin = np.zeros(len(chosen)) if mins is None else mins[chosen]
    centres = fields.text("centerings").lower().split() or ["cell"] * dimension
    at_centre = [axis < len(centres) and centres[axis] == "node" for axis in chosen]
    known = np.isfinite(origin) & (mins is not None)
    return spacing, np.where(known, origin + np.where(at_centre, 0, spacing / 2), 0)


def _unit(fields: Fields, axes: _Axes) -> str:
    """The unit of the axes of space; empty if it is not known, or not the same for all."""
    of_axes = re.findall('"([^"]*)"', fields.text("units"))
    units = (
        set(re.findall('"([^"]*)"', fields.text("space units")))
        if axes.steps is not None
        else {of_axes[axis] for axis in axes.spatial if axis < len(of_axes)}
    )
    return units.pop() if len(units) == 1 else ""


def _parts(
    lines: HeaderLines, fields: Fields, listed: list[str], sides: list[int], itemsize: int
) -> list[VoxelPart]:
    path, encoding = fields.path, fields.text("encoding").lower()
    if encoding not in _ENCODINGS:
        if encoding in ("ascii", "txt", "text", "hex", "bzip2", "bz2"):
            raise VolumeFileError(f"{path}: its encoding is {encoding}; save it with encoding gzip or raw")
        raise fields.odd("encoding")
    compression = _ENCODINGS[encoding]
    skip = fields.one("byte skip", 0)
    skipped_lines = fields.one("line skip", 0)
    if skip < FROM_END or skipped_lines < 0 or (compression and skip == FROM_END):
        raise fields.odd("byte skip", "line skip")
    if "data file" in fields.texts:
        names, axes = _names(fields, listed, sides)
        files, first = found_files(path, names, count_of_files(path, sides, axes)), 0
    else:
        files, first, axes = [path], lines.position, len(sides)
    voxel_bytes = math.prod(sides[:axes]) * itemsize
    parts = []
    for file in files:
        start = start_after_lines(file, first, skipped_lines)
        if compression:
            parts.append(VoxelPart(file, start, voxel_bytes, compression, skip))
        else:
            start = start_from_end(file, voxel_bytes) if skip == FROM_END else start + skip
            parts.append(VoxelPart(file, start, voxel_bytes))
    return parts


def _names(fields: Fields, listed: list[str], sides: list[int]) -> tuple[list[str], int]:
    """The names of the files of voxels, and how many axes of the image each one holds."""
    text, last = fields.text("data file"), len(sides) - 1
    if is_list := _LIST.fullmatch(text):
        return listed, int(is_list[1] or last)
    pattern, given = numbers_at_end(text, 4)
    if "%" in pattern and len(given) >= 3:
        first, stop, step, axes = (*given, last)[:4]
        if step == 0:
            raise fields.odd("data file")
        numbers = range(first, stop + (1 if step > 0 else -1), step)
        names = numbered_names(pattern, numbers[: count_of_files(fields.path, sides, axes) + 1])
        if names is not None:
            return names, axes
    return [text], len(sides)
