"""Voxels in one file or in several, one after another, read as one stream."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zpatch.errors import VolumeFileError
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.volume_files.byte_streams import Compression, open_bytes
from zpatch.volume_files.signature import pointer

MAX_TRAILING_BYTES = 64 * 2**20
MAX_DEFLATE_RATIO = 1032  # 258 bytes from 2 bits
READ_BYTES = 2**20

_TRAILING = "{} trailing bytes after the last voxel"


@dataclass(frozen=True, slots=True)
class VoxelPart:
    """The consecutive voxels in one file.

    Their data start at byte ``start`` of the file. Once these are decompressed, ``skip`` bytes are left out,
    and the next ``voxel_bytes`` are voxels.
    """

    path: Path
    start: int
    voxel_bytes: int
    compression: Compression = ""
    skip: int = 0

    def check_size(self) -> int:
        """The number of bytes after the last voxel, or 0 for compressed data.

        Raises VolumeFileError for a file that is too short.
        """
        try:
            present = os.path.getsize(self.path)
        except OSError as error:
            raise VolumeFileError(
                f"{self.path}: it cannot be read ({error.strerror}); restore the file"
            ) from None
        needed = self.start + self.skip + self.voxel_bytes
        if self.start + (present - self.start) * (MAX_DEFLATE_RATIO if self.compression else 1) >= needed:
            return 0 if self.compression else present - needed
        if found := pointer(self.path):
            raise VolumeFileError(f"{self.path}: {found[0]}, so it holds no voxels; {found[1]}")
        kind = f" of {self.compression} data" if self.compression else ""
        raise VolumeFileError(
            f"{self.path}: it has {format_bytes(present)}{kind} where its "
            f"header declares {format_bytes(needed)}; copy the file again"
        )


def checked_parts(parts: Iterable[VoxelPart], warnings: list[str]) -> tuple[VoxelPart, ...]:
    """Parts whose files are long enough; bytes after their last voxels add a line to ``warnings``."""
    checked = tuple(parts)
    if trailing := sum(part.check_size() for part in checked):
        warnings.append(_TRAILING.format(trailing))
    return checked


class VoxelStream:
    """The voxels of several parts as one stream of bytes; a context manager.

    Compressed data are read to their end, where their checksum is compared, once their last voxel was read.
    """

    def __init__(self, parts: Iterable[VoxelPart]) -> None:
        self._parts = iter(parts)
        self._files = contextlib.ExitStack()
        self._part: VoxelPart | None = None
        self._stream: Any = None
        self._left = 0
        self._trailing = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def fill(self, view: memoryview) -> None:
        """Read the next bytes, as many as ``view`` has."""
        filled = 0
        while filled < len(view):
            if not self._left:
                self._next_part()
            got = self._stream.readinto(view[filled : filled + min(READ_BYTES, self._left)])
            if not got and self._part is not None:
                raise VolumeFileError(
                    f"{self._part.path}: it ends before its last voxel (the header declares "
                    f"{format_bytes(self._part.voxel_bytes)}); copy the file again"
                )
            filled += got
            self._left -= got

    def finish(self) -> list[str]:
        """Check what follows the last voxel; the warnings about it."""
        self._drain()
        return [_TRAILING.format(self._trailing)] if self._trailing else []

    def _next_part(self) -> None:
        self._drain()
        self._files.close()
        part = next(self._parts)
        self._stream = self._files.enter_context(
            open_bytes(part.path, compression=part.compression, start=part.start)
        )
        self._part, self._left, skip = part, part.voxel_bytes, part.skip
        while skip and (got := len(self._stream.read(min(skip, READ_BYTES)))):
            skip -= got

    def _drain(self) -> None:
        """Read compressed data to their end, up to a limit."""
        if self._part is None or not self._part.compression:
            return
        trailing, limit = 0, max(self._part.voxel_bytes, MAX_TRAILING_BYTES)
        while rest := self._stream.read(READ_BYTES):
            trailing += len(rest)
            if trailing > limit:
                raise VolumeFileError(
                    f"{self._part.path}: its {self._part.compression} data go on for over "
                    f"{format_bytes(limit)} after its last voxel; write the file again"
                )
        self._trailing += trailing
