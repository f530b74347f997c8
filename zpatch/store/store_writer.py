"""Writing a store image by image, under a lock, so that a crash leaves the committed images and nothing else.

An image is written below ``.staging``, synced, renamed into place, and only then entered in
``manifest.jsonl``. That line is the commit: an image without a line does not exist.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections import ChainMap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Self

from zpatch.chunks.mapped_shards import close_shards
from zpatch.digests import FileSeal, Json, digest
from zpatch.errors import DamageError, StoreError, StoreExistsError
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest import Key, append_lines, open_manifest, save_table
from zpatch.records.names import FORMAT, LOCK, MANIFEST, MANIFEST_TABLE, ROOT_DOCUMENT, STAGING, UNFINISHED
from zpatch.runtime.guarded_files import read_document
from zpatch.runtime.whole_file import sync, whole_file
from zpatch.store.lock import take_lock, writing_to
from zpatch.store.staged_image import StagedImage, group_document
from zpatch.store.store import TOOL, is_store, root_attributes
from zpatch.store.verification import damage_of

PARTIAL_DOCUMENT = f"{ROOT_DOCUMENT}.partial"
OWN_NAMES = {LOCK, STAGING, ROOT_DOCUMENT, PARTIAL_DOCUMENT, MANIFEST_TABLE}


def check_can_create(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raise ``StoreExistsError`` for an existing path, unless it is an empty folder, or a store that may be
    replaced (``overwrite``) or resumed (``resume``)."""
    if _is_vacant(path):
        return
    if not is_store(path):
        raise StoreExistsError(f"{path}: it exists and is no zpatch store; choose another name")
    if not (overwrite or resume):
        raise StoreExistsError(
            f"{path}: it exists already; say overwrite=True to start over, or choose another name"
        )


def _is_vacant(path: Path) -> bool:
    """Whether a path does not exist, or holds only files of a writer killed before its first line."""
    if not path.exists():
        return True
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    return names <= OWN_NAMES and (ROOT_DOCUMENT not in names or is_store(path))


class StoreWriter:
    """The one writer of a store: a context manager that holds its lock and clears staging at its end."""

    def __init__(
        self,
        path: Path,
        lock: IO[str],
        attributes: Json,
        records: Mapping[Key, ImageRecord] = MappingProxyType({}),
        documents: Mapping[str, FileSeal] = MappingProxyType({}),
    ) -> None:
        self.path = path.absolute()
        self.attributes = attributes  # of the store's root
        self.records = records  # what was committed before
        # Sealed files outside the images: those of this writer, and those before it.
        self.documents = ChainMap[str, FileSeal]({}, documents)  # type: ignore[arg-type]
        self.staging = self.path / STAGING
        self._lock = lock
        self._manifest = self.path / MANIFEST
        self._bytes_before = 0  # of the manifest
        self._replaced = self.staging / "replaced"

    @classmethod
    def create(cls, path: Path, attributes: Json, *, overwrite: bool = False) -> Self:
        """Make a new store and take its lock; with ``overwrite`` in the place of an older one."""
        check_can_create(path, overwrite=overwrite)
        lock = take_lock(path)
        try:
            with writing_to(path):
                _clear(path)
                created = datetime.now(UTC).isoformat(timespec="seconds")
                writer = cls(path, lock, {"format": FORMAT, "created": created, **attributes})
                writer._write_group("", writer.attributes)
        except BaseException:
            lock.close()
            raise
        return writer

    @classmethod
    def resume(cls, path: Path, attributes: Json) -> Self:
        """Resume an existing store, or make a new one.

        A torn manifest line is cut off, an image whose replacement was not committed is put back, and
        files that an interrupted writer left in staging are removed.
        """
        check_can_create(path, resume=True)
        if _is_vacant(path):
            return cls.create(path, attributes)
        own_attributes = root_attributes(path)
        if ("prediction" in own_attributes) != ("prediction" in attributes):
            what = "predictions" if "prediction" in own_attributes else "images that were converted"
            raise StoreExistsError(f"{path}: it holds {what}; choose another name, or say overwrite=True")
        lock = take_lock(path)
        try:
            with writing_to(path):
                for name in (STAGING, UNFINISHED):
                    _refuse_link(path / name)
                manifest = open_manifest(path / MANIFEST)
                if manifest.whole_bytes < (path / MANIFEST).stat().st_size:
                    os.truncate(path / MANIFEST, manifest.whole_bytes)
                writer = cls(path, lock, own_attributes, manifest.records, manifest.documents)
                writer._bytes_before = manifest.whole_bytes
                if ROOT_DOCUMENT not in manifest.documents:  # its line, the first, was torn
                    writer._write_group("", own_attributes)
                writer._put_back(manifest.records)
                shutil.rmtree(writer.staging, ignore_errors=True)
        except BaseException:
            lock.close()
            raise
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError, DamageError):  # without a table, the manifest is read line by line
            if self._manifest.stat().st_size != self._bytes_before:
                save_table(self._manifest, self.staging / MANIFEST_TABLE)
        shutil.rmtree(self.staging, ignore_errors=True)
        self._lock.close()

    def abandon(self) -> None:
        """Remove the whole store, of a run that came to nothing; after a kill the rest can be resumed."""
        _clear(self.path, manifest_last=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def stage(self) -> StagedImage:
        """A new folder to write one image to."""
        return StagedImage.below(self.staging)

    def commit(self, images: Sequence[tuple[Path, ImageRecord]]) -> None:
        """Move the staged images of a subject into the store, then enter all of them in the manifest.

        An existing version of an image is moved aside until the line of the new one is written.
        """
        with writing_to(self.path):
            try:
                self._commit(images)
            except BaseException:
                self._undo(images)
                raise

    def mend(self, images: Sequence[tuple[Path, ImageRecord]]) -> None:
        """Put the files of each folder in the place of those of a committed image with the same record.

        Each file is replaced as a whole, so that a process that is killed leaves it damaged or mended. The
        manifest stays as it is.
        """
        with writing_to(self.path):
            for folder, record in images:
                self._write_subject(record)
                target = self.path / record.subject / record.image
                _refuse_link(target)
                close_shards(target)
                files = [target / key for key in record.files]
                for file in files:
                    if file.is_dir() and not file.is_symlink():
                        shutil.rmtree(file)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    (folder / file.relative_to(target)).replace(file)
                for place in {place for file in files for place in file.parents}:
                    if place.is_relative_to(self.path):
                        sync(place)

    def _commit(self, images: Sequence[tuple[Path, ImageRecord]]) -> None:
        aside = []
        for folder, record in images:
            self._write_subject(record)
            target = self.path / record.subject / record.image
            _refuse_link(target)
            if target.exists():
                close_shards(target)
                aside.append(self._replaced / record.subject / record.image)
                aside[-1].parent.mkdir(parents=True, exist_ok=True)
                target.rename(aside[-1])
            folder.rename(target)
            sync(target.parent)
        append_lines(self._manifest, *(record.to_json() for _, record in images))
        # First out of the place where _put_back looks: half an image is none to put back.
        for folder in aside:
            shutil.rmtree(folder.rename(self.staging / uuid.uuid4().hex))

    def _undo(self, images: Sequence[tuple[Path, ImageRecord]]) -> None:
        """Take out what was moved in, unless its line was written."""
        manifest = open_manifest(self._manifest)
        for _, record in images:
            if (record.subject, record.image) not in manifest.records:
                shutil.rmtree(self.path / record.subject / record.image, ignore_errors=True)
            if f"{record.subject}/{ROOT_DOCUMENT}" not in manifest.documents:
                shutil.rmtree(self.path / record.subject, ignore_errors=True)
        self._put_back(manifest.records)

    def _put_back(self, records: Mapping[Key, ImageRecord]) -> None:
        """Undo replacements whose line was not written.

        The folder stays that has more of the files of the image's line, as either may be damaged.
        """
        for folder in sorted(self._replaced.glob("*/*")):
            key = folder.parent.name, folder.name
            target = self.path / key[0] / key[1]
            if key in records and _sound_files(folder, records[key]) > _sound_files(target, records[key]):
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)

    def _write_subject(self, record: ImageRecord) -> None:
        attributes = {"subject": record.subject, "split": record.split, "meta": record.meta}
        self._write_group(record.subject, attributes)

    def _write_group(self, name: str, attributes: Json) -> None:
        """Write the document of a group, unless it is there with these attributes."""
        folder = self.path / name
        if name:
            _refuse_link(folder)
        key = f"{name}/{ROOT_DOCUMENT}".lstrip("/")
        content = group_document({TOOL: attributes})
        seal = FileSeal(len(content), digest(content))
        document = folder / ROOT_DOCUMENT
        if _contents(document) != content:
            with whole_file(document, folder / PARTIAL_DOCUMENT) as partial:
                partial.write_bytes(content)
        if self.documents.get(key) != seal:
            append_lines(self._manifest, {"document": key, "bytes": seal.bytes, "checksum": seal.checksum})
            self.documents[key] = seal


def _contents(document: Path) -> bytes | None:
    """The bytes of a document; None if there is none that can be read."""
    try:
        return read_document(document)
    except OSError:
        return None


def _sound_files(folder: Path, record: ImageRecord) -> int:
    """How many files of an image are in a folder as they were written."""
    return sum(damage_of(folder, key, seal, quick=False) is None for key, seal in record.files.items())


def _refuse_link(folder: Path) -> None:
    """Raise ``StoreError`` for a folder of the store that is a link: another one would be written to."""
    if folder.is_symlink():
        raise StoreError(f"{folder}: it is a link, and a store has none; remove it")


def _clear(path: Path, *, manifest_last: bool = False) -> None:
    """Remove all of a store except its lock: the manifest first, so that a partly removed store has no
    images, and the root document last, so that the rest is still recognised as a store.

    A store without images keeps its manifest until then, without which it could not be resumed.
    """
    order = {MANIFEST: 2 if manifest_last else 0, ROOT_DOCUMENT: 3}
    for entry in sorted(path.iterdir(), key=lambda entry: order.get(entry.name, 1)):
        close_shards(entry)
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
