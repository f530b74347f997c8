"""The files of voxels that a text header names: one, a list, or a pattern with numbers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from zpatch.errors import VolumeFileError
from zpatch.volume_files.byte_streams import open_bytes
from zpatch.volume_files.text_header import MAX_TEXT_BYTES, REPAIR, WHOLE, shown

MAX_FILES = 100_000
FROM_END = -1  # in place of the first byte: voxels are at the end of the file

_NUMBERED = re.compile(r"([^%]*)%(0?[0-9]{0,2})[diu]([^%]*)")


def numbered_names(pattern: str, numbers: Iterable[int]) -> list[str] | None:
    """The names that a printf pattern stands for; None if it is no pattern.

    >>> numbered_names("slice%03d.raw", range(1, 3))
    ['slice001.raw', 'slice002.raw']
    """
    if parts := _NUMBERED.fullmatch(pattern):
        return [f"{parts[1]}{number:{parts[2]}d}{parts[3]}" for number in numbers]
    return None


def numbers_at_end(text: str, most: int) -> tuple[str, list[int]]:
    """A text without the whole numbers that it ends in, and these, at most so many.

    >>> numbers_at_end("slice %d.raw 1 20 1", 4)
    ('slice %d.raw', [1, 20, 1])
    """
    numbers: list[int] = []
    while text and len(numbers) < most:
        before, *last = text.rsplit(maxsplit=1)
        if not last or not WHOLE.fullmatch(last[0]):
            break
        text, numbers = before, [int(last[0]), *numbers]
    return text, numbers


def count_of_files(path: Path, sides: Sequence[int], axes: int) -> int:
    """The number of files of an image with these sides, if each file holds the first ``axes`` axes of it."""
    count = math.prod(sides[axes:])
    if not 0 < axes <= len(sides) or count > MAX_FILES:
        raise VolumeFileError(
            f"{path}: its voxels would be in {count} files of {axes} axes each, and at most {MAX_FILES} are "
            f"read; {REPAIR}"
        )
    return count


def found_files(path: Path, names: Sequence[str], count: int) -> list[Path]:
    """The files that the header in ``path`` names, relative to its folder; each must be there."""
    if len(names) != count:
        raise VolumeFileError(f"{path}: it names {len(names)} files of voxels for {count}; {REPAIR}")
    files = [path.parent / name for name in names]
    for file, name in zip(files, names, strict=True):
        if not os.path.isfile(file):  # unlike Path.is_file, whatever the name
            what = "is no regular file" if os.path.exists(file) else "does not exist"
            raise VolumeFileError(f"{path}: the file of its voxels, {shown(name)}, {what}; copy it too")
    return files


def start_from_end(file: Path, voxel_bytes: int) -> int:
    """The first byte of voxels that are at the end of a file; 0 if it is too short."""
    return max(0, file.stat().st_size - voxel_bytes)


def start_after_lines(file: Path, start: int, lines: int) -> int:
    """The first byte after some lines of a file, from byte ``start`` on."""
    if not lines:
        return start
    with open_bytes(file, start=start) as stream:
        text = stream.read(MAX_TEXT_BYTES)
    position = 0
    for _ in range(lines):
        if not (position := text.find(b"\n", position) + 1):
            raise VolumeFileError(
                f"{file}: it does not have the {lines} lines that its header skips; {REPAIR}"
            )
    return start + position
