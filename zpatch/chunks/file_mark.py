"""The mark of a file of an input: whether it is still there, and still the file that was opened.

A chunk without a file is read as the array's fill value, so an array that is not there would be read as
zeros. The mark of its metadata file tells the two apart.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from zpatch.digests import digest
from zpatch.errors import DamageError, SourceError
from zpatch.runtime.guarded_files import MOST_DOCUMENT_BYTES, open_regular
from zpatch.runtime.recent import Recent

REMEMBERED = 1024
AGAIN = "put it back as it was, or open it again, and run the same command again"


@dataclass(frozen=True, slots=True)
class _Status:
    """What a file system says of a file; ``device`` and ``inode`` differ between machines that share it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: int) -> Self:
        """The status of an open file."""
        status = os.fstat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class FileMark:
    """A file as it was when it was opened.

    Attributes:
        path: Its absolute path.
        status: What the file system of the machine that opened it said of it.
        checksum: The digest of its bytes; empty for a file of voxels, which is identified by its size and
            its time of modification.
        changes: Whether its voxels may change while it is read: its size alone identifies it then.
    """

    path: Path
    status: _Status
    checksum: str = ""
    changes: bool = False

    @classmethod
    def of_metadata(cls, path: Path) -> Self | None:
        """The mark of a small file, which is read; None if there is none."""
        try:
            status, content = _read(path)
        except FileNotFoundError:
            return None
        return cls(path, status, digest(content))

    @classmethod
    def of_voxels(cls, path: Path, *, changes: bool = False) -> Self:
        """The mark of a file of voxels. Raises SourceError if it cannot be opened."""
        try:
            return cls(path.absolute(), _status(path), changes=changes)
        except OSError as error:
            raise SourceError(f"{path}: it cannot be opened ({error.strerror}); {AGAIN}") from None

    def check(self, name: str) -> None:
        """Raise DamageError if the file is gone or another one; ``name`` is the image or array it belongs to.

        The file is opened, as network file systems may answer for a file that is gone until it is opened.
        """
        if problem := self.problem():
            raise DamageError(
                f"{name}: {problem}: the input was moved, unmounted or changed while it was read; {AGAIN}"
            )

    def problem(self) -> str | None:
        """What is wrong with the file; None for the file that was opened."""
        try:
            return None if self._is_same() else f"{self.path} is not the file that was opened"
        except OSError as error:
            return f"{self.path} is not there ({error.strerror})"

    def _is_same(self) -> bool:
        status = _status(self.path)
        if status == self.status:
            return True
        if not self.checksum:
            is_as_long = status.size == self.status.size
            return is_as_long and (self.changes or status.mtime_ns == self.status.mtime_ns)
        key = self.path, self.checksum
        if status == _seen.get(key, lambda: self.status):
            return True
        status, content = _read(self.path)
        if digest(content) != self.checksum:
            return False
        _seen.get(key, lambda: status, lambda seen: seen == status)
        return True


# The status under which a file was last found to have the digest of its mark, by its path and that digest.
_seen: Recent[tuple[Path, str], _Status] = Recent(REMEMBERED)


def _status(path: Path) -> _Status:
    file = open_regular(path, follow=True)
    try:
        return _Status.of(file)
    finally:
        os.close(file)


def _read(path: Path) -> tuple[_Status, bytes]:
    with open(open_regular(path, follow=True), "rb") as file:
        return _Status.of(file.fileno()), file.read(MOST_DOCUMENT_BYTES)
