"""An image written shard by shard, by processes on any machines; resumed after any of them is killed.

Beside the folder of the image is its ledger, with one file for each written shard, its entry. So no process
waits for another, and no entry is ever half written::

    <subject>/.ledger.json                      the header: all that the voxels below depend on
    <subject>/<digest of the header>/           the outputs made with this header; tasks on a cluster that
                                                still work with another header write to another folder
        .ledger/<image>/<c>.<z>.<y>.<x>.json    the entry of a shard: its seal and its statistics
        <image>/0/c/...                         the shards
        <image>/1/c/..., 2/c/...                those of coarser levels, made when all others are written;
                                                their entries are called <level>-<c>.<z>.<y>.<x>.json

An entry is made after its shard is in place, and only a shard with an entry counts as written. Both are
written under another name, synced and renamed, so a shard may be written twice. Statistics are merged from
the entries in C order of the shards: they do not depend on which process wrote which shard, or when.

The ledger is removed when the image is committed, and not before: a process that is killed earlier can be
repeated.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import stat
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.gather import read_region
from zpatch.chunks.levels import halved_shard
from zpatch.chunks.mapped_shards import close_shards
from zpatch.chunks.shard_writer import write_shard
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.digests import FileSeal, Json, compact_json, digest, sealed_line, unsealed
from zpatch.errors import DamageError, IncompleteCoverageError
from zpatch.planning.prediction_options import check_same
from zpatch.records.image_record import ImageRecord, check_sealed_file
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.runtime.guarded_files import read_document
from zpatch.runtime.whole_file import clear_folder, link_or_copy, whole_file
from zpatch.store.image_writer import ImageTally, Shard
from zpatch.store.staged_image import StagedImage
from zpatch.store.store import sharded_array
from zpatch.store.verification import damage_of

LEDGER = ".ledger"
HEADER = ".ledger.json"
MOST_STATE_BYTES = 2**30  # unpacked; those of zpatch have some MiB at most


@dataclass(frozen=True, slots=True)
class _Entry:
    """The entry of a written shard.

    Attributes:
        shard: Its number along (c, z, y, x).
        file: Its file, relative to the folder of the image.
        seal: The seal of that file.
        skipped: How many of its voxels were filled and not predicted.
        not_finite: How many were predicted as NaN or infinite, before they were reduced.
        state: The packed state of its tally; empty in a coarser level, whose voxels are not counted.
        level: The number of its level: 0 for the voxels themselves.
    """

    shard: Shard
    file: str
    seal: FileSeal
    skipped: int
    not_finite: int
    state: str
    level: int = 0

    def to_json(self) -> Json:
        return {
            "unit": self.shard,
            "file": self.file,
            "seal": dataclasses.asdict(self.seal),
            "skipped": self.skipped,
            "not_finite": self.not_finite,
            "state": self.state,
            **({"level": self.level} if self.level else {}),
        }

    @classmethod
    def from_json(cls, value: Json) -> _Entry:
        """The entry of a sealed file; KeyError, TypeError or ValueError if it is none of zpatch."""
        c, z, y, x = value["unit"]
        seal = FileSeal(**value["seal"])
        check_sealed_file(value["file"], seal)
        counts = value["skipped"], value.get("not_finite", 0)  # which was not counted at first
        level = value.get("level", 0)
        if not all(type(n) is int and n >= 0 for n in (c, z, y, x, *counts, level)):
            raise ValueError("a number that is none")
        return cls((c, z, y, x), value["file"], seal, *counts, value["state"], level)


class ShardLedger:
    """The written shards of the image that is being written to ``folder``.

    It holds no state, so each process makes one for itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries = folder.parent / LEDGER / folder.name

    def write(
        self,
        record: ImageRecord,
        shard: Shard,
        voxels: NDArray[Any],
        *,
        skipped: int = 0,
        not_finite: int = 0,
    ) -> None:
        """Write a whole shard, then its entry.

        ``shard`` is the number of a shard along (c, z, y, x); ``voxels`` is (c, z, y, x), little-endian,
        clipped to the image; ``skipped`` is how many of them were filled and not predicted, ``not_finite``
        how many were predicted as NaN or infinite. Raises OSError if the disk fails, and leaves nothing half
        written.
        """
        array = sharded_array(self.folder, record)
        tally = ImageTally(record, array.name)
        seal = self._write_shard(array, shard, voxels, record.codec, tally.counting(shard, voxels))
        state = _packed(tally.state())
        self._enter(_Entry(shard, self._key(array, shard), seal, skipped, not_finite, state))

    def has(self, shard: Shard, level: int = 0) -> bool:
        """Whether a shard is written: it has a sound entry, and its file has the length given there."""
        return self._read(self._entry_file(shard, level)) is not None

    def _write_shard(
        self,
        array: ShardedArray,
        shard: Shard,
        voxels: NDArray[Any],
        codec: str,
        meanwhile: AbstractContextManager[None],
    ) -> FileSeal:
        names = dataclasses.replace(array.files, prefix=_partial_name(), separator=".")
        partial = dataclasses.replace(array, path=self._entries, files=names)
        with whole_file(array.shard_file(shard), partial.shard_file(shard), is_synced=True), meanwhile:
            return write_shard(partial, shard, voxels, codec)

    def _write_levels(self, record: ImageRecord) -> dict[str, FileSeal]:
        """Write the shards of coarser levels that are not written yet, each level from the finer one.

        Returns the seals of all of them. If a finer shard is damaged, its entry is removed, so that the next
        run makes it again, and DamageError is raised.
        """
        seals = {}
        for level in range(1, len(record.levels) + 1):
            fine, coarse = (sharded_array(self.folder, record, number) for number in (level - 1, level))
            for c, z, y, x in np.ndindex(coarse.shard_grid):
                shard = (c, z, y, x)
                entry = self._read(self._entry_file(shard, level))
                if entry is None:
                    try:
                        voxels = halved_shard(fine, coarse, shard, majority=record.kind == "label")
                    except DamageError as error:
                        found = self._forget_damaged(fine, level - 1)
                        raise DamageError(
                            f"{fine}: {', '.join(found) or 'a file'} changed after it was written; run the "
                            f"same command again: it makes only that again"
                        ) from error
                    finally:
                        close_shards(fine.path)
                    seal = self._write_shard(coarse, shard, voxels, record.codec, nullcontext())
                    entry = _Entry(shard, self._key(coarse, shard), seal, 0, 0, "", level)
                    self._enter(entry)
                seals[entry.file] = entry.seal
        return seals

    def _forget_damaged(self, array: ShardedArray, level: int) -> list[str]:
        """Remove the entries of all shards of a level whose bytes have changed, and give their files."""
        found = []
        for c, z, y, x in np.ndindex(array.shard_grid):
            file = self._entry_file((c, z, y, x), level)
            entry = self._read(file)
            if entry is not None and damage_of(self.folder, entry.file, entry.seal, quick=False):
                file.unlink()
                found.append(entry.file)
        return found

    def adopt(self, image: Path, record: ImageRecord) -> None:
        """Take over all sound shards of the committed image in the folder ``image``, which is not modified.

        A shard is sound if its file has the sealed bytes. Shards are read one at a time, because the
        statistics of each are counted again. How many voxels of a shard were skipped or not finite is not
        known, so ``finish`` must be given the record.
        """
        for level in range(len(record.levels) + 1):
            array = sharded_array(self.folder, record, level)
            for c, z, y, x in np.ndindex(array.shard_grid):
                shard, file = (c, z, y, x), array.shard_file((c, z, y, x))
                key = self._key(array, shard)
                if self.has(shard, level) or damage_of(image, key, record.files[key], quick=False):
                    continue
                file.unlink(missing_ok=True)
                with whole_file(file, self._entries / _partial_name(), is_synced=True) as partial:
                    link_or_copy(image / key, partial)
                state = "" if level else _packed(_counted(record, array, shard))
                self._enter(_Entry(shard, key, record.files[key], 0, 0, state, level))
        close_shards(self.folder)

    def finish(
        self,
        record: ImageRecord,
        raw_header: bytes,
        warnings: Sequence[str] = (),
        *,
        damaged_tiles: int = 0,
        mended: ImageRecord | None = None,
    ) -> ImageRecord:
        """Write the coarser levels and all other files of the image; return its record, with its seals.

        ``stats["skipped"]`` is how many voxels were filled and not predicted, ``stats["not_finite"]`` how
        many were predicted as NaN or infinite, ``stats["damaged_tiles"]`` is ``damaged_tiles``, if there are
        any; they are those of ``mended``, the committed record of an image that is mended, or else the sums
        over all entries. Shards are read for coarser levels only, those of a few at a time. May be repeated,
        also after it was killed. Raises IncompleteCoverageError if shards are missing.
        """
        array = sharded_array(self.folder, record)
        tally = ImageTally(record, array.name)
        seals: dict[str, FileSeal] = {}
        missing: list[Shard] = []
        skipped = not_finite = 0
        for c, z, y, x in np.ndindex(array.shard_grid):
            entry = self._read(self._entry_file((c, z, y, x)))
            if entry is None:
                missing.append((c, z, y, x))
                continue
            try:
                tally.merge(_unpacked(entry.state))
            except Exception as error:  # numpy, zipfile and tallies raise many kinds
                raise DamageError(
                    f"{self._entry_file(entry.shard)}: its statistics cannot be read ({error}); remove it, "
                    f"and run the same command again"
                ) from error
            seals[entry.file] = entry.seal
            skipped += entry.skipped
            not_finite += entry.not_finite
        if missing:
            raise IncompleteCoverageError(
                f"{array.name}: {len(missing)} of {len(missing) + len(seals)} shards are not written, the "
                f"first one {missing[0]} along c, z, y, x; run the same command again"
            )
        levels = [sharded_array(self.folder, record, number) for number in range(len(record.levels) + 1)]
        clear_folder(self.folder, keep=[level.path / level.files.prefix for level in levels])
        stage = StagedImage(self.folder, seals | self._write_levels(record))
        counts = {"skipped": skipped, "not_finite": not_finite, "damaged_tiles": damaged_tiles}
        if mended is not None:  # the entries of adopted shards do not say
            counts = {name: mended.stats.get(name, 0) for name in counts}
        return tally.finish(stage, raw_header, warnings=warnings, counts=counts)

    def _key(self, array: ShardedArray, shard: Shard) -> str:
        return array.shard_file(shard).relative_to(self.folder).as_posix()

    def _entry_file(self, shard: Shard, level: int = 0) -> Path:
        return self._entries / f"{f'{level}-' if level else ''}{'.'.join(map(str, shard))}.json"

    def _enter(self, entry: _Entry) -> None:
        _write_sealed(self._entry_file(entry.shard, entry.level), entry.to_json())

    def _read(self, path: Path) -> _Entry | None:
        """The entry of a shard, if it is sound and the file of its shard exists."""
        value = _read_sealed(path)
        if value is None:
            return None
        try:
            entry = _Entry.from_json(value)
            status = os.stat(self.folder / entry.file)
        except (KeyError, TypeError, ValueError, OSError):
            return None
        is_there = stat.S_ISREG(status.st_mode) and status.st_size == entry.seal.bytes
        return entry if is_there and path == self._entry_file(entry.shard, entry.level) else None


def begin(folder: Path, header: Json, *, writes: bool = True) -> Path:
    """Write the header of a folder, all that its images depend on; return the folder to write them to.

    ``header`` is flat JSON. Raises StoreExistsError if the folder has another header. If its header is lost,
    shards that were written with another one are left as they are. ``writes=False`` only compares.
    """
    header = json.loads(compact_json(header))
    if (before := header_of(folder)) is not None:
        check_same(before, header, folder)
    elif writes:
        _write_sealed(folder / HEADER, {"header": header})
    return folder / digest(compact_json(header).encode())


def header_of(folder: Path) -> Json | None:
    """The header of a folder, or None if it has none."""
    found = (_read_sealed(folder / HEADER) or {}).get("header")
    return found if isinstance(found, dict) else None


def _write_sealed(path: Path, value: Json) -> None:
    with whole_file(path, path.with_name(_partial_name())) as partial:
        partial.write_bytes(sealed_line(value).encode())


def _read_sealed(path: Path) -> Json | None:
    """The value in a sealed file; None if the file does not exist or is damaged."""
    try:
        return unsealed(read_document(path), str(path))
    except (FileNotFoundError, DamageError):
        return None


def _partial_name() -> str:
    """A name that no other process uses or looks for."""
    return f"{uuid.uuid4().hex}.partial"


def _counted(record: ImageRecord, array: ShardedArray, shard: Shard) -> Mapping[str, NDArray[Any]]:
    """The state of the tally of a shard that is read from its file."""
    first = [n * s for n, s in zip(shard, array.shards, strict=True)]
    stop = [min(a + s, n) for a, s, n in zip(first, array.shards, array.shape, strict=True)]
    tally = ImageTally(record, array.name)
    tally.update(shard, read_region(array, first, stop))
    return tally.state()


def _packed(state: Mapping[str, NDArray[Any]]) -> str:
    stream = io.BytesIO()
    np.savez_compressed(stream, **state)  # type: ignore[arg-type]  # none is called allow_pickle
    return base64.b64encode(stream.getvalue()).decode()


def _unpacked(text: str) -> Mapping[str, NDArray[Any]]:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        size = sum(member.file_size for member in arrays.zip.infolist())
        if size > MOST_STATE_BYTES:
            raise ValueError(f"{format_bytes(size)} is too much")
        return dict(arrays)
