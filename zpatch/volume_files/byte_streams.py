"""The door to gzip and isal: compressed files read and written as streams, by isal where it has a wheel."""

from __future__ import annotations

import contextlib
import gzip
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from zpatch.errors import NiftiError

try:
    from isal import igzip, igzip_lib

    _gzip: ModuleType = igzip
    _BROKEN: tuple[Any, ...] = (gzip.BadGzipFile, EOFError, zlib.error, igzip_lib.error)
except ImportError:  # no wheel for this platform: the standard library is slower, and reads the same
    _gzip = gzip
    _BROKEN = (gzip.BadGzipFile, EOFError, zlib.error)

LEVEL = 1

_MAGIC = b"\x1f\x8b"


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip data, whatever its name."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise NiftiError(f"{path}: it is no regular file; leave it out with exclude=, or remove it")
        with path.open("rb") as stream:
            return stream.read(2) == _MAGIC
    except OSError as error:
        raise NiftiError(f"{path}: it cannot be read ({error.strerror}); restore the file") from None


@contextlib.contextmanager
def open_bytes(path: Path, *, compressed: bool) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed; broken or unreadable data raise a NiftiError that names the file."""
    try:
        with (_gzip.open if compressed else open)(path, "rb") as stream:
            yield stream
    except _BROKEN as error:
        raise NiftiError(f"{path}: broken gzip data ({error}); copy the file again") from None
    except OSError as error:
        raise NiftiError(f"{path}: it cannot be read ({error.strerror}); restore the file") from None


def gzip_writer(stream: IO[bytes]) -> Any:
    """A stream that compresses into another; the same contents give the same bytes, as no time is written."""
    return _gzip.GzipFile(filename="", mode="wb", compresslevel=LEVEL, fileobj=stream, mtime=0)
