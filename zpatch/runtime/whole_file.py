"""A file that appears whole or not at all, whenever the process is killed or the machine loses power."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path, partial: Path | None = None, *, is_synced: bool = False) -> Iterator[Path]:
    """Yield the path to write the contents to; then sync that file and rename it to ``path``.

    It is ``partial``, which must be in the same file system, or by default a unique hidden name in the folder
    of ``path``. An existing file is replaced, and missing folders are made. With ``is_synced`` the caller
    syncs the contents. After an error ``path`` is unchanged and ``partial`` is removed. What stands at
    ``partial`` before, such as a link to another file, is removed and never written to.
    """
    if partial is None:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    for file in (partial, path):
        file.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    try:
        yield partial
        if not is_synced:
            sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(file: Path, name: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
        sync(name)


def clear_folder(folder: Path, keep: Collection[Path]) -> None:
    """Remove everything in a folder except the folders ``keep`` below it, at any depth."""
    for entry in folder.iterdir():
        if entry in keep:
            continue
        if any(kept.is_relative_to(entry) for kept in keep):
            clear_folder(entry, keep)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
