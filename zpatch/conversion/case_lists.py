"""Sources that list their files: JSON datalists and tables, each read by a function that returns its cases.

Listed files may be anywhere; whether they exist is checked when they are read.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from zpatch.conversion.cases import (
    SUFFIXES_IN_WORDS,
    Case,
    CaseImage,
    is_image_name,
    kind_by_name,
    stem_of,
)
from zpatch.conversion.source_files import listed_file
from zpatch.errors import SourceError
from zpatch.records.image_record import Kind

DATASET = "dataset.json"
SUBJECT_KEYS = ("subject", "case", "id")
SOLE_IMAGE = "image"

_LIST_SPLITS = {
    "training": "train",
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "testing": "test",
    "test": "test",
}
_MARKS: Mapping[str, Kind] = {"label": "label", "sampling": "sampling"}
_MISSING = ("", "n/a", "nan")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[+-]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(?=[eE]))([eE][+-]?[0-9]+)?")

Row = dict[str, str]


def read_json(file: Path) -> Any:
    """The value of a JSON file; NaN and infinity, which standard JSON lacks, become None."""
    try:
        return json.loads(_text_of(file), parse_constant=lambda name: None, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise SourceError(f"{file}, line {error.lineno}: no valid JSON ({error.msg}); correct it") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: no usable JSON ({error}); correct it") from None


def read_table(file: Path) -> tuple[list[str], list[tuple[int, Row]]]:
    """The columns of a CSV or TSV file, and its rows, each with the number of its last line.

    Columns without a name are left out.
    """
    text = _text_of(file)
    head = text.partition("\n")[0]
    delimiter = "\t" if file.suffix == ".tsv" else ";" if ";" in head and "," not in head else ","
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        columns = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise SourceError(f"{file}, line {reader.line_num}: no valid table ({error}); correct it") from None
    named = [name for name in columns if name]
    if twice := next((name for name, times in Counter(named).items() if times > 1), None):
        raise SourceError(f"{file}: two columns are called {twice!r}; rename one")
    for line, cells in rows:
        if len(cells) != len(columns):
            raise SourceError(
                f"{file}, line {line}: {len(cells)} cells under {len(columns)} columns; correct that line"
            )
    return named, [
        (line, {name: cell.strip() for name, cell in zip(columns, cells, strict=True) if name})
        for line, cells in rows
    ]


def _text_of(file: Path) -> str:
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise SourceError(f"{file}: it is no regular file; save the list as one")
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"{file}: it cannot be read ({error.strerror}); restore the file") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: it is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def value_of(cell: str) -> int | float | str | None:
    """A cell of a table as a number if it is one; a missing value is None, and '007' stays text.

    >>> [value_of(cell) for cell in ("7", "1e-3", "007", "n/a", "inf")]
    [7, 0.001, '007', None, 'inf']
    """
    if cell.lower() in _MISSING:
        return None
    if _INTEGER.fullmatch(cell):
        return int(cell)
    if _DECIMAL.fullmatch(cell):
        return value if math.isfinite(value := float(cell)) else cell
    return cell


def case_of_row(subject: str, images: Iterable[CaseImage], row: Row) -> Case:
    """A case with its row of a table: the column ``split`` is its split, all other columns are metadata."""
    meta = {key: value_of(cell) for key, cell in row.items() if key != "split"}
    split = row.get("split", "")
    return Case(subject, tuple(images), split if split.lower() not in _MISSING else None, meta)


def looks_like_msd(dataset: Mapping[str, Any]) -> bool:
    """Whether the contents of a JSON file look like a ``dataset.json`` of the Medical Decathlon."""
    return "training" in dataset and "modality" in dataset


def read_dict(file: Path) -> Mapping[str, Any]:
    """The dict in a JSON file; an empty one if the file holds another value."""
    document = read_json(file)
    return document if isinstance(document, dict) else {}


def table(file: Path) -> list[Case]:
    """The cases of a CSV or TSV file, one in each row: ``subject`` (or ``case``, ``id``), ``split``, images.

    Image columns are marked ``label:NAME`` or ``sampling:NAME``, or have values that name files of images; an
    empty cell means that the case has no such image. All other columns are metadata.
    """
    columns, rows = read_table(file)
    subject_column = next((name for name in SUBJECT_KEYS if name in columns), None)
    if subject_column is None:
        raise SourceError(
            f"{file}: no column subject, case or id (it has: {', '.join(columns) or 'none'}); add one"
        )
    images = _image_columns(file, [name for name in columns if name != subject_column], rows)
    lines: dict[str, int] = {}
    cases = []
    for line, row in rows:
        where = f"{file}, line {line}"
        subject = row.pop(subject_column)
        if not subject:
            raise SourceError(f"{where}: column {subject_column} is empty; name the case")
        if (first := lines.setdefault(subject, line)) != line:
            raise SourceError(f"{where}: {subject!r} is on line {first} already; keep one row a case")
        found = [
            CaseImage(name, kind, listed_file(file.parent, cell, where))
            for column, (name, kind) in images.items()
            if (cell := row.pop(column)).lower() not in _MISSING
        ]
        cases.append(case_of_row(subject, found, row))
    return cases


def _image_columns(
    file: Path, columns: Iterable[str], rows: Sequence[tuple[int, Row]]
) -> dict[str, tuple[str, Kind]]:
    """Which columns hold images, and their names and kinds."""
    images: dict[str, tuple[str, Kind]] = {}
    for column in columns:
        mark, _, name = column.partition(":")
        if mark in _MARKS and name:
            images[column] = name, _MARKS[mark]
            continue
        cells = [(line, row[column]) for line, row in rows if row[column].lower() not in _MISSING]
        others = [(line, cell) for line, cell in cells if not is_image_name(cell)]
        if cells and not others:
            images[column] = column, kind_by_name(column)
        elif len(others) < len(cells):
            line, cell = others[0]
            raise SourceError(
                f"{file}, line {line}: column {column!r} has {cell!r}, and files of images elsewhere; "
                f"correct it"
            )
    if not images:
        raise SourceError(
            f"{file}: no column holds files of images (values that end in {SUFFIXES_IN_WORDS}); add one"
        )
    return images


def datalist(file: Path) -> list[Case]:
    """The cases of a JSON file of lists of dicts, as the Medical Decathlon and MONAI write them.

    Values that name files of images are images, named by their keys; ``subject``, ``case`` or ``id`` names
    the case, or else the names of its files do; all other values are metadata. The split is ``train``,
    ``validation`` or ``test``, or else the key of the list; ``fold-N`` for a training entry with a ``fold``.
    """
    document = read_json(file)
    entries = list(_entries(document, file))
    shared = _modalities(document)
    subjects = _subjects_of(entries)
    modalities = _names_in_lists(entries)
    cases = []
    for subject, entry in zip(subjects, entries, strict=True):
        images = [
            CaseImage(name, kind_by_name(key), listed_file(file.parent, text, entry.where))
            for key, texts in entry.files.items()
            for name, text in zip(_image_names(key, len(texts), modalities), texts, strict=True)
        ]
        cases.append(Case(entry.subject or subject, tuple(images), entry.split, shared | entry.meta))
    return cases


@dataclass(frozen=True, slots=True)
class _Entry:
    """A dict of a datalist, parsed.

    ``where`` names its place in errors; ``subject`` is the name in the dict, or empty.
    """

    where: str
    split: str | None
    subject: str
    files: dict[str, list[str]]
    meta: dict[str, Any]


def _entries(document: Any, file: Path) -> Iterator[_Entry]:
    lists = document if isinstance(document, dict) else {"": document}
    for key, values in lists.items():
        if not isinstance(values, list):
            continue
        if (
            key
            and key not in _LIST_SPLITS
            and not any(isinstance(v, dict) and SOLE_IMAGE in v for v in values)
        ):
            continue
        split = _LIST_SPLITS.get(key, key) or None
        for n, value in enumerate(values):
            where = f"{file}: {key}[{n}]"
            entry = {SOLE_IMAGE: value} if isinstance(value, str) else value
            if not isinstance(entry, dict):
                raise SourceError(f"{where}: {value!r} is neither a file nor a dict of files; correct it")
            yield _entry(where, split, entry)


def _entry(where: str, split: str | None, values: Mapping[str, Any]) -> _Entry:
    own = next((key for key in SUBJECT_KEYS if isinstance(values.get(key), str | int)), "")
    files: dict[str, list[str]] = {}
    meta: dict[str, Any] = {}
    for key, value in values.items():
        texts = value if isinstance(value, list) else [value]
        are_texts = bool(texts) and all(isinstance(text, str) for text in texts)
        if key == own:
            continue
        if are_texts and (key == SOLE_IMAGE or all(map(is_image_name, texts))):
            files[key] = texts
        elif key == SOLE_IMAGE:
            raise SourceError(f"{where}: its image is {value!r}, which names no file; correct it")
        elif not (value in (None, "") and kind_by_name(key) == "label"):
            meta[key] = value
    if split == "train" and meta.get("fold") is not None:
        split = f"fold-{meta['fold']}"
    return _Entry(where, split, str(values.get(own, "")), files, meta)


def _modalities(document: Any) -> dict[str, Any]:
    """The names of the channels of 4-D images, from the field ``modality`` of the Decathlon."""
    given = document.get("modality") if isinstance(document, dict) else None
    return {"modality": list(given.values())} if isinstance(given, dict) else {}


def _image_names(key: str, count: int, modalities: Sequence[str]) -> list[str]:
    """Names for the images under a key: the key itself, or for a list a name for each file."""
    if count == 1:
        return [key]
    if key == SOLE_IMAGE and len(modalities) == count:
        return list(modalities)
    return [f"{key}-{n}" for n in range(count)]


def _names_in_lists(entries: Iterable[_Entry]) -> Sequence[str]:
    """The names of the files of an ``image`` list without the name of the case, where all lists agree:
    ``["a_t1.nii", "a_t2.nii"]`` are ``t1`` and ``t2``."""
    names = set()
    for entry in entries:
        texts = entry.files.get(SOLE_IMAGE, [])
        stems = [stem_of(PurePath(text)) for text in texts]
        prefix = _shared_start(stems)
        if len(stems) > 1:
            names.add(tuple(stem.removeprefix(prefix).strip("_") for stem in stems))
    agreed = names.pop() if len(names) == 1 else ()
    if not all(agreed) or len(set(agreed)) < len(agreed):
        return ()
    return [f"{SOLE_IMAGE}-{name}" if name[0].isdigit() else name for name in agreed]


def _subjects_of(entries: Sequence[_Entry]) -> list[str]:
    """Names for entries without a subject, from the names of their files.

    The first of these that is different for each entry: the start that its files share, the first file, or
    the folder of the first file; if there is none, the whole path of the first file.
    """
    paths = [[PurePath(text) for texts in entry.files.values() for text in texts] for entry in entries]
    firsts = [files[0] if files else PurePath() for files in paths]
    namings = (
        [_shared_start([stem_of(file) for file in files]).removesuffix("_0000") for files in paths],
        [stem_of(first) for first in firsts],
        [first.parent.name for first in firsts],
    )
    for names in namings:
        if all(names) and len(set(names)) == len(names):
            return names
    return [
        "_".join([*(p for p in first.parent.parts if p[0] not in "./"), stem_of(first)]) for first in firsts
    ]


def _shared_start(stems: Sequence[str]) -> str:
    """The longest start of all stems that ends before an underscore or at the end of a stem.

    >>> _shared_start(["liver_1", "liver_1_mask"])
    'liver_1'
    """
    parts = [stem.split("_") for stem in stems]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "_".join(shared)
