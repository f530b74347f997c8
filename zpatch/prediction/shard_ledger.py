"""An image written shard by shard, by any processes on any machines, and resumed after any of them died.

Each shard is written whole. Beside the folder of the image is the ledger, with one record for each shard,
so that no process waits for another and no line is ever torn::

    <subject>/.ledger.json                      what all voxels below depend on
    <subject>/<digest of that>/                 all that is written of them: whoever still works for something
                                                else, as tasks on a cluster may, writes elsewhere
        .ledger/<image>/<c>.<z>.<y>.<x>.json    one written shard: its seal and what was counted in it
        <image>/0/c/...                         the shards

A record is made after its shard is in place, and it is what counts: a shard without one proves nothing. Both
are written under another name, synced and renamed, so that doing a shard twice is as good as once. Statistics
are merged from the records in C order of the shards, and so are the same whoever wrote which shard when.

The ledger goes when the image is committed, not before: whatever dies earlier can be repeated.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.shard_writer import write_shard
from zpatch.digests import FileSeal, Json, compact_json, digest, sealed_line, unsealed
from zpatch.errors import DamageError, IncompleteCoverageError, StoreExistsError
from zpatch.store.image_record import ImageRecord
from zpatch.store.image_writer import ImageTally, Shard
from zpatch.store.staged_image import StagedImage, sync_folder
from zpatch.store.store import sharded_array
from zpatch.store.voxel_statistics import State

LEDGER = ".ledger"
HEADER = ".ledger.json"
SHOWN_CHANGES = 5
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class _Entry:
    """The record of a shard: its file in the image's folder, that file's seal, how many of its voxels were
    filled and not predicted, and the packed state of its tally."""

    shard: Shard
    file: str
    seal: FileSeal
    skipped: int
    state: str

    def to_json(self) -> Json:
        return {
            "unit": self.shard,
            "file": self.file,
            "seal": dataclasses.asdict(self.seal),
            "skipped": self.skipped,
            "state": self.state,
        }

    @classmethod
    def from_json(cls, value: Json) -> _Entry:
        c, z, y, x = value["unit"]
        seal = FileSeal(**value["seal"])
        return cls((c, z, y, x), value["file"], seal, value["skipped"], value["state"])


class ShardLedger:
    """The written shards of one image; ``folder`` is where the image is being written.

    It holds no state: each process makes its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries = folder.parent / LEDGER / folder.name

    def write(self, record: ImageRecord, shard: Shard, voxels: NDArray[Any], *, skipped: int = 0) -> None:
        """Write a shard, whole, then its record.

        ``shard`` is the number of a shard along (c, z, y, x); ``voxels`` is (c, z, y, x), little-endian,
        clipped to the image; ``skipped`` says how many of them were filled and not predicted. A disk that
        fails is an OSError, and nothing half done is left.
        """
        array = sharded_array(self.folder, record)
        file = array.shard_file(shard)
        tally = ImageTally(record, array.name)
        names = dataclasses.replace(array.files, prefix=_partial_name(), separator=".")
        partial = dataclasses.replace(array, path=self._entries, files=names)
        with _put_in_place(partial.shard_file(shard), file), tally.counting(shard, voxels):
            seal = write_shard(partial, shard, voxels, record.codec)
        entry = _Entry(shard, file.relative_to(self.folder).as_posix(), seal, skipped, _packed(tally.state()))
        _write_sealed(self._entry_file(shard), entry.to_json())

    def has(self, shard: Shard) -> bool:
        """Whether a shard need not be written again: it has a sound record and a shard of its length."""
        return self._read(self._entry_file(shard)) is not None

    def finish(self, record: ImageRecord, raw_header: bytes, warnings: Sequence[str] = ()) -> ImageRecord:
        """Write all of the image but its voxels, and return its record with statistics and seals.

        ``stats["skipped"]`` is how many voxels were filled and not predicted, where there are any. No shard
        is read. May be repeated, also after it was killed.
        """
        array = sharded_array(self.folder, record)
        tally = ImageTally(record, array.name)
        seals: dict[str, FileSeal] = {}
        missing: list[Shard] = []
        skipped = 0
        for c, z, y, x in np.ndindex(array.shard_grid):
            entry = self._read(self._entry_file((c, z, y, x)))
            if entry is None:
                missing.append((c, z, y, x))
                continue
            tally.merge(_unpacked(entry.state))
            seals[entry.file] = entry.seal
            skipped += entry.skipped
        if missing:
            raise IncompleteCoverageError(
                f"{array.name}: {len(missing)} of {len(missing) + len(seals)} shards are not written, the "
                f"first one {missing[0]} along c, z, y, x; run the same command again"
            )
        _clear(self.folder, keep=array.path / array.files.prefix)
        stage = StagedImage(self.folder, seals)
        return tally.finish(stage, raw_header, warnings=warnings, skipped=skipped)

    def _entry_file(self, shard: Shard) -> Path:
        return self._entries / f"{'.'.join(map(str, shard))}.json"

    def _read(self, path: Path) -> _Entry | None:
        """The record of a shard, if it is sound and its shard is there."""
        value = _read_sealed(path)
        if value is None:
            return None
        entry = _Entry.from_json(value)
        file = self.folder / entry.file
        is_there = file.is_file() and file.stat().st_size == entry.seal.bytes
        return entry if is_there and path == self._entry_file(entry.shard) else None


def begin(folder: Path, header: Json) -> Path:
    """Enter what all images below a folder depend on, and give the folder to write them in.

    ``header`` is flat JSON. Where shards were written that depend on something else, that is refused with
    StoreExistsError. Where the header is lost, those of another one are left alone.
    """
    header = json.loads(compact_json(header))
    before = _read_sealed(folder / HEADER)
    if before is None:
        _write_sealed(folder / HEADER, {"header": header})
    else:
        check_same(before["header"], header, folder)
    return folder / digest(compact_json(header).encode())


def header_of(folder: Path) -> Json | None:
    """What all images below a folder depend on, if any were begun."""
    begun = _read_sealed(folder / HEADER)
    return None if begun is None else begun["header"]


def check_same(before: Json, now: Json, place: Path) -> None:
    """Refuse to go on with what depends on something else; says what, and what it was."""
    changes = _changes(before, json.loads(compact_json(now)))
    if changes:
        more = f" (and {len(changes) - SHOWN_CHANGES} more)" if len(changes) > SHOWN_CHANGES else ""
        raise StoreExistsError(
            f"{place}: what was begun there differs in {', '.join(changes[:SHOWN_CHANGES])}{more}; "
            f"say --overwrite to start over, or choose another output"
        )


def _changes(before: Json, now: Json) -> list[str]:
    changed = (key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
    return [f"{key}: {' then, '.join(_shown(before.get(key), now.get(key)))} now" for key in changed]


def _shown(before: Any, now: Any) -> tuple[str, str]:
    """Both values, long ones from shortly before where they differ."""
    texts = [compact_json({"": value})[4:-1] for value in (before, now)]
    alike = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, alike - SHOWN_CHARACTERS // 4) if max(map(len, texts)) > SHOWN_CHARACTERS else 0
    stop = start + SHOWN_CHARACTERS
    then, later = (
        f"{'...' if start else ''}{text[start:stop]}{'...' if len(text) > stop else ''}" for text in texts
    )
    return then, later


def _write_sealed(path: Path, value: Json) -> None:
    partial = path.with_name(_partial_name())
    with _put_in_place(partial, path), partial.open("wb") as stream:
        stream.write(sealed_line(value).encode())
        stream.flush()
        os.fsync(stream.fileno())


def _read_sealed(path: Path) -> Json | None:
    """What a sealed file says; None where it is not there or not as it was written."""
    try:
        return unsealed(path.read_bytes(), str(path))
    except (FileNotFoundError, DamageError):
        return None


def _partial_name() -> str:
    """A name that nobody looks for and nobody else uses."""
    return f"{uuid.uuid4().hex}.partial"


@contextlib.contextmanager
def _put_in_place(partial: Path, file: Path) -> Iterator[None]:
    """Make a file that is there whole or not at all, of what the caller writes to ``partial``."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def _packed(state: State) -> str:
    stream = io.BytesIO()
    np.savez_compressed(stream, **state)  # type: ignore[arg-type]  # none is called allow_pickle
    return base64.b64encode(stream.getvalue()).decode()


def _unpacked(text: str) -> Mapping[str, NDArray[Any]]:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        return dict(arrays)


def _clear(folder: Path, keep: Path) -> None:
    """Remove all from a folder but one folder below it, however deep that is."""
    for entry in folder.iterdir():
        if entry == keep:
            continue
        if keep.is_relative_to(entry):
            _clear(entry, keep)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
