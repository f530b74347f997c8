"""The manifest: lines are checked when it is read, records parsed on access; the last line of each wins."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_image_record import TEXT, a_record, records

from zpatch.digests import FileSeal, sealed_line
from zpatch.errors import DamageError
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest import Manifest, append_lines, read_manifest

ROOT = {"document": "zarr.json", "bytes": 7, "checksum": "0" * 32}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "manifest.jsonl"


def written(path: Path, *values: ImageRecord | dict[str, Any]) -> Manifest:
    path.unlink(missing_ok=True)
    append_lines(path, *(value.to_json() if isinstance(value, ImageRecord) else value for value in values))
    return read_manifest(path)


def some_records(count: int = 5) -> list[ImageRecord]:
    return [a_record(subject=f"sub-{n:02}", image=image) for n in range(count) for image in ("t1", "seg")]


def keys(values: Sequence[ImageRecord]) -> list[tuple[str, str]]:
    return [(record.subject, record.image) for record in values]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(records(), max_size=4, unique_by=lambda record: (record.subject, record.image)))
def test_records_are_read_as_they_were_appended_and_in_that_order(
    path: Path, values: list[ImageRecord]
) -> None:
    found = written(path, ROOT, *values)
    assert list(found.records) == keys(values)
    assert list(found.records.values()) == values
    assert found.whole_bytes == path.stat().st_size


def test_records_are_a_mapping_by_subject_and_image(path: Path) -> None:
    values = some_records()
    found = written(path, *values).records
    assert len(found) == 10
    assert dict(found) == dict(zip(keys(values), values, strict=True))
    assert ("sub-01", "t1") in found
    assert ("sub-01", "t2") not in found
    assert "sub-01" not in found
    with pytest.raises(KeyError, match="nobody"):
        found["nobody", "t1"]


def test_records_that_were_pickled_are_the_same(path: Path) -> None:
    found = written(path, *some_records()).records
    assert dict(pickle.loads(pickle.dumps(found))) == dict(found)


def test_a_record_is_parsed_on_access_only(path: Path) -> None:
    good, bad = a_record(image="good"), {**a_record(image="bad").to_json(), "codec": "pickle"}
    found = written(path, bad, good).records
    assert found["sub-01", "good"] == good
    with pytest.raises(
        DamageError, match=r"manifest.jsonl, line 1 is no image record \(codec must be one of"
    ):
        found["sub-01", "bad"]


def test_the_last_line_of_an_image_wins_and_keeps_the_place_of_the_first(path: Path) -> None:
    values = some_records(2)
    newer = dataclasses.replace(values[1], split="test")
    found = written(path, *values, newer)
    assert list(found.records) == keys(values)
    assert found.records["sub-00", "seg"] == newer
    assert len(found.records) == 4


def test_documents_are_kept_apart_from_images_and_the_last_line_of_each_wins(path: Path) -> None:
    of_subject = {"document": "sub-01/zarr.json", "bytes": 9, "checksum": "1" * 32}
    newer = {**ROOT, "bytes": 8, "checksum": "2" * 32}
    found = written(path, ROOT, of_subject, a_record(), newer)
    assert found.documents == {
        "zarr.json": FileSeal(8, "2" * 32),
        "sub-01/zarr.json": FileSeal(9, "1" * 32),
    }
    assert list(found.records) == [("sub-01", "t1")]


@pytest.mark.parametrize("missing", ["document", "bytes", "checksum"])
def test_a_document_line_that_lacks_a_field_is_damage(path: Path, missing: str) -> None:
    value = {key: field for key, field in ROOT.items() if key != missing}
    with pytest.raises(DamageError, match=r"manifest.jsonl, line 2 is no"):
        written(path, ROOT, value)


def test_a_manifest_without_lines_is_empty(path: Path) -> None:
    path.touch()
    found = read_manifest(path)
    assert (dict(found.records), found.documents, found.whole_bytes) == ({}, {}, 0)


def test_a_missing_manifest_is_damage_that_names_it(path: Path) -> None:
    with pytest.raises(DamageError, match=r"manifest.jsonl: it is missing; restore the file from a copy"):
        read_manifest(path)


def test_an_incomplete_last_line_is_ignored_whatever_its_length(path: Path) -> None:
    values = some_records(1)
    written(path, ROOT, *values)
    data = path.read_bytes()
    whole = data[:-1].rindex(b"\n") + 1
    for cut in range(whole, len(data)):
        path.write_bytes(data[:cut])
        found = read_manifest(path)
        assert found.whole_bytes == whole
        assert list(found.records) == keys(values[:-1])
        assert found.documents.keys() == {"zarr.json"}


def test_an_incomplete_only_line_leaves_an_empty_manifest(path: Path) -> None:
    written(path, ROOT)
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        found = read_manifest(path)
        assert (len(found.records), found.documents, found.whole_bytes) == (0, {}, 0)


def test_a_flipped_bit_anywhere_is_damage_that_names_its_line(path: Path, full: bool) -> None:
    """The last line break is left out, as without it the last line is an incomplete one."""
    written(path, ROOT, *some_records(1), ROOT)
    data = path.read_bytes()
    starts = np.cumsum([0, *map(len, data.splitlines(keepends=True))])
    undetected = []
    for position in range(0, len(data) - 1, 1 if full else 3):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            number = int(np.searchsorted(starts, position, side="right"))
            try:
                read_manifest(path)
            except DamageError as error:
                if f"{path}, line {number} " in str(error):
                    continue
            undetected.append((position, bit))
    assert undetected == []


@pytest.mark.parametrize("change", ["drop", "repeat", "insert"])
def test_lines_that_are_not_whole_are_damage(path: Path, change: str) -> None:
    written(path, ROOT, *some_records(1))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = {"drop": lines[1][:-9], "repeat": lines[1][:-1] + lines[1], "insert": b"\n"}[change]
    path.write_bytes(b"".join(lines))
    with pytest.raises(DamageError, match=r"manifest.jsonl, line 2 .*; restore the file from a copy"):
        read_manifest(path)


# What users write into metadata is never taken for the keys of a line.

LURES = [
    '{"subject":"x","image":"y"}',
    '"image":"y"',
    '"subject":"x"',
    '","subject":"x","image":"y","z":"',
    '\\","subject":"x',
    '"document":"zarr.json"',
    '"check":"' + "0" * 32 + '",',
    "\n",
    "\\",
    '"',
]
FIELDS = ["subject", "image", "document", "check", "checksum", "bytes", "files", "zzz", "Subject"]
hostile_text = st.one_of(st.sampled_from(LURES + FIELDS), TEXT)
hostile_json = st.recursive(
    hostile_text | st.just("0" * 32) | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile_text, inner, max_size=3),
    max_leaves=6,
)
hostile_numbers = st.recursive(
    st.none() | st.integers(), lambda inner: st.dictionaries(hostile_text, inner, max_size=3), max_leaves=6
)


def reads_back(path: Path, record: ImageRecord) -> None:
    found = written(path, ROOT, record, a_record(subject="other", image="t9"))
    assert list(found.records) == [(record.subject, record.image), ("other", "t9")]
    assert found.records[record.subject, record.image] == record
    assert found.documents == {"zarr.json": FileSeal(7, "0" * 32)}


@pytest.mark.parametrize("text", LURES)
@pytest.mark.parametrize("field", ["key", "value", "split", "stats", "warnings", "files", "source"])
def test_text_that_looks_like_a_line_is_not_taken_for_the_names_of_the_image(
    path: Path, text: str, field: str
) -> None:
    assert a_record().source is not None
    changes: dict[str, Any] = {
        "key": {"meta": {text: 1}},
        "value": {"meta": {"a": text}},
        "split": {"split": text},
        "stats": {"stats": {text: {text: 1}}},
        "warnings": {"warnings": (text,)},
        "files": {"files": {"zarr.json": FileSeal(1, text)}},
        "source": {"source": dataclasses.replace(a_record().source, path=text)},
    }
    reads_back(path, a_record(**changes[field]))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("field", ["meta", "stats"])
def test_metadata_may_have_the_names_of_the_fields_of_a_line(path: Path, name: str, field: str) -> None:
    texts = ("x", "0" * 32, {"subject": "x", "image": "y", "document": "z"}, [name])
    for value in texts if field == "meta" else (1, {"subject": 1, "image": 2, "document": 3}, [4]):
        reads_back(path, a_record(**{field: {name: value}}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    meta=st.dictionaries(hostile_text, hostile_json, max_size=4),
    stats=st.dictionaries(hostile_text, hostile_numbers, max_size=4),
    warnings=st.lists(hostile_text, max_size=2).map(tuple),
    split=st.none() | hostile_text,
)
def test_no_metadata_can_hide_or_change_the_names_of_an_image(path: Path, **changes: Any) -> None:
    reads_back(path, a_record(**changes))


# Appending


def test_lines_are_appended_sealed(path: Path) -> None:
    append_lines(path, ROOT)
    append_lines(path, *(record.to_json() for record in some_records(1)))
    expected = [ROOT, *(record.to_json() for record in some_records(1))]
    assert path.read_text() == "".join(sealed_line(value) + "\n" for value in expected)
    assert all(json.loads(line)["check"] for line in path.read_text().splitlines())
