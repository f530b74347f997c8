"""An image written shard by shard has the same bytes whichever process wrote a shard, and was killed."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.chunks.layout import chunk_counts
from zpatch.chunks.levels import Level, halve, plan_levels
from zpatch.digests import compact_json, digest, sealed_line, unsealed
from zpatch.errors import DamageError, IncompleteCoverageError, SamplingError, StoreExistsError
from zpatch.geometry.boxes import padded_to_4d
from zpatch.prediction.shard_ledger import HEADER, LEDGER, Shard, ShardLedger, begin, header_of
from zpatch.records.image_record import ImageRecord, Kind
from zpatch.store.image_writer import ImageWriter
from zpatch.store.staged_image import StagedImage
from zpatch.store.store import sharded_array
from zpatch.volume_files.nifti_writer import make_header

STEPS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
HEADER_BYTES = make_header((20, 18, 25), 1, np.dtype("<f4"), np.eye(4))

Voxels = NDArray[Any]


# Images


def record_of(voxels: Voxels, kind: Kind = "scalar", *, shards: tuple[int, ...] = (8, 16, 24)) -> ImageRecord:
    """A record of voxels (z, y, x) or (c, z, y, x)."""
    channels = (1,) * (voxels.ndim - 3)
    return ImageRecord(
        subject="sub-01",
        image="heart",
        kind=kind,
        shape=voxels.shape,
        dtype=voxels.dtype.str,
        axes="czyx"[-voxels.ndim :],
        chunks=(*channels, 8, 8, 8),
        shards=(*channels, *shards),
        codec="lz4",
        affine=tuple(map(tuple, np.eye(4).tolist())),
    )


def make_voxels(kind: str) -> Voxels:
    rng = np.random.default_rng(7)
    if kind == "label":
        return rng.integers(0, 4, (25, 18, 20)).astype(np.uint8)
    if kind == "sampling":
        return rng.random((25, 18, 20)).astype("<f4")
    return rng.normal(50, 20, (2, 25, 18, 20)).astype("<f4")


def shards_of(record: ImageRecord) -> list[Shard]:
    return list(np.ndindex(chunk_counts(record.shape_czyx, padded_to_4d(record.shards))))  # type: ignore[arg-type]


def part_of(record: ImageRecord, voxels: Voxels, shard: Shard) -> Voxels:
    shards = padded_to_4d(record.shards)
    box = tuple(slice(n * s, (n + 1) * s) for n, s in zip(shard, shards, strict=True))
    return voxels.reshape(record.shape_czyx)[box]


def skipped_in(shard: Shard) -> int:
    return 100 * shard[0] + 10 * shard[1] + shard[2]


def write_shards(folder: Path, record: ImageRecord, voxels: Voxels, shards: Sequence[Shard]) -> None:
    for shard in shards:
        ShardLedger(folder).write(record, shard, part_of(record, voxels, shard), skipped=skipped_in(shard))


def finish(folder: Path, record: ImageRecord) -> ImageRecord:
    return ShardLedger(folder).finish(record, HEADER_BYTES, ["a warning"])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an image, byte for byte."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def undisturbed(folder: Path, kind: Kind = "scalar") -> tuple[ImageRecord, dict[str, bytes]]:
    """The record and the files of an image that one process wrote in order."""
    voxels = make_voxels(kind)
    record = record_of(voxels, kind)
    write_shards(folder, record, voxels, shards_of(record))
    return finish(folder, record), contents(folder)


def entry_file(folder: Path, shard: Shard) -> Path:
    return folder.parent / LEDGER / folder.name / f"{'.'.join(map(str, shard))}.json"


def written(folder: Path) -> set[Shard]:
    """The shards that need not be written again."""
    names = (entry.stem.split(".") for entry in entry_file(folder, (0, 0, 0, 0)).parent.glob("?.*.json"))
    shards: list[Shard] = [tuple(map(int, name)) for name in names]  # type: ignore[misc]
    return {shard for shard in shards if ShardLedger(folder).has(shard)}


def shard_file(folder: Path, record: ImageRecord, shard: Shard) -> Path:
    return sharded_array(folder, record).shard_file(shard)


def assert_resumes(folder: Path, kind: Kind, lost: set[Shard], expected: dict[str, bytes]) -> None:
    """Only lost shards are written again, and then all files are as expected."""
    voxels = make_voxels(kind)
    record = record_of(voxels, kind)
    left = set(shards_of(record)) - written(folder)
    assert left == lost
    write_shards(folder, record, voxels, sorted(left))
    finish(folder, record)
    assert contents(folder) == expected


# What is written


@pytest.mark.parametrize("kind", ["scalar", "label", "sampling"])
def test_an_image_is_byte_for_byte_equal_to_one_that_is_counted_in_one_pass(
    tmp_path: Path, kind: Kind
) -> None:
    """Of floats too, as these shards are small enough to be counted in one block."""
    voxels = make_voxels(kind)
    record = record_of(voxels, kind)
    writer = ImageWriter(StagedImage.below(tmp_path), record, "heart")
    for shard in shards_of(record):
        writer.add_shard(shard, part_of(record, voxels, shard))
        ShardLedger(tmp_path / "heart").write(record, shard, part_of(record, voxels, shard))
    assert finish(tmp_path / "heart", record) == writer.finish(HEADER_BYTES, ["a warning"])
    assert contents(tmp_path / "heart") == contents(writer.stage.folder)


def test_the_record_seals_every_file_and_counts_skipped_voxels(tmp_path: Path) -> None:
    record, files = undisturbed(tmp_path / "heart")
    assert record.stats["skipped"] == sum(map(skipped_in, shards_of(record)))
    seals = {key: (seal.bytes, seal.checksum) for key, seal in record.files.items()}
    assert seals == {key: (len(data), digest(data)) for key, data in files.items()}
    assert ImageRecord.from_json(json.loads(compact_json(record.to_json())), "line") == record


@given(
    order=st.permutations(range(16)),
    twice=st.sets(st.integers(0, 15)),
    kind=st.sampled_from(["scalar", "label"]),
)
def test_the_order_of_shards_and_repeated_ones_change_no_byte(
    order: list[int], twice: set[int], kind: Kind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = expected_files(kind, tmp_path_factory)
    folder = tmp_path_factory.mktemp("any order") / "heart"
    voxels = make_voxels(kind)
    record = record_of(voxels, kind)
    shards = shards_of(record)
    write_shards(folder, record, voxels, [shards[n] for n in [*order, *twice] if n < len(shards)])
    assert written(folder) == set(shards)
    finish(folder, record)
    assert contents(folder) == expected
    shutil.rmtree(folder.parent)


EXPECTED: dict[str, dict[str, bytes]] = {}


def expected_files(kind: Kind, places: pytest.TempPathFactory) -> dict[str, bytes]:
    if kind not in EXPECTED:
        EXPECTED[kind] = undisturbed(places.mktemp("undisturbed") / "heart", kind)[1]
    return EXPECTED[kind]


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the image of floats, undisturbed."""
    return expected_files("scalar", tmp_path_factory)


def test_images_of_one_subject_keep_their_shards_apart(tmp_path: Path) -> None:
    voxels = make_voxels("scalar")
    record = record_of(voxels)
    write_shards(tmp_path / "one", record, voxels, shards_of(record)[:3])
    assert written(tmp_path / "other") == set()
    assert written(tmp_path / "one") == set(shards_of(record)[:3])


def test_voxels_that_are_not_finite_are_counted_and_entries_that_did_not_count_them_are_read(
    tmp_path: Path,
) -> None:
    voxels = make_voxels("label")
    record = record_of(voxels, "label")
    for number, shard in enumerate(shards_of(record)):
        ledger = ShardLedger(tmp_path / "heart")
        ledger.write(record, shard, part_of(record, voxels, shard), not_finite=number)
    number = len(shards_of(record)) - 1
    assert finish(tmp_path / "heart", record).stats["not_finite"] == number * (number + 1) / 2
    last = entry_file(tmp_path / "heart", shards_of(record)[-1])
    value = unsealed(last.read_bytes(), "")
    del value["not_finite"]
    last.write_text(sealed_line(value))
    assert finish(tmp_path / "heart", record).stats["not_finite"] == number * (number - 1) / 2


def test_missing_shards_are_an_error_with_their_number(tmp_path: Path) -> None:
    voxels = make_voxels("scalar")
    record = record_of(voxels)
    shards = shards_of(record)
    write_shards(tmp_path / "heart", record, voxels, [*shards[:3], *shards[5:]])
    before = contents(tmp_path)
    text = (
        r"^image 'heart' of subject 'sub-01': 2 of 16 shards are not written, the first one \(0, 1, 1, 0\) "
        r"along c, z, y, x; run the same command again$"
    )
    with pytest.raises(IncompleteCoverageError, match=text):
        finish(tmp_path / "heart", record)
    assert contents(tmp_path) == before


def test_voxels_that_an_index_refuses_leave_nothing(tmp_path: Path) -> None:
    voxels = -make_voxels("sampling")
    record = record_of(voxels, "sampling")
    with pytest.raises(SamplingError, match="image 'heart' of subject 'sub-01' holds negative weights"):
        write_shards(tmp_path / "heart", record, voxels, shards_of(record)[:1])
    assert contents(tmp_path) == {}
    assert written(tmp_path / "heart") == set()


def test_an_entry_holds_plain_numbers_and_no_pickle(tmp_path: Path) -> None:
    undisturbed(tmp_path / "heart", "label")
    entry = unsealed(entry_file(tmp_path / "heart", (0, 1, 0, 0)).read_bytes(), "record")
    with np.load(io.BytesIO(base64.b64decode(entry["state"])), allow_pickle=False) as state:
        assert all(values.dtype.kind in "iuf" for values in state.values())
    assert len(entry["state"]) < 4000


# Coarser levels


def with_levels(kind: Kind) -> ImageRecord:
    """The record of an image with two coarser levels, in shards that do not fit each other."""
    record = record_of(make_voxels(kind), kind)
    channels, first = record.shape[:-3], record.chunks[:-3]
    levels = (
        Level((*channels, 13, 9, 10), (*first, 8, 8, 8), (*first, 8, 16, 8)),
        Level((*channels, 7, 5, 5), (*first, 4, 4, 4), (*first, 4, 8, 4)),
    )
    return dataclasses.replace(record, levels=levels)


def shards_of_levels(record: ImageRecord) -> int:
    return sum(math.prod(chunk_counts(level.shape, level.shards)) for level in record.levels)


def coarser(voxels: Voxels, kind: Kind) -> Voxels:
    """Every second voxel (..., z, y, x), each the mean or the first most frequent label of its block."""
    shape = [-(-n // 2) for n in voxels.shape[-3:]]
    found = np.empty((*voxels.shape[:-3], *shape), voxels.dtype)
    for z, y, x in np.ndindex(*shape):
        block = voxels[..., 2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        if kind == "label":
            values, counts = np.unique(block, return_counts=True)
            found[..., z, y, x] = values[counts.argmax()]
        else:
            found[..., z, y, x] = block.mean(axis=(-3, -2, -1), dtype=np.float64)
    return found


def levels_of(folder: Path) -> list[Voxels]:
    group = zarr.open_group(folder, mode="r")
    return [np.asarray(group[str(number)][:]) for number in range(len(list(folder.glob("[0-9]"))))]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["scalar", "label"])
def test_levels_are_made_of_the_finer_ones_and_the_image_is_the_same(tmp_path: Path, kind: Kind) -> None:
    _, plain = undisturbed(tmp_path / "plain" / "heart", kind)
    record = with_levels(kind)
    folder = tmp_path / "heart"
    write_shards(folder, record, make_voxels(kind), shards_of(record))
    done = finish(folder, record)
    files = contents(folder)
    assert {name: files[name] for name in plain if name != "zarr.json"} == {
        name: data for name, data in plain.items() if name != "zarr.json"
    }
    seals = {key: (seal.bytes, seal.checksum) for key, seal in done.files.items()}
    assert seals == {key: (len(data), digest(data)) for key, data in files.items()}
    first, second, third = levels_of(folder)
    np.testing.assert_array_equal(first, make_voxels(kind))
    np.testing.assert_allclose(second, coarser(first, kind), rtol=1e-6)
    np.testing.assert_allclose(third, coarser(second, kind), rtol=1e-6)
    assert set(np.unique(third)) <= set(np.unique(first)) or kind != "label"


@pytest.mark.parametrize("harm", ["cut", "unlink"])
def test_only_lost_shards_of_levels_are_made_again(tmp_path: Path, harm: str) -> None:
    record, folder = with_levels("label"), tmp_path / "heart"
    write_shards(folder, record, make_voxels("label"), shards_of(record))
    finish(folder, record)
    before = {file: file.stat().st_ino for file in folder.glob("[12]/c/*/*/*")}
    expected = contents(folder)
    assert len(before) == shards_of_levels(record)
    lost = folder / "1/c/1/0/1"
    cut(lost, 3) if harm == "cut" else lost.unlink()
    finish(folder, record)
    assert contents(folder) == expected
    assert {file for file, number in before.items() if file.stat().st_ino != number} <= {lost}


def test_a_damaged_shard_is_found_by_the_levels_made_of_it_and_written_again(tmp_path: Path) -> None:
    record, folder = with_levels("label"), tmp_path / "heart"
    write_shards(folder, record, make_voxels("label"), shards_of(record))
    flip(shard_file(folder, record, (0, 1, 0, 0)))
    text = "^image 'heart' of subject 'sub-01': 0/c/1/0/0 changed after it was written; run the same command"
    with pytest.raises(DamageError, match=text):
        finish(folder, record)
    assert set(shards_of(record)) - written(folder) == {(0, 1, 0, 0)}
    write_shards(folder, record, make_voxels("label"), [(0, 1, 0, 0)])
    finish(folder, record)
    sound = tmp_path / "sound" / "heart"
    write_shards(sound, record, make_voxels("label"), shards_of(record))
    finish(sound, record)
    assert contents(folder) == contents(sound)


def test_an_image_finished_without_its_levels_has_none_of_their_files(tmp_path: Path) -> None:
    record, folder = with_levels("label"), tmp_path / "heart"
    write_shards(folder, record, make_voxels("label"), shards_of(record))
    finish(folder, record)
    finish(folder, dataclasses.replace(record, levels=()))
    assert contents(folder) == undisturbed(tmp_path / "plain" / "heart", "label")[1]


@given(
    shape=st.tuples(*[st.integers(1, 90)] * 2, st.integers(1, 30)).flatmap(st.permutations),
    chunk=st.integers(1, 5),
    per_shard=st.tuples(*[st.integers(1, 9)] * 3),
    kind=st.sampled_from(["scalar", "label"]),
)
def test_levels_of_any_shape_in_any_shards_are_those_of_the_whole_array(
    shape: list[int],
    chunk: int,
    per_shard: tuple[int, ...],
    kind: Kind,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any") / "heart"
    voxels = np.random.default_rng(sum(shape)).integers(0, 4, shape).astype(np.uint8)
    chunks = tuple(min(8 * chunk, n) for n in shape)
    shards = tuple(c * s for c, s in zip(chunks, per_shard, strict=True))
    record = dataclasses.replace(record_of(voxels, kind), chunks=chunks, shards=shards)
    record = dataclasses.replace(record, levels=plan_levels(record.shape, chunks, shards))
    write_shards(folder, record, voxels, shards_of(record))
    finish(folder, record)
    whole, *levels = levels_of(folder)
    for level in levels:
        whole = halve(whole[None], majority=kind == "label")[0]
        np.testing.assert_array_equal(level, whole)
    shutil.rmtree(folder.parent)


# Torn, lost


def cut(file: Path, length: int) -> None:
    os.truncate(file, length)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


HARMED = (1, 2, 0, 0)
HARMS: dict[str, Callable[[Path, Path], Any]] = {
    "an empty record": lambda record, shard: cut(record, 0),
    "half a record": lambda record, shard: cut(record, record.stat().st_size // 2),
    "a record without its last byte": lambda record, shard: cut(record, record.stat().st_size - 1),
    "a flipped bit": lambda record, shard: flip(record),
    "a shard without record": lambda record, shard: record.unlink(),
    "a record without shard": lambda record, shard: shard.unlink(),
    "a shard cut off": lambda record, shard: cut(shard, shard.stat().st_size - 1),
    "an empty shard": lambda record, shard: cut(shard, 0),
    "the record of another shard": lambda record, shard: shutil.copy(
        record.with_name("0.0.0.0.json"), record
    ),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("finished", [False, True])
def test_only_damaged_shards_are_written_again(
    tmp_path: Path, harm: str, finished: bool, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "heart"
    record, _ = undisturbed(folder)
    if not finished:
        for entry in folder.iterdir():
            if entry.name != "0":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    HARMS[harm](entry_file(folder, HARMED), shard_file(folder, record, HARMED))
    with pytest.raises(IncompleteCoverageError, match=r"1 of 16 shards .* \(1, 2, 0, 0\)"):
        finish(folder, record_of(make_voxels("scalar")))
    assert_resumes(folder, "scalar", {HARMED}, expected)


def test_partial_files_of_killed_writers_are_neither_counted_nor_kept(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "heart"
    undisturbed(folder)
    entry_file(folder, HARMED).with_name("0123.partial").write_text("{")
    entry_file(folder, HARMED).with_name("0123.partial.0.0.0.0").write_bytes(b"half a shard")
    for name in ("nifti/c/half", "index/half", "zarr.json.4567.partial", "0/zarr.json.4567.partial"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    assert_resumes(folder, "scalar", set(), expected)


# Processes of their own, harmed


def tell(value: Any) -> None:
    """Answer from such a process."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def answer_of(process: forked.Forked) -> Any:
    out, _ = process.communicate(120)
    assert process.returncode == 0
    return json.loads(out)


def write_share(folder: str, share: int, shares: int) -> None:
    """Say that all is ready, then write a share of the shards."""
    voxels = make_voxels("scalar")
    record = record_of(voxels)
    tell("ready")
    write_shards(Path(folder), record, voxels, shards_of(record)[share::shares])


def started(*writers: forked.Forked) -> Sequence[forked.Forked]:
    """The writers, once all of them are about to write."""
    for writer in writers:
        assert writer.read_line()
    return writers


@pytest.mark.slow
def test_two_writers_killed_at_any_moment_lose_only_the_shard_in_hand(
    tmp_path: Path, full: bool, expected: dict[str, bytes]
) -> None:
    moments = random.Random(3)
    for round_ in range(20 if full else 3):
        folder = tmp_path / str(round_) / "heart"
        writers = started(*(forked.start(write_share, str(folder), share, 2) for share in (0, 1)))
        for writer in moments.sample(writers, 2):
            time.sleep(moments.uniform(0, 0.02))
            writer.kill()
        for writer in writers:
            writer.communicate()
        there = written(folder)
        assert_resumes(folder, "scalar", set(shards_of(record_of(make_voxels("scalar")))) - there, expected)


@pytest.mark.slow
def test_two_writers_of_the_same_shards_at_once_do_no_harm(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "heart"
    for writer in started(*(forked.start(write_share, str(folder), 0, 1) for _ in range(2))):
        writer.communicate()
        assert writer.returncode == 0
    assert not list(tmp_path.rglob("*.partial*"))
    assert_resumes(folder, "scalar", set(), expected)


def killed_at(steps: Sequence[int], folder: str, act: str) -> None:
    """For each step, do a thing to a copy of the folder in a child that is killed at that step."""
    tell([_killed_at(step, Path(folder), ACTS[act]) for step in steps])


def _killed_at(step: int, folder: Path, act: Callable[[Path], Any]) -> int:
    copy = folder.with_name(f"{folder.name}-{step}")
    shutil.copytree(folder, copy)
    if (child := os.fork()) == 0:
        count = itertools.count(1)

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def harmed(*args: Any, **options: Any) -> Any:
                if next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return harmed

        try:
            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            act(copy / "heart")
        finally:
            os._exit(min(next(count) - 1, 255))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _write_two(folder: Path) -> None:
    voxels = make_voxels("scalar")
    record = record_of(voxels)
    write_shards(folder, record, voxels, shards_of(record)[4:6])


ACTS: dict[str, Callable[[Path], Any]] = {
    "write": _write_two,
    "finish": lambda folder: finish(folder, record_of(make_voxels("scalar"))),
    "finish with levels": lambda folder: finish(folder, with_levels("scalar")),
}


@pytest.mark.slow
@pytest.mark.parametrize("act", ["write", "finish"])
def test_writing_or_finishing_can_be_repeated_after_a_kill_at_any_step(
    tmp_path: Path, act: str, full: bool, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "whole" / "heart"
    voxels = make_voxels("scalar")
    record = record_of(voxels)
    shards = shards_of(record)
    begun = shards if act == "finish" else shards[:4]
    write_shards(folder, record, voxels, begun)
    (count,) = answer_of(forked.start(killed_at, [10**6], str(folder.parent), act))
    assert 12 < count < 255
    steps = [*range(1, count + 1)]
    steps = steps if full else steps[:: max(1, len(steps) // 8)]
    codes = answer_of(forked.start(killed_at, steps, str(folder.parent), act))
    assert codes == [-signal.SIGKILL] * len(steps)
    for step in steps:
        harmed = folder.parent.with_name(f"whole-{step}") / "heart"
        there = written(harmed)
        assert there >= set(begun)
        assert_resumes(harmed, "scalar", set(shards) - there, expected)


@pytest.mark.slow
def test_levels_can_be_finished_after_a_kill_at_any_step_and_finished_shards_are_not_made_again(
    tmp_path: Path, full: bool
) -> None:
    folder = tmp_path / "whole" / "heart"
    record = with_levels("scalar")
    write_shards(folder, record, make_voxels("scalar"), shards_of(record))
    (count,) = answer_of(forked.start(killed_at, [10**6], str(folder.parent), "finish with levels"))
    steps = [*range(1, count + 1)][:: 1 if full else 14]
    codes = answer_of(forked.start(killed_at, steps, str(folder.parent), "finish with levels"))
    assert codes == [-signal.SIGKILL] * len(steps)
    finish(folder, record)
    expected = contents(folder)
    partly = 0
    for step in steps:
        harmed = folder.parent.with_name(f"whole-{step}") / "heart"
        entries = list((harmed.parent / LEDGER / "heart").glob("*-*.json"))
        partly += 0 < len(entries) < shards_of_levels(record)
        files = [harmed / unsealed(entry.read_bytes(), "")["file"] for entry in entries]
        before = [(file, file.stat().st_ino) for file in files]
        finish(harmed, record)
        assert contents(harmed) == expected
        assert [(file, file.stat().st_ino) for file in files] == before
    assert partly


def written_on_a_full_disk(folder: str, limit: int) -> None:
    """Write a shard where files may have so many bytes and no more."""
    voxels = make_voxels("scalar")
    record = record_of(voxels)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_shards(Path(folder), record, voxels, [SMALL_SHARD])
    except OSError as error:
        tell(error.strerror)


SMALL_SHARD = (0, 2, 1, 0)  # smaller than its record


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nothing", "half a shard", "a shard and no record"])
def test_a_disk_that_is_full_is_an_error_that_leaves_nothing_half_done(
    tmp_path: Path, what: str, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "heart"
    record = record_of(make_voxels("scalar"))
    shards = shards_of(record)
    write_shards(folder, record, make_voxels("scalar"), [shard for shard in shards if shard != SMALL_SHARD])
    before = contents(tmp_path)
    shard = str(shard_file(folder, record, SMALL_SHARD).relative_to(folder))
    size = len(expected[shard])
    limit = {"nothing": 0, "half a shard": size // 2, "a shard and no record": size}[what]
    assert answer_of(forked.start(written_on_a_full_disk, str(folder), limit)) == "File too large"
    whole = {f"heart/{shard}": expected[shard]} if "and" in what else {}
    assert contents(tmp_path) == before | whole
    assert_resumes(folder, "scalar", {SMALL_SHARD}, expected)


# What is done to the disk


def traced(folder: str) -> None:
    """Write and finish an image, and print which files were opened and renamed."""
    events: list[tuple[str, ...]] = []

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str):
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR))
            events.append(("write" if writes else "read", args[0]))
        elif event == "os.rename":
            events.append(("rename", str(args[0]), str(args[1])))

    voxels = make_voxels("scalar")
    record = record_of(voxels)
    sys.addaudithook(note)
    write_shards(Path(folder), record, voxels, shards_of(record))
    written(Path(folder))
    finish(Path(folder), record)
    tell([event for event in events if event[1].startswith(folder.rpartition("/")[0])])


def test_each_shard_is_written_once_and_none_is_ever_read(tmp_path: Path) -> None:
    folder = tmp_path / "heart"
    events = answer_of(forked.start(traced, str(folder)))
    record = record_of(make_voxels("scalar"))
    shards = shards_of(record)
    files = {str(shard_file(folder, record, shard)) for shard in shards}
    renamed = Counter(event[2] for event in events if event[0] == "rename")
    assert {name: times for name, times in renamed.items() if name in files} == dict.fromkeys(files, 1)
    assert {str(entry_file(folder, shard)) for shard in shards} <= renamed.keys()
    sources = {event[1] for event in events if event[0] == "rename" and event[2] in files}
    opened = Counter(event[1] for event in events if event[0] != "rename")
    assert {opened[name] for name in sources} == {1}
    assert not files & opened.keys()


# What shards depend on


HEADER_VALUES = {"model": "ab" * 16, "patch_size": [64, 64, 64], "reduce": "argmax", "mask": None}


def test_a_header_is_written_once_and_an_equal_one_accepted(tmp_path: Path) -> None:
    begin(tmp_path / "sub-01", HEADER_VALUES)
    before = contents(tmp_path)
    assert set(before) == {f"sub-01/{HEADER}"}
    begin(tmp_path / "sub-01", {**HEADER_VALUES, "patch_size": (64, 64, 64)})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "cd" * 16}, f'model: "{"ab" * 16}" then, "{"cd" * 16}" now;'),
        (
            {"patch_size": [96, 96, 96], "reduce": None},
            'patch_size: [64,64,64] then, [96,96,96] now, reduce: "argmax" then, null now; say overwrite=',
        ),
        ({"tta": True}, "tta: null then, true now;"),
        ({"patch_size": [64] * 99}, "[64,64,64] then, [64,64,64,64,64,64,64,64,64,64,64,64,64,... now;"),
        ({f"input {n}": n for n in range(9)}, "input 4: null then, 4 now (and 4 more); say overwrite=True"),
        ({"mask": "line\nline"}, r'mask: null then, "line\nline" now'),
    ],
)
def test_another_header_is_refused_with_the_differences(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    begin(tmp_path / "sub-01", HEADER_VALUES)
    before = contents(tmp_path)
    with pytest.raises(StoreExistsError) as refusal:
        begin(tmp_path / "sub-01", {**HEADER_VALUES, **changes})
    said = str(refusal.value)
    assert said.startswith(f"{tmp_path / 'sub-01'}: the prediction started there differs in ")
    assert text in said
    assert said.endswith("; say overwrite=True to start over, or choose another output")
    assert len(said.splitlines()) == 1
    assert contents(tmp_path) == before


def test_long_values_are_shown_around_their_first_difference(tmp_path: Path) -> None:
    before = {"heads": {"prediction": [3, *[256] * 20, 64, 128, 128, 128]}}
    begin(tmp_path, before)
    before["heads"]["prediction"][21] = 32
    with pytest.raises(StoreExistsError) as refusal:
        begin(tmp_path, before)
    shown = "heads: ...6,256,256,64,128,128,128]} then, ...6,256,256,32,128,128,128]} now;"
    assert shown in str(refusal.value)


HEADER_HARMS: dict[str, Callable[[Path], Any]] = {
    "lost": Path.unlink,
    "empty": lambda path: cut(path, 0),
    "torn": lambda path: cut(path, 40),
    "a bit flipped": flip,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"unit": [0, 0, 0]},
        {"unit": [0, 0, 0, "0"]},
        {"unit": 5},
        {"file": 7},
        {"file": "../../secret"},
        {"file": "a" * 5000},
        {"file": "0"},
        {"seal": {"bytes": "many", "checksum": "0"}},
        {"seal": None},
        {"skipped": None},
        {"not_finite": -1},
        {"level": "0"},
    ],
    ids=lambda changed: f"{changed!s:.40}",
)
def test_an_entry_that_is_sealed_but_none_of_zpatch_does_not_count(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder, shard = tmp_path / "heart", (0, 0, 0, 0)
    record = record_of(make_voxels("sampling"), "sampling")
    write_shards(folder, record, make_voxels("sampling"), [shard])
    file = entry_file(folder, shard)
    entry = unsealed(file.read_bytes(), "")
    assert ShardLedger(folder).has(shard)
    file.write_text(sealed_line({**entry, **changed}))
    assert not ShardLedger(folder).has(shard)
    lacking = {key: value for key, value in entry.items() if key not in changed}
    file.write_text(sealed_line(lacking))
    assert ShardLedger(folder).has(shard) == (set(changed) <= {"level", "not_finite"})


def state_of(**arrays: Any) -> str:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return base64.b64encode(stream.getvalue()).decode()


def bomb() -> str:
    """An array that says that it has 2 GiB, in few bytes."""
    stream = io.BytesIO(base64.b64decode(state_of(box=np.zeros(3))))
    with zipfile.ZipFile(stream) as file:
        place = file.start_dir + 24  # the size in the directory of a zip file
    stream.getbuffer()[place : place + 4] = (2**31).to_bytes(4, "little")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    "state",
    [
        *("", "no base64", 5, None),
        base64.b64encode(b"no zip").decode(),
        state_of(box=np.zeros(3)),
        state_of(box=np.zeros((3, 2)), bin=np.array(["a"])),
        state_of()[:-8],
        bomb(),
    ],
    ids=lambda state: f"{state!s:.12}",
)
def test_statistics_of_an_entry_that_cannot_be_read_are_an_error(tmp_path: Path, state: Any) -> None:
    record = record_of(make_voxels("sampling"), "sampling")
    folder, shards = tmp_path / "heart", shards_of(record)
    write_shards(folder, record, make_voxels("sampling"), shards)
    file = entry_file(folder, shards[-1])
    file.write_text(sealed_line({**unsealed(file.read_bytes(), ""), "state": state}))
    with pytest.raises(DamageError, match=r"its statistics cannot be read .* remove it, and run the same"):
        finish(folder, record)
    file.unlink()
    with pytest.raises(IncompleteCoverageError, match="1 of"):
        finish(folder, record)


@pytest.mark.parametrize("value", [{"header": 3}, {"header": None}, {"head": {}}], ids=str)
def test_a_sealed_file_without_a_header_counts_as_none(tmp_path: Path, value: dict[str, Any]) -> None:
    (tmp_path / HEADER).write_text(sealed_line(value))
    assert header_of(tmp_path) is None
    begin(tmp_path, {"patch_size": 3})
    assert header_of(tmp_path) == {"patch_size": 3}


@pytest.mark.parametrize("harm", HEADER_HARMS)
def test_a_damaged_header_is_written_again_and_shards_of_an_equal_one_still_count(
    tmp_path: Path, harm: str
) -> None:
    folder = begin(tmp_path, HEADER_VALUES)
    voxels = make_voxels("scalar")
    record = record_of(voxels)
    write_shards(folder / "heart", record, voxels, shards_of(record)[:1])
    before = contents(tmp_path)
    HEADER_HARMS[harm](tmp_path / HEADER)
    assert header_of(tmp_path) is None
    assert begin(tmp_path, HEADER_VALUES) == folder
    assert header_of(tmp_path) == HEADER_VALUES
    assert contents(tmp_path) == before


@pytest.mark.parametrize("harm", HEADER_HARMS)
def test_after_a_header_is_lost_shards_of_another_one_do_not_count(tmp_path: Path, harm: str) -> None:
    voxels = make_voxels("scalar")
    record, shard = record_of(voxels), shards_of(record_of(voxels))[0]
    write_shards(begin(tmp_path, HEADER_VALUES) / "heart", record, voxels, [shard])
    HEADER_HARMS[harm](tmp_path / HEADER)
    folder = begin(tmp_path, {**HEADER_VALUES, "model": "cd" * 16})
    assert not ShardLedger(folder / "heart").has(shard)
