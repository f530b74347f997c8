"""The door to tifffile: files, their pages and the bytes of a tile, and how tiles are decoded.

Of tifffile are used what it knows of files and their codecs: the directories, which pages make a series, and
the function that decodes a tile. Bytes are read here, in place, so that any thread and any process may.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.errors import SourceError, one_line
from zpatch.geometry.boxes import Voxels
from zpatch.runtime.recent import Recent

KEPT_OPEN = 64  # files
KEPT_PAGES = 64  # of each
_JPEG = (6, 7, 34892, 33007)  # compressions whose tiles share tables
_JPEG_END = b"\xff\xd9"
_DESCRIPTION = 270  # tag
_INSTALL = "install 'zpatch[slides]'"


class NoCodecError(SourceError):
    """A library that reads the file is missing here, or a codec of it; the file may be sound."""


def tifffile_module() -> Any:
    """tifffile, imported when the first file is opened; it logs what it finds odd, which errors say here."""
    try:
        import tifffile
    except ImportError:
        raise NoCodecError(
            f"TIFF files are read by tifffile and imagecodecs, which are missing; {_INSTALL}"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return tifffile


class OpenPage:
    """A page: where the bytes of its tiles are, and how they are decoded."""

    def __init__(self, page: Any, descriptor: int) -> None:
        frame = page.keyframe
        self._offsets, self._counts, self._descriptor = page.dataoffsets, page.databytecounts, descriptor
        self._decode = frame.decode
        self._tables: dict[str, Any] = {}
        self._jpeg: Any = None
        if frame.compression in _JPEG:
            self._tables = {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader}
            self._jpeg = _jpeg_decoder(page)

    def extent(self, segment: int) -> tuple[int, int]:
        """Where the bytes of a tile begin, and their number. Raises IndexError."""
        return int(self._offsets[segment]), int(self._counts[segment])

    def read(self, offset: int, count: int) -> bytes:
        """Bytes of the file that the page is in."""
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, min(count, max(0, size - offset)), offset)

    def is_cut_short(self, data: bytes) -> bool:
        """Whether the bytes of a JPEG tile have no end: its decoder would paint the rest grey."""
        return self._jpeg is not None and self._tables["jpegheader"] is None and _JPEG_END not in data

    def decode(self, data: bytes, segment: int) -> Voxels | None:
        """A tile as tifffile decodes it: in new memory, and of full size at the border too."""
        voxels: Voxels | None = self._decode(data, segment, _fullsize=True, **self._tables)[0]
        return voxels

    def decode_into(self, memory: Voxels, data: bytes) -> bool:
        """Decode a tile into ``memory`` (1, j, i, c), if it is a JPEG image of that size; whether it was.

        New memory for each tile may take a quarter of the time. What fails here is left to ``decode``.
        """
        if self._jpeg is None or memory.dtype != np.uint8 or len(memory) > 1:
            return False
        plane = memory[0] if memory.shape[3] > 1 else memory[0, ..., 0]
        try:
            self._jpeg(data, shape=plane.shape[:2], out=plane)
        except MemoryError:
            raise
        except Exception:  # each codec has errors of its own
            return False
        return True


def _jpeg_decoder(page: Any) -> Any:
    """The function that tifffile decodes JPEG by, with the tables and colours of a page."""
    import imagecodecs

    frame = page.keyframe
    colours = tifffile_module().tifffile.jpeg_decode_colorspace(
        frame.photometric, frame.planarconfig, frame.extrasamples, frame.is_jfif
    )
    return partial(
        imagecodecs.jpeg_decode,
        tables=page.jpegtables,
        header=frame.jpegheader,
        colorspace=colours[0],
        outcolorspace=colours[1],
    )


class OpenTiff:
    """An open file: its series as tifffile finds them, and descriptors to read its bytes by."""

    def __init__(self, path: Path) -> None:
        module = tifffile_module()
        try:
            self.file = module.TiffFile(path)
            self.series: Sequence[Any] = self.file.series
        except OSError as error:
            raise SourceError(
                f"{path}: it cannot be opened ({error.strerror or error}); restore it"
            ) from None
        except Exception as error:  # whatever a damaged directory makes it raise
            raise damaged_directory(path, error) from error
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._pages: dict[tuple[int, int, int], OpenPage] = {}

    def page(self, series: int, level: int, number: int) -> OpenPage:
        """A page of a level of a series, which is read from the file when it is first asked for."""
        key = series, level, number
        with self._lock:
            if key not in self._pages:
                if len(self._pages) >= KEPT_PAGES:
                    self._pages.clear()
                page = self.series[series].levels[level][number]
                self._pages[key] = OpenPage(page, self._descriptor(page.parent.filehandle.path))
            return self._pages[key]

    def _descriptor(self, path: str) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[path]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)
        if hasattr(self, "file"):
            self.file.close()


def damaged_directory(path: Path, error: Exception) -> SourceError:
    """The error for a file in whose directories something is wrong."""
    return SourceError(
        f"{path}: its directory of images cannot be read ({one_line(error)}); copy the file again"
    )


_open: Recent[tuple[int, FileMark], OpenTiff] = Recent(KEPT_OPEN)


def opened(mark: FileMark) -> OpenTiff:
    """The open file of a mark, one for each process. Raises DamageError if it is another file by now."""

    def make() -> OpenTiff:
        mark.check(str(mark.path))
        return OpenTiff(mark.path)

    return _open.get((os.getpid(), mark), make)


def check_decodes(frame: Any, path: Path) -> None:
    """Refuse a page for which there is no codec, and one without pixels."""
    extents = [*frame.shaped, frame.samplesperpixel]
    extents += (
        [frame.tilewidth, frame.tilelength, frame.tiledepth] if frame.is_tiled else [frame.rowsperstrip]
    )
    is_sound = all(isinstance(n, SupportsIndex) and n.__index__() > 0 for n in extents)
    if frame.dtype is None or not is_sound or not len(frame.dataoffsets):
        raise SourceError(f"{path}: it has no pixels that can be read; copy the file again")
    if np.dtype(frame.dtype).kind not in "biuf":
        raise SourceError(f"{path}: pixels of type {frame.dtype} are not read; write it anew as integers")
    if frame.compression == 1:
        return
    name = codec_of(frame)
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        raise NoCodecError(f"{path}: its tiles are {name}, which imagecodecs decodes; {_INSTALL}") from None
    try:
        tifffile_module().TIFF.DECOMPRESSORS[frame.compression]
    except (KeyError, ValueError, ImportError) as error:
        raise SourceError(
            f"{path}: its tiles are {name}, for which there is no codec here ({one_line(error)}); write it "
            f"anew as JPEG or deflate"
        ) from None


def has_description(page: Any) -> bool:
    """Whether the description of a page was read, if its directory lists one."""
    tiff, handle = page.parent.tiff, page.parent.filehandle
    handle.seek(page.offset)
    (count,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    listed = handle.read(count * tiff.tagsize)
    codes = [struct.unpack_from(tiff.byteorder + "H", listed, n * tiff.tagsize)[0] for n in range(count)]
    return _DESCRIPTION not in codes or _DESCRIPTION in page.tags


def codec_of(frame: Any) -> str:
    """The name of the codec of a page."""
    compression = getattr(frame.compression, "name", frame.compression)
    return "none" if frame.compression == 1 else str(compression)
