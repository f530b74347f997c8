"""Stores and arrays that may come from anyone: refused in one line, in bounded time and memory, and nothing
outside a store is read or written through it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import pytest
import zarr
from numcodecs import blosc, zstd

import zpatch as zp
from zpatch.chunks.codec import ChunkCodec
from zpatch.chunks.mapped_shards import close_shards
from zpatch.digests import compact_json, digest, sealed_line, unsealed
from zpatch.errors import DamageError, StoreError, ZpatchError
from zpatch.records.names import LOCK, MANIFEST, ROOT_DOCUMENT, STAGING, UNFINISHED
from zpatch.store.store_writer import PARTIAL_DOCUMENT

pytestmark = pytest.mark.timeout(60)

Run = Callable[..., tuple[int, str, str]]
Change = Callable[[dict[str, Any]], Any]
ESCAPE = "\x1b[2J\x1b]0;title\x07"


@pytest.fixture
def store(cohort_store: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(cohort_store, tmp_path / "hostile.zarr"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the store, with a file that nobody may change."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    return folder


def image_folder(store: Path) -> Path:
    return store / "sub-01" / "t1"


def a_read(store: Path) -> Any:
    """Read everything that a cohort needs of a store."""
    for subject in zp.Cohort(store):
        for image in subject.images.values():
            image.read(zp.PatchLocation((0, 0, 0), (4, 4, 4)))
        zp.LabelSampler(4, "seg").locations(subject, 1)
    close_shards(store)


def refused(run: Run, store: Path, *commands: str) -> str:
    """What all commands say, one line each."""
    said = ""
    for command in commands or ("info", "verify"):
        code, _, error = run(command, store)
        assert code in (1, 4), command
        assert "unexpected " not in error.partition("is no image record")[0]
        assert all(line.isprintable() for line in error.splitlines())
        said += error
    return said


def change_line(store: Path, change: Change, image: str = "t1") -> None:
    """Change the record of an image, and seal it again."""
    lines = []
    for line in (store / MANIFEST).read_bytes().splitlines():
        value = unsealed(line, "")
        if (value.get("subject"), value.get("image")) == ("sub-01", image):
            change(value)
        lines.append(sealed_line(value))
    (store / MANIFEST).write_text("\n".join(lines) + "\n")


# Links, pipes and devices


@pytest.mark.parametrize("name", ["sub-01", "sub-01/t1"])
def test_a_folder_that_is_a_link_is_not_read_and_not_written_to(
    run: Run, store: Path, elsewhere: Path, cohort_source: Path, name: str
) -> None:
    (store / name).rename(elsewhere / "images")
    (store / name).symlink_to(elsewhere / "images")
    with pytest.raises(DamageError, match="is a link"):
        a_read(store)
    assert "it is behind a link" in refused(run, store, "verify")
    before = sorted(elsewhere.rglob("*"))
    source = Path(shutil.copytree(cohort_source, elsewhere.with_name("source")))
    scan: Any = nib.load(source / "sub-01" / "t1.nii.gz")
    nib.Nifti1Image(scan.get_fdata() + 1, scan.affine).to_filename(source / "sub-01" / "t1.nii.gz")
    with pytest.raises(StoreError, match="it is a link, and a store has none; remove it"):
        zp.convert(source, store, chunk=16)
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", [LOCK, MANIFEST, PARTIAL_DOCUMENT, STAGING, UNFINISHED])
def test_a_writer_follows_no_link_in_a_store(
    store: Path, elsewhere: Path, cohort_source: Path, name: str
) -> None:
    shutil.rmtree(store / name, ignore_errors=True)
    (store / name).unlink(missing_ok=True)
    is_folder = name in (STAGING, UNFINISHED)
    (store / name).symlink_to(elsewhere if is_folder else elsewhere / "precious")
    (store / ROOT_DOCUMENT).write_bytes((store / ROOT_DOCUMENT).read_bytes() + b"\n")  # to be written again
    if name == PARTIAL_DOCUMENT:
        zp.convert(cohort_source, store, chunk=16)
    else:
        with pytest.raises(StoreError, match="it is a link"):
            zp.convert(cohort_source, store, chunk=16)
    assert [file.name for file in elsewhere.iterdir()] == ["precious"]
    assert (elsewhere / "precious").read_text() == "precious"


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def endless(file: Path) -> None:
    os.truncate(file, 2**40)


@pytest.mark.parametrize("damage", [pipe, device, endless])
@pytest.mark.parametrize("name", [MANIFEST, ROOT_DOCUMENT, "sub-01/seg/index/values/c/0"])
def test_a_file_that_never_ends_is_an_error_of_one_line(
    run: Run, store: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(store / name)
    with pytest.raises(ZpatchError):
        a_read(store)
    refused(run, store, *([] if name == MANIFEST else ["verify"]))


@pytest.mark.parametrize("damage", [pipe, device, endless])
def test_a_pipe_for_a_lock_or_the_metadata_of_an_array_is_not_waited_for(
    store: Path, cohort_source: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    zarr.create_array(tmp_path / "array", data=np.zeros((4, 5, 6), np.int16), dimension_names=list("zyx"))
    damage(tmp_path / "array" / "zarr.json")
    with pytest.raises(StoreError):
        zp.ScalarImage(tmp_path / "array").read(zp.PatchLocation((0, 0, 0), (2, 2, 2)))
    if damage is not endless:
        damage(store / LOCK)
        with pytest.raises(StoreError):
            zp.convert(cohort_source, store, chunk=16)


@pytest.mark.parametrize(
    "key", ["../../../elsewhere/precious", "/etc/passwd", "a//b", ".", "a\\..\\b", ESCAPE]
)
def test_a_seal_of_a_file_outside_its_image_is_no_record(run: Run, store: Path, key: str) -> None:
    change_line(store, lambda record: record["files"].update({key: [1, "0" * 32]}))
    assert "is no image record" in refused(run, store)
    with pytest.raises(DamageError):
        a_read(store)


# Lines of a manifest that are sealed as they should be


def sealed(text: str) -> bytes:
    """Any text with the seal of a manifest line."""
    check = f'"check":"{digest(text.encode())}",'
    return (text[:1] + check + text[1:]).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        sealed("{no json}"),
        sealed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        sealed('{"document":' + "9" * 5000 + "}"),
        sealed('{"document":"zarr.json","bytes":1}'),
        sealed('{"bytes":1,"checksum":"00","document":["zarr.json"]}'),
        sealed('{"bytes":1,"checksum":"00","document":"../zarr.json"}'),
        sealed('{"bytes":"1","checksum":"00","document":"zarr.json"}'),
        sealed('{"image":"a","subject":"b"}').replace(b'"a"', b'"\xff"'),
    ],
    ids=lambda line: repr(line[42:70]),
)
def test_a_line_that_zpatch_would_not_write_is_damage(run: Run, store: Path, line: bytes) -> None:
    if b"\xff" in line:  # the seal of these bytes
        plain = b'{"image":"\xff","subject":"b"}'
        line = plain[:1] + f'"check":"{digest(plain)}",'.encode() + plain[1:] + b"\n"
    with (store / MANIFEST).open("ab") as manifest:
        manifest.write(line)
    assert f"{MANIFEST}, line 1" in refused(run, store)


HUGE = [2**40] * 3
CHANGES: dict[str, Change] = {
    "a shape of 2**40": lambda record: record.update(shape=HUGE),
    "a chunk of 2**70": lambda record: record.update(chunks=[2**70] * 3, shards=[2**70] * 3),
    "small chunks": lambda record: record.update(chunks=[1] * 3, shards=[2**20] * 3),
    "a true shape": lambda record: record.update(shape=[True] * 3),
    "a text for a slope": lambda record: record.update(slope="1"),
    "a huge slope": lambda record: record.update(slope=10**400),
    "no affine": lambda record: record.update(affine=[["x"] * 4] * 4),
    "a huge affine": lambda record: record.update(affine=[[10**400] * 4] * 4),
    "a text for a mean": lambda record: record["stats"].update(mean=ESCAPE),
    "a text for statistics": lambda record: record.update(stats="none"),
    "meta of text": lambda record: record.update(meta="none"),
    "a number for a split": lambda record: record.update(split=3),
    "a number for a warning": lambda record: record.update(warnings=[3]),
    "a number for a unit": lambda record: record.update(spatial_unit=3),
    "colours of text": lambda record: record.update(colours="3"),
    "half a colour": lambda record: record.update(colours=2.5),
    "a source of numbers": lambda record: record["source"].update(path=3),
    "a level that is none": lambda record: record.update(levels=[3]),
    "a huge level": lambda record: record.update(levels=[dict.fromkeys(("shape", "chunks", "shards"), HUGE)]),
    "a seal of text": lambda record: record["files"].update({"zarr.json": ["1", "0"]}),
    "another field": lambda record: record.update(other=1),
    "a list for a name": lambda record: record["orientation"].update(axes=[[0], 1, 2]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_record_with_values_that_cannot_be_is_damage(run: Run, store: Path, change: Change) -> None:
    change_line(store, change)
    assert "is no image record" in refused(run, store)


def test_escape_codes_of_a_manifest_do_not_reach_the_terminal(run: Run, store: Path) -> None:
    change_line(store, lambda record: record.update(warnings=[ESCAPE], spatial_unit=ESCAPE, split=ESCAPE))
    code, out, error = run("info", store)
    assert code == 0
    assert r"\x1b[2J" in out
    assert all(line.isprintable() for line in (out + error).splitlines())


def test_a_root_document_of_any_json_is_no_store(run: Run, store: Path) -> None:
    for text in ("[" * 100_000, "9" * 5000, '{"attributes": {"zpatch": [1]}}',
                 '{"attributes": {"zpatch": {"format": "1"}}}', "3", '"x"'):  # fmt: skip
        (store / ROOT_DOCUMENT).write_text(text)
        assert "no zpatch store" in refused(run, store, "info")


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("row_start", np.array([0, 2**40])),
        ("row_start", np.array([5, 1, 0])),
        ("chunk_id", np.array([-1])),
        ("count", np.array([1.5])),
        ("values", np.ones((2, 2), np.int64)),
    ],
)
def test_a_label_index_whose_columns_do_not_fit_is_damage(store: Path, name: str, table: Any) -> None:
    folder = store / "sub-01" / "seg" / "index" / name
    shutil.rmtree(folder)
    config = {"write_empty_chunks": True}
    zarr.create_array(folder, data=table, chunks=table.shape, compressors=None, config=config)

    def seal_again(record: dict[str, Any]) -> None:
        for file in (
            "zarr.json",
            *(str(c.relative_to(folder)) for c in (folder / "c").rglob("*") if c.is_file()),
        ):
            data = (folder / file).read_bytes()
            record["files"][f"index/{name}/{file}"] = [len(data), digest(data)]

    change_line(store, seal_again, "seg")
    with pytest.raises(DamageError, match=r"is no label index|cannot be read .*no regular file"):
        a_read(store)


# Arrays of others

MEASURE = """
import sys
from zpatch.runtime.process_memory import peak_bytes, reset_peak, resident_bytes
import zpatch as zp
reset_peak()
before = resident_bytes()
try:
    image = zp.ScalarImage(sys.argv[1])
    print(image.read(zp.PatchLocation((0, 0, 0), (8, 8, 8))).sum())
except zp.errors.ZpatchError as error:
    print("refused:", error)
print((peak_bytes() - before) // 2**20)
"""


def read_apart(array: Path) -> tuple[str, int]:
    """What a process that reads 8 x 8 x 8 voxels prints, and the memory it takes, in MiB."""
    ran = forked.run(
        MEASURE.replace("zp.errors.", "zpatch.errors.").replace("import sys", "import sys, zpatch.errors"),
        array,
    )
    assert ran.returncode == 0, ran.stderr
    said, mib = ran.stdout.strip().splitlines()
    return said, int(mib)


def metadata(folder: Path, shape: int, shard: int, chunk: int, dtype: str = "uint8") -> None:
    """The document of a sharded array, and nothing else."""
    folder.mkdir()
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [chunk] * 3, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "index_codecs": index, "index_location": "end",
    }  # fmt: skip
    document = {
        "zarr_format": 3, "node_type": "array", "shape": [shape] * 3, "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard] * 3}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "fill_value": 7,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}], "attributes": {},
        "dimension_names": list("zyx"),
    }  # fmt: skip
    (folder / "zarr.json").write_text(json.dumps(document))


def test_metadata_that_ask_for_a_huge_table_of_chunks_are_refused(tmp_path: Path) -> None:
    metadata(tmp_path / "array", 1600, 1600, 1)
    said, mib = read_apart(tmp_path / "array")
    assert "its shards have 4096000000 chunks each" in said
    assert mib < 64


def test_a_sparse_shard_with_a_huge_index_is_refused(tmp_path: Path) -> None:
    metadata(tmp_path / "array", 512, 512, 1)
    shard = tmp_path / "array" / "c" / "0" / "0" / "0"
    shard.parent.mkdir(parents=True)
    with shard.open("wb") as file:
        file.truncate(16 * 512**3 + 4)
    said, mib = read_apart(tmp_path / "array")
    assert "its shards have 134217728 chunks each" in said
    assert mib < 64


def test_a_missing_chunk_takes_no_memory(tmp_path: Path) -> None:
    metadata(tmp_path / "array", 1280, 1280, 1280)
    said, mib = read_apart(tmp_path / "array")
    assert float(said) == 7 * 8**3
    assert mib < 64


def test_an_array_larger_than_any_disk_is_refused(tmp_path: Path) -> None:
    metadata(tmp_path / "array", 2**40, 64, 32)
    said, _ = read_apart(tmp_path / "array")
    assert "is larger than any disk" in said


# Frames that decode to less than a chunk


def test_frames_that_are_too_short_for_a_chunk_are_damaged() -> None:
    small = zstd.compress(b"\1" * 8, 1)
    assert len(small) < 18
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd" + zstd.compress(b"\1" * 64, 1)
    for frame in (small, skipped, small[:5], b""):
        with pytest.raises(ValueError, match=r"does not decode|cannot be decoded"):
            ChunkCodec("zstd").decode(np.frombuffer(frame, np.uint8), np.full(64, 9, np.uint8))


@pytest.mark.parametrize("compressor", ["zstd", "blosc"])
def test_whatever_is_decoded_fills_the_chunk(compressor: str, rng: np.random.Generator, full: bool) -> None:
    """Of two buffers with other contents before, both have the same afterwards, or both are refused."""
    voxels = rng.integers(0, 9, 2000, np.uint8)
    frames = {
        "zstd": [zstd.compress(voxels, 3), zstd.compress(voxels[:40], 3)],
        "blosc": [blosc.compress(voxels.view(f"V{size}"), b"lz4", 5, size // 4) for size in (2, 4, 8)],
    }[compressor]
    decoded = 0
    for _ in range(20_000 if full else 2000):
        frame = np.frombuffer(frames[rng.integers(len(frames))], np.uint8).copy()
        for _ in range(rng.integers(1, 4)):
            frame[rng.integers(min(len(frame), 40))] = rng.integers(256)
        outs = [np.full(2000, before, np.uint8) for before in (0, 255)]
        try:
            for out in outs:
                ChunkCodec(compressor).decode(frame, out)  # type: ignore[arg-type]
        except ValueError:
            continue
        decoded += 1
        np.testing.assert_array_equal(*outs)
    assert decoded > 10


def test_blocks_that_are_no_whole_voxels_are_damaged() -> None:
    frame = bytearray(blosc.compress(np.arange(4000, dtype="<i4") % 50, b"lz4", 5, 1, 0))
    assert not frame[2] & 16
    frame[8:12] = (4002).to_bytes(4, "little")
    with pytest.raises(ValueError, match="no whole voxels"):
        ChunkCodec("blosc").decode(np.frombuffer(bytes(frame), np.uint8), np.zeros(4000, "<i4"))


def test_compact_json_of_a_hostile_line_is_sealed_as_a_sound_one() -> None:
    """The helper of these tests seals as zpatch does."""
    value = {"a": 1, "b": [2]}
    assert json.loads(sealed(compact_json(value))) == json.loads(sealed_line(value))
