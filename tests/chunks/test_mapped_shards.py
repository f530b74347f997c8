"""Shard files: zarr-python reads them, and damaged bytes are never read as voxels."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import nibabel as nib
import numpy as np
import psutil
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reading import assert_same_bytes, both_loops, random_voxels
from reading import loop as loop
from record import Some

import zpatch as zp
from zpatch.chunks import mapped_shards
from zpatch.chunks.codec import CODECS, codec_of, encode_chunk
from zpatch.chunks.gather import read_region
from zpatch.chunks.gather_plan import GatherPlan
from zpatch.chunks.layout import Layout
from zpatch.chunks.mapped_shards import (
    NO_CHUNK,
    OPEN_MAPS,
    MappedShard,
    OpenFile,
    close_shards,
    open_shard,
)
from zpatch.chunks.scaling import Scaling
from zpatch.chunks.shard_writer import write_shard
from zpatch.chunks.sharded_array import ChunkFiles, ShardedArray
from zpatch.conversion import conversion_plan
from zpatch.digests import FileSeal, digest
from zpatch.errors import DamageError
from zpatch.records.image_record import ImageRecord
from zpatch.sources import group_read, voxel_sources
from zpatch.sources.group_read import read_group
from zpatch.store.staged_image import StagedImage
from zpatch.store.store import sharded_array

DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "c16"]
EYE = tuple(map(tuple, np.eye(4).tolist()))

every_codec = pytest.mark.parametrize("codec", list(CODECS))


def written(
    folder: Path, voxels: NDArray[Any], chunks: tuple[int, ...], shards: tuple[int, ...], codec: str = "lz4"
) -> ShardedArray:
    """An array on disk, ``voxels`` being (z, y, x) or (c, z, y, x)."""
    record = ImageRecord(
        "sub", "image", "scalar", voxels.shape, voxels.dtype.str, "czyx"[-voxels.ndim :], chunks, shards,
        codec, EYE,
    )  # fmt: skip
    stage = StagedImage(folder)
    array = sharded_array(folder, record)
    padded = voxels.reshape(array.shape)
    for shard in np.ndindex(*array.shard_grid):
        box = tuple(slice(n * s, (n + 1) * s) for n, s in zip(shard, array.shards, strict=True))
        stage.write_shard(record, shard, padded[box])
    stage.finish(record)
    return array


def decode_chunk(array: ShardedArray, chunk: int, out: NDArray[Any]) -> tuple[int, ...]:
    """Decode a chunk by its number in the whole array; its first voxel."""
    position = np.unravel_index(chunk, array.chunk_grid)
    shard, within = np.divmod(position, array.chunks_per_shard)
    mapped = open_shard(array, tuple(shard.tolist()))
    number = int(np.ravel_multi_index(tuple(within), array.chunks_per_shard))
    out[...] = mapped.decode(number, np.empty(array.chunks, array.dtype))
    return tuple(np.multiply(position, array.chunks).tolist())


def decoded(array: ShardedArray) -> NDArray[Any]:
    """All voxels (c, z, y, x), chunk by chunk, from freshly opened files."""
    close_shards(array.path)
    out = np.zeros([n * c for n, c in zip(array.chunk_grid, array.chunks, strict=True)], array.dtype)
    chunk = np.empty(array.chunks, array.dtype)
    for number in range(math.prod(array.chunk_grid)):
        first = decode_chunk(array, number, chunk)
        out[tuple(slice(a, a + c) for a, c in zip(first, array.chunks, strict=True))] = chunk
    return out[tuple(map(slice, array.shape))]


@pytest.fixture
def voxels(rng: np.random.Generator) -> NDArray[np.int16]:
    return rng.integers(-5, 5, (9, 10, 11), dtype=np.int16)


@pytest.fixture
def array(tmp_path: Path, voxels: NDArray[np.int16]) -> ShardedArray:
    """Three shards of 3 x 3 x 3 chunks."""
    return written(tmp_path / "array", voxels, (2, 4, 4), (4, 12, 12))


@every_codec
@pytest.mark.parametrize("code", DTYPES)
def test_zarr_reads_the_voxels_that_were_written(
    tmp_path: Path, rng: np.random.Generator, codec: str, code: str
) -> None:
    voxels = rng.integers(0, 100, (2, 5, 6, 7)).astype(code)
    array = written(tmp_path / "array", voxels, (1, 2, 3, 4), (2, 4, 6, 8), codec)
    np.testing.assert_array_equal(zarr.open_array(array.path, mode="r")[:], voxels)
    np.testing.assert_array_equal(decoded(array), voxels)


@given(data=st.data(), codec=st.sampled_from(list(CODECS)))
def test_zarr_reads_shards_of_any_shape(
    data: st.DataObject, codec: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(least, most), min_size=3, max_size=3)))

    shape, chunks, packed = draw(1, 7), draw(1, 4), draw(1, 3)
    shards = tuple(c * n for c, n in zip(chunks, packed, strict=True))
    voxels = np.random.default_rng(0).integers(0, 9, shape).astype(np.float32)
    array = written(tmp_path_factory.mktemp("any") / "array", voxels, chunks, shards, codec)
    np.testing.assert_array_equal(zarr.open_array(array.path, mode="r")[:], voxels)
    np.testing.assert_array_equal(decoded(array)[0], voxels)
    close_shards(array.path)


@every_codec
def test_shards_that_zarr_writes_can_be_read(tmp_path: Path, voxels: NDArray[np.int16], codec: str) -> None:
    array = written(tmp_path / "array", np.zeros_like(voxels), (2, 4, 4), (4, 12, 12), codec)
    zarr.open_array(array.path, mode="r+")[:] = voxels
    np.testing.assert_array_equal(decoded(array)[0], voxels)


def test_a_seal_is_the_length_and_blake2b_of_the_file(array: ShardedArray) -> None:
    seal = write_shard(array, (0, 0, 0, 0), np.ones((1, 4, 10, 11), np.int16), "lz4")
    content = array.shard_file((0, 0, 0, 0)).read_bytes()
    assert seal == FileSeal(len(content), digest(content))


def test_shards_of_equal_length_have_the_same_crc_but_not_the_same_seal(tmp_path: Path) -> None:
    array = ShardedArray(
        tmp_path, (1, 4, 4, 4), np.dtype("i2"), (1, 2, 2, 2), (1, 2, 4, 4), codec_of("none"),
        ChunkFiles((1, 2, 3)),
    )  # fmt: skip
    seals = [write_shard(array, (0, z, 0, 0), np.full((1, 2, 4, 4), z, np.int16), "none") for z in (0, 1)]
    assert seals[0].bytes == seals[1].bytes
    assert seals[0].checksum != seals[1].checksum


def refused(array: ShardedArray, why: str, shard: tuple[int, ...] = (0, 1, 0, 0)) -> None:
    """Reading fails with an error that names the file of the shard, the problem and the remedy."""
    with pytest.raises(DamageError, match=why) as caught:
        decoded(array)
    assert str(array.shard_file(shard)) in str(caught.value)
    assert "run 'zpatch verify " in str(caught.value)


def cut_in_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_within_the_index(file: Path) -> None:
    os.truncate(file, 100)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def put_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def put_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_a_link(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("moved")))


def put_a_broken_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def flip_in_a_chunk(file: Path) -> None:
    flip(file, 20)


def flip_in_the_index(file: Path) -> None:
    flip(file, file.stat().st_size - 20)


def flip_in_the_last_checksum(file: Path) -> None:
    flip(file, file.stat().st_size - 1)


def flip(file: Path, position: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (Path.unlink, "it is missing"),
        (empty, "it is empty"),
        (cut_within_the_index, "it has 100 bytes, fewer than its index"),
        (cut_in_half, "its index does not match its checksum"),
        (put_a_folder, "no regular file"),
        (put_a_pipe, "no regular file"),
        (put_a_link, "cannot be opened"),
        (put_a_broken_link, "cannot be opened"),
        (flip_in_a_chunk, "chunk 0 of the file .* does not match its checksum"),
        (flip_in_the_index, "its index does not match its checksum"),
        (flip_in_the_last_checksum, "its index does not match its checksum"),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_its_file(
    array: ShardedArray, damage: Callable[[Path], None], why: str
) -> None:
    damage(array.shard_file((0, 1, 0, 0)))
    refused(array, why)


@pytest.mark.parametrize("damage", [flip_in_the_index, empty, put_a_folder, put_a_pipe])
def test_a_damaged_shard_leaves_no_file_open(array: ShardedArray, damage: Callable[[Path], None]) -> None:
    damage(array.shard_file((0, 1, 0, 0)))
    before = psutil.Process().num_fds()
    with contextlib.suppress(DamageError, IsADirectoryError):
        open_shard(array, (0, 1, 0, 0))
    assert psutil.Process().num_fds() == before


def test_shards_in_a_folder_that_is_a_link_are_refused(array: ShardedArray, tmp_path: Path) -> None:
    shutil.move(array.path / "c", tmp_path / "elsewhere")
    (array.path / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamageError):
        decoded(array)


def rewrite_index(file: Path, chunks: int, entry: int, offset: int, length: int) -> None:
    """Change an entry of the index, and its checksum with it."""
    data = bytearray(file.read_bytes())
    index = np.frombuffer(data[-16 * chunks - 4 : -4], "<u8").reshape(chunks, 2).copy()
    index[entry] = offset, length
    data[-16 * chunks - 4 : -4] = index.tobytes()
    data[-4:] = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "length", "why"),
    [
        (NO_CHUNK, NO_CHUNK, "chunk 5 of the file .* is missing"),
        (NO_CHUNK, 10, "chunk 5 of the file .* is missing"),
        (0, 2**63, "points outside"),
        (2**63, 2**63, "points outside"),
        (2**40, 10, "points outside"),
        (0, 4, "points outside"),
        (0, 0, "points outside"),
        (3, 100, "chunk 5 of the file .* does not match its checksum"),
    ],
)
def test_a_wrong_index_is_damage_and_never_a_fill_value(
    array: ShardedArray, offset: int, length: int, why: str
) -> None:
    rewrite_index(array.shard_file((0, 1, 0, 0)), 18, 5, offset, length)
    refused(array, why)


@pytest.mark.parametrize("codec", ["lz4", "lz4hc", "zstd"])
@pytest.mark.parametrize(
    ("position", "value", "why"),
    [
        (4, 2**31, "does not decode to the 64 bytes of a chunk"),
        (4, 16, "does not decode to the 64 bytes of a chunk"),
        (12, 2**20, "cannot be decoded"),
        (12, 20, "cannot be decoded"),
    ],
)
def test_a_frame_with_a_wrong_size_is_not_decoded(
    tmp_path: Path, codec: str, position: int, value: int, why: str
) -> None:
    voxels = np.zeros((4, 4, 2), np.int16)
    array = written(tmp_path / "array", voxels, voxels.shape, voxels.shape, codec)
    frame = bytearray(encode_chunk(voxels, codec)[0])
    frame[position : position + 4] = value.to_bytes(4, "little")
    file = array.shard_file((0, 0, 0, 0))
    checked = bytes(frame) + google_crc32c.value(bytes(frame)).to_bytes(4, "little")
    file.write_bytes(checked + bytes(20))
    rewrite_index(file, 1, 0, 0, len(checked))
    refused(array, why, (0, 0, 0, 0))


def test_an_uncompressed_chunk_of_another_size_is_damage(tmp_path: Path) -> None:
    array = written(tmp_path / "array", np.zeros((4, 4, 2), np.int16), (4, 4, 2), (4, 4, 2), "none")
    data = b"123" + google_crc32c.value(b"123").to_bytes(4, "little")
    file = array.shard_file((0, 0, 0, 0))
    file.write_bytes(data + bytes(20))
    rewrite_index(file, 1, 0, 0, len(data))
    refused(array, "chunk 0 of the file .* has 3 bytes instead of 64", (0, 0, 0, 0))


@every_codec
def test_a_bit_flip_anywhere_in_a_shard_is_found_or_harmless(
    tmp_path: Path, voxels: NDArray[np.int16], rng: np.random.Generator, codec: str, some: Some
) -> None:
    array = written(tmp_path / "array", voxels, (3, 4, 4), (9, 12, 12), codec)
    file = array.shard_file((0, 0, 0, 0))
    size = file.stat().st_size
    for position in some(rng.integers(0, size, 250).tolist(), 50):
        mask = 1 << int(rng.integers(8))
        flip(file, position, mask)
        with contextlib.suppress(DamageError):
            np.testing.assert_array_equal(decoded(array)[0], voxels)
        flip(file, position, mask)
    np.testing.assert_array_equal(decoded(array)[0], voxels)


def test_maps_beyond_the_limit_are_released(tmp_path: Path) -> None:
    voxels = np.arange(OPEN_MAPS + 20, dtype=np.int16).reshape(-1, 1, 1)
    array = written(tmp_path / "array", voxels, (1, 1, 1), (1, 1, 1))
    before = psutil.Process().num_fds()
    np.testing.assert_array_equal(decoded(array)[0], voxels)
    assert psutil.Process().num_fds() <= before + OPEN_MAPS
    np.testing.assert_array_equal(decoded(array)[0], voxels)
    close_shards(array.path)
    assert psutil.Process().num_fds() <= before


def test_a_map_in_use_outlives_its_eviction(array: ShardedArray, voxels: NDArray[np.int16]) -> None:
    shard = open_shard(array, (0, 0, 0, 0))
    close_shards(array.path)
    chunk = shard.decode(0, np.empty(array.chunks, array.dtype))
    np.testing.assert_array_equal(chunk[0], voxels[:2, :4, :4])


def test_an_open_shard_is_mapped_once(array: ShardedArray) -> None:
    assert open_shard(array, (0, 0, 0, 0)) is open_shard(array, (0, 0, 0, 0))


@both_loops
def test_chunks_are_read_from_the_file_at_first_and_through_a_map_when_they_are_read_again(
    array: ShardedArray, voxels: NDArray[np.int16], loop: str
) -> None:
    shard = open_shard(array, (0, 0, 0, 0))
    for stop, is_mapped in ((4, False), (12, False), (4, True), (12, True)):
        whole = read_region(array, (0, 0, 0, stop - 4), (1, 2, 4, min(stop, 11)))
        np.testing.assert_array_equal(whole[0], voxels[:2, :4, stop - 4 : stop])
        if loop == "compiled":
            assert (shard._map is not None) == is_mapped


def test_an_array_with_large_chunks_is_read_through_a_map(tmp_path: Path) -> None:
    voxels = random_voxels((65, 128, 128), "|u1")
    array = written(tmp_path / "array", voxels, voxels.shape, voxels.shape, "none")
    assert_same_bytes(read_region(array, (0, 0, 0, 0), array.shape)[0], voxels)
    assert open_shard(array, (0, 0, 0, 0))._map is not None


def test_an_open_shard_has_one_descriptor_before_and_after_it_is_mapped(array: ShardedArray) -> None:
    before = psutil.Process().num_fds()
    for _ in range(3):
        read_region(array, (0, 0, 0, 0), array.shape)
        assert psutil.Process().num_fds() == before + 3
    close_shards(array.path)
    assert psutil.Process().num_fds() == before


def test_a_file_in_use_outlives_the_making_of_its_map(array: ShardedArray) -> None:
    """As in other threads, which may still read from the descriptor."""
    shard = open_shard(array, (0, 0, 0, 0))
    opened = shard.place(np.array([0]))
    assert isinstance(opened, OpenFile)
    shard.mark_read(np.array([0]))
    assert not isinstance(shard.place(np.array([0])), OpenFile)
    assert os.fstat(opened.number).st_size == array.shard_file((0, 0, 0, 0)).stat().st_size


@pytest.fixture
def quickly_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_shards, "SETTLED_S", 0)


@both_loops
@pytest.mark.usefixtures("quickly_settled")
def test_chunks_of_a_file_that_is_opened_again_are_not_checked_again(
    array: ShardedArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, everything = np.arange(1), np.arange(18)
    read_region(array, (0, 0, 0, 0), (1, 2, 4, 4))
    close_shards(array.path)
    shard = open_shard(array, (0, 0, 0, 0))
    assert not shard.unchecked(first).any()
    assert shard.unchecked(everything[1:]).all()
    assert isinstance(shard.place(first), OpenFile)
    read_region(array, (0, 0, 0, 0), array.shape)
    close_shards(array.path)
    assert not open_shard(array, (0, 0, 0, 0)).unchecked(everything).any()


def touched(file: Path) -> None:
    os.utime(file)


def written_again(file: Path) -> None:
    file.write_bytes(file.read_bytes())


def replaced(file: Path) -> None:
    shutil.copy2(file, file.with_name("copy"))
    file.with_name("copy").rename(file)


@pytest.mark.usefixtures("quickly_settled")
@pytest.mark.parametrize("change", [touched, written_again, replaced])
def test_chunks_of_a_file_that_has_changed_are_checked_again(
    array: ShardedArray, change: Callable[[Path], None]
) -> None:
    read_region(array, (0, 0, 0, 0), array.shape)
    close_shards(array.path)
    time.sleep(0.02)  # a kernel's clock for files may step by 10 ms
    change(array.shard_file((0, 0, 0, 0)))
    assert open_shard(array, (0, 0, 0, 0)).unchecked(np.arange(18)).all()


def test_chunks_of_a_file_that_has_just_changed_are_not_remembered(array: ShardedArray) -> None:
    read_region(array, (0, 0, 0, 0), array.shape)
    close_shards(array.path)
    assert open_shard(array, (0, 0, 0, 0)).unchecked(np.arange(18)).all()


@pytest.mark.usefixtures("quickly_settled")
def test_a_limited_number_of_chunks_is_remembered(
    array: ShardedArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_shards, "MOST_REMEMBERED_CHUNKS", 17)
    read_region(array, (0, 0, 0, 0), array.shape)
    close_shards(array.path)
    assert open_shard(array, (0, 0, 0, 0)).unchecked(np.arange(18)).all()


@both_loops
def test_a_chunk_that_is_damaged_after_the_shard_was_opened_is_found(
    array: ShardedArray, voxels: NDArray[np.int16]
) -> None:
    file = array.shard_file((0, 0, 0, 0))
    first = read_region(array, (0, 0, 0, 0), (1, 2, 4, 4))
    np.testing.assert_array_equal(first[0], voxels[:2, :4, :4])
    offset = int(open_shard(array, (0, 0, 0, 0)).extents[1, 0])
    for again in (False, True):  # from the file and through a map
        with file.open("r+b") as stream:
            stream.seek(offset + 20)
            byte = stream.read(1)[0]
            stream.seek(offset + 20)
            stream.write(bytes([byte ^ 1]))
        with pytest.raises(DamageError, match=r"chunk 1 of the file .* does not match its checksum"):
            read_region(array, (0, 0, 0, 0 if again else 4), (1, 2, 4, 8))
        with file.open("r+b") as stream:
            stream.seek(offset + 20)
            stream.write(bytes([byte]))


def test_maps_can_be_read_in_a_forked_child(array: ShardedArray, voxels: NDArray[np.int16]) -> None:
    chunk = np.empty(array.chunks, array.dtype)
    decode_chunk(array, 0, chunk)
    child = os.fork()
    if child == 0:  # no assert and no cleanup here: this is a copy of pytest
        right = False
        with contextlib.suppress(BaseException):
            decode_chunk(array, 0, chunk)
            right = np.array_equal(chunk[0], voxels[:2, :4, :4]) and np.array_equal(decoded(array)[0], voxels)
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(decoded(array)[0], voxels)


def test_the_index_of_a_mapped_shard_has_each_chunk_in_c_order(array: ShardedArray) -> None:
    shard = MappedShard(array, (0, 2, 0, 0))
    present = shard.extents[:, 0] >= 0
    # Of 2 x 3 x 3 chunks the last shard holds one layer: the array ends inside it.
    np.testing.assert_array_equal(present, [True] * 9 + [False] * 9)


# Damage, found when patches are read


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one image with 2 x 2 x 2 shards, of which only the first is wholly inside."""
    folder = tmp_path_factory.mktemp("whole")
    voxels = random_voxels((60, 60, 60), "<i2") // 64
    (folder / "anna").mkdir()
    nib.Nifti1Image(voxels.T, np.eye(4)).to_filename(folder / "anna" / "ct.nii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion_plan, "plan_layout", lambda *_, **__: Layout((8,) * 3, (32,) * 3))
        zp.convert(folder, folder / "store")
    return folder / "store"


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> Path:
    """A copy of that store, to be damaged."""
    return Path(shutil.copytree(whole_store, tmp_path / "store"))


def shard_of(store: Path, *place: int) -> Path:
    return store / "anna" / "ct" / "0" / "c" / "/".join(map(str, place))


def read_all(store: Path, scheduler: Any = "sync") -> NDArray[Any]:
    close_shards(store)
    image = zp.Cohort(store)["anna"].ct
    boxes = [zp.PatchLocation((0, 0, 0), (60, 60, 60)), zp.PatchLocation((20, 20, 20), (20, 20, 20))]
    whole, part = image.read_group(boxes, scheduler=scheduler)
    np.testing.assert_array_equal(part, whole[:, 20:40, 20:40, 20:40])
    return whole


@both_loops
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (Path.unlink, "it is missing"),
        (empty, "it is empty"),
        (cut_in_half, "its index does not match its checksum"),
        (flip_in_a_chunk, r"chunk 0 of the file \(0/0/4 of the array\) does not match its checksum"),
        (flip_in_the_index, "its index does not match its checksum"),
        (lambda file: rewrite_index(file, 64, 9, NO_CHUNK, NO_CHUNK), r"chunk 9 of the file .* is missing"),
        (lambda file: rewrite_index(file, 64, 9, 2**40, 99), "its index points outside the file"),
    ],
)
def test_reading_a_damaged_group_fails_and_names_the_chunk_the_file_and_the_remedy(
    store: Path, damage: Callable[[Path], None], why: str, scheduler: Any
) -> None:
    damage(shard_of(store, 0, 0, 1))
    with pytest.raises(DamageError, match=why) as caught:
        read_all(store, scheduler)
    text = str(caught.value)
    assert "image 'ct' of subject 'anna'" in text
    assert str(shard_of(store, 0, 0, 1)) in text
    assert f"run 'zpatch verify {store}'" in text
    assert f"'zpatch convert SOURCE {store} --overwrite --include anna'" in text


@both_loops
def test_damage_in_other_chunks_does_not_affect_a_group(store: Path) -> None:
    whole = read_all(store)
    flip_in_a_chunk(shard_of(store, 0, 0, 0))
    shard_of(store, 1, 1, 1).unlink()
    close_shards(store)
    image = zp.Cohort(store)["anna"].ct
    [found] = image.read_group([zp.PatchLocation((8, 8, 8), (30, 20, 20))])  # chunk 0 is not needed
    np.testing.assert_array_equal(found, whole[:, 8:38, 8:28, 8:28])


@both_loops
def test_a_bit_flip_anywhere_in_a_store_is_found_or_harmless_to_a_group(
    store: Path, rng: np.random.Generator, full: bool
) -> None:
    whole = read_all(store)
    file = shard_of(store, 0, 1, 0)
    size = file.stat().st_size
    found = 0
    for position in rng.integers(0, size, 200 if full else 25).tolist():
        mask = 1 << int(rng.integers(8))
        flip(file, position, mask)
        try:
            np.testing.assert_array_equal(read_all(store), whole)
        except DamageError:
            found += 1
        flip(file, position, mask)
    assert found > 20
    np.testing.assert_array_equal(read_all(store), whole)


@both_loops
def test_a_shard_cut_anywhere_is_found_by_a_group(store: Path, rng: np.random.Generator) -> None:
    file = shard_of(store, 1, 0, 0)
    content = file.read_bytes()
    for length in rng.integers(0, len(content), 15).tolist():
        file.write_bytes(content[:length])
        with pytest.raises(DamageError, match="c/1/0/0: it"):
            read_all(store)


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


@both_loops
def test_a_shard_swapped_with_one_at_the_border_is_found_by_its_missing_chunks(
    tmp_path: Path,
) -> None:
    voxels = random_voxels((24, 8, 8), "<i2")
    array = written(tmp_path / "array", voxels[:20], (4, 8, 8), (8, 8, 8))
    swap(array.shard_file((0, 0, 0, 0)), array.shard_file((0, 2, 0, 0)))
    with pytest.raises(DamageError, match=r"c/0/0/0: chunk 1 of the file .* is missing"):
        read_region(array, (0, 0, 0, 0), (1, 20, 8, 8))


@both_loops
def test_two_swapped_shards_of_equal_layout_are_found_by_verify_alone(store: Path) -> None:
    # Each file is intact, and nothing in it says which shard it is: only the seals of the manifest do.
    whole = read_all(store)
    swap(shard_of(store, 0, 0, 1), shard_of(store, 0, 1, 0))
    assert not np.array_equal(read_all(store), whole)
    report = zp.verify(store)
    assert not report.ok
    assert {damage.file for damage in report.damages} == {f"anna/ct/0/c/{n}" for n in ("0/0/1", "0/1/0")}


@both_loops
def test_a_shard_of_another_image_is_found_by_verify_or_by_its_index(store: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", random_voxels((32, 32, 32), "<i2"), (16,) * 3, (32,) * 3)
    shutil.copy(other.shard_file((0, 0, 0, 0)), shard_of(store, 0, 0, 0))
    with pytest.raises(DamageError, match="c/0/0/0: its index does not match its checksum"):
        read_all(store)
    assert not zp.verify(store).ok


@both_loops
def test_damage_is_found_again_when_it_is_read_again(store: Path) -> None:
    flip_in_a_chunk(shard_of(store, 0, 0, 1))
    image = zp.Cohort(store)["anna"].ct
    for _ in range(3):
        with pytest.raises(DamageError, match="does not match its checksum"):
            image.read(zp.PatchLocation((32, 0, 0), (4, 4, 4)))


@both_loops
def test_nothing_is_written_after_a_group_in_threads_has_failed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_of(store, 1, 1, 1).unlink()
    opened = voxel_sources.gather

    def slowly(array: ShardedArray, plan: GatherPlan, outs: Any, scaling: Scaling) -> None:
        try:
            opened(array, plan, outs, scaling)
        finally:
            failed.append(plan)
            for _ in range(20 if len(failed) > 1 else 0):  # as another thread that is still running
                time.sleep(0.01)
                outs[0][...] = 77

    failed: list[GatherPlan] = []
    monkeypatch.setattr(voxel_sources, "gather", slowly)
    monkeypatch.setattr(group_read, "thread_count", lambda scheduler: 4)
    image = zp.Cohort(store)["anna"].ct
    out = np.zeros((1, 60, 60, 60), np.int16)
    with pytest.raises(DamageError, match="c/1/1/1: it is missing"):
        read_group([image], [zp.PatchLocation((0, 0, 0), (60, 60, 60))], scheduler="threads", out=[[out]])
    out[...] = 5  # the caller may use the memory again
    time.sleep(0.3)
    assert (out == 5).all()
