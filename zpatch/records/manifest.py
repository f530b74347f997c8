"""The manifest: one sealed line for each committed image or document; the last line of each wins.

Checksums of lines are compared when the manifest is read, and a line is parsed when its record is accessed,
so that a cohort of ten thousand subjects opens at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zpatch.digests import FileSeal, Json, check_seal, sealed_line, unsealed
from zpatch.errors import DamageError
from zpatch.records.image_record import ImageRecord, check_sealed_file
from zpatch.runtime.guarded_files import open_regular, read_document

Key = tuple[str, str]
MOST_MANIFEST_BYTES = 2**31

# Keys are sorted, and JSON escapes the quotes inside strings, so these find the keys of the line itself: no
# value before "image", and none after "subject", holds such a key.
_IMAGE = re.compile(rb'"image":"([^"\\]+)"')
_SUBJECT = re.compile(rb'.*"subject":"([^"\\]+)"', re.DOTALL)
_DOCUMENT = re.compile(rb'"document":"')


class Records(Mapping[Key, ImageRecord]):
    """The committed images by (subject, image), in manifest order; a record is parsed on access."""

    def __init__(self, path: Path, data: bytes, lines: Mapping[Key, tuple[int, int, int]]) -> None:
        self._path = path
        self._data = data
        self._lines = lines

    def __getitem__(self, key: Key) -> ImageRecord:
        number, start, stop = self._lines[key]
        where = f"{self._path}, line {number}"
        return ImageRecord.from_json(unsealed(self._data[start:stop], where), where)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, key: object) -> bool:
        return key in self._lines


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """The contents of a manifest file.

    ``documents`` are the sealed files outside the images, by their path relative to the store.
    ``whole_bytes`` is the length of all whole lines; an incomplete one may follow them.
    """

    records: Records
    documents: Mapping[str, FileSeal]
    whole_bytes: int


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. An incomplete last line is ignored; any other invalid line raises ``DamageError``."""
    try:
        data = read_document(path, most=MOST_MANIFEST_BYTES)
    except FileNotFoundError:
        raise DamageError(f"{path}: it is missing; restore the file from a copy") from None
    except OSError as error:
        raise DamageError(f"{path}: it cannot be read ({error.strerror}); restore it from a copy") from None
    view = memoryview(data)
    lines: dict[Key, tuple[int, int, int]] = {}
    documents: dict[str, FileSeal] = {}
    start = number = 0
    while (stop := data.find(b"\n", start)) >= 0:
        number += 1
        line = view[start:stop]
        where = f"{path}, line {number}"
        check_seal(line, where)
        image, subject = _IMAGE.search(line), _SUBJECT.match(line)
        if image and subject:
            lines[_name(subject, where), _name(image, where)] = number, start, stop
        elif _DOCUMENT.search(line):  # tested second: metadata of an image may hold such a key
            documents.update(_document(unsealed(line, where), where))
        else:
            raise DamageError(f"{where} is no image record; restore the file from a copy")
        start = stop + 1
    return Manifest(Records(path, data, lines), documents, start)


def _name(found: re.Match[bytes], where: str) -> str:
    try:
        return found[1].decode()
    except UnicodeDecodeError:
        raise DamageError(f"{where} has a name that is no text; restore the file from a copy") from None


def _document(value: Json, where: str) -> dict[str, FileSeal]:
    try:
        seal = FileSeal(value["bytes"], value["checksum"])
        check_sealed_file(value["document"], seal)
    except KeyError as error:
        raise DamageError(f"{where} is no document record (no {error})") from None
    except ValueError as error:
        raise DamageError(f"{where} is no document record ({error})") from None
    return {value["document"]: seal}


def append_lines(path: Path, *values: Json) -> None:
    """Append lines in one write, so that the images of a subject are committed together, and sync them."""
    lines = memoryview("".join(sealed_line(value) + "\n" for value in values).encode())
    handle = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with open(handle, "ab", buffering=0) as stream:
        while lines:  # a disk that runs full takes a part, and fails at the next write only
            lines = lines[stream.write(lines) :]
        os.fsync(stream.fileno())
