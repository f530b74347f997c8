"""The lines of a manifest, one after the other, become a table; or are added to one that covers the first."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import FileSeal, Json, compact_json, digest, unsealed
from zpatch.errors import DamageError
from zpatch.geometry.affines import spacing_mm
from zpatch.records.image_facts import Directions, ImageFacts
from zpatch.records.image_record import check_sealed_file
from zpatch.records.manifest_table import COLUMNS, DTYPES, WIDTHS, ManifestTable, Prefix
from zpatch.records.texts import Texts

NONE = -1
MOST = 2**63
NO_NUMBER = float("nan")
NO_CONTENTS = bytes(16)

Value = TypeVar("Value", bound=Hashable)


class _Numbered(Generic[Value]):
    """Different values, each with its number, from 0 on."""

    def __init__(self, values: Iterable[Value] = ()) -> None:
        self.numbers = {value: number for number, value in enumerate(values)}

    def number_of(self, value: Value | None) -> int:
        """The number of a value; -1 for None."""
        return NONE if value is None else self.numbers.setdefault(value, len(self.numbers))


class TableBuilder:
    """Collects the rows of a table; ``before`` is the table of the lines before the next one."""

    def __init__(self, before: ManifestTable | None = None) -> None:
        self.lines = self.bytes = 0
        self._subjects, self._images = _Numbered[str](), _Numbered[str]()
        self._splits, self._metas, self._sources = _Numbered[str](), _Numbered[str](), _Numbered[str]()
        self._facts = _Numbered[ImageFacts]()
        self._rows: list[tuple[Any, ...]] = []  # in the order of COLUMNS
        self._row_of: dict[tuple[int, int], int] = {}
        self._documents: dict[str, FileSeal] = {}
        if before is not None:
            self._take(before)

    def _take(self, before: ManifestTable) -> None:
        self.lines, self.bytes = before.prefix.lines, before.prefix.bytes
        self._subjects, self._images = _Numbered(before.subjects), _Numbered(before.images)
        self._splits, self._metas = _Numbered(before.splits), _Numbered(before.metas)
        self._sources = _Numbered(before.sources)
        self._facts = _Numbered(before.all_facts())
        columns = [before.arrays[name] for name in COLUMNS]
        lists = [map(bytes, c) if c.dtype == np.uint8 else c.tolist() for c in columns]
        self._rows = list(zip(*lists, strict=True))
        self._row_of = {row[:2]: number for number, row in enumerate(self._rows)}
        self._documents = {name: before.document_seal(n) for n, name in enumerate(before.documents)}

    def add(self, line: bytes, where: str) -> None:
        """Take in the next line; one that is neither of an image nor of a document raises DamageError."""
        self.lines += 1
        start, self.bytes = self.bytes, self.bytes + len(line) + 1
        value = unsealed(line, where)
        subject, image = value.get("subject"), value.get("image")
        if _is_text(subject) and _is_text(image):
            key = self._subjects.number_of(subject), self._images.number_of(image)
            row = self._row_of.setdefault(key, len(self._rows))
            self._rows[row : row + 1] = [(*key, self.lines, start, len(line), *self._columns_of(value))]
        elif "document" in value:
            self._documents.update(_document(value, where))
        else:
            raise DamageError(f"{where} is no image record; restore the file from a copy")

    def _columns_of(self, value: Json) -> tuple[Any, ...]:
        """The rest of the columns of an image; those of nothing where its line is no record."""
        try:
            facts, spacing = ImageFacts.of_line(value), _spacing(ImageFacts.directions(value))
            split, meta = value["split"], value["meta"]
            if not (split is None or isinstance(split, str)) or not isinstance(meta, dict):
                return _NOTHING
            source = value["source"] or {"path": None, "bytes": 0, "mtime_ns": 0}
            path, size, mtime_ns = source["path"], int(source["bytes"]), int(source["mtime_ns"])
            if max(abs(size), abs(mtime_ns)) >= MOST:  # of no file
                path, size, mtime_ns = None, 0, 0
            stats = value["stats"]
            return (
                self._splits.number_of(split),
                self._metas.number_of(json.dumps(meta, separators=(",", ":")) if meta else None),
                self._facts.number_of(facts),
                self._sources.number_of(path if _is_text(path) else None),
                size,
                mtime_ns,
                _contents(value["files"]),
                spacing,
                tuple(float(stats.get(f"percentile_{at}", NO_NUMBER)) for at in ("0_5", "99_5")),
            )
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError, IndexError):
            return _NOTHING

    def table(self, head: str, tail: str) -> ManifestTable:
        """The table of all lines so far; ``head`` and ``tail`` are digests of the ends of the manifest."""
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(COLUMNS)
        arrays = {name: _column(name, values) for name, values in zip(COLUMNS, columns, strict=True)}
        names = list(self._subjects.numbers)
        order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        places = np.empty(len(names), "<i4")
        places[order] = np.arange(len(names))
        arrays["subject"] = places[arrays["subject"]]
        arrays["rows"] = np.argsort(arrays["subject"], kind="stable").astype("<i4")
        arrays["row_end"] = np.cumsum(np.bincount(arrays["subject"], minlength=len(names)))
        arrays["alike"] = _alike(arrays)
        documents = dict(sorted(self._documents.items()))
        texts: dict[str, Iterable[str]] = {
            "subjects": sorted(names),
            "images": self._images.numbers,
            "splits": self._splits.numbers,
            "metas": self._metas.numbers,
            "facts": (compact_json({"facts": facts.to_json()}) for facts in self._facts.numbers),
            "sources": self._sources.numbers,
            "documents": documents,
        }
        for of, some in texts.items():
            made = Texts.of(some)
            arrays[f"{of}_joined"], arrays[f"{of}_ends"] = made.joined, made.ends
        arrays["document_bytes"] = np.array([seal.bytes for seal in documents.values()], "<i8")
        checksums = bytes.fromhex("".join(seal.checksum for seal in documents.values()))
        arrays["document_checksum"] = np.frombuffer(checksums, np.uint8).reshape(-1, 16)
        return ManifestTable(Prefix(self.bytes, self.lines, head, tail), arrays)


_NOTHING = (NONE, NONE, NONE, NONE, 0, 0, NO_CONTENTS, (NO_NUMBER,) * 3, (NO_NUMBER,) * 2)


def _column(name: str, values: Iterable[Any]) -> NDArray[Any]:
    """The values of a column as an array."""
    if name == "contents":
        return np.frombuffer(b"".join(values), np.uint8).reshape(-1, WIDTHS[name])
    found = np.array(list(values), DTYPES[name])
    return found.reshape(-1, WIDTHS[name]) if name in WIDTHS else found


def _alike(arrays: dict[str, NDArray[Any]]) -> NDArray[np.int32]:
    """A number for each subject, equal where images have the same names and facts, in the same order."""
    images, facts = (arrays[name][arrays["rows"]].tolist() for name in ("image", "fact"))
    pairs = list(zip(images, facts, strict=True))
    kinds = _Numbered[tuple[tuple[int, int], ...]]()
    ends = arrays["row_end"].tolist()
    return np.array(
        [kinds.number_of(tuple(pairs[a:b])) for a, b in zip([0, *ends], ends, strict=False)], "<i4"
    )


@lru_cache(maxsize=1024)
def _spacing(directions: Directions) -> tuple[float, ...]:
    with np.errstate(all="ignore"):
        return spacing_mm(np.array(directions, dtype=np.float64))


def _contents(files: Any) -> bytes:
    """The digest of all files of an image, as ``ImageRecord.contents`` is; zeros where there are none."""
    checksums = "".join([seal[1] for _, seal in sorted(files.items())])
    return bytes.fromhex(digest(checksums.encode())) if files else NO_CONTENTS


def _is_text(name: Any) -> bool:
    """Whether a name is a text that is not empty and has no half of a pair of surrogates."""
    return isinstance(name, str) and bool(name) and (name.isascii() or _can_be_encoded(name))


def _can_be_encoded(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _document(value: Json, where: str) -> dict[str, FileSeal]:
    try:
        seal = FileSeal(value["bytes"], value["checksum"])
        check_sealed_file(value["document"], seal)
        if len(bytes.fromhex(seal.checksum)) != 16 or seal.bytes >= MOST:
            raise ValueError(f"a seal {seal}")
    except KeyError as error:
        raise DamageError(f"{where} is no document record (no {error})") from None
    except ValueError as error:
        raise DamageError(f"{where} is no document record ({error})") from None
    return {value["document"]: seal}
