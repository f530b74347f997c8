"""The door to gzip, zlib and isal: compressed files as streams, by isal where it has a wheel."""

from __future__ import annotations

import contextlib
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

from zpatch.errors import VolumeFileError

try:
    from isal import igzip, igzip_lib, isal_zlib

    _gzip: ModuleType = igzip
    _zlib: ModuleType = isal_zlib
    _BROKEN: tuple[Any, ...] = (gzip.BadGzipFile, EOFError, zlib.error, igzip_lib.error)
except ImportError:  # no wheel for this platform: the standard library is slower, and reads the same
    _gzip, _zlib = gzip, zlib
    _BROKEN = (gzip.BadGzipFile, EOFError, zlib.error)

Compression = Literal["", "gzip", "zlib"]

LEVEL = 1

_MAGIC = b"\x1f\x8b"
_BLOCK_BYTES = 2**17


def is_gzip(path: Path, start: int = 0) -> bool:
    """Whether the data at byte ``start`` of a file are gzip data, whatever its name."""
    check_regular(path)
    with open_bytes(path, start=start) as stream:
        return stream.read(2) == _MAGIC


def check_regular(path: Path) -> None:
    """Raise VolumeFileError for a pipe, folder or device, and for a path that leads nowhere."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise VolumeFileError(f"{path}: it is no regular file; leave it out with exclude=, or remove it")
    except OSError as error:
        raise VolumeFileError(f"{path}: it cannot be read ({error.strerror}); restore the file") from None


@contextlib.contextmanager
def open_bytes(path: Path, *, compression: Compression = "", start: int = 0) -> Iterator[IO[bytes]]:
    """The bytes of a file from byte ``start`` on, decompressed.

    Broken or unreadable data raise a VolumeFileError that names the file.
    """
    try:
        with path.open("rb") as raw:
            raw.seek(start)
            with _decompressed(raw, compression) as stream:
                yield stream
    except _BROKEN as error:
        raise VolumeFileError(f"{path}: broken {compression} data ({error}); copy the file again") from None
    except OSError as error:
        raise VolumeFileError(f"{path}: it cannot be read ({error.strerror}); restore the file") from None


def _decompressed(raw: IO[bytes], compression: Compression) -> contextlib.AbstractContextManager[Any]:
    if compression == "gzip":
        return contextlib.closing(_gzip.GzipFile(fileobj=raw, mode="rb"))
    return contextlib.closing(_ZlibReader(raw)) if compression == "zlib" else contextlib.nullcontext(raw)


class _ZlibReader(io.RawIOBase):
    """The data of a zlib stream. As in gzip data only zeros may follow it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._inflater = _zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Decompress up to the length of ``buffer``; 0 at the end, where the checksum was compared."""
        while not self._inflater.eof:
            block = self._inflater.unconsumed_tail or self._raw.read(_BLOCK_BYTES)
            data = self._inflater.decompress(block, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            if not block:
                raise EOFError("it ends before the end-of-stream marker was reached")
        rest = self._inflater.unused_data
        while rest or (rest := self._raw.read(_BLOCK_BYTES)):
            if rest.strip(b"\0"):
                raise zlib.error("other bytes follow its end")
            rest = b""
        return 0


def gzip_writer(stream: IO[bytes]) -> Any:
    """A stream that compresses into another; the same contents give the same bytes, as no time is written."""
    return _gzip.GzipFile(filename="", mode="wb", compresslevel=LEVEL, fileobj=stream, mtime=0)
