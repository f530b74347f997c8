"""Files of a folder that may come from anyone: regular ones, of bounded size, and not behind a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_DOCUMENT_BYTES = 2**28  # of a document that is read at once; metadata take kilobytes


class OpenFile:
    """A file descriptor, closed when nothing refers to it any more."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open a regular file, as ``os.open``; ``follow`` allows a link to one.

    A pipe is not waited for. A link, folder, pipe or device raises OSError.
    """
    safe = os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags | safe, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return handle


def read_document(path: Path, *, most: int = MOST_DOCUMENT_BYTES, follow: bool = False) -> bytes:
    """The bytes of a regular file. A larger one than ``most``, in bytes, raises OSError."""
    with open(open_regular(path, follow=follow), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than {most}", str(path))
        return stream.read(size)


def is_behind_link(root: Path, path: Path) -> bool:
    """Whether a folder below ``root``, on the way to ``path`` or ``path`` itself, is a link."""
    place = str(root)
    for step in filter(None, str(path).removeprefix(place).split(os.sep)):
        place += os.sep + step
        try:
            if stat.S_ISLNK(os.lstat(place).st_mode):
                return True
        except OSError:  # there is nothing further down
            return False
    return False
