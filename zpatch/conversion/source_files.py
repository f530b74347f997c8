"""The image files of a source: found by their names, and known again by their fingerprints."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zpatch.conversion.cases import HEADER, VOXELS, stem_of
from zpatch.digests import new_digest
from zpatch.errors import SourceError, VolumeFileError
from zpatch.records.image_record import SourceFingerprint
from zpatch.volume_files.formats import SUFFIXES, files_of

Note = Callable[[str], None]

BLOCK_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file, and the parts of its path below the source folder, the last of them its name."""

    path: Path
    parts: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return stem_of(self.path)


def listed_file(folder: Path, text: str, where: str) -> Path:
    """The file that a list in ``folder`` names; whether it exists is checked when it is read."""
    try:
        usable = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise SourceError(f"{where}: {text!r} cannot be the name of a file; correct it")
    path = folder / text
    return path.with_suffix(HEADER) if path.suffix == VOXELS else path


def image_files(
    folder: Path, note: Note, *, top: Callable[[str], bool] = lambda name: True
) -> list[FoundFile]:
    """All files of images below a folder, sorted by path, recognised by their names alone.

    Hidden files and folders are left out. Linked folders are not followed, which is reported to ``note``. Of
    the folders in ``folder`` itself only those whose names ``top`` accepts are entered.
    """
    found: list[tuple[str, ...]] = []
    linked: list[str] = []
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        for entry in entries_of(folder.joinpath(*parts)):
            here = (*parts, entry.name)
            if entry.is_dir(follow_symlinks=False):
                if parts or top(entry.name):
                    waiting.append(here)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                if parts or top(entry.name):
                    linked.append("/".join(here))
            elif entry.name.endswith(SUFFIXES):
                found.append(here)
    if linked:
        note(f"{counted(sorted(linked), 'linked folder')} not followed")
    return [FoundFile(folder.joinpath(*parts), parts) for parts in sorted(found)]


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise SourceError(f"{folder}: it cannot be read ({error.strerror}); see to its permissions") from None


def counted(names: list[str], what: str) -> str:
    """How many names there are, and the first three.

    >>> counted(["a", "b", "c", "d"], "row")
    '4 rows (a, b, c, ...)'
    """
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def fingerprint(path: Path, folder: Path) -> SourceFingerprint:
    """The size, time and checksum of a source file, with its path relative to ``folder``.

    An image in several files, as a .hdr/.img pair, has one fingerprint, of all of them.
    """
    checksum, block = new_digest(), memoryview(bytearray(BLOCK_BYTES))
    try:
        files = files_of(path)
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(block):
                    checksum.update(block[:count])
        size, mtime_ns = _size_and_time(files)
    except OSError as error:
        raise VolumeFileError(f"{path}: it cannot be read ({error.strerror}); restore the file") from None
    return SourceFingerprint(_relative_path(path, folder), size, mtime_ns, checksum.hexdigest())


def has_fingerprint(
    path: Path, source: tuple[str, int, int], checksum: Callable[[], str], folder: Path
) -> bool:
    """Whether a file is still that of a path relative to ``folder``, a size, a time and a checksum.

    Its bytes are read, and its checksum is asked for, only if its time differs.
    """
    try:
        size, mtime_ns = _size_and_time(files_of(path))
        if (_relative_path(path, folder), size) != source[:2]:
            return False
        return mtime_ns == source[2] or fingerprint(path, folder).checksum == checksum()
    except (OSError, SourceError):
        return False


def _size_and_time(files: Sequence[Path]) -> tuple[int, int]:
    statuses = [file.stat() for file in files]
    return sum(s.st_size for s in statuses), max(s.st_mtime_ns for s in statuses)


def _relative_path(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
