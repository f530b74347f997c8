"""Which cases a source holds: its convention, told from its looks, and the checks that all cases pass."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zpatch.conversion.case_lists import DATASET, datalist, read_json, table
from zpatch.conversion.cases import Case, CaseImage, Note, counted, entries_of, is_image_name, stem_of
from zpatch.conversion.folder_conventions import DERIVATIVES, bids, glob, nnunet
from zpatch.errors import OptionError, SourceError
from zpatch.store.image_record import Kind
from zpatch.store.names import check_name, check_names_differ, matches

__all__ = ["FORMATS", "Case", "CaseImage", "Discovery", "discover", "matches", "stem_of"]

FORMATS = ("auto", "bids", "nnunet", "msd", "json", "csv", "glob")

_LISTS, _FOLDERS = ("json", "csv"), ("bids", "nnunet", "glob")
_BIDS_FOLDER = re.compile("anat|func|dwi|fmap|perf|pet|micr|meg|eeg|ieeg|beh|nirs|motion|mrs|ses-.+")
_HOLDS_NOTHING = {
    "bids": "no .nii or .nii.gz file in its sub-* folders",
    "nnunet": "no .nii or .nii.gz file in its imagesTr and imagesTs",
    "msd": "no case in its lists training and test",
    "json": "no list of cases in it (as training, validation or test)",
    "csv": "no row in it",
    "glob": "no .nii or .nii.gz file in it",
}


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a source holds.

    ``format`` is the convention that was detected or forced, ``folder`` what source paths are told
    relative to (a listed file may lie outside of it), ``notes`` what was left out, a line each.
    """

    format: str
    cases: list[Case]
    folder: Path
    notes: tuple[str, ...] = ()


def discover(
    source: Path,
    *,
    format: str = "auto",  # noqa: A002 - the command's option is called so
    label_patterns: Sequence[str] = (),
    sampling_patterns: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int | None = None,
) -> Discovery:
    """The cases of a folder of NIfTI files, or of a file that lists them.

    ``format`` is one of ``FORMATS``. Files that fit a pattern (their name, stem, path or image name)
    become label or sampling maps in every convention; in ``glob``, ``label_patterns`` take the place of
    the usual names. ``include`` and ``exclude`` are patterns for subjects, ``limit`` keeps the first ones.
    """
    if format not in FORMATS:
        raise OptionError(f"format must be one of {', '.join(FORMATS)}, not {format!r}", option="format")
    if limit is not None and limit < 1:
        raise OptionError(f"limit must be at least 1 subject, not {limit}", option="limit")
    if not os.path.exists(source):
        raise SourceError(f"{source}: it does not exist; name the folder that holds the NIfTI files")
    notes: list[str] = []
    found = _detected(source) if format == "auto" else format
    folder = source if source.is_dir() else source.parent
    cases = _with_images(_cases(source, folder, found, notes.append, bool(label_patterns)), notes.append)
    if not cases:
        more = f" ({'; '.join(notes)})" if notes else ""
        raise SourceError(f"{source}: {_HOLDS_NOTHING[found]}{more}; name the folder that holds them")
    _check_subjects(source, cases)
    kept = [case for case in cases if matches(case.subject, include or ["*"])]
    kept = [case for case in kept if not matches(case.subject, exclude)][:limit]
    if not kept:
        raise SourceError(f"{source}: --include and --exclude leave none of {len(cases)} subjects")
    kept = [_with_patterns(case, folder, label_patterns, sampling_patterns) for case in kept]
    for case in kept:
        _check_images(case)
    return Discovery(found, kept, folder, tuple(notes))


def _detected(source: Path) -> str:
    """The convention of a source, by its looks."""
    if not source.is_dir():
        return _detected_list(source)
    if (source / DATASET).is_file() and (source / "imagesTr").is_dir():
        dataset = _keys_of(source / DATASET)
        if "channel_names" in dataset or _is_nnunet_1(source, dataset):
            return "nnunet"
        if "training" in dataset:
            return "msd"
    return "bids" if _looks_like_bids(source) else "glob"


def _detected_list(file: Path) -> str:
    if file.suffix in (".csv", ".tsv"):
        return "csv"
    if file.suffix != ".json":
        raise SourceError(
            f"{file}: it is no folder; name the folder that holds the NIfTI files, "
            f"or a .json, .csv or .tsv file that lists them"
        )
    dataset = _keys_of(file)
    if "channel_names" in dataset and file.name == DATASET:
        return "nnunet"
    return "msd" if "training" in dataset and "modality" in dataset else "json"


def _keys_of(file: Path) -> Mapping[str, Any]:
    document = read_json(file)
    return document if isinstance(document, dict) else {}


def _is_nnunet_1(folder: Path, dataset: Mapping[str, Any]) -> bool:
    """nnU-Net 1 lists ``case.nii.gz`` as the Decathlon does, for files called ``case_0000.nii.gz``."""
    match dataset:
        case {"modality": dict(), "training": [{"image": str(image)}, *_]} if is_image_name(image):
            path = folder / image
            channel = path.with_name(path.name.replace(stem_of(path), f"{stem_of(path)}_0000", 1))
            return channel.exists() and not path.exists()
    return False


def _looks_like_bids(folder: Path) -> bool:
    entries = entries_of(folder)
    subjects = [entry for entry in entries if entry.name.startswith("sub-") and _is_folder(entry)]
    if any(entry.name == "dataset_description.json" for entry in entries):
        return bool(subjects) or any(entry.name == DERIVATIVES for entry in entries)
    return any(
        _BIDS_FOLDER.fullmatch(entry.name) and _is_folder(entry)
        for subject in subjects
        for entry in entries_of(Path(subject.path))
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _cases(source: Path, folder: Path, format: str, note: Note, labels_are_told: bool) -> list[Case]:  # noqa: A002
    if format in _LISTS and source.is_dir():
        raise SourceError(f"{source}: it is a folder; name the .{format} file that lists the NIfTI files")
    if format in _FOLDERS and not source.is_dir() and (format, source.name) != ("nnunet", DATASET):
        raise SourceError(f"{source}: it is no folder; name the folder that holds the NIfTI files")
    match format:
        case "bids":
            return bids(folder, note)
        case "nnunet":
            return nnunet(folder, note)
        case "msd":
            return datalist(source / DATASET if source.is_dir() else source)
        case "json":
            return datalist(source)
        case "csv":
            return table(source)
    return glob(folder, note, guess_labels=not labels_are_told)


def _with_images(cases: list[Case], note: Note) -> list[Case]:
    if empty := [case.subject for case in cases if not case.images]:
        note(f"{counted(empty, 'subject')} left out: no image is named for them")
    return [case for case in cases if case.images]


def _check_subjects(source: Path, cases: Sequence[Case]) -> None:
    times = Counter(case.subject for case in cases)
    if twice := next((subject for subject, count in times.items() if count > 1), None):
        raise SourceError(f"{source}: {times[twice]} cases are called {twice!r}; give each a name of its own")
    check_names_differ(times, "subject")


def _check_images(case: Case) -> None:
    check_name(case.subject, "subject")
    check_names_differ((image.name for image in case.images), f"image (of subject {case.subject!r})")
    by_name: dict[str, CaseImage] = {}
    for image in case.images:
        check_name(image.name, "image")
        if (other := by_name.setdefault(image.name, image)) is not image:
            raise SourceError(
                f"subject {case.subject!r} has two files for the image {image.name!r}: {other.path} and "
                f"{image.path}; rename or remove one"
            )


def _with_patterns(
    case: Case, folder: Path, label_patterns: Sequence[str], sampling_patterns: Sequence[str]
) -> Case:
    """The case with kinds as patterns have them; sampling patterns come first."""
    if not label_patterns and not sampling_patterns:
        return case

    def kind(image: CaseImage) -> Kind:
        inside = image.path.is_relative_to(folder)
        path = (image.path.relative_to(folder) if inside else image.path).as_posix()
        names = (image.name, image.path.name, stem_of(image.path), path)
        if any(fnmatch.fnmatch(name, pattern) for pattern in sampling_patterns for name in names):
            return "sampling"
        if any(fnmatch.fnmatch(name, pattern) for pattern in label_patterns for name in names):
            return "label"
        return image.kind

    images = tuple(dataclasses.replace(image, kind=kind(image)) for image in case.images)
    return dataclasses.replace(case, images=images)
