"""The hash of the format, and its two seals: of files, and of JSON lines that hold their own digest."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

from zpatch.errors import DamageError

Json = dict[str, Any]
# Never the last key of a line: "checksum" and "chunks" sort after it.
_CHECK = re.compile(rb'"check":"([0-9a-f]{32})",')


def new_digest(data: bytes = b"") -> hashlib.blake2b:
    """The hash of the format, blake2b-128, of ``data`` so far; ``update`` adds bytes."""
    return hashlib.blake2b(data, digest_size=16)


def digest(data: bytes) -> str:
    """The blake2b-128 of ``data``, in hexadecimal."""
    return new_digest(data).hexdigest()


def parsed_json(data: bytes) -> Json:
    """A JSON object of a file that may come from anyone; anything else raises ValueError."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def file_digest(file: BinaryIO) -> str:
    """The blake2b-128 of an open file, which is at its beginning afterwards."""
    file.seek(0)
    found = hashlib.file_digest(file, new_digest).hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return found


def compact_json(value: Json) -> str:
    """JSON with sorted keys and no spaces; NaN and infinity are errors."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sealed_line(value: Json) -> str:
    """A manifest line: compact JSON with ``check``, the digest of the line without that field."""
    return compact_json({**value, "check": digest(compact_json(value).encode())})


def check_seal(line: bytes | memoryview, where: str) -> None:
    """Raise ``DamageError`` unless a line has a ``check`` that is the digest of the rest of the line."""
    check = _CHECK.search(line)
    if check is None:
        raise DamageError(f"{where} is not a manifest line; restore the file from a copy")
    if check[1].decode() != digest(bytes(line[: check.start()]) + bytes(line[check.end() :])):
        raise DamageError(f"{where} does not match its checksum; restore the file from a copy")


def unsealed(line: bytes | memoryview, where: str) -> Json:
    """The value of a manifest line, without its ``check``; a wrong one raises ``DamageError``."""
    check_seal(line, where)
    try:
        value = parsed_json(bytes(line))
        del value["check"]
    except (ValueError, KeyError) as error:  # sealed so by a program that is not zpatch
        raise DamageError(f"{where} is no manifest line ({error}); restore the file from a copy") from None
    return value


@dataclass(frozen=True, slots=True)
class FileSeal:
    """The length of a file, and the blake2b-128 of its bytes."""

    bytes: int
    checksum: str
