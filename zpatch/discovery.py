"""Which cases a source folder holds: conventions for folders and names -> subjects, images, kinds."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zpatch.errors import SourceError
from zpatch.nifti import SUFFIXES
from zpatch.schema import Kind, check_name, check_names_differ

SOLE_IMAGE = "image"

_LABEL_STEM = re.compile(r".*(seg|label|labels|mask)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One file to convert: the image's name in its subject, what it is, and where it lies."""

    name: str
    kind: Kind
    path: Path


@dataclass(frozen=True, slots=True)
class Case:
    """One subject to convert, all its images together."""

    subject: str
    images: tuple[SourceImage, ...]
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def discover(
    source: Path,
    *,
    label_patterns: Sequence[str] = (),
    sampling_patterns: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[Case]:
    """The cases of a folder of NIfTI files.

    ``<folder>/<subject>/<image>.nii[.gz]``, or flat: ``<subject>_<image>.nii[.gz]`` where several files
    share a ``<subject>``, else one subject a file with the image ``image``. Label maps are files whose
    name fits a pattern; without patterns, names that end in seg, dseg, label, labels or mask, and files in
    folders called labels*. ``include`` and ``exclude`` are patterns for subjects.
    """
    if not source.is_dir():
        what = "it is no folder" if source.exists() else "it does not exist"
        raise SourceError(f"{source}: {what}; name the folder that holds the NIfTI files")
    files = [file for file in sorted(source.rglob("*")) if _is_nifti_name(source, file)]
    if not files:
        raise SourceError(f"{source}: no .nii or .nii.gz file in it; name the folder that holds them")
    subjects: dict[str, list[SourceImage]] = defaultdict(list)
    for subject, name, file in _named(source, files):
        kind = _kind(file, file.relative_to(source), label_patterns, sampling_patterns)
        subjects[subject].append(SourceImage(name, kind, file))
    check_names_differ(subjects, "subject")
    cases = [
        _case(subject, images) for subject, images in subjects.items() if _wanted(subject, include, exclude)
    ]
    if not cases:
        raise SourceError(f"{source}: --include and --exclude leave none of {len(subjects)} subjects")
    return cases


def _is_nifti_name(source: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
    return file.name.endswith(SUFFIXES) and not hidden and not file.is_dir()


def stem_of(file: Path) -> str:
    """A file's name without ``.nii`` or ``.nii.gz``."""
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _named(source: Path, files: Iterable[Path]) -> Iterable[tuple[str, str, Path]]:
    flat = [file for file in files if file.parent == source]
    sharing: dict[str, int] = defaultdict(int)
    for file in flat:
        sharing[stem_of(file).rpartition("_")[0]] += 1
    for file in files:
        if file.parent != source:
            yield file.parent.name, stem_of(file), file
            continue
        subject, _, image = stem_of(file).rpartition("_")
        if subject and image and sharing[subject] > 1:
            yield subject, image, file
        else:
            yield stem_of(file), SOLE_IMAGE, file


def _kind(
    file: Path, relative: Path, label_patterns: Sequence[str], sampling_patterns: Sequence[str]
) -> Kind:
    def fits(patterns: Sequence[str]) -> bool:
        names = (file.name, stem_of(file), relative.as_posix())
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in names)

    if fits(sampling_patterns):
        return "sampling"
    if label_patterns:
        return "label" if fits(label_patterns) else "scalar"
    in_label_folder = any(part.lower().startswith("labels") for part in relative.parts[:-1])
    return "label" if in_label_folder or _LABEL_STEM.fullmatch(stem_of(file)) else "scalar"


def _case(subject: str, images: list[SourceImage]) -> Case:
    check_name(subject, "subject")
    check_names_differ((image.name for image in images), f"image (of subject {subject!r})")
    by_name: dict[str, SourceImage] = {}
    for image in images:
        check_name(image.name, "image")
        if (other := by_name.setdefault(image.name, image)) is not image:
            raise SourceError(
                f"subject {subject!r} has two files for the image {image.name!r}: {other.path} and "
                f"{image.path}; rename or remove one"
            )
    return Case(subject, tuple(images))


def _wanted(subject: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return matches(subject, include or ["*"]) and not matches(subject, exclude)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits any of some glob patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
