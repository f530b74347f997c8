"""The table beside a manifest: it says what the lines say, and is never trusted further than they are."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_image_record import a_record, records

import zpatch as zp
from zpatch.digests import FileSeal, sealed_line
from zpatch.errors import DamageError
from zpatch.records import table_builder
from zpatch.records.image_facts import ImageFacts
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest import (
    END_BYTES,
    Manifest,
    ManifestFile,
    append_lines,
    open_manifest,
    read_manifest,
    save_table,
)
from zpatch.records.manifest_table import read_table
from zpatch.records.names import MANIFEST, MANIFEST_TABLE

ROOT = {"document": "zarr.json", "bytes": 7, "checksum": "0" * 32}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / MANIFEST


def saved(path: Path) -> Path:
    """The table of a manifest, as a writer saves it."""
    save_table(path, path.with_name("partial"))
    return path.with_name(MANIFEST_TABLE)


def many(count: int = 40) -> list[ImageRecord]:
    """So many that no end of the manifest holds all of them."""
    return [
        a_record(subject=f"sub-{n:02}", image=image, meta={"age": n}, split="train" if n % 2 else None)
        for n in range(count)
        for image in ("t1", "seg")
    ]


def append(path: Path, *some: ImageRecord) -> None:
    append_lines(path, *(record.to_json() for record in some))


def contents(manifest: Manifest) -> object:
    """All that a manifest says, by its records and by its table."""
    table = manifest.table
    facts = [(table.facts_of(row), table.split_of(row), table.meta_of(row)) for row in range(len(table))]
    return dict(manifest.records), dict(manifest.documents), manifest.whole_bytes, facts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(values=st.lists(records(), min_size=1, max_size=5), cut=st.integers(0, 5), again=st.booleans())
def test_a_table_that_grows_says_what_the_lines_say(
    path: Path, values: list[ImageRecord], cut: int, again: bool
) -> None:
    path.unlink(missing_ok=True)
    path.with_name(MANIFEST_TABLE).unlink(missing_ok=True)
    append_lines(path, ROOT, *(record.to_json() for record in values[:cut]))
    saved(path)
    append(path, *values[cut:], *([dataclasses.replace(values[0], split="again")] if again else []))
    found = open_manifest(path)
    last = {(record.subject, record.image): record for record in values}
    if again:
        last[values[0].subject, values[0].image] = dataclasses.replace(values[0], split="again")
    assert dict(found.records) == last
    assert list(found.records) == list(last)
    assert list(found.table.subjects) == sorted({subject for subject, _ in last})
    assert contents(found) == contents(read_manifest(path)) == contents(open_manifest(path))
    for row, record in enumerate(last.values()):
        meta, source = found.table.meta_of(row), record.source
        assert (found.table.split_of(row), meta) == (record.split, record.meta)
        assert found.table.facts_of(row) == ImageFacts.of_line(record.to_json())
        assert found.table.contents_of(row) == (record.contents if record.files else "")
        if source and source.path and max(abs(source.bytes), abs(source.mtime_ns)) < 2**63:
            assert found.table.source_of(row) == (source.path, source.bytes, source.mtime_ns)
        else:
            assert found.table.source_of(row) is None


def test_subjects_are_alike_whose_images_have_the_same_names_and_facts(path: Path) -> None:
    append(
        path, *many(6), a_record(subject="sub-03", image="t1", slope=2.0), a_record(subject="z", image="t1")
    )
    alike = open_manifest(path).table.arrays["alike"].tolist()
    assert alike[0] == alike[1] == alike[2] == alike[4] == alike[5]
    assert len({alike[0], alike[3], alike[6]}) == 3


def test_opening_by_a_table_reads_no_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(path, *many())
    saved(path)
    monkeypatch.setattr("zpatch.records.table_builder.unsealed", lambda *args: pytest.fail("a line was read"))
    found = open_manifest(path)
    assert len(found.records) == 80
    append(path, a_record(subject="new"))
    with pytest.raises(pytest.fail.Exception):
        open_manifest(path)


def test_only_the_lines_behind_a_table_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(path, *many())
    saved(path)
    append(path, a_record(subject="new"))
    read: list[str] = []

    original = table_builder.unsealed  # type: ignore[attr-defined]
    monkeypatch.setattr(
        table_builder, "unsealed", lambda line, where: read.append(where) or original(line, where)
    )
    assert "new" in list(open_manifest(path).table.subjects)
    assert read == [f"{path}, line 81"]
    assert "new" in list(open_manifest(path).table.subjects)
    assert len(read) == 1  # the table was made again


def test_a_reader_makes_no_table_where_there_is_none(path: Path) -> None:
    append(path, *many(2))
    assert len(open_manifest(path).records) == 4
    assert os.listdir(path.parent) == [MANIFEST]


def test_a_stale_table_in_a_folder_that_cannot_be_written_to_is_made_again_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(path, *many(2))
    table = saved(path)
    before = table.read_bytes()
    append(path, a_record(subject="new"))

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zpatch.records.manifest.write_table", refused)
    assert len(open_manifest(path).records) == 5
    assert table.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == [MANIFEST_TABLE, MANIFEST]


def test_a_table_that_is_damaged_anywhere_is_made_again(path: Path, full: bool) -> None:
    append(path, *many(3))
    table = saved(path)
    whole, expected = table.read_bytes(), contents(read_manifest(path))
    step = 7 if full else 307
    for position in range(0, len(whole), step):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        table.write_bytes(damaged)
        assert contents(open_manifest(path)) == expected
        assert read_table(table) is not None  # it was made again, or only a byte between two arrays differs
    for length in range(0, len(whole), 7 * step):
        table.write_bytes(whole[:length])
        assert contents(open_manifest(path)) == expected


@pytest.mark.parametrize("what", ["a folder", "a link", "a pipe"])
def test_what_is_no_file_is_no_table(path: Path, what: str) -> None:
    append(path, *many(1))
    place = path.with_name(MANIFEST_TABLE)
    {
        "a folder": place.mkdir,
        "a link": lambda: place.symlink_to(path.with_name("elsewhere")),
        "a pipe": lambda: os.mkfifo(place),
    }[what]()
    assert len(open_manifest(path).records) == 2


def test_the_table_of_another_manifest_is_not_used(path: Path, tmp_path: Path) -> None:
    append(path, *many(3))
    table = saved(path)
    path.unlink()
    append(path, *(dataclasses.replace(record, dtype="<u2") for record in many(3)))
    found = open_manifest(path)
    assert {found.table.facts_of(row).dtype for row in range(6)} == {"<u2"}  # type: ignore[union-attr]
    assert contents(open_manifest(path)) == contents(read_manifest(path))
    assert table.exists()


def test_a_flipped_bit_in_the_middle_of_a_long_manifest_is_found_when_its_record_is_read(path: Path) -> None:
    append(path, *many(200))
    saved(path)
    data = bytearray(path.read_bytes())
    position = len(data) // 2
    assert END_BYTES < position < len(data) - END_BYTES
    data[position] ^= 1
    path.write_bytes(data)
    number = data[:position].count(b"\n") + 1
    found = open_manifest(path)
    with pytest.raises(DamageError, match=rf"manifest.jsonl, line {number} "):
        dict(found.records)
    with pytest.raises(DamageError, match=rf"manifest.jsonl, line {number} "):
        read_manifest(path)


def test_a_table_that_leads_to_the_line_of_another_image_is_found_out(path: Path) -> None:
    append(path, *many(3))
    table = open_manifest(path).table
    arrays = {**table.arrays, "start": table.arrays["start"][::-1], "length": table.arrays["length"][::-1]}
    forged = type(table)(table.prefix, arrays)
    with pytest.raises(DamageError, match=r"is of another image than manifest.index says; remove that file"):
        Manifest.of(ManifestFile(path), forged).records["sub-00", "t1"]


def test_numbers_that_lead_out_of_their_arrays_are_not_sound(path: Path) -> None:
    append(path, *many(3))
    table = open_manifest(path).table
    assert table.is_sound
    for name in ("subject", "image", "split", "meta", "fact", "source", "start", "rows", "row_end"):
        for value in (10**6, -2):
            changed = table.arrays[name].copy()
            changed[1] = value
            assert not type(table)(table.prefix, {**table.arrays, name: changed}).is_sound, name


# Stores and cohorts.


def test_converting_writes_the_table_and_a_store_without_it_opens_the_same(
    cohort_store: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(cohort_store, tmp_path / "store"))
    table = read_table(store / MANIFEST_TABLE)
    assert table is not None
    assert table.prefix.bytes == (store / MANIFEST).stat().st_size
    (store / MANIFEST_TABLE).unlink()
    before, after = zp.Cohort(cohort_store), zp.Cohort(store)
    assert before.names == after.names
    assert before.table == after.table
    assert zp.verify(store).ok
    assert not (store / MANIFEST_TABLE).exists()


def test_a_pickled_cohort_is_small_and_stays_as_it_was_opened(cohort_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(cohort_store, tmp_path / "store"))
    cohort = zp.Cohort(store)[1:]
    pickled = pickle.dumps(cohort)
    assert len(pickled) < 2000
    record = cohort[0].images["t1"].record
    assert record is not None
    newer = [dataclasses.replace(record, subject="aa"), dataclasses.replace(record, split="new")]
    for value in newer:
        with (store / MANIFEST).open("a") as manifest:
            manifest.write(sealed_line(value.to_json()) + "\n")
        zp.Cohort(store)  # which makes the table again
        again = pickle.loads(pickled)
        assert again.names == cohort.names
        assert [subject.split for subject in again] == [subject.split for subject in cohort]
        assert again[0].t1.record == record


def test_a_pickled_cohort_of_a_store_that_was_replaced_is_refused(cohort_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(cohort_store, tmp_path / "store"))
    pickled = pickle.dumps(zp.Cohort(store))
    lines = (store / MANIFEST).read_bytes().splitlines(keepends=True)
    (store / MANIFEST).write_bytes(b"".join(lines[:1] + lines[3:]))
    with pytest.raises(
        DamageError, match="it was replaced since its cohort was opened; open the cohort again"
    ):
        pickle.loads(pickled)


def test_a_cohort_that_is_dropped_holds_nothing_open(cohort_store: Path) -> None:
    def opened() -> int:
        paths = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sum(path.is_symlink() and cohort_store in path.readlink().parents for path in paths)

    before = opened()
    cohort = zp.Cohort(cohort_store)
    subject = cohort[0]
    assert opened() == before + 2
    del cohort
    assert opened() == before
    assert subject.name == "sub-01"


def test_documents_are_found_by_their_path(path: Path) -> None:
    of_subject = {"document": "sub-01/zarr.json", "bytes": 9, "checksum": "1" * 32}
    append_lines(path, ROOT, of_subject)
    documents = open_manifest(path).documents
    assert documents["sub-01/zarr.json"] == FileSeal(9, "1" * 32)
    assert "sub-02/zarr.json" not in documents
    assert list(documents) == ["sub-01/zarr.json", "zarr.json"]
    assert np.dtype("<i8") == open_manifest(path).table.arrays["document_bytes"].dtype
