"""Cases to convert, as data, and how file names and free text become names and kinds of images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from zpatch.records.image_record import Kind
from zpatch.volume_files.formats import SUFFIXES

SUFFIXES_IN_WORDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
HEADER, VOXELS = ".hdr", ".img"  # a pair is one image, known by its header

_LABEL_NAME = re.compile(r".*((?<!prob)seg|label|labels|mask)", re.IGNORECASE)
_UNUSABLE = re.compile(r"[^a-z0-9._]+")
_AT_ENDS = "-._"


@dataclass(frozen=True, slots=True)
class CaseImage:
    """One file to convert: the image's name in its subject, its kind, and its path."""

    name: str
    kind: Kind
    path: Path


@dataclass(frozen=True, slots=True)
class Case:
    """One subject to convert, all its images together.

    ``split`` and ``meta`` are further facts about it in the source: plain JSON, without NaN.
    """

    subject: str
    images: tuple[CaseImage, ...]
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def stem_of(file: PurePath) -> str:
    """A file's name without its suffix.

    >>> stem_of(PurePath("sub-01/t1.5.nii.gz"))
    't1.5'
    """
    suffix = max((s for s in (*SUFFIXES, VOXELS) if file.name.endswith(s)), key=len, default="")
    return file.name.removesuffix(suffix)


def is_image_name(text: str) -> bool:
    """Whether a listed name is that of a file to convert, or of either file of a .hdr/.img pair."""
    return text.endswith((*SUFFIXES, VOXELS))


def kind_by_name(name: str) -> Kind:
    """The kind of an image by its name: names that end in seg, label, labels or mask are label maps.

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
