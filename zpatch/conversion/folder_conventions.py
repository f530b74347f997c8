"""What the names in a folder mean: for each convention how it looks, and its cases.

No image file is opened: a case whose file is missing or bad fails on its own, when its header is read.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zpatch.conversion.case_lists import DATASET, SOLE_IMAGE, Row, case_of_row, read_json, read_table
from zpatch.conversion.cases import (
    SUFFIXES_IN_WORDS,
    Case,
    CaseImage,
    is_image_name,
    kind_by_name,
    stem_of,
    usable_name,
)
from zpatch.conversion.source_files import FoundFile, Note, counted, entries_of, image_files, listed_file
from zpatch.errors import SourceError
from zpatch.records.image_record import Kind

SOLE_LABEL = "label"
PARTICIPANTS = "participants.tsv"
DERIVATIVES = "derivatives"

_NNUNET_SPLITS = {"imagesTr": "train", "imagesTs": "test", "labelsTr": "train", "labelsTs": "test"}
_BIDS_NAMES = {"t1w": "t1", "t2w": "t2"}
_NATIVE_SPACES = {"orig", "native", "individual", "scanner", "T1w", "T2w", "FLAIR"}

_BIDS_FOLDER = re.compile("anat|func|dwi|fmap|perf|pet|micr|meg|eeg|ieeg|beh|nirs|motion|mrs|ses-.+")
_CHANNEL_STEM = re.compile(r"(.+)_(\d{4})")
_IMAGE_FOLDER = re.compile(r"(images|labels).*", re.IGNORECASE)

ImagesByCase = dict[str, list[CaseImage]]


def glob(folder: Path, note: Note, *, guess_labels: bool = True) -> list[Case]:
    """``<subject>/<image>``, or flat: ``<subject>_<image>`` where several files share a ``<subject>``,
    else one subject a file; files in ``images*/`` and ``labels*/`` are flat files of their stems.

    Where folders of one name lie in different folders, as ``siteA/s1`` and ``siteB/s1``, subjects are named
    by all folders: ``siteA-s1``.
    """
    files = image_files(folder, note)
    sharing = Counter(file.stem.rpartition("_")[0] for file in files if len(file.parts) == 1)
    subjects: dict[tuple[str, ...], list[CaseImage]] = defaultdict(list)
    for file in files:
        path, name = _glob_names(file, sharing)
        kind: Kind = _glob_kind(file) if guess_labels else "scalar"
        subjects[path].append(CaseImage(name, kind, file.path))
    is_ambiguous = len({path[-1] for path in subjects}) < len(subjects)
    if is_ambiguous:
        some = next(path for path in subjects if len(path) > 1)
        note(f"subjects are named by all folders above their files, as {'-'.join(some)!r}: some share a name")
    return [
        Case("-".join(path) if is_ambiguous else path[-1], tuple(images)) for path, images in subjects.items()
    ]


def _glob_names(file: FoundFile, sharing: Mapping[str, int]) -> tuple[tuple[str, ...], str]:
    """The subject of a file, with the folders that it is in, and the name of the image."""
    match file.parts[:-1]:
        case ():
            subject, _, image = file.stem.rpartition("_")
            shared = subject and image and sharing[subject] > 1
            return ((subject,), image) if shared else ((file.stem,), SOLE_IMAGE)
        case (only,) if _IMAGE_FOLDER.fullmatch(only):
            return (file.stem,), SOLE_LABEL if only.lower().startswith("labels") else SOLE_IMAGE
        case (*above, inner) if _IMAGE_FOLDER.fullmatch(inner):
            return tuple(above), file.stem
    return tuple(file.parts[:-1]), file.stem


def _glob_kind(file: FoundFile) -> Kind:
    folders = [part.lower() for part in file.parts[:-1]]
    if any(folder.startswith("labels") for folder in folders):
        return "label"
    return "scalar" if len(folders) == 1 and folders[0].startswith("images") else kind_by_name(file.stem)


@dataclass(frozen=True, slots=True)
class _BidsFile:
    """A file of a BIDS dataset: ``entities`` by their keys, each whole (``run`` -> ``run-2``)."""

    case: str
    participant: str
    name: str
    kind: Kind
    entities: dict[str, str]
    derived: bool
    file: FoundFile


def looks_like_bids(folder: Path) -> bool:
    """Whether a folder has subjects of BIDS, or its description and a folder of derivatives."""
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


def bids(folder: Path, note: Note) -> list[Case]:
    """BIDS, raw or derived: one case for each subject and session.

    Images are named by their suffixes (``T1w`` -> ``t1``). If a case has several files of one suffix, the
    entities that differ between them are added to the name, in all cases alike. Of the derivatives of a raw
    dataset only label maps on the grids of raw images are taken.
    """
    found = image_files(folder, note, top=lambda name: name.startswith("sub-") or name == DERIVATIVES)
    files = _without_strays([_bids_file(file) for file in found if _in_subject(file)], note)
    files.sort(key=lambda file: (file.case, file.derived))
    telling = _telling_entities(files)
    cases: ImagesByCase = defaultdict(list)
    for file in files:
        added = [text for key, text in file.entities.items() if key in telling[file.name]]
        cases[file.case].append(CaseImage("_".join([file.name, *added]), file.kind, file.file.path))
    people = _participants(folder / PARTICIPANTS)
    participant_of = {file.case: file.participant for file in files}
    return [case_of_row(case, images, people.get(participant_of[case], {})) for case, images in cases.items()]


def _in_subject(file: FoundFile) -> bool:
    return any(part.startswith("sub-") for part in file.parts[:-1])


def _bids_file(file: FoundFile) -> _BidsFile:
    at = next(place for place, part in enumerate(file.parts) if part.startswith("sub-"))
    participant, *below = file.parts[at:-1]
    *tokens, suffix = file.stem.split("_")
    if "-" in suffix:
        tokens, suffix = [*tokens, suffix], SOLE_IMAGE
    sessions = [part for part in (*below[:1], *tokens) if part.startswith("ses-")]
    entities = {t.partition("-")[0]: t for t in tokens if not t.startswith(("sub-", "ses-"))}
    if pipeline := usable_name("/".join(file.parts[1:at])):
        entities["pipeline"] = f"pipeline-{pipeline}"
    name = _BIDS_NAMES.get(suffix.lower(), suffix.lower())
    case = "_".join([participant, *sessions[:1]])
    return _BidsFile(case, participant, name, kind_by_name(suffix), entities, at > 0, file)


def _without_strays(files: list[_BidsFile], note: Note) -> list[_BidsFile]:
    """Beside raw images, of derivatives only label maps, and only those on a raw image's grid."""
    raw_spaces = {file.entities.get("space") for file in files if not file.derived}
    if not raw_spaces:
        return files

    def fits(file: _BidsFile) -> bool:
        space = file.entities.get("space")
        native = space is None or (
            space.removeprefix("space-") in _NATIVE_SPACES and "func" not in file.file.parts
        )
        return not file.derived or (file.kind == "label" and (native or space in raw_spaces))

    if strays := ["/".join(file.file.parts) for file in files if not fits(file)]:
        note(
            f"{counted(strays, 'derived image')} left out: no label map on the grid of a raw image; "
            f"convert a pipeline's own folder to have all of its images"
        )
    return [file for file in files if fits(file)]


def _telling_entities(files: Iterable[_BidsFile]) -> dict[str, set[str]]:
    """For each image name the entities that differ between files of one case."""
    groups: dict[tuple[str, str], list[_BidsFile]] = defaultdict(list)
    for file in files:
        groups[file.case, file.name].append(file)
    telling: dict[str, set[str]] = defaultdict(set)
    for (_, name), group in groups.items():
        times = Counter(entity for file in group for entity in file.entities.items())
        telling[name] |= {key for (key, _), count in times.items() if count < len(group)}
    return telling


def _participants(file: Path) -> dict[str, Row]:
    """The rows of participants.tsv, by participant."""
    if not os.path.lexists(file):
        return {}
    people: dict[str, Row] = {}
    columns, rows = read_table(file)
    if "participant_id" not in columns:
        raise SourceError(f"{file}: no column participant_id (it has: {', '.join(columns)}); add it")
    for line, row in rows:
        name = f"sub-{row.pop('participant_id').removeprefix('sub-')}"
        if name in people:
            raise SourceError(f"{file}, line {line}: {name} has a row already; keep one a participant")
        people[name] = row
    return people


def datasets_in(folder: Path) -> list[str]:
    """The folders in a folder that are datasets of nnU-Net or of the Decathlon, by their names."""
    return sorted(
        entry.name
        for entry in entries_of(folder)
        if _is_folder(entry)
        and os.path.isfile(os.path.join(entry.path, DATASET))
        and os.path.isdir(os.path.join(entry.path, "imagesTr"))
    )


def looks_like_nnunet(folder: Path, dataset: Mapping[str, Any]) -> bool:
    """Whether a folder with this ``dataset.json`` is of nnU-Net 2, or of nnU-Net 1.

    nnU-Net 1 lists ``case.nii.gz`` as the Decathlon does, for files called ``case_0000.nii.gz``.
    """
    match dataset:
        case {"channel_names": _}:
            return True
        case {"modality": dict(), "training": [{"image": str(image)}, *_]} if is_image_name(image):
            path = folder / image
            channel = path.with_name(path.name.replace(stem_of(path), f"{stem_of(path)}_0000", 1))
            return channel.exists() and not path.exists()
    return False


def nnunet(folder: Path, note: Note) -> list[Case]:
    """nnU-Net 2 raw (and 1): ``imagesTr/<case>_0000``, named by the channel, with ``labelsTr/<case>``.

    Where ``dataset.json`` has a ``file_ending``, files with others are left out.
    """
    file = folder / DATASET
    dataset = read_json(file)
    channels = _channel_names(dataset, file)
    if isinstance(listed := dataset.get("dataset"), dict):
        return [_nnunet_listed(folder, subject, value, channels) for subject, value in listed.items()]
    cases: dict[tuple[str, str], list[CaseImage]] = defaultdict(list)
    files = image_files(folder, note, top=_NNUNET_SPLITS.__contains__)
    for found in _with_ending(files, dataset, file, note):
        if len(found.parts) != 2:
            continue
        split = _NNUNET_SPLITS[found.parts[0]]
        if found.parts[0].startswith("labels"):
            cases[split, found.stem].append(CaseImage("seg", "label", found.path))
        else:
            subject, channel = _channel_of(found.path)
            image = CaseImage(_channel(channels, channel, str(found.path)), "scalar", found.path)
            cases[split, subject].append(image)
    return [Case(subject, tuple(images), split) for (split, subject), images in cases.items()]


def _with_ending(
    files: list[FoundFile], dataset: Mapping[str, Any], file: Path, note: Note
) -> list[FoundFile]:
    """The files with the ``file_ending`` of the dataset, if it has one."""
    ending = dataset.get("file_ending")
    if not isinstance(ending, str):
        return files
    if not is_image_name(f"a{ending}"):
        raise SourceError(
            f"{file}: its file_ending is {ending!r}, and files that end in {SUFFIXES_IN_WORDS} "
            f"are converted; save the images as one of these"
        )
    if others := ["/".join(found.parts) for found in files if not found.path.name.endswith(ending)]:
        note(f"{counted(others, 'file')} left out: the file_ending of the dataset is {ending!r}")
    return [found for found in files if found.path.name.endswith(ending)]


def _nnunet_listed(folder: Path, subject: str, value: Any, channels: Mapping[int, str]) -> Case:
    """A case of ``dataset.json`` that lists its files itself, in the order of the channels."""
    where = f"{folder / DATASET}: dataset[{subject!r}]"
    match value:
        case {"images": [*images], "label": str(label)} if all(isinstance(image, str) for image in images):
            scalars = [
                CaseImage(_channel(channels, n, where), "scalar", listed_file(folder, image, where))
                for n, image in enumerate(images)
            ]
            seg = CaseImage("seg", "label", listed_file(folder, label, where))
            return Case(subject, (*scalars, seg), "train")
    raise SourceError(f"{where} is not of the form {{'images': [...], 'label': ...}}; correct it")


def _channel_names(dataset: Any, file: Path) -> dict[int, str]:
    given = dataset.get("channel_names", dataset.get("modality")) if isinstance(dataset, dict) else None
    if not isinstance(given, dict) or not all(key.isdecimal() for key in given):
        raise SourceError(f"{file}: no channel_names of the form {{'0': 'CT'}}; add them")
    names = {int(key): usable_name(str(name)) or f"channel-{int(key)}" for key, name in given.items()}
    times = Counter(names.values())
    return {n: f"{name}-{n}" if times[name] > 1 else name for n, name in names.items()}


def _channel_of(path: Path) -> tuple[str, int]:
    if not (parts := _CHANNEL_STEM.fullmatch(stem_of(path))):
        raise SourceError(f"{path}: its name does not end in a channel as in case_0000.nii.gz; rename it")
    return parts[1], int(parts[2])


def _channel(channels: Mapping[int, str], number: int, where: str) -> str:
    if number not in channels:
        known = ", ".join(map(str, channels))
        raise SourceError(f"{where}: channel {number} has no name in {DATASET} (it names {known}); add it")
    return channels[number]
