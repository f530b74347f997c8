"""The format on disk: names, records, sealed lines and OME-Zarr metadata."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ome_zarr_models.v05.image import ImageAttrs

from zpatch.chunks.codec import CODECS, check_codec
from zpatch.chunks.levels import plan_levels
from zpatch.digests import FileSeal, check_seal, compact_json, digest, sealed_line, unsealed
from zpatch.errors import DamageError, OptionError, SourceError
from zpatch.records.image_record import ImageRecord, Provenance, SourceFingerprint
from zpatch.records.names import check_name, check_names_differ
from zpatch.store import staged_image

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
STATISTICS = st.recursive(
    st.none() | st.integers() | FLOATS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)
FILES = st.sampled_from(["zarr.json", "0/c/0/0/0", "index/values/c/0", "nifti/zarr.json"])
PATHS = st.none() | TEXT
CHECKSUMS = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)


@st.composite
def records(draw: st.DrawFn) -> ImageRecord:
    axes = draw(st.sampled_from(["zyx", "czyx", "tzyx"]))
    sides = [st.integers(1, 99)] * len(axes)
    chunks = draw(st.tuples(*sides))
    return ImageRecord(
        subject=draw(NAMES),
        image=draw(NAMES),
        kind=draw(st.sampled_from(["scalar", "label", "sampling"])),
        shape=draw(st.tuples(*sides)),
        dtype=draw(st.sampled_from(["|u1", "|i1", "<i2", "<u4", "<f4", "<f8", "<c8"])),
        axes=axes,
        chunks=chunks,
        shards=tuple(
            c * s for c, s in zip(chunks, draw(st.tuples(*[st.integers(1, 31)] * len(axes))), strict=True)
        ),
        codec=draw(st.sampled_from(list(CODECS))),
        affine=draw(st.tuples(*[st.tuples(*[FLOATS] * 4)] * 4)),
        affine_source=draw(st.sampled_from(["none", "sform", "qform", "pixdim"])),
        spatial_unit=draw(st.sampled_from([None, "millimeter", "micrometer"])),
        slope=draw(FLOATS),
        inter=draw(FLOATS),
        source_dtype=draw(st.none() | st.just(">f4")),
        colours=draw(st.sampled_from([1, 3, 4])),
        split=draw(st.none() | TEXT),
        meta=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        stats=draw(st.dictionaries(TEXT, STATISTICS, max_size=3)),
        warnings=tuple(draw(st.lists(TEXT, max_size=3))),
        source=draw(st.none() | st.builds(SourceFingerprint, TEXT, st.integers(0), st.integers(), CHECKSUMS)),
        provenance=draw(st.none() | st.builds(Provenance, TEXT, PATHS, st.dictionaries(TEXT, PATHS), TEXT)),
        files=draw(st.dictionaries(FILES, st.builds(FileSeal, st.integers(0), CHECKSUMS), max_size=3)),
    )


def a_record(**changes: Any) -> ImageRecord:
    record = ImageRecord(
        subject="sub-01",
        image="t1",
        kind="scalar",
        shape=(20, 30, 40),
        dtype="<i2",
        axes="zyx",
        chunks=(10, 16, 16),
        shards=(20, 32, 48),
        codec="lz4",
        affine=((2.0, 0.0, 0.0, -7.5), (0.0, 3.0, 0.0, 8.5), (0.0, 0.0, 4.0, 9.5), (0.0, 0.0, 0.0, 1.0)),
        slope=0.1 + 0.2,
        inter=1e-05,
        meta={"größe": "1 m"},
        source=SourceFingerprint("a/t1.nii", 100, 12345, "0" * 32),
        files={"0/c/0/0/0": FileSeal(10, "1" * 32)},
    )
    return dataclasses.replace(record, **changes)


def a_diagonal(*spacing: float) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, np.diag([*spacing, 1.0]).tolist()))


# Names


@given(NAMES)
def test_a_valid_name_is_accepted(name: str) -> None:
    check_name(name, "subject")


@pytest.mark.parametrize(
    "name",
    ["", ".a", "-a", "_a", "a/b", "a\\b", "a b", "ä", "a\n", "..", "a:b", "a" * 129, "²", "a\x00"],
)
def test_any_other_name_is_refused_and_quoted_with_the_rules(name: str) -> None:
    with pytest.raises(SourceError, match=r"subject name .* is not usable: .* letters, digits") as caught:
        check_name(name, "subject")
    assert repr(name) in str(caught.value)


def test_a_name_may_be_128_characters_long() -> None:
    check_name("a" * 128, "image")


def test_names_that_differ_in_case_only_are_refused_and_both_are_named() -> None:
    with pytest.raises(SourceError, match="subject names 'Sub-01' and 'sub-01' differ in case only; rename"):
        check_names_differ(["Sub-01", "sub-02", "sub-01"], "subject")


def test_names_that_differ_in_more_than_case_are_accepted() -> None:
    check_names_differ(["t1", "t2", "T1w"], "image")


# Codecs


@pytest.mark.parametrize("codec", ["lz4", "lz4hc", "zstd", "none"])
def test_each_codec_of_the_format_is_a_preset(codec: str) -> None:
    check_codec(codec)


@pytest.mark.parametrize("codec", ["gzip", "LZ4", "", "pickle"])
def test_any_other_codec_is_refused_with_a_list_of_all(codec: str) -> None:
    with pytest.raises(OptionError, match=f"one of lz4, lz4hc, zstd, none, not '{codec}'"):
        check_codec(codec)


# Lines


@given(records())
def test_a_record_survives_a_round_trip_through_its_line(record: ImageRecord) -> None:
    line = sealed_line(record.to_json()).encode()
    check_seal(line, "line 1")
    assert ImageRecord.from_json(unsealed(line, "line 1"), "line 1") == record
    assert unsealed(memoryview(line), "line 1") == unsealed(line, "line 1")


@given(records())
def test_a_line_is_one_line_of_ascii_with_sorted_keys_and_no_spaces_between(record: ImageRecord) -> None:
    line = sealed_line(record.to_json())
    assert line.isascii()
    assert "\n" not in line
    value = json.loads(line)
    assert json.dumps(value, sort_keys=True, separators=(",", ":")) == line


def test_the_check_of_a_line_is_the_digest_of_the_line_without_it() -> None:
    value = {"b": [1, 2.5, None], "a": "x"}
    sealed = json.loads(sealed_line(value))
    assert sealed.pop("check") == digest(b'{"a":"x","b":[1,2.5,null]}')
    assert sealed == value


def test_a_flipped_bit_anywhere_in_a_line_is_caught() -> None:
    line = sealed_line(a_record().to_json()).encode()
    undetected = []
    for position in range(len(line)):
        for bit in range(8):
            damaged = bytearray(line)
            damaged[position] ^= 1 << bit
            try:
                check_seal(damaged, "line 1")
            except DamageError:
                continue
            undetected.append(bytes(damaged[position - 10 : position + 10]))
    assert undetected == []


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_line_that_lost_some_of_its_bytes_is_caught(start: int, count: int) -> None:
    line = sealed_line(a_record().to_json()).encode()
    start %= len(line)
    with pytest.raises(DamageError):
        unsealed(line[:start] + line[start + count :], "line 1")


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"{}", b"[]", b"null", b"5", b'"check"', b'{"check":1}', b'{"a":NaN,"check":""}', b"\xff"],
)
def test_an_unsealed_line_is_damage_and_the_error_says_where_and_what_to_do(line: bytes) -> None:
    for read in (check_seal, unsealed):
        with pytest.raises(DamageError, match=r"^m\.jsonl, line 7 .*; restore the file from a copy"):
            read(line, "m.jsonl, line 7")


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "../x"},
        {"image": ".."},
        {"kind": "picture"},
        {"codec": "pickle"},
        {"dtype": "|O"},
        {"dtype": "|V8"},
        {"dtype": "nonsense"},
        {"dtype": ">i2"},
        {"axes": "xyz"},
        {"axes": "yx"},
        {"shape": [20, 30]},
        {"shape": [20, 0, 40]},
        {"shape": [20, -1, 40]},
        {"shape": [20, 30.5, 40]},
        {"shape": "abc"},
        {"shape": 5},
        {"shards": [20, 32, 47]},
        {"chunks": [0, 16, 16]},
        {"colours": 0},
        {"affine": [[1.0]]},
        {"affine": 1},
        {"source": {"path": "x"}},
        {"source": "x"},
        {"files": {"0": 5}},
        {"files": [1]},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_an_invalid_record_is_damage_and_the_error_says_where(change: Any) -> None:
    value = {**json.loads(compact_json(a_record().to_json())), **change}
    with pytest.raises(DamageError, match=r"^line 7 is no image record"):
        ImageRecord.from_json(value, "line 7")


@pytest.mark.parametrize("field", ["subject", "shape", "affine", "files", "source", "warnings"])
def test_a_record_that_lacks_a_field_is_damage(field: str) -> None:
    value = a_record().to_json()
    del value[field]
    with pytest.raises(DamageError, match="line 7 is no image record"):
        ImageRecord.from_json(value, "line 7")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_never_written(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        sealed_line(a_record(slope=number).to_json())


# What a record says of its image


def test_the_spatial_shape_is_the_stored_one_reversed() -> None:
    assert a_record().spatial_shape == (40, 30, 20)
    assert a_record().shape_czyx == (1, 20, 30, 40)
    assert a_record(shape=(3, 20, 30, 40), axes="czyx").spatial_shape == (40, 30, 20)
    assert a_record(shape=(3, 20, 30, 40), axes="czyx").shape_czyx == (3, 20, 30, 40)


def test_sizes_are_those_of_the_voxels_and_of_the_files() -> None:
    huge = a_record(shape=(5000, 5000, 5000), dtype="<f8")
    assert huge.voxel_bytes == 8 * 5000**3
    files = {"a": FileSeal(3, ""), "b": FileSeal(4, "")}
    assert a_record(files=files).stored_bytes == 7


# OME-Zarr


def multiscale(record: ImageRecord) -> tuple[list[dict[str, Any]], list[float], list[float]]:
    """Axes, scale and translation in the OME-Zarr metadata."""
    (found,) = staged_image.ome_attributes(record)["multiscales"]
    (dataset,) = found["datasets"]
    scale, translation = dataset["coordinateTransformations"]
    assert (scale["type"], translation["type"]) == ("scale", "translation")
    return found["axes"], scale["scale"], translation["translation"]


@given(records())
def test_ome_metadata_is_valid_for_ome_zarr_models_and_as_json(record: ImageRecord) -> None:
    with np.errstate(over="ignore"):
        attributes = staged_image.ome_attributes(record)
    compact_json(attributes)
    assert ImageAttrs.model_validate(attributes).get_array_paths() == ["0"]


def test_ome_axes_scale_and_translation_are_in_stored_order() -> None:
    axes, scale, translation = multiscale(a_record())
    assert axes == [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    assert scale == [4.0, 3.0, 2.0]
    assert translation == [9.5, 8.5, -7.5]


@pytest.mark.parametrize(("name", "kind"), [("c", "channel"), ("t", "time")])
def test_a_leading_axis_has_scale_one_translation_zero_and_no_unit(name: str, kind: str) -> None:
    record = a_record(
        shape=(5, 20, 30, 40), axes=f"{name}zyx", chunks=(1, 10, 16, 16), shards=(5, 20, 32, 48)
    )
    axes, scale, translation = multiscale(record)
    assert axes[0] == {"name": name, "type": kind}
    assert scale == [1.0, 4.0, 3.0, 2.0]
    assert translation == [0.0, 9.5, 8.5, -7.5]


def test_levels_have_the_scale_of_the_axes_that_were_halved_and_the_centres_of_their_blocks() -> None:
    """An axis of two voxels is halved once, and one of a single voxel never."""
    record = a_record(shape=(2, 1, 300), chunks=(2, 1, 32), shards=(2, 1, 320))
    levels = plan_levels(record.shape, record.chunks, record.shards)
    record = dataclasses.replace(record, levels=levels, affine=a_diagonal(1.0, 3.0, 5.0))
    [found] = staged_image.ome_attributes(record)["multiscales"]
    datasets = [dataset["coordinateTransformations"] for dataset in found["datasets"]]
    assert [level.shape for level in levels] == [(1, 1, 150), (1, 1, 75), (1, 1, 38)]
    assert [scale["scale"] for scale, _ in datasets] == [[5, 3, 1], [10, 3, 2], [10, 3, 4], [10, 3, 8]]
    shifts = [[0, 0, 0], [2.5, 0, 0.5], [2.5, 0, 1.5], [2.5, 0, 3.5]]
    assert [shift["translation"] for _, shift in datasets] == shifts


def test_label_maps_are_marked_with_a_colour_for_each_label() -> None:
    assert "image-label" not in staged_image.ome_attributes(a_record())
    stats = {"labels": {"0": 5, "3": 1, "12": 2}}
    label = staged_image.ome_attributes(a_record(kind="label", dtype="|u1", stats=stats))["image-label"]
    assert [colour["label-value"] for colour in label["colors"]] == [0, 3, 12]
    [none, *others] = [colour["rgba"] for colour in label["colors"]]
    assert none == [0, 0, 0, 0]
    assert all(0 <= part <= 255 for colour in others for part in colour)
    one = staged_image.ome_attributes(a_record(kind="label", stats={"labels": {"12": 2}}))["image-label"]
    assert one["colors"] == label["colors"][2:]  # the same colour in every image


@pytest.mark.parametrize("labels", [{}, {"0": 9}, {str(n): 1 for n in range(300)}])
def test_a_label_map_without_labels_or_with_too_many_has_no_colours(labels: dict[str, int]) -> None:
    record = a_record(kind="label", dtype="<u2", stats={"labels": labels})
    assert staged_image.ome_attributes(record)["image-label"] == {"version": "0.5"}


def test_a_record_without_provenance_is_written_as_before_it_was_known() -> None:
    assert "provenance" not in a_record().to_json()
    assert ImageRecord.from_json(a_record().to_json(), "line").provenance is None


@pytest.mark.parametrize(
    "change", [{"model": 1}, {"model_path": 2}, {"inputs": {"t1": 3}}, {"inputs": [1]}, {"extra": ""}]
)
def test_provenance_of_other_types_is_damage(change: dict[str, Any]) -> None:
    made = {"model": "net", "model_path": None, "inputs": {"t1": "/a"}, "version": "1", **change}
    with pytest.raises(DamageError, match="line is no image record"):
        ImageRecord.from_json({**a_record().to_json(), "provenance": made}, "line")


def test_the_scale_of_an_oblique_image_is_its_voxel_size() -> None:
    turned = ((0.0, -3.0, 0.0, 0.0), (2.0, 0.0, 0.0, 0.0), (0.0, 0.0, 4.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    assert multiscale(a_record(affine=turned))[1] == [4.0, 3.0, 2.0]


def test_an_unknown_unit_is_left_out() -> None:
    axes, _, _ = multiscale(a_record(spatial_unit=None))
    assert axes == [{"name": name, "type": "space"} for name in "zyx"]


@pytest.mark.parametrize("spacing", [0.0, math.nan, math.inf])
def test_an_invalid_voxel_size_is_written_as_one(spacing: float) -> None:
    record = a_record(affine=a_diagonal(spacing, 3.0, 4.0))
    assert multiscale(record)[1] == [4.0, 3.0, 1.0]
    compact_json(staged_image.ome_attributes(record))


def test_an_origin_that_is_not_a_number_is_written_as_zero() -> None:
    affine = ((2.0, 0.0, 0.0, math.nan), *a_record().affine[1:])
    assert multiscale(a_record(affine=affine))[2] == [9.5, 8.5, 0.0]
