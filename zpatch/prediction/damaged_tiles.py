"""Tiles of slides that were read as 0 because they are damaged: noted by all processes, once each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from zpatch.digests import digest
from zpatch.errors import DamageError
from zpatch.records.image_record import ImageRecord
from zpatch.runtime.guarded_files import read_document
from zpatch.runtime.whole_file import whole_file

FOLDER = ".damaged"  # in the folder of a subject that is predicted; no output has such a name
SHOWN = 3
_START = "damaged: "


def note_damaged(folder: Path, found: Mapping[str, str]) -> None:
    """Note damaged tiles, by their keys, a file for each; several processes may note the same one."""
    for key, text in found.items():
        file = folder / FOLDER / f"{digest(key.encode())}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file, file.with_name(f".{os.getpid()}.partial")) as partial:
                partial.write_text(json.dumps(text))


def damaged_in(folder: Path) -> list[str]:
    """The errors of the damaged tiles that were noted, in a fixed order."""
    return sorted(str(json.loads(read_document(file))) for file in (folder / FOLDER).glob("*.json"))


def damaged_warnings(errors: Sequence[str]) -> list[str]:
    """The warnings of an image that damaged tiles were read for: the first ones, and how many there are."""
    more = [f"{_START}{len(errors)} tiles in all were read as 0"] if errors else []
    return [*errors[:SHOWN], *more]


def damaged_of(record: ImageRecord) -> list[str]:
    """Those warnings of an image that is committed."""
    return [warning for warning in record.warnings if warning.startswith(_START)]


def damaged_text(records: Iterable[ImageRecord]) -> str | None:
    """How many damaged tiles some predictions were made of; None for none."""
    counts = {
        f"{r.subject}/{r.image}": r.stats["damaged_tiles"] for r in records if "damaged_tiles" in r.stats
    }
    if not counts:
        return None
    named = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return f"damaged tiles were read as 0 for {named}; restore the file, and predict it again"


def check_undamaged(records: Iterable[ImageRecord]) -> None:
    """Raise DamageError if any image was made of damaged tiles, in an earlier run."""
    if text := damaged_text(records):
        raise DamageError(f"{text}; leave out strict=True, or say overwrite=True to start over")
