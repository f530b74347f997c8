"""Whether every file of a store still holds the bytes that were written to it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zpatch.digests import FileSeal, Json, file_digest
from zpatch.errors import DamageError, StoreError
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest import read_manifest
from zpatch.records.names import MANIFEST, ROOT_DOCUMENT
from zpatch.runtime.guarded_files import is_behind_link, open_regular
from zpatch.runtime.task_contract import Progress
from zpatch.store.lock import writer_of
from zpatch.store.store import Store, root_attributes


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that differs from its seal: ``file``, relative to the store, and ``what`` is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """What a verification found.

    ``images`` and ``files`` are how many were checked, ``bytes`` the length of the files together, ``quick``
    whether contents were left unread. ``missing_subjects`` are subjects that a prediction was to write and
    that were never committed. ``leftovers`` are folders that no manifest line names; interrupted work leaves
    them, and they do no harm. ``is_predicted`` is whether ``predict`` wrote the store. ``writer`` is the
    process that was writing to it, in words: what that had not committed yet was not verified.
    """

    store: Path
    images: int
    files: int
    bytes: int
    quick: bool
    damages: tuple[Damage, ...]
    missing_subjects: tuple[str, ...]
    leftovers: tuple[str, ...]
    is_predicted: bool = False
    writer: str | None = None

    @property
    def ok(self) -> bool:
        """Whether no file is damaged and no subject is missing."""
        return not self.damages and not self.missing_subjects

    @property
    def remedy(self) -> str:
        """The command that mends the faults."""
        own = sorted({damage.file for damage in self.damages} & {MANIFEST, ROOT_DOCUMENT})
        copy = f"restore {' and '.join(own)} from a copy, then " if own else ""
        if self.is_predicted:
            every_byte = "" if self.quick else " with --verify"
            return (
                f"{copy}run the same 'zpatch predict' command{every_byte} again: it computes what is missing "
                f"or damaged, and nothing else"
            )
        return (
            f"{copy}'zpatch convert SOURCE {self.store} --overwrite --include SUBJECT' converts a subject "
            f"again; or restore files from a copy"
        )

    def to_json(self) -> Json:
        """The report as plain JSON."""
        return {
            "store": str(self.store),
            "ok": self.ok,
            "quick": self.quick,
            "images": self.images,
            "files": self.files,
            "bytes": self.bytes,
            "damages": [{"file": damage.file, "what": damage.what} for damage in self.damages],
            "missing_subjects": list(self.missing_subjects),
            "leftovers": list(self.leftovers),
            "writer": self.writer,
        }


def verify(
    store: str | os.PathLike[str],
    *,
    quick: bool = False,
    progress: Progress = lambda file_bytes: None,
) -> VerificationReport:
    """Compare every file of a store with its seal in the manifest, as ``zpatch verify`` does.

    ``quick`` checks the presence and length of all files, and the contents of ``zarr.json`` documents only.
    ``progress`` is called with the length in bytes of each file that was checked. Damage is reported, not
    raised; a folder that is not a store raises ``NotAStoreError``.

    >>> import tempfile
    >>> import nibabel as nib
    >>> import numpy as np
    >>> import zpatch as zp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image = nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.eye(4))
    ...     image.to_filename(f"{folder}/ann.nii.gz")
    ...     converted = zp.convert(folder, f"{folder}/cohort.zarr")
    ...     report = verify(f"{folder}/cohort.zarr")
    ...     os.truncate(f"{folder}/cohort.zarr/ann/image/0/c/0/0/0", 100)
    ...     damaged = verify(f"{folder}/cohort.zarr", quick=True)
    >>> report.ok, [damage.file for damage in damaged.damages]
    (True, ['ann/image/0/c/0/0/0'])
    """
    root = Path(store)
    writer = writer_of(root)
    try:
        opened = _opened(root)
    except DamageError as error:
        damage = Damage(MANIFEST, str(error))
        return VerificationReport(root, 0, 0, 0, quick, (damage,), (), ())
    seals = dict(sealed_files(opened))
    damages = []
    for name, seal in seals.items():
        if found := damage_of(root, name, seal, quick=quick):
            damages.append(found)
        progress(seal.bytes)
    return VerificationReport(
        store=root,
        images=len(opened.records),
        files=len(seals),
        bytes=sum(seal.bytes for seal in seals.values()),
        quick=quick,
        damages=tuple(damages),
        missing_subjects=tuple(_missing_subjects(opened)),
        leftovers=tuple(_leftovers(opened)),
        is_predicted=any(record.inputs is not None for record in opened.records.values())
        or "prediction" in opened.attributes,
        writer=writer,
    )


def _opened(root: Path) -> Store:
    """The store, also where its root document is missing or damaged: its seal reports that."""
    try:
        return Store(root.absolute(), root_attributes(root), read_manifest(root / MANIFEST))
    except DamageError:
        raise
    except StoreError:  # no store, or one of a newer format
        if not (root / MANIFEST).is_file():
            raise
        store = Store(root.absolute(), {}, read_manifest(root / MANIFEST))
        seal = store.documents.get(ROOT_DOCUMENT)
        if seal is not None and damage_of(root, ROOT_DOCUMENT, seal, quick=False) is None:
            raise
        return store


def sealed_bytes(store: str | os.PathLike[str]) -> int:
    """The number of bytes to verify; 0 where the manifest itself is damaged."""
    try:
        return sum(seal.bytes for _, seal in sealed_files(_opened(Path(store))))
    except DamageError:
        return 0


def sealed_files(store: Store) -> Iterator[tuple[str, FileSeal]]:
    """Every file that the manifest names, by its path relative to the store, and its seal."""
    yield from store.documents.items()
    for record in store.records.values():
        yield from files_of(record)


def files_of(record: ImageRecord) -> Iterator[tuple[str, FileSeal]]:
    """Every file of an image, by its path below the store."""
    for key, seal in record.files.items():
        yield f"{record.subject}/{record.image}/{key}", seal


def damage_of(root: Path, name: str, seal: FileSeal, *, quick: bool) -> Damage | None:
    """The damage of a file, by its path below the store; None if it is as it was written.

    ``quick`` compares presence and length only, and the contents of ``zarr.json`` documents.
    """
    file = root / name
    if is_behind_link(root, file.parent):
        return Damage(name, "it is behind a link")
    what = _fault(file, seal, quick=quick and not name.endswith(ROOT_DOCUMENT))
    return Damage(name, what) if what else None


def _fault(file: Path, seal: FileSeal, *, quick: bool) -> str | None:
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "it is no regular file"
        if status.st_size != seal.bytes:
            return f"it has {status.st_size} bytes instead of {seal.bytes}"
        if quick:
            return None
        with open(open_regular(file), "rb") as stream:
            found = file_digest(stream)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if found == seal.checksum else "its contents have changed"


def _missing_subjects(store: Store) -> list[str]:
    present = {subject for subject, _ in store.records}
    expected = store.attributes.get("expected_subjects", [])
    names = expected if isinstance(expected, list) else []
    return [name for name in map(str, names) if name not in present]


def _leftovers(store: Store) -> list[str]:
    known = {subject for subject, _ in store.records}
    known |= {document.rpartition("/")[0] for document in store.documents}
    images = {f"{subject}/{image}" for subject, image in store.records}
    found = []
    for folder in sorted(entry for entry in store.path.iterdir() if entry.is_dir()):
        if folder.name not in known:
            found.append(folder.name)
            continue
        found += [
            f"{folder.name}/{image.name}"
            for image in sorted(folder.iterdir())
            if image.is_dir() and f"{folder.name}/{image.name}" not in images
        ]
    return found
