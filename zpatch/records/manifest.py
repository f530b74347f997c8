"""The manifest: one sealed line for each committed image or document; the last line of each wins.

Lines are found through the table beside the manifest, and each is compared with its checksum when its record
is accessed, so that a cohort of a hundred thousand subjects opens at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from zpatch.digests import FileSeal, Json, digest, sealed_line, unsealed
from zpatch.errors import DamageError
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest_table import ManifestTable, Prefix, read_table, write_table
from zpatch.records.names import MANIFEST_TABLE
from zpatch.records.table_builder import TableBuilder
from zpatch.runtime.guarded_files import OpenFile, open_regular
from zpatch.runtime.whole_file import whole_file

Key = tuple[str, str]
MOST_MANIFEST_BYTES = 2**36
MOST_LINE_BYTES = 2**26
BLOCK_BYTES = 2**22
END_BYTES = 2**14  # at each end of a manifest, by which its table is known
RECENT_RECORDS = 256


class ManifestFile:
    """A manifest that is open: a version that is replaced can still be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open = OpenFile(open_regular(path))
        except FileNotFoundError:
            raise DamageError(f"{path}: it is missing; restore the file from a copy") from None
        except OSError as error:
            raise DamageError(
                f"{path}: it cannot be read ({error.strerror}); restore it from a copy"
            ) from None
        self.bytes = os.fstat(self._open.number).st_size
        if self.bytes > MOST_MANIFEST_BYTES:
            raise DamageError(f"{path}: it has {self.bytes} bytes, more than {MOST_MANIFEST_BYTES}")

    def read(self, start: int, stop: int) -> bytes:
        """Some bytes; fewer where the file ends."""
        parts = []
        while start < stop and (part := os.pread(self._open.number, stop - start, start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def ends(self, stop: int) -> tuple[str, str]:
        """Digests of the first and the last bytes before ``stop``."""
        head, tail = self.read(0, min(stop, END_BYTES)), self.read(max(0, stop - END_BYTES), stop)
        return digest(head), digest(tail)

    def lines(self, start: int, stop: int) -> Iterator[bytes]:
        """The whole lines between two offsets, without their line breaks."""
        rest = b""
        while block := self.read(start, min(stop, start + BLOCK_BYTES)):
            start += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
            if len(rest) > MOST_LINE_BYTES:
                raise DamageError(
                    f"{self.path}: a line has more than {MOST_LINE_BYTES} bytes; restore the file from a copy"
                )

    def covers(self, prefix: Prefix) -> bool:
        """Whether the file begins with what a table covers."""
        return prefix.bytes <= self.bytes and self.ends(prefix.bytes) == (prefix.head, prefix.tail)


class Records(Mapping[Key, ImageRecord]):
    """The committed images by (subject, image), in manifest order; a record is parsed on access."""

    def __init__(self, file: ManifestFile, table: ManifestTable) -> None:
        self._file, self._table = file, table
        self._recent = lru_cache(RECENT_RECORDS)(partial(_record, file, table))

    def __getitem__(self, key: Key) -> ImageRecord:
        row = self._table.row_of(*key)
        if row is None:
            raise KeyError(key)
        return self._recent(row)

    def at(self, row: int) -> ImageRecord:
        """The record of a row of the table."""
        return self._recent(row)

    def of(self, subjects: Iterable[str]) -> Iterator[ImageRecord]:
        """The records of some subjects, in the order of the manifest."""
        numbers = [self._table.subjects.number_of(name) for name in subjects]
        rows = (row for number in numbers if number is not None for row in self._table.rows_of(number))
        return map(self.at, sorted(rows))

    def __iter__(self) -> Iterator[Key]:
        return map(self._table.key, range(len(self._table)))

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: object) -> bool:
        is_key = isinstance(key, tuple) and len(key) == 2 and all(isinstance(name, str) for name in key)
        return is_key and self._table.row_of(*key) is not None  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return _records_of, (self._file.path, self._table.prefix)


class Documents(Mapping[str, FileSeal]):
    """The sealed files outside the images, by their path relative to the store, sorted."""

    def __init__(self, table: ManifestTable) -> None:
        self._table = table

    def __getitem__(self, name: str) -> FileSeal:
        number = self._table.documents.number_of(name)
        if number is None:
            raise KeyError(name)
        return self._table.document_seal(number)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.documents)

    def __len__(self) -> int:
        return len(self._table.documents)


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """A manifest file and its table; where it is pickled, only its path and its length are.

    ``documents`` are the sealed files outside the images, by their path relative to the store.
    """

    file: ManifestFile
    table: ManifestTable
    records: Records
    documents: Documents

    @classmethod
    def of(cls, file: ManifestFile, table: ManifestTable) -> Manifest:
        """The manifest of an open file."""
        return cls(file, table, Records(file, table), Documents(table))

    @property
    def whole_bytes(self) -> int:
        """The length of all whole lines; an incomplete one may follow them."""
        return self.table.prefix.bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.file.path, self.table.prefix)


def read_manifest(path: Path) -> Manifest:
    """Read all lines of a manifest. An incomplete last line is ignored; any other invalid line raises
    ``DamageError``."""
    file = ManifestFile(path)
    return Manifest.of(file, _table_of(file, None))


def open_manifest(path: Path) -> Manifest:
    """Open a manifest by its table, and read the lines that it does not cover; all if there is no table.

    A table that does not cover all is made again, if the folder can be written to.
    """
    file = ManifestFile(path)
    place = path.with_name(MANIFEST_TABLE)
    before = read_table(place)
    found = Manifest.of(file, _table_of(file, before))
    if found.table is not before and place.exists():
        with contextlib.suppress(OSError), whole_file(place) as partial_file:
            write_table(found.table, partial_file)
    return found


def save_table(path: Path, partial_file: Path) -> None:
    """Let the table beside a manifest cover all of it; it is written to ``partial_file`` first."""
    file, place = ManifestFile(path), path.with_name(MANIFEST_TABLE)
    before = read_table(place)
    table = _table_of(file, before)
    if table is not before:
        with whole_file(place, partial_file) as written:
            write_table(table, written)


def _table_of(file: ManifestFile, before: ManifestTable | None, stop: int | None = None) -> ManifestTable:
    """The table of all lines up to ``stop``, by one that may cover the first of them."""
    end = file.bytes if stop is None else stop
    if before is not None and not (before.prefix.bytes <= end and file.covers(before.prefix)):
        before = None
    if before is not None and before.prefix.bytes == end:
        return before
    builder = TableBuilder(before)
    for line in file.lines(builder.bytes, end):
        builder.add(line, f"{file.path}, line {builder.lines + 1}")
    if before is not None and builder.bytes == before.prefix.bytes:
        return before
    return builder.table(*file.ends(builder.bytes))


def _reopened(path: Path, prefix: Prefix) -> Manifest:
    """The manifest as far as a table covered it in another process."""
    file = ManifestFile(path)
    if not file.covers(prefix):
        raise DamageError(f"{path}: it was replaced since its cohort was opened; open the cohort again")
    return Manifest.of(file, _table_of(file, read_table(path.with_name(MANIFEST_TABLE)), prefix.bytes))


def _records_of(path: Path, prefix: Prefix) -> Records:
    return _reopened(path, prefix).records


def _record(file: ManifestFile, table: ManifestTable, row: int) -> ImageRecord:
    """The record of a row; DamageError if its line is not the one that the table was made of."""
    start = int(table.arrays["start"][row])
    where = f"{file.path}, line {table.arrays['line'][row]}"
    value = unsealed(file.read(start, start + int(table.arrays["length"][row])), where)
    if (value.get("subject"), value.get("image")) != table.key(row):
        raise DamageError(f"{where} is of another image than {MANIFEST_TABLE} says; remove that file")
    return ImageRecord.from_json(value, where)


def append_lines(path: Path, *values: Json) -> None:
    """Append lines in one write, so that the images of a subject are committed together, and sync them."""
    lines = memoryview("".join(sealed_line(value) + "\n" for value in values).encode())
    handle = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with open(handle, "ab", buffering=0) as stream:
        while lines:  # a disk that runs full takes a part, and fails at the next write only
            lines = lines[stream.write(lines) :]
        os.fsync(stream.fileno())
