"""Cases to convert, as data, and how files and free text become their names and kinds.

The only module that looks into source folders; what the names in them mean, `conventions.py` knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from zpatch.errors import SourceError
from zpatch.nifti.header import SUFFIXES
from zpatch.store.image_record import Kind

HEADER, VOXELS = ".hdr", ".img"  # a pair is one image, known by its header

_LABEL_NAME = re.compile(r".*((?<!prob)seg|label|labels|mask)", re.IGNORECASE)
_UNUSABLE = re.compile(r"[^a-z0-9._]+")
_AT_ENDS = "-._"

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CaseImage:
    """One file to convert: the image's name in its subject, what it is, and where it lies."""

    name: str
    kind: Kind
    path: Path


@dataclass(frozen=True, slots=True)
class Case:
    """One subject to convert, all its images together.

    ``split`` and ``meta`` are what the source says of it beyond its files: plain JSON, without NaN.
    """

    subject: str
    images: tuple[CaseImage, ...]
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file and its parts below the source folder, the last of them its name."""

    path: Path
    parts: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return stem_of(self.path)


def stem_of(file: PurePath) -> str:
    """A file's name without its suffix.

    >>> stem_of(PurePath("sub-01/t1.5.nii.gz"))
    't1.5'
    """
    suffix = max((s for s in (*SUFFIXES, VOXELS) if file.name.endswith(s)), key=len, default="")
    return file.name.removesuffix(suffix)


def is_image_name(text: str) -> bool:
    """Whether a listed name is that of a NIfTI file, of either file of a pair too."""
    return text.endswith((*SUFFIXES, VOXELS))


def kind_by_name(name: str) -> Kind:
    """What an image of that name would be: names that end in seg, label, labels or mask are label maps.

    >>> kind_by_name("lesion_mask"), kind_by_name("probseg")
    ('label', 'scalar')
    """
    return "label" if _LABEL_NAME.fullmatch(name) else "scalar"


def usable_name(text: str) -> str:
    """Free text as a name for a store; empty where nothing of it is usable.

    >>> usable_name("CT contrast (HU)")
    'ct-contrast-hu'
    """
    return _UNUSABLE.sub("-", text.lower()).strip(_AT_ENDS)


def listed_file(folder: Path, text: str, where: str) -> Path:
    """The file that a list in ``folder`` names; whether it exists is seen when it is read."""
    try:
        usable = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise SourceError(f"{where}: {text!r} cannot be the name of a file; correct it")
    path = folder / text
    return path.with_suffix(HEADER) if path.suffix == VOXELS else path


def nifti_files(
    folder: Path, note: Note, *, top: Callable[[str], bool] = lambda name: True
) -> list[FoundFile]:
    """All NIfTI files of a folder, by their names alone and in their order.

    Hidden files and folders are passed over; linked folders are not followed, and ``note`` is told.
    Only folders whose names ``top`` takes are entered from the first one.
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
    """What lies in a folder and is not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise SourceError(f"{folder}: it cannot be read ({error.strerror}); see to its permissions") from None


def counted(names: list[str], what: str) -> str:
    """How many there are, and the first of them.

    >>> counted(["a", "b", "c", "d"], "row")
    '4 rows (a, b, c, ...)'
    """
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"
