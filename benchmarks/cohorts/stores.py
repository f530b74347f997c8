"""Stores of many subjects: a manifest with a line for each image, and the same facts for the peers.

All subjects are one tiny converted case, under other names, with other metadata, splits and labels. What
reads the manifest alone needs no more; the first subjects have their folders too, as hard links.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from zpatch.digests import Json, sealed_line
from zpatch.records.names import MANIFEST, ROOT_DOCUMENT

MOST_LINKS = 30_000  # of one file; ext4 allows 65,000
SITES = ("amsterdam", "boston", "cardiff", "delft")
SPLITS = ("train",) * 8 + ("val", "test")
RARE_CLASS, RARE_EVERY = 3, 100  # one subject in a hundred


@dataclass(frozen=True, slots=True)
class Subject:
    """What is known of a subject, by its number."""

    number: int

    @property
    def name(self) -> str:
        return f"sub-{self.number:06d}"

    @property
    def split(self) -> str:
        return SPLITS[self.number % len(SPLITS)]

    @property
    def meta(self) -> Json:
        """As ``convert`` reads them from a table."""
        chosen = self.number * 7919
        return {"age": 18 + chosen % 70, "sex": "FM"[chosen % 2], "site": SITES[chosen // 3 % len(SITES)]}

    @property
    def has_rare_class(self) -> bool:
        return self.number % RARE_EVERY == RARE_EVERY // 2


@dataclass(frozen=True, slots=True)
class Made:
    """A store of ``subjects`` subjects, of which the first ``with_folders`` have folders.

    ``table`` is the CSV file that it could have been converted from.
    """

    store: Path
    table: Path
    parquet: Path
    subjects: int
    with_folders: int

    @property
    def manifest_bytes(self) -> int:
        return (self.store / MANIFEST).stat().st_size


def make(folder: Path, subjects: int, with_folders: int, *, with_sources: bool = True) -> Made:
    """Write a store of many subjects into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    template = _Template.made_in(folder)
    made = Made(folder / "store", folder / "table.csv", folder / "facts.parquet", subjects, with_folders)
    made.store.mkdir()
    shutil.copy(template.store / ROOT_DOCUMENT, made.store)
    with (made.store / MANIFEST).open("w") as stream:
        stream.writelines(template.lines(subjects))
    _link_each(template.store / "sub", [made.store / Subject(n).name for n in range(with_folders)])
    _write_table(made.table, subjects)
    if with_sources:
        sources = folder / "sources"
        _link_each(template.source / "sub", [sources / Subject(n).name for n in range(subjects)])
    return made


class _Template:
    """One converted case, and the lines of its copies."""

    def __init__(self, source: Path, store: Path) -> None:
        from zpatch.store.store import open_store

        self.source, self.store = source, store
        opened = open_store(store)
        self._documents = opened.documents
        self._records = [record.to_json() for record in opened.records.values()]

    @classmethod
    def made_in(cls, folder: Path) -> _Template:
        from zpatch.conversion.conversion import convert

        source, store = folder / "one-source", folder / "one"
        data.write_tiny_subject(source / "sub")
        convert(source, store)
        return cls(source, store)

    def lines(self, subjects: int) -> Iterator[str]:
        """The lines of a manifest."""
        yield self._document(ROOT_DOCUMENT, ROOT_DOCUMENT)
        for number in range(subjects):
            subject = Subject(number)
            yield self._document(f"sub/{ROOT_DOCUMENT}", f"{subject.name}/{ROOT_DOCUMENT}")
            for record in self._records:
                yield sealed_line(_renamed(record, subject)) + "\n"

    def _document(self, path: str, renamed: str) -> str:
        seal = self._documents[path]
        return sealed_line({"document": renamed, "bytes": seal.bytes, "checksum": seal.checksum}) + "\n"


def _renamed(record: Json, subject: Subject) -> Json:
    name = Path(record["source"]["path"]).name
    value = {
        **record,
        "subject": subject.name,
        "split": subject.split,
        "meta": subject.meta,
        "source": {**record["source"], "path": f"sources/{subject.name}/{name}"},
    }
    if subject.has_rare_class and record["kind"] == "label":
        value["stats"] = {**record["stats"], "labels": {**record["stats"]["labels"], str(RARE_CLASS): 8}}
    return value


def _write_table(path: Path, subjects: int) -> None:
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["subject", "split", "t1", "seg", "age", "sex", "site"])
        for subject in map(Subject, range(subjects)):
            folder = f"sources/{subject.name}"
            images = f"{folder}/t1.nii.gz", f"{folder}/seg.nii.gz"
            rows.writerow([subject.name, subject.split, *images, *subject.meta.values()])


def _link_each(folder: Path, copies: Sequence[Path]) -> None:
    """Make copies of a folder whose files are links to the same files; times and sizes stay."""
    folders = [path.relative_to(folder) for path in [folder, *folder.rglob("*")] if path.is_dir()]
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    linked = folder
    for number, copy in enumerate(copies):
        if number and number % MOST_LINKS == 0:
            linked = folder.with_name(f"{folder.name}-{number}")
            shutil.copytree(folder, linked)
        for path in folders:
            os.makedirs(copy / path, exist_ok=True)
        for path in files:
            os.link(linked / path, copy / path)


# For the peers.


def write_parquet(made: Made) -> None:
    """The facts of the manifest that samplers and splits need, one row for each image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    subjects = np.repeat(np.arange(made.subjects), 2)
    each = [Subject(int(number)) for number in subjects]
    kinds = ["label", "scalar"] * made.subjects
    of_map = {False: [0, 1, 2], True: [0, 1, 2, RARE_CLASS]}
    labels = [of_map[s.has_rare_class] if k == "label" else None for s, k in zip(each, kinds, strict=True)]
    metas: list[Mapping[str, Any]] = [subject.meta for subject in each]
    columns: dict[str, Any] = {
        "subject": [subject.name for subject in each],
        "image": ["seg", "t1"] * made.subjects,
        "kind": kinds,
        "split": [subject.split for subject in each],
        "shape": [[16, 16, 16]] * len(each),
        "labels": labels,
        "line": list(range(len(each))),
        **{key: [meta[key] for meta in metas] for key in metas[0]},
    }
    pq.write_table(pa.table(columns), made.parquet)


def write_consolidated(made: Made) -> Path:
    """The root of the same tree with zarr-python's consolidated metadata, and nothing else of the tree."""
    import zarr

    one, root = made.store.with_name("one"), made.store.with_name("consolidated")
    zarr.consolidate_metadata(str(one), zarr_format=3)
    document = json.loads((one / ROOT_DOCUMENT).read_text())
    entries = document["consolidated_metadata"]["metadata"]
    document["consolidated_metadata"]["metadata"] = {
        name + path.removeprefix("sub"): entry
        for name in (Subject(number).name for number in range(made.subjects))
        for path, entry in entries.items()
    }
    root.mkdir()
    (root / ROOT_DOCUMENT).write_text(json.dumps(document))
    return root
