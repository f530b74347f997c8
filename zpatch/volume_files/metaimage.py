"""MetaImage files (.mha, .mhd): a header of ``key = value`` lines, and voxels behind it or in other files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.errors import VolumeFileError
from zpatch.geometry.affines import Affine
from zpatch.volume_files.byte_streams import Compression, is_gzip
from zpatch.volume_files.data_files import (
    FROM_END,
    count_of_files,
    found_files,
    numbered_names,
    numbers_at_end,
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

_TYPES: Mapping[str, str] = {  # long has four bytes, whatever the platform
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_LAST_KEY = "ElementDataFile"
_MATRIX = ("TransformMatrix", "Rotation", "Orientation")
_LIST = re.compile(r"LIST(?:\s+([0-9]{1,2})D?)?", re.IGNORECASE)


def read_metaimage(path: Path) -> VolumeFile:
    """Read and check the header of a MetaImage file.

    Its axes are those of LPS, as in SimpleITK, and become those of RAS. Channels are stored together in the
    file, and are the fourth axis here.
    """
    lines = HeaderLines(path, "a MetaImage file")
    fields = _fields(lines)
    sides = checked_sides(path, fields.whole("DimSize", fields.one("NDims", len(fields.whole("DimSize")))))
    channels = fields.one("ElementNumberOfChannels", 1)
    checked_sides(path, [channels])
    dtype = _voxel_type(fields)
    warnings: list[str] = []
    parts = checked_parts(_parts(lines, fields, sides, channels * dtype.itemsize), warnings)
    unit, factor = unit_of(fields.text("DistanceUnits"))
    affine = _affine(fields, len(sides), factor, warnings)
    slope = fields.real(1, "ElementToIntensityFunctionSlope")
    if slope is not None and slope[0] != 1:
        warnings.append("its ElementToIntensityFunctionSlope is not applied")
    spatial = (*sides[:3], 1, 1)[:3]
    return volume_of(
        path,
        (*spatial, *([channels] if channels > 1 else []), *sides[3:]),
        dtype,
        parts,
        affine,
        has_directions=bool(fields.text(*_MATRIX)),
        unit=unit,
        components=channels,
        warnings=warnings,
    )


def _fields(lines: HeaderLines) -> Fields:
    """The fields up to the one that names the data, which is the last one."""
    texts: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not line:
            continue
        if not equals:
            raise lines.refused(f"{shown(line)} is not of the form 'key = value'")
        texts[key.strip()] = value.strip()
        if _LAST_KEY in texts:
            break
    else:
        raise lines.refused("no ElementDataFile in its header")
    fields = Fields(lines.path, texts)
    if (kind := fields.text("ObjectType") or "Image").lower() != "image":
        raise lines.refused(f"its ObjectType is {shown(kind)}")
    if fields.text("BinaryData").lower().startswith("f"):
        raise VolumeFileError(f"{lines.path}: its voxels are written as text; save it with binary data")
    return fields


def _is_true(text: str) -> bool:
    return text.lower().startswith(("t", "1"))


def _voxel_type(fields: Fields) -> np.dtype[Any]:
    name = fields.text("ElementType")
    code = _TYPES.get(name.upper().removesuffix("_ARRAY"))
    if code is None:
        raise VolumeFileError(f"{fields.path}: unknown voxel type {shown(name)}; {REPAIR}")
    is_big = _is_true(fields.text("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    return np.dtype((">" if is_big else "<") + code)


def _affine(fields: Fields, dimension: int, factor: float, warnings: list[str]) -> Affine:
    axes = min(dimension, 3)
    matrix = fields.real(dimension**2, *_MATRIX)
    if matrix is None:
        orientation = fields.text("AnatomicalOrientation")
        ignored = " (its AnatomicalOrientation is not used)" if orientation.upper() not in ("", "RAI") else ""
        warnings.append(f"it has no TransformMatrix: only voxel sizes are known{ignored}")
        matrix = np.eye(dimension).reshape(-1)
    spacing = fields.real(dimension, "ElementSpacing", "ElementSize")
    origin = fields.real(dimension, "Offset", "Position", "Origin")
    sizes = usable_spacing(np.ones(dimension) if spacing is None else spacing, warnings)
    steps = matrix.reshape(dimension, dimension)[:axes, :axes] * sizes[:axes, None] * factor
    first = np.zeros(axes) if origin is None else origin[:axes] * factor
    return ras_affine(fields.path, steps, first, LPS)


def _parts(lines: HeaderLines, fields: Fields, sides: list[int], voxel_size: int) -> list[VoxelPart]:
    """Where the voxels are; ``voxel_size`` is the bytes of all channels of a voxel."""
    path, text = fields.path, fields.text(_LAST_KEY)
    start = fields.one("HeaderSize", 0)
    if start < FROM_END:
        raise fields.odd("HeaderSize")
    if text.upper() in ("LOCAL", "LOCALFILE"):
        files, axes = [path], len(sides)
        start = start or lines.position
    else:
        names, axes = _names(text, lines, sides)
        files = found_files(path, names, count_of_files(path, sides, axes))
    voxel_bytes = math.prod(sides[:axes]) * voxel_size
    is_compressed = _is_true(fields.text("CompressedData"))
    parts = []
    for file in files:
        first = start
        if start == FROM_END:
            first = lines.position if file == path else 0
            if not is_compressed:
                first = start_from_end(file, voxel_bytes)
        compression: Compression = ""
        if is_compressed:
            compression = "gzip" if is_gzip(file, first) else "zlib"
        parts.append(VoxelPart(file, first, voxel_bytes, compression))
    return parts


def _names(text: str, lines: HeaderLines, sides: list[int]) -> tuple[list[str], int]:
    """The names of the files of voxels, and how many axes of the image each one holds."""
    last = len(sides) - 1
    if listed := _LIST.fullmatch(text):
        return [line for line in lines if line], int(listed[1] or 0) or last
    if "%" in text and last:
        pattern, given = numbers_at_end(text, 3)
        first = given[0] if given else 1
        stop, step = (*given[1:], *(first + sides[last] - 1, 1)[len(given[1:]) :])
        numbers = range(first, stop + 1, max(1, step))[: count_of_files(lines.path, sides, last) + 1]
        if names := numbered_names(pattern, numbers):
            return names, last
    return [text], len(sides)
