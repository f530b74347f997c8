"""Fingerprints of source files, by which a file that has changed since its conversion is found."""

from __future__ import annotations

import os
from pathlib import Path

from zpatch.digests import new_digest
from zpatch.errors import NiftiError
from zpatch.nifti.header import image_of_pair
from zpatch.store.image_record import SourceFingerprint


def fingerprint(path: Path, folder: Path) -> SourceFingerprint:
    """The size, time and checksum of a source file, with its path relative to ``folder``.

    A .hdr/.img pair has one fingerprint, of both files.
    """
    checksum = new_digest()
    try:
        files = _files_of(path)
        for file in files:
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    checksum.update(block)
        size, mtime_ns = _size_and_time(files)
    except OSError as error:
        raise NiftiError(f"{path}: it cannot be read ({error.strerror}); restore the file") from None
    return SourceFingerprint(_relative_path(path, folder), size, mtime_ns, checksum.hexdigest())


def has_fingerprint(path: Path, source: SourceFingerprint, folder: Path) -> bool:
    """Whether a file still has a fingerprint; its bytes are read only if its time differs."""
    try:
        size, mtime_ns = _size_and_time(_files_of(path))
        if _relative_path(path, folder) != source.path or size != source.bytes:
            return False
        return mtime_ns == source.mtime_ns or fingerprint(path, folder).checksum == source.checksum
    except (OSError, NiftiError):
        return False


def _files_of(path: Path) -> list[Path]:
    is_pair = path.name.removesuffix(".gz").endswith(".hdr")
    return [path, image_of_pair(path)] if is_pair else [path]


def _size_and_time(files: list[Path]) -> tuple[int, int]:
    statuses = [file.stat() for file in files]
    return sum(s.st_size for s in statuses), max(s.st_mtime_ns for s in statuses)


def _relative_path(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
