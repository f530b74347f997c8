"""Reading boxes: the voxels of zarr-python and numpy, for all chunks, codecs and schedulers."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
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
from reading import (
    DTYPES,
    assert_same_bytes,
    both_loops,
    draw_box,
    needs_compiled_loop,
    random_voxels,
    stored,
)
from reading import loop as loop

from zpatch.chunks import gather
from zpatch.chunks.codec import CODECS
from zpatch.chunks.mapped_shards import MappedShard, close_shards
from zpatch.chunks.scaling import UNSCALED
from zpatch.errors import DamageError, OptionError, PatchLocationError
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.image import Image, ScalarImage
from zpatch.sources import group_read
from zpatch.sources.group_read import read_group
from zpatch.sources.voxel_sources import ArraySource, DaskSource

Draw = st.DataObject
RUN_GRAPH = group_read.run_graph


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "image"


@pytest.fixture
def voxels(rng: np.random.Generator) -> NDArray[np.int16]:
    """(c, z, y, x)."""
    return rng.integers(-1000, 1000, (2, 9, 10, 11), dtype=np.int16)


@both_loops
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=4),
    chunk=st.tuples(*[st.integers(1, 5)] * 3),
    shard=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(list(CODECS)),
    scheduler=st.sampled_from(["sync", "threads"]),
)
def test_boxes_of_a_group_have_the_voxels_of_the_zarr_array(
    data: Draw,
    shape: list[int],
    chunk: tuple[int, ...],
    shard: int,
    dtype: str,
    codec: str,
    scheduler: group_read.Scheduler,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any") / "image"
    voxels = random_voxels(tuple(shape), dtype, seed=data.draw(st.integers(0, 9)))
    image = stored(folder, voxels, chunk=chunk, shard=shard, codec=codec)
    whole = zarr.open_array(folder / "0", mode="r")[:].reshape((-1, *shape[-3:])).transpose(0, 3, 2, 1)
    assert whole.tobytes() == voxels.reshape((-1, *shape[-3:])).transpose(0, 3, 2, 1).tobytes()
    boxes = [draw_box(data, image.spatial_shape) for _ in range(data.draw(st.integers(1, 4)))]
    boxes += boxes[:1]
    found = image.read_group(boxes, scheduler=scheduler)
    assert len(found) == len(boxes)
    for box, patch in zip(boxes, found, strict=True):
        assert_same_bytes(patch, whole[(slice(None), *box.to_slices())])
    close_shards(folder)


@both_loops
@pytest.mark.parametrize("chunk", [(64, 64, 64), (40, 72, 96)])
@pytest.mark.parametrize("codec", list(CODECS))
def test_chunks_of_several_blocks_have_the_voxels_of_the_zarr_array(
    folder: Path, rng: np.random.Generator, chunk: tuple[int, ...], codec: str
) -> None:
    smooth = 400 * np.sin(np.linspace(0, 30, 100 * 100 * 120)).reshape(100, 100, 120)
    voxels = (smooth + rng.normal(0, 6, smooth.shape)).astype(np.int16)
    image = stored(folder, voxels, chunk=chunk, shard=1, codec=codec)
    whole = zarr.open_array(folder / "0", mode="r")[:].T[None]
    boxes = [PatchLocation(tuple(rng.integers(0, 50, 3).tolist()), (48, 49, 50)) for _ in range(4)]
    boxes += [PatchLocation((0, 0, 0), image.spatial_shape), PatchLocation((63, 71, 39), (1, 1, 1))]
    for box, patch in zip(boxes, image.read_group(boxes), strict=True):
        assert_same_bytes(patch, whole[(slice(None), *box.to_slices())])


@both_loops
@given(
    data=st.data(),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    chunk=st.tuples(*[st.integers(1, 5)] * 3),
    dtype=st.sampled_from(["|b1", "|u1", "|i1", "<u2", "<i2", "<f2"]),
    codec=st.sampled_from(list(CODECS)),
    scaling=st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 2),
    rescaling=st.none() | st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 4),
)
def test_scaled_boxes_have_the_values_that_numpy_computes_in_float32(
    data: Draw,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: str,
    codec: str,
    scaling: tuple[float, float],
    rescaling: tuple[float, float, float, float] | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any") / "image"
    voxels = np.random.default_rng(0).integers(0, 2 if dtype == "|b1" else 100, shape).astype(dtype)
    slope, inter = scaling
    image = stored(folder, voxels, chunk=chunk, shard=2, codec=codec, slope=slope, inter=inter)
    values = voxels.T[None].astype(np.float64) * slope + inter
    if rescaling is not None:
        slope, inter, *bounds = rescaling
        image = image.rescaled(slope, inter, min(bounds), max(bounds))
        values = np.clip(values, min(bounds), max(bounds)) * slope + inter
    boxes = [draw_box(data, image.spatial_shape) for _ in range(3)] * 2
    for box, patch in zip(boxes, image.read_group(boxes), strict=True):
        part = (slice(None), *box.to_slices())
        assert_same_bytes(patch, image.scaling.apply(voxels.T[None][part]))
        np.testing.assert_allclose(patch, values[part], rtol=1e-4, atol=1e-5 * max(1, abs(values).max()))
        if image.scaling != UNSCALED:
            assert patch.dtype == np.float32
    close_shards(folder)


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
    folder = tmp_path_factory.mktemp("dask") / "image"
    return stored(folder, voxels, chunk=2, shard=2).dask, view


def test_a_dask_array_has_a_block_for_each_shard(folder: Path, voxels: NDArray[np.int16]) -> None:
    image = stored(folder, voxels, chunk=2, shard=2)  # chunks 2 x 3 x 4 (z, y, x), shards of 2 of each
    assert image.dask.chunks == ((2,), (8, 3), (6, 4), (4, 4, 1))
    assert image.dask.dtype == voxels.dtype
    np.testing.assert_array_equal(image.dask.compute(), voxels.transpose(0, 3, 2, 1))


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_a_chunk_that_boxes_share_is_decoded_once(
    folder: Path, voxels: NDArray[np.int16], scheduler: group_read.Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: collections.Counter[tuple[str, int]] = collections.Counter()
    decode = MappedShard.decode

    def counting(shard: MappedShard, number: int, scratch: Any) -> Any:
        decoded["/".join(shard.file.parts[-3:]), number] += 1
        return decode(shard, number, scratch)

    monkeypatch.setattr(MappedShard, "decode", counting)
    monkeypatch.setattr(gather, "_compiled", None)
    image = stored(folder, voxels, chunk=4, shard=2)  # chunks 4 x 5 x 6 (z, y, x) on a grid of 3 x 2 x 2
    boxes = [PatchLocation((0, 0, 0), (8, 8, 3)), PatchLocation((2, 2, 0), (8, 8, 4))] * 2
    image.read_group(boxes, scheduler=scheduler)
    numbers = [0, 1, 2, 3, 8, 9, 10, 11]  # the first layer of both channels of the first shard
    assert sorted(decoded) == [("0/0/0", number) for number in numbers]
    assert set(decoded.values()) == {1}


@needs_compiled_loop
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_the_compiled_loop_is_given_all_parts_of_a_chunk_at_once(
    folder: Path, voxels: NDArray[np.int16], scheduler: group_read.Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[tuple[int, int]] = []
    compiled = gather._compiled

    def noting(rows: NDArray[np.int64], start: int, *more: Any) -> tuple[int, bool]:
        places = [(number, offset) for number, offset, *_ in rows.tolist()]
        chunks.extend(place for n, place in enumerate(places) if n == 0 or places[n - 1] != place)
        return compiled(rows, start, *more)

    monkeypatch.setattr(gather, "_compiled", noting)
    image = stored(folder, voxels, chunk=4, shard=3)  # 2 x 3 x 2 x 2 chunks in one shard
    boxes = [PatchLocation((0, 0, 0), (11, 10, 9)), PatchLocation((2, 2, 0), (8, 8, 4))] * 3
    image.read_group(boxes, scheduler=scheduler)
    assert len(chunks) == len(set(chunks)) == 24


@both_loops
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_images_that_are_read_together_are_one_graph(
    tmp_path: Path,
    voxels: NDArray[np.int16],
    scheduler: group_read.Scheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = stored(tmp_path / "one", voxels, chunk=4, shard=2)
    two = stored(tmp_path / "two", voxels[0] + 1, chunk=3, shard=1, codec="zstd", slope=2.0)
    images = [one, two, ScalarImage(voxels.transpose(0, 3, 2, 1)), one.map(lambda array: array * 2)]
    wholes = [image.data for image in images]
    graphs: list[Any] = []
    monkeypatch.setattr(group_read, "run_graph", lambda *how: graphs.append(how) or RUN_GRAPH(*how))
    boxes = [PatchLocation((1, 2, 3), (5, 5, 5)), PatchLocation((0, 0, 0), (11, 10, 9))]
    found = read_group(images, boxes, scheduler=scheduler)
    assert len([how for how in graphs if how[2] == scheduler and len(how[0]) > 3]) == 1
    for whole, patches in zip(wholes, found, strict=True):
        for box, patch in zip(boxes, patches, strict=True):
            assert_same_bytes(patch, whole[(slice(None), *box.to_slices())])


def as_array(folder: Path, voxels: NDArray[Any]) -> Image:
    return ScalarImage(voxels.transpose(0, 3, 2, 1))


def as_dask(folder: Path, voxels: NDArray[Any]) -> Image:
    return ScalarImage(da.from_array(voxels.transpose(0, 3, 2, 1), chunks=4))


def as_shards(folder: Path, voxels: NDArray[Any]) -> Image:
    return stored(folder, voxels, chunk=4, shard=2)


every_source = pytest.mark.parametrize("make", [as_array, as_dask, as_shards])
MakeImage = Callable[[Path, NDArray[Any]], Image]


@both_loops
@every_source
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_every_source_gives_each_box_its_own_memory(
    folder: Path, voxels: NDArray[np.int16], make: MakeImage, scheduler: group_read.Scheduler
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
def test_no_boxes_give_no_voxels(folder: Path, voxels: NDArray[np.int16], make: MakeImage) -> None:
    assert make(folder, voxels).read_group([]) == []


@pytest.mark.parametrize("make", [as_array, as_dask])
def test_big_endian_voxels_are_read_in_native_order(
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
def test_a_source_has_a_shape_a_type_and_chunks(
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


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_blocks_that_boxes_and_images_share_are_computed_once(
    folder: Path, voxels: NDArray[np.int16], scheduler: group_read.Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: collections.Counter[tuple[Path, int]] = collections.Counter()
    computed: collections.Counter[tuple[int, ...]] = collections.Counter()
    decode = MappedShard.decode

    def counting(shard: MappedShard, number: int, scratch: Any) -> Any:
        decoded[shard.file, number] += 1
        return decode(shard, number, scratch)

    def note(block: NDArray[Any], block_info: Any = None) -> NDArray[Any]:
        computed[block_info[0]["chunk-location"]] += 1
        return block + 0.5

    monkeypatch.setattr(MappedShard, "decode", counting)
    monkeypatch.setattr(gather, "_compiled", None)
    image = stored(folder, voxels, chunk=(3, 5, 5), shard=1)
    shared = image.dask.map_blocks(note, dtype=float, meta=np.empty((0,) * 4))
    images = [ScalarImage(shared * 2), ScalarImage(shared - 5), ScalarImage(shared)]
    boxes = [PatchLocation((0, 0, 0), (7, 6, 4)), PatchLocation((3, 3, 2), (4, 4, 4))] * 2
    found = read_group(images, boxes, scheduler=scheduler)
    whole = voxels.transpose(0, 3, 2, 1) + 0.5
    for patches, expected in zip(found, [whole * 2, whole - 5, whole], strict=True):
        for box, patch in zip(boxes, patches, strict=True):
            assert_same_bytes(patch, expected[(slice(None), *box.to_slices())])
    assert set(computed.values()) == {1}
    assert len(computed) == 2 * 2 * 2  # of 3 x 2 x 3: blocks that no box touches are not computed
    assert set(decoded.values()) == {1}


def smoothed(array: Any) -> Any:
    """Each voxel with its neighbours along I, in dask or numpy."""
    if isinstance(array, np.ndarray):
        wide = np.pad(array.astype(float), [(0, 0), (1, 1), (0, 0), (0, 0)])
        return wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    return da.map_overlap(
        lambda block: smoothed(block)[:, 1:-1],
        array,
        depth={1: 1},
        boundary=0,
        trim=False,
        dtype=float,
        meta=np.empty((0,) * 4),
    )


EXPRESSIONS: list[Callable[[Any], Any]] = [
    lambda array: array * 2 + 1,
    lambda array: (array > 50).astype(np.uint8),
    lambda array: array.astype(np.float32) ** 0.5,
    lambda array: array[:1] - array.mean(),
    lambda array: array - array.max(axis=(1, 2, 3), keepdims=True),
    lambda array: array[::-1].astype(np.int32),
    smoothed,
]


@both_loops
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=4),
    chunk=st.tuples(*[st.integers(1, 5)] * 3),
    expression=st.sampled_from(EXPRESSIONS),
    source=st.sampled_from(["shards", "dask", "numpy", "a map"]),
    scheduler=st.sampled_from(["sync", "threads"]),
)
def test_boxes_of_a_mapped_image_have_the_values_that_numpy_computes_of_the_whole(
    data: Draw,
    shape: list[int],
    chunk: tuple[int, ...],
    expression: Callable[[Any], Any],
    source: str,
    scheduler: group_read.Scheduler,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any") / "image"
    voxels = np.random.default_rng(0).integers(0, 100, shape).astype(np.int16)
    image = stored(folder, voxels, chunk=chunk, shard=2)
    whole = image.data
    if source == "dask":
        mapped = ScalarImage(expression(image.dask))
    elif source == "numpy":
        mapped = ScalarImage(whole).map(expression)
    else:
        mapped = image.map(expression)
    expected = expression(whole)
    if source == "a map":
        mapped, expected = mapped.map(lambda array: array + 1), expected + 1
    boxes = [draw_box(data, image.spatial_shape) for _ in range(3)] * 2
    for box, patch in zip(boxes, mapped.read_group(boxes, scheduler=scheduler), strict=True):
        np.testing.assert_allclose(patch, expected[(slice(None), *box.to_slices())], rtol=1e-6)
        assert patch.dtype == mapped.dtype
    close_shards(folder)


# A cluster


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@both_loops
@every_source
def test_a_cluster_reads_the_same_voxels(
    folder: Path, voxels: NDArray[np.int16], make: MakeImage, client: Any
) -> None:
    image = make(folder, voxels)
    boxes = [PatchLocation((n, 2, 3), (4, 5, 6)) for n in range(7)] + [PatchLocation((0, 0, 0), (11, 10, 9))]
    images = [image, image.rescaled(0.5, 1.25, -100, 100), image.map(lambda array: array - 3)]
    here = read_group(images, boxes)
    for expected, found in zip(here, read_group(images, boxes, scheduler=client), strict=True):
        for one, other in zip(expected, found, strict=True):
            assert_same_bytes(other, one)
    over = [PatchLocation((-3, -3, -3), (8, 20, 8)), *boxes]
    padded = image.read_group(over, padding_mode="reflect")
    for one, other in zip(
        padded, image.read_group(over, padding_mode="reflect", scheduler=client), strict=True
    ):
        assert_same_bytes(other, one)
    assert image.read_group([], scheduler=client) == []
    out = np.zeros((2, 22, 10, 9), np.float32)[:, ::-2]
    read_group([image], boxes[-1:], scheduler=client, out=[[out]])
    np.testing.assert_array_equal(out, image.data)


def test_several_threads_may_read_by_one_cluster_at_once(
    folder: Path, voxels: NDArray[np.int16], client: Any
) -> None:
    image = as_shards(folder, voxels)
    wrong: list[PatchLocation] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(10):
            box = PatchLocation(tuple(rng.integers(0, 5, 3).tolist()), (5, 5, 4))
            [found] = image.read_group([box], scheduler=client)
            if not np.array_equal(found, voxels.transpose(0, 3, 2, 1)[(slice(None), *box.to_slices())]):
                wrong.append(box)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_errors_on_a_cluster_are_raised_here(folder: Path, voxels: NDArray[np.int16], client: Any) -> None:
    image = as_shards(folder, voxels)
    with pytest.raises(PatchLocationError, match="is not inside"):
        image.read_group([PatchLocation((0, 0, 0), (12, 1, 1))], scheduler=client)
    (folder / "0" / "c" / "0" / "0" / "0" / "0").unlink()
    with pytest.raises(DamageError, match="c/0/0/0/0: it is missing"):
        image.read_group([PatchLocation((0, 0, 0), (1, 1, 1))], scheduler=client)


def test_an_unknown_scheduler_is_refused_with_the_known_ones(folder: Path, voxels: NDArray[np.int16]) -> None:
    with pytest.raises(OptionError, match="must be 'sync', 'threads' or a distributed"):
        as_shards(folder, voxels).read_group([PatchLocation((0, 0, 0), (1, 1, 1))], scheduler="cluster")  # type: ignore[arg-type]
