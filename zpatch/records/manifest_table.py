"""The table of a manifest: what cohorts, samplers and resuming need of each image, as mapped arrays.

``manifest.index`` is made from ``manifest.jsonl``, which alone says what is committed: a table that is
missing, damaged, or of another manifest is made again. Processes that map the same file share its memory.

The file is a sealed JSON line, and the arrays. The line says which part of the manifest the table covers, and
where each array begins, its type and shape. All arrays have one crc32c.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.codec import crc32c
from zpatch.digests import FileSeal, Json, parsed_json, sealed_line, unsealed
from zpatch.errors import DamageError
from zpatch.records.image_facts import ImageFacts
from zpatch.records.texts import Texts
from zpatch.runtime.guarded_files import open_regular

FORMAT = 1
ALIGNMENT = 64
MOST_HEADER_BYTES = 2**16

TEXTS = ("subjects", "images", "splits", "metas", "facts", "sources", "documents")
# Of each image, in the order of the manifest: numbers of texts (-1 is none), ...
NUMBERS = {
    "subject": "subjects",
    "image": "images",
    "split": "splits",
    "meta": "metas",
    "fact": "facts",
    "source": "sources",
}
# ... the number of its line, where that begins, its bytes, and more of its record.
COLUMNS = (
    *("subject", "image", "line", "start", "length", "split", "meta", "fact", "source"),
    *("source_bytes", "source_mtime_ns", "contents", "spacing", "range"),
)
WIDTHS = {"contents": 16, "spacing": 3, "range": 2}
DTYPES = {
    **dict.fromkeys(COLUMNS, "<i8"),
    **dict.fromkeys(NUMBERS, "<i4"),
    "contents": "|u1",  # (N, 16), the digest of all files; zeros where there are none
    "spacing": "<f8",  # (N, 3), in the unit of the affine
    "range": "<f8",  # (N, 2), the percentiles 0.5 and 99.5; NaN where there are none
    "rows": "<i4",  # the images of the subjects, in the order of the subjects, ...
    "row_end": "<i8",  # ... and where those of each subject end
    "alike": "<i4",  # equal for subjects whose images have the same names and facts
    "document_bytes": "<i8",
    "document_checksum": "|u1",  # (D, 16)
    **{f"{name}_joined": "|u1" for name in TEXTS},
    **{f"{name}_ends": "<i8" for name in TEXTS},
}


@dataclass(frozen=True, slots=True)
class Prefix:
    """The part of a manifest that a table covers: all lines in its first ``bytes``.

    ``head`` and ``tail`` are digests of the first and the last bytes of that part, ``lines`` their number.
    """

    bytes: int
    lines: int
    head: str
    tail: str


class ManifestTable:
    """The arrays of a table by name; see ``DTYPES``. A row is an image, by its place in the manifest."""

    def __init__(self, prefix: Prefix, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.prefix = prefix
        self.arrays = arrays
        for name in TEXTS:
            setattr(self, name, Texts(arrays[f"{name}_joined"], arrays[f"{name}_ends"]))
        self._facts_of = lru_cache(maxsize=4096)(partial(_parsed_facts, self.facts))

    subjects: Texts  # sorted
    images: Texts
    splits: Texts
    metas: Texts
    facts: Texts
    sources: Texts
    documents: Texts  # sorted

    def __len__(self) -> int:
        return len(self.arrays["line"])

    def key(self, row: int) -> tuple[str, str]:
        """Subject and image of a row."""
        return self.subjects[int(self.arrays["subject"][row])], self.images[int(self.arrays["image"][row])]

    def rows_of(self, subject: int) -> list[int]:
        """The rows of a subject by its number, in the order of the manifest."""
        ends = self.arrays["row_end"]
        found: list[int] = self.arrays["rows"][
            int(ends[subject - 1]) if subject else 0 : ends[subject]
        ].tolist()
        return found

    def row_of(self, subject: str, image: str) -> int | None:
        """The row of an image; None if there is none."""
        number = self.subjects.number_of(subject)
        if number is None:
            return None
        return next(
            (row for row in self.rows_of(number) if self.images[self.arrays["image"][row]] == image), None
        )

    @cached_property
    def first_rows(self) -> NDArray[np.int32]:
        """The first row of each subject, (S,)."""
        ends = self.arrays["row_end"]
        return np.asarray(self.arrays["rows"][np.concatenate([[0], ends[:-1]]) if len(ends) else []])

    def facts_of(self, row: int) -> ImageFacts | None:
        """The facts of a row; None where its line is no record, as parsing it will say."""
        number = int(self.arrays["fact"][row])
        return None if number < 0 else self._facts_of(number)

    def all_facts(self) -> Iterator[ImageFacts]:
        """All different facts, in the order of their numbers."""
        return map(partial(_parsed_facts, self.facts), range(len(self.facts)))

    def split_of(self, row: int) -> str | None:
        """The split of a row."""
        number = int(self.arrays["split"][row])
        return None if number < 0 else self.splits[number]

    def meta_of(self, row: int) -> Json:
        """The metadata of a row."""
        number = int(self.arrays["meta"][row])
        return {} if number < 0 else parsed_json(self.metas[number].encode())

    def source_of(self, row: int) -> tuple[str, int, int] | None:
        """Path, bytes and time (ns) of the file that a row was converted from; None if it was not."""
        number, arrays = int(self.arrays["source"][row]), self.arrays
        if number < 0:
            return None
        return self.sources[number], int(arrays["source_bytes"][row]), int(arrays["source_mtime_ns"][row])

    def contents_of(self, row: int) -> str:
        """The digest of all files of a row; empty where it has none."""
        found = self.arrays["contents"][row]
        return found.tobytes().hex() if found.any() else ""

    def document_seal(self, number: int) -> FileSeal:
        """The seal of a document by its number."""
        checksum = self.arrays["document_checksum"][number].tobytes().hex()
        return FileSeal(int(self.arrays["document_bytes"][number]), checksum)

    @property
    def is_sound(self) -> bool:
        """Whether no number leads out of its array."""
        arrays, rows, subjects = self.arrays, len(self), len(self.subjects)
        ends = np.concatenate([[0], arrays["row_end"]])
        return (
            all(getattr(self, name).is_sound for name in TEXTS)
            and all(len(arrays[name]) == rows for name in (*COLUMNS, "rows"))
            and all(arrays[name].shape[1:] == (width,) for name, width in WIDTHS.items())
            and all(_within(arrays[name], -1, len(getattr(self, of))) for name, of in NUMBERS.items())
            and _within(arrays["subject"], 0, subjects)
            and _within(arrays["image"], 0, len(self.images))
            and _within(arrays["rows"], 0, rows)
            and bool((np.diff(ends) > 0).all())
            and (len(ends) - 1, int(ends[-1])) == (subjects, rows)
            and len(arrays["alike"]) == subjects
            and _within(arrays["start"], 0, self.prefix.bytes)
            and _within(arrays["length"], 0, self.prefix.bytes + 1)
            and len(arrays["document_bytes"]) == len(self.documents) == len(arrays["document_checksum"])
        )


def _parsed_facts(texts: Texts, number: int) -> ImageFacts:
    return ImageFacts.of_json(parsed_json(texts[number].encode())["facts"])


def _within(values: NDArray[Any], low: int, high: int) -> bool:
    return not len(values) or bool(values.min() >= low and values.max() < high)


def read_table(path: Path) -> ManifestTable | None:
    """The table in a file, which is mapped; None for one that is missing, damaged or of another format."""
    try:
        handle = open_regular(path)
    except OSError:
        return None
    try:
        mapped = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # it is empty
        return None
    finally:
        os.close(handle)
    try:
        table = _parsed(np.frombuffer(mapped, np.uint8), path)
    except (DamageError, ValueError, TypeError, KeyError, IndexError, OverflowError):
        return None
    return table if table is not None and table.is_sound else None


def _parsed(data: NDArray[np.uint8], path: Path) -> ManifestTable | None:
    line = data[:MOST_HEADER_BYTES].tobytes().partition(b"\n")[0]
    header = unsealed(line, str(path))
    body = data[_aligned(len(line) + 1) :]
    if header["format"] != FORMAT or crc32c(body) != bytes.fromhex(header["checksum"]):
        return None
    arrays = {}
    for name, (offset, dtype, *shape) in header["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        if name not in DTYPES or dtype != DTYPES[name] or offset < 0 or count < 0:
            return None
        arrays[name] = np.frombuffer(body, dtype, count, offset).reshape(shape)
    return ManifestTable(Prefix(**header["manifest"]), arrays)


def write_table(table: ManifestTable, partial: Path) -> None:
    """Write the file of a table."""
    offset, places, parts = 0, {}, []
    for name, array in table.arrays.items():
        data = np.ascontiguousarray(array, DTYPES[name])
        places[name] = [offset, DTYPES[name], *data.shape]
        parts += [data.tobytes(), bytes(_aligned(data.nbytes) - data.nbytes)]
        offset += _aligned(data.nbytes)
    body = b"".join(parts)
    header = {
        "format": FORMAT,
        "manifest": asdict(table.prefix),
        "arrays": places,
        "checksum": crc32c(body).hex(),
    }
    line = sealed_line(header).encode() + b"\n"
    partial.write_bytes(line + bytes(_aligned(len(line)) - len(line)) + body)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
