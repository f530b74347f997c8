"""Reading boxes: the voxels that zarr-python and numpy give, whatever the chunks, codecs and schedulers."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from numpy.typing import NDArray

from zpatch import gathering, reader
from zpatch.errors import OptionError
from zpatch.geometry import PatchLocation
from zpatch.image import Image, ScalarImage, stored_image
from zpatch.padding import PADDING_MODES
from zpatch.reader import ArraySource, DaskSource
from zpatch.schema import CODECS, ImageRecord
from zpatch.shards import MappedShard, close_shards
from zpatch.store import sharded_array
from zpatch.store_writer import StagedImage

EYE = tuple(map(tuple, np.eye(4).tolist()))
Draw = st.DataObject


def stored(folder: Path, voxels: NDArray[Any], *, chunk: int, shard: int, codec: str = "lz4") -> Image:
    """An image on disk; ``voxels`` is (z, y, x) or (c, z, y, x), ``shard`` counts chunks along each axis."""
    chunks = ((1,) if voxels.ndim == 4 else ()) + (chunk, chunk + 1, chunk + 2)
    shards = tuple(c * shard for c in chunks)
    record = ImageRecord(
        "sub", "image", "scalar", voxels.shape, voxels.dtype.str, "czyx"[-voxels.ndim :], chunks, shards,
        codec, EYE,
    )  # fmt: skip
    stage = StagedImage(folder)
    array = sharded_array(folder, record)
    for place in np.ndindex(*array.shard_grid):
        box = tuple(slice(n * s, (n + 1) * s) for n, s in zip(place, array.shards, strict=True))
        stage.write_shard(record, place, voxels.reshape(array.shape)[box])
    return stored_image(folder, stage.finish(record))


def draw_box(data: Draw, spatial_shape: tuple[int, ...]) -> PatchLocation:
    size = [data.draw(st.integers(1, n)) for n in spatial_shape]
    index = [data.draw(st.integers(0, n - s)) for n, s in zip(spatial_shape, size, strict=True)]
    return PatchLocation(tuple(index), tuple(size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "image"


@pytest.fixture
def voxels(rng: np.random.Generator) -> NDArray[np.int16]:
    """(c, z, y, x)."""
    return rng.integers(-1000, 1000, (2, 9, 10, 11), dtype=np.int16)


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=4),
    chunk=st.integers(1, 5),
    shard=st.integers(1, 3),
    dtype=st.sampled_from(["<u1", "<i2", "<f4", "<f8", "<c8"]),
    codec=st.sampled_from(list(CODECS)),
    scheduler=st.sampled_from(["sync", "threads"]),
)
def test_boxes_read_together_are_those_of_the_zarr_array(
    data: Draw,
    shape: list[int],
    chunk: int,
    shard: int,
    dtype: str,
    codec: str,
    scheduler: reader.Scheduler,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any") / "image"
    voxels = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    image = stored(folder, voxels, chunk=chunk, shard=shard, codec=codec)
    whole = zarr.open_array(folder / "0", mode="r")[:].reshape((-1, *shape[-3:])).transpose(0, 3, 2, 1)
    boxes = [draw_box(data, image.spatial_shape) for _ in range(data.draw(st.integers(1, 4)))]
    boxes += boxes[:1]
    found = image.read_group(boxes, scheduler=scheduler)
    assert len(found) == len(boxes)
    for box, patch in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(patch, whole[(slice(None), *box.to_slices())])
        assert patch.dtype == image.dtype
    close_shards(folder)


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    mode=st.sampled_from(PADDING_MODES),
)
def test_boxes_over_the_border_are_those_of_the_volume_padded_by_numpy(
    data: Draw, shape: list[int], mode: str
) -> None:
    margin = 8
    volume = np.arange(2 * np.prod(shape)).reshape(2, *shape)
    choice = {"constant_values": 7} if mode == "constant" else {}
    padded = np.pad(volume, [(0, 0)] + [(margin, margin)] * 3, mode=mode, **choice)  # type: ignore[call-overload]
    shifted = [draw_box(data, padded.shape[1:]) for _ in range(3)]
    boxes = [PatchLocation(tuple(i - margin for i in box.index), box.size) for box in shifted]
    found = ScalarImage(volume).read_group(boxes, padding_mode=mode, fill=7)
    for box, patch in zip(shifted, found, strict=True):
        np.testing.assert_array_equal(patch, padded[(slice(None), *box.to_slices())])


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_padding_reads_only_from_inside_a_stored_image(
    folder: Path, voxels: NDArray[np.int16], mode: str, scheduler: reader.Scheduler
) -> None:
    image = stored(folder, voxels, chunk=4, shard=2)
    padded = np.pad(voxels.transpose(0, 3, 2, 1), [(0, 0), (5, 5), (5, 5), (5, 5)], mode=mode)  # type: ignore[call-overload]
    boxes = [PatchLocation((-5, 2, 6), (7, 6, 8)), PatchLocation((3, -5, -5), (13, 20, 19))]
    for box, patch in zip(
        boxes, image.read_group(boxes, padding_mode=mode, scheduler=scheduler), strict=True
    ):
        i, j, k = (slice(a + 5, b + 5) for a, b in zip(box.index_ini, box.index_fin, strict=True))
        np.testing.assert_array_equal(patch, padded[:, i, j, k])


@given(indices=basic_indices((2, 11, 10, 9), allow_newaxis=False))
def test_a_dask_array_is_indexed_as_numpy_is(indices: Any, dask_and_numpy: tuple[da.Array, Any]) -> None:
    lazy, whole = dask_and_numpy
    np.testing.assert_array_equal(lazy[indices].compute(scheduler="sync"), whole[indices])


@pytest.fixture(scope="module", params=["stored", "numpy"])
def dask_and_numpy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[da.Array, Any]:
    voxels = np.random.default_rng(0).integers(0, 99, (2, 9, 10, 11))
    view = voxels.transpose(0, 3, 2, 1)
    if request.param == "numpy":
        return ArraySource(view).dask(), view
    return stored(tmp_path_factory.mktemp("dask") / "image", voxels, chunk=2, shard=2).dask, view


def test_a_dask_array_has_a_block_for_each_shard(folder: Path, voxels: NDArray[np.int16]) -> None:
    image = stored(folder, voxels, chunk=2, shard=2)  # chunks 2 x 3 x 4 (z, y, x), shards of 2 of each
    assert image.dask.chunks == ((2,), (8, 3), (6, 4), (4, 4, 1))
    assert image.dask.dtype == voxels.dtype
    np.testing.assert_array_equal(image.dask.compute(), voxels.transpose(0, 3, 2, 1))


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_a_chunk_that_boxes_share_is_decoded_once(
    folder: Path, voxels: NDArray[np.int16], scheduler: reader.Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: collections.Counter[tuple[str, int]] = collections.Counter()
    decode = MappedShard.decode

    def counting(shard: MappedShard, number: int, out: Any) -> None:
        decoded["/".join(shard.file.parts[-3:]), number] += 1
        decode(shard, number, out)

    monkeypatch.setattr(MappedShard, "decode", counting)
    monkeypatch.setattr(gathering, "_compiled", None)
    image = stored(folder, voxels, chunk=4, shard=2)  # chunks 4 x 5 x 6 (z, y, x) on a grid of 3 x 2 x 2
    boxes = [PatchLocation((0, 0, 0), (8, 8, 3)), PatchLocation((2, 2, 0), (8, 8, 4))] * 2
    image.read_group(boxes, scheduler=scheduler)
    numbers = [0, 1, 2, 3, 8, 9, 10, 11]  # the first layer of both channels of the first shard
    assert sorted(decoded) == [("0/0/0", number) for number in numbers]
    assert set(decoded.values()) == {1}


def as_array(folder: Path, voxels: NDArray[Any]) -> Image:
    return ScalarImage(voxels.transpose(0, 3, 2, 1))


def as_dask(folder: Path, voxels: NDArray[Any]) -> Image:
    return ScalarImage(da.from_array(voxels.transpose(0, 3, 2, 1), chunks=4))


def as_shards(folder: Path, voxels: NDArray[Any]) -> Image:
    return stored(folder, voxels, chunk=4, shard=2)


every_source = pytest.mark.parametrize("make", [as_array, as_dask, as_shards])
MakeImage = Callable[[Path, NDArray[Any]], Image]


@every_source
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_every_source_gives_boxes_in_memory_of_their_own(
    folder: Path, voxels: NDArray[np.int16], make: MakeImage, scheduler: reader.Scheduler
) -> None:
    image = make(folder, voxels)
    boxes = [PatchLocation((1, 2, 3), (4, 5, 6)), PatchLocation((0, 0, 0), (11, 10, 9))] * 2
    found = image.read_group(boxes, scheduler=scheduler)
    for patch in found:
        patch[...] = 0
    for box, patch in zip(boxes, image.read_group(boxes), strict=True):
        np.testing.assert_array_equal(patch, voxels.transpose(0, 3, 2, 1)[(slice(None), *box.to_slices())])
    assert not any(np.shares_memory(a, b) for n, a in enumerate(found) for b in found[:n])


@every_source
@pytest.mark.parametrize("padding_mode", [None, "edge"])
def test_every_source_gives_boxes_in_the_memory_order_of_the_store(
    folder: Path, voxels: NDArray[np.int16], make: MakeImage, padding_mode: str | None
) -> None:
    location = PatchLocation((0, 0, 0), (11, 10, 9) if padding_mode is None else (12, 12, 12))
    [patch] = make(folder, voxels).read_group([location], padding_mode=padding_mode)
    assert patch.transpose(0, 3, 2, 1).flags.c_contiguous


@every_source
def test_no_boxes_are_no_voxels(folder: Path, voxels: NDArray[np.int16], make: MakeImage) -> None:
    assert make(folder, voxels).read_group([]) == []


@pytest.mark.parametrize("make", [as_array, as_dask])
def test_big_endian_voxels_come_in_native_order(
    folder: Path, voxels: NDArray[np.int16], make: MakeImage
) -> None:
    image = make(folder, voxels.astype(">i2"))
    assert image.dtype == image.data.dtype == np.dtype(np.int16)
    assert image.dtype.isnative
    np.testing.assert_array_equal(image.data, voxels.transpose(0, 3, 2, 1))


@pytest.mark.parametrize(
    ("source", "chunk_shape"),
    [
        (ArraySource(np.zeros((2, 3, 4, 5))), (64, 64, 64)),
        (DaskSource(da.zeros((2, 3, 4, 5), chunks=(1, 3, 2, 3))), (3, 2, 3)),
    ],
)
def test_a_source_says_its_shape_and_what_is_best_read_at_once(
    source: ArraySource | DaskSource, chunk_shape: tuple[int, ...]
) -> None:
    assert source.shape == (2, 3, 4, 5)
    assert source.dtype == np.float64
    assert source.chunk_shape == chunk_shape


def test_only_the_blocks_that_a_box_touches_are_computed() -> None:
    computed = []

    def note(block: NDArray[Any], block_info: Any = None) -> NDArray[Any]:
        computed.append(block_info[0]["chunk-location"])
        return block

    lazy = da.zeros((1, 8, 8, 8), chunks=4).map_blocks(note, dtype=float, meta=np.empty((0,) * 4))
    ScalarImage(lazy).read_group([PatchLocation((0, 0, 4), (4, 4, 4)), PatchLocation((1, 1, 5), (2, 2, 2))])
    assert computed == [(0, 0, 0, 1)]


def test_an_unknown_padding_is_refused_by_the_names_of_those_that_are_known() -> None:
    with pytest.raises(OptionError, match="one of constant, edge, reflect, symmetric, wrap, not 'mirror'"):
        ScalarImage(np.zeros((2, 2, 2))).read_group([], padding_mode="mirror")


def test_an_unknown_scheduler_is_refused_by_the_names_of_those_that_are_known(
    folder: Path, voxels: NDArray[np.int16]
) -> None:
    with pytest.raises(OptionError, match="must be 'sync', 'threads' or a distributed"):
        as_shards(folder, voxels).read_group([PatchLocation((0, 0, 0), (1, 1, 1))], scheduler="cluster")  # type: ignore[arg-type]
