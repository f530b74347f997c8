"""The cases of a source: its convention is detected, and the names of all cases are checked."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zpatch.conversion.case_lists import DATASET, datalist, looks_like_msd, read_dict, table
from zpatch.conversion.cases import Case, CaseImage, stem_of
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.folder_conventions import (
    bids,
    datasets_in,
    glob,
    looks_like_bids,
    looks_like_nnunet,
    nnunet,
)
from zpatch.conversion.source_files import Note, counted
from zpatch.errors import SourceError
from zpatch.records.image_record import Kind
from zpatch.records.names import check_name, check_names_differ, matches

_LISTS, _FOLDERS = ("json", "csv"), ("bids", "nnunet", "glob")
_HOLDS_NOTHING = {
    "bids": "no NIfTI, NRRD or MetaImage file in its sub-* folders",
    "nnunet": "no NIfTI, NRRD or MetaImage file in its imagesTr and imagesTs",
    "msd": "no case in its lists training and test",
    "json": "no list of cases in it (as training, validation or test)",
    "csv": "no row in it",
    "glob": "no NIfTI, NRRD or MetaImage file in it",
}


@dataclass(frozen=True, slots=True)
class Discovery:
    """The cases of a source.

    ``format`` is the convention that was detected or chosen. Paths of sources are stored relative to
    ``folder``, which need not hold a listed file. ``refused`` are subjects whose names, or those of their
    images, cannot be used, each with the reason. ``notes`` say what was left out, a line each.
    """

    format: str
    cases: list[Case]
    folder: Path
    refused: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def discover(source: Path, options: ConvertOptions) -> Discovery:
    """The cases of a folder of images, or of a file that lists them.

    Files that match a pattern of ``options`` (by their name, stem, path or image name) become label or
    sampling maps in every convention; in ``glob``, label patterns replace the usual names. ``include`` and
    ``exclude`` choose subjects, and the first ``limit`` of them are kept.
    """
    if not os.path.exists(source):
        raise SourceError(f"{source}: it does not exist; name the folder that holds the images")
    notes: list[str] = []
    found = _detected(source) if options.format == "auto" else options.format
    folder = source if source.is_dir() else source.parent
    guess_labels = not options.label_patterns
    cases = _with_images(_cases(source, folder, found, notes.append, guess_labels), notes.append)
    if not cases:
        more = f" ({'; '.join(notes)})" if notes else ""
        raise SourceError(f"{source}: {_HOLDS_NOTHING[found]}{more}; name the folder that holds them")
    kept = [case for case in cases if matches(case.subject, options.include or ["*"])]
    kept = [case for case in kept if not matches(case.subject, options.exclude)][: options.limit]
    if not kept:
        raise SourceError(f"{source}: include= and exclude= leave none of {len(cases)} subjects")
    kept = [_with_patterns(case, folder, options) for case in kept]
    usable, refused = _checked(kept)
    return Discovery(found, usable, folder, tuple(refused), tuple(notes))


def _detected(source: Path) -> str:
    """The convention of a source, by the names of its files and folders."""
    if not source.is_dir():
        return _detected_list(source)
    if (source / DATASET).is_file() and (source / "imagesTr").is_dir():
        dataset = read_dict(source / DATASET)
        if looks_like_nnunet(source, dataset):
            return "nnunet"
        if "training" in dataset:
            return "msd"
    if looks_like_bids(source):
        return "bids"
    if inner := datasets_in(source):
        raise SourceError(
            f"{source}: it holds {len(inner)} dataset{'s' * (len(inner) > 1)} ({', '.join(inner[:5])}"
            f"{', ...' * (len(inner) > 5)}); name one of them, as {source / inner[0]}"
        )
    return "glob"


def _detected_list(file: Path) -> str:
    if file.suffix in (".csv", ".tsv"):
        return "csv"
    if file.suffix != ".json":
        raise SourceError(
            f"{file}: it is no folder; name the folder that holds the images, "
            f"or a .json, .csv or .tsv file that lists them"
        )
    dataset = read_dict(file)
    if "channel_names" in dataset and file.name == DATASET:
        return "nnunet"
    return "msd" if looks_like_msd(dataset) else "json"


def _cases(source: Path, folder: Path, format: str, note: Note, guess_labels: bool) -> list[Case]:  # noqa: A002
    if format in _LISTS and source.is_dir():
        raise SourceError(f"{source}: it is a folder; name the .{format} file that lists the images")
    if format in _FOLDERS and not source.is_dir() and (format, source.name) != ("nnunet", DATASET):
        raise SourceError(f"{source}: it is no folder; name the folder that holds the images")
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
    return glob(folder, note, guess_labels=guess_labels)


def _with_images(cases: list[Case], note: Note) -> list[Case]:
    if empty := [case.subject for case in cases if not case.images]:
        note(f"{counted(empty, 'subject')} left out: no image is named for them")
    return [case for case in cases if case.images]


def _checked(cases: Sequence[Case]) -> tuple[list[Case], list[tuple[str, str]]]:
    """The cases with names that a store can have, and the others, each with the reason."""
    of_name: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        of_name[case.subject.casefold()].append(case)
    usable, refused = [], []
    for case in cases:
        try:
            _check_subject(case, of_name[case.subject.casefold()])
            _check_images(case)
            usable.append(case)
        except SourceError as error:
            advice = "or give it another name in a table: a .csv with columns subject and one for each image"
            refused.append((case.subject, f"{case.images[0].path}: {error}, {advice}"))
    return usable, refused


def _check_subject(case: Case, alike: Sequence[Case]) -> None:
    """Refuse a case that another one has the name of, exactly or but for the case of letters."""
    others = [other for other in alike if other is not case]
    if same := next((other for other in others if other.subject == case.subject), None):
        raise SourceError(
            f"{len(others) + 1} cases are called {case.subject!r} (also {same.images[0].path}); rename it"
        )
    check_names_differ((other.subject for other in alike), "subject")


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


def _with_patterns(case: Case, folder: Path, options: ConvertOptions) -> Case:
    """The case with the kinds that patterns give its images; sampling patterns take precedence."""
    if not options.label_patterns and not options.sampling_patterns:
        return case

    def kind(image: CaseImage) -> Kind:
        inside = image.path.is_relative_to(folder)
        path = (image.path.relative_to(folder) if inside else image.path).as_posix()
        names = (image.name, image.path.name, stem_of(image.path), path)
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.sampling_patterns for name in names):
            return "sampling"
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.label_patterns for name in names):
            return "label"
        return image.kind

    images = tuple(dataclasses.replace(image, kind=kind(image)) for image in case.images)
    return dataclasses.replace(case, images=images)
