"""An aggregator blends patches, in any order, into the volume that a dense reference gives."""

from __future__ import annotations

import errno
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from blending_oracle import window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
import zpatch.store.staged_image
from zpatch.blending.reduction import reduce_channels
from zpatch.blending.sinks import ImageSink
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import (
    IncompleteCoverageError,
    MemoryLimitError,
    ModelError,
    OptionError,
    PatchLocationError,
    StoreError,
    StoreExistsError,
    UnknownNameError,
    ZpatchError,
)
from zpatch.geometry.boxes import Triple
from zpatch.geometry.padding import PADDING_MODES

MODES = ["crop", "average", "hann", "gaussian"]
Floats = NDArray[np.float64]


def grid_over(shape: Triple, size: Any, overlap: Any = 0, padding_mode: str | None = None) -> zp.GridSampler:
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(np.broadcast_to(np.uint8(0), shape)))
    return zp.GridSampler(subject, size, overlap, padding_mode)


@st.composite
def grids(draw: st.DrawFn) -> zp.GridSampler:
    """Grids of any shape, overlaps of 0 to 75 %, with and without padding; one axis may be long."""
    padding_mode = draw(st.sampled_from([None, *PADDING_MODES]))
    long_axis = draw(st.integers(0, 2))
    shape, size, overlap = [], [], []
    for axis in range(3):
        n = draw(st.integers(1, 60 if axis == long_axis else 8))
        p = draw(st.integers(-(-n // 4), n if padding_mode is None else n + 3))
        shape.append(n)
        size.append(p)
        overlap.append(draw(st.sampled_from([o for o in range(0, p, 2) if 4 * o <= 3 * p])))
    return grid_over((shape[0], shape[1], shape[2]), size, overlap, padding_mode)


def starts_of(n: int, p: int, o: int, *, padded: bool) -> tuple[list[int], int, int]:
    """First voxels of the patches on one axis, and where the (padded) axis begins and ends."""
    before = after = o // 2 if padded else 0
    missing = max(p - n - before - after, 0)
    before, after = before + missing // 2, after + missing - missing // 2
    starts = list(range(-before, n + after - p + 1, p - o))
    if starts[-1] != n + after - p:
        starts.append(n + after - p)
    return starts, -before, n + after


def dense(mode: str, sampler: zp.GridSampler, patches: Sequence[Floats]) -> Floats:
    """The blended volume (C, I, J, K) in float64, all of it in memory, straight from the formulas."""
    grid = sampler.grid
    axes = [
        starts_of(n, p, o, padded=sampler.padding_mode is not None)
        for n, p, o in zip(grid.spatial_shape, grid.patch_size, grid.patch_overlap, strict=True)
    ]
    extent = tuple(stop - start for _, start, stop in axes)
    total, weights = np.zeros((len(patches[0]), *extent)), np.zeros(extent)
    i, j, k = (window(mode, p) for p in grid.patch_size)
    weight = i[:, None, None] * j[:, None] * k
    for patch, corner in zip(patches, itertools.product(*(starts for starts, _, _ in axes)), strict=True):
        box, cut = [], []
        for c, (_, start, stop), p, o in zip(corner, axes, grid.patch_size, grid.patch_overlap, strict=True):
            first = o // 2 if mode == "crop" and c > start else 0
            last = p - o // 2 if mode == "crop" and c + p < stop else p
            box.append(slice(c - start + first, c - start + last))
            cut.append(slice(first, last))
        if mode == "crop":
            total[:, *box], weights[*box] = patch[:, *cut], 1
        else:
            total[:, *box] += weight * patch
            weights[*box] += weight
    inside = [slice(-start, n - start) for (_, start, _), n in zip(axes, grid.spatial_shape, strict=True)]
    return (total / weights)[:, *inside]


def blended(
    sampler: zp.GridSampler,
    mode: str,
    patches: Sequence[Any],
    order: Sequence[int] | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same by the aggregator, over its known grid."""
    locations = sampler.locations
    with zp.PatchAggregator(sampler.grid.spatial_shape, mode, grid=sampler, **options) as aggregator:
        for number in order or range(len(patches)):
            batch = torch.as_tensor(patches[number])[None]
            aggregator.add_batch(batch, [locations[number]])
        output = aggregator.get_output()
    assert isinstance(output, torch.Tensor)
    return output


def random_patches(sampler: zp.GridSampler, rng: np.random.Generator, channels: int = 2) -> list[Any]:
    return list(rng.uniform(1, 2, (len(sampler), channels, *sampler.patch_size)).astype(np.float32))


def field_and_patches(sampler: zp.GridSampler, rng: np.random.Generator) -> tuple[Any, list[Any]]:
    """A random field (C, I, J, K) over the volume, and its voxels in each patch."""
    field = rng.uniform(1, 2, (2, *sampler.grid.spatial_shape)).astype(np.float32)
    boxes = [
        [
            np.arange(a, a + p).clip(0, n - 1)
            for a, p, n in zip(place.index, place.size, field.shape[1:], strict=True)
        ]
        for place in sampler.locations
    ]
    return field, [np.stack([channel[np.ix_(*box)] for channel in field]) for box in boxes]


@pytest.fixture
def sampler() -> zp.GridSampler:
    """Two patches along each axis, and more along I."""
    return grid_over((70, 12, 13), (16, 8, 8), (4, 2, 2))


@pytest.fixture
def patches(sampler: zp.GridSampler, rng: np.random.Generator) -> list[Any]:
    return random_patches(sampler, rng)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out" / "blended.zarr"
    close_shards(tmp_path)


# The law


@pytest.mark.parametrize("mode", MODES)
@given(sampler=grids(), value=st.sampled_from([0.0, -3.3, 1e-6, 1e6]) | st.floats(1, 1000, width=32))
def test_constants_in_are_the_same_constants_out(mode: str, sampler: zp.GridSampler, value: float) -> None:
    patch = np.full((1, *sampler.patch_size), value, dtype=np.float32)
    output = blended(sampler, mode, [patch] * len(sampler))
    assert output.shape == (1, *sampler.grid.spatial_shape)
    np.testing.assert_allclose(output, np.float32(value), rtol=0 if mode == "crop" else 1e-6)


@pytest.mark.parametrize("mode", MODES)
@given(sampler=grids(), seed=st.integers(0, 2**32))
def test_random_patches_agree_with_a_dense_reference_in_float64(
    mode: str, sampler: zp.GridSampler, seed: int
) -> None:
    patches = random_patches(sampler, np.random.default_rng(seed))
    wanted = dense(mode, sampler, patches)
    np.testing.assert_allclose(blended(sampler, mode, patches), wanted, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@given(sampler=grids(), seed=st.integers(0, 2**32))
def test_windows_that_all_predict_one_field_give_that_field(
    mode: str, sampler: zp.GridSampler, seed: int
) -> None:
    field, patches = field_and_patches(sampler, np.random.default_rng(seed))
    np.testing.assert_allclose(blended(sampler, mode, patches), field, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@given(sampler=grids(), seed=st.integers(0, 2**32))
def test_any_order_of_arrival_gives_the_same_bits(mode: str, sampler: zp.GridSampler, seed: int) -> None:
    rng = np.random.default_rng(seed)
    patches = random_patches(sampler, rng)
    order = rng.permutation(len(patches)).tolist()
    assert torch.equal(blended(sampler, mode, patches, order), blended(sampler, mode, patches))


@pytest.mark.parametrize("mode", MODES)
@given(sampler=grids(), seed=st.integers(0, 2**32))
def test_without_a_known_grid_the_result_is_the_same(mode: str, sampler: zp.GridSampler, seed: int) -> None:
    patches = random_patches(sampler, np.random.default_rng(seed))
    grid = sampler.grid
    loose = zp.PatchAggregator(grid.spatial_shape, mode, grid.patch_overlap)
    for patch, location in zip(patches, sampler.locations, strict=True):
        loose.add_batch(torch.from_numpy(patch)[None], [location])
    # Without the grid, crop knows the edges of the volume only, not those of its padding.
    if mode != "crop" or sampler.padding_mode is None:
        np.testing.assert_allclose(loose.get_output(), blended(sampler, mode, patches), rtol=1e-6)
    else:
        assert loose.get_output().shape == (2, *grid.spatial_shape)


@pytest.mark.parametrize("mode", ["crop", "average", "hann"])
@pytest.mark.parametrize("known", [True, False])
def test_crop_average_and_hann_are_those_of_torchio_1(
    mode: str, known: bool, sampler: zp.GridSampler, patches: list[Any]
) -> None:
    shape, size, overlap = sampler.grid.spatial_shape, sampler.patch_size, sampler.patch_overlap
    total, weights = torch.zeros(2, *shape), torch.zeros(shape)
    lines = [torch.hann_window(p + 2, periodic=False)[1:-1] for p in size]
    window = lines[0][:, None, None] * lines[1][:, None] * lines[2] if mode == "hann" else torch.ones(size)
    for patch, location in zip(map(torch.from_numpy, patches), sampler.locations, strict=True):
        cut = [slice(0, p) for p in size]
        if mode == "crop":
            cut = [
                slice(o // 2 if a > 0 else 0, p - o // 2 if a + p < n else p)
                for a, p, o, n in zip(location.index, size, overlap, shape, strict=True)
            ]
        box = [slice(a + c.start, a + c.stop) for a, c in zip(location.index, cut, strict=True)]
        if mode == "crop":
            total[:, *box], weights[*box] = patch[:, *cut], 1
        else:
            total[:, *box] += window * patch
            weights[*box] += window
    options: dict[str, Any] = {"grid": sampler} if known else {"patch_overlap": overlap}
    aggregator = zp.PatchAggregator(shape, mode, **options)
    for first in range(0, len(patches), 5):
        part = slice(first, first + 5)
        aggregator.add_batch(torch.from_numpy(np.stack(patches[part])), sampler.locations[part])
    np.testing.assert_allclose(aggregator.get_output(), total / weights, rtol=2e-6)


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
def test_more_than_255_patches_may_lie_on_a_voxel(mode: str) -> None:
    sampler = grid_over((17, 17, 17), 7, 6)  # 343 patches on each voxel of the middle
    patches = [np.full((1, 7, 7, 7), 7, dtype=np.float32)] * len(sampler)
    np.testing.assert_allclose(blended(sampler, mode, patches), 7, rtol=1e-5)


def test_more_than_255_patches_may_lie_on_a_voxel_without_a_grid() -> None:
    aggregator = zp.PatchAggregator(4, "average")
    location = zp.PatchLocation((0, 0, 0), (4, 4, 4))
    for value in range(300):
        aggregator.add_batch(torch.full((1, 1, 4, 4, 4), float(value)), [location])
    np.testing.assert_allclose(aggregator.get_output(), 149.5)


# Types


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [np.uint8, np.int8, np.int16, np.int32, np.int64, np.bool_, np.uint16, np.uint32, np.uint64],
)
def test_integers_stay_exact_in_crop_mode(known: bool, dtype: Any, sampler: zp.GridSampler) -> None:
    top = 1 if dtype is np.bool_ else int(np.iinfo(dtype).max)
    low = max(0, top - 50)
    field = np.arange(math.prod((70, 12, 13))).reshape(1, 70, 12, 13) % (top - low + 1)
    field = field.astype(dtype) + dtype(low)
    options: dict[str, Any] = {"grid": sampler} if known else {"patch_overlap": sampler.patch_overlap}
    aggregator = zp.PatchAggregator((70, 12, 13), "crop", **options)
    for location in sampler.locations:
        patch = torch.from_numpy(field[:, *location.to_slices()].copy())
        aggregator.add_batch(patch[None], [location])
    output = aggregator.get_output()
    assert isinstance(output, torch.Tensor)
    assert not output.is_floating_point()
    np.testing.assert_array_equal(output.numpy(), field)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(known: bool, dtype: torch.dtype) -> None:
    sampler = grid_over((12, 12, 12), 9, 8)
    options: dict[str, Any] = {"grid": sampler} if known else {}
    aggregator = zp.PatchAggregator(12, "average", **options)
    for location in sampler.locations:  # 64 of them, whose sum float16 cannot hold
        aggregator.add_batch(torch.full((1, 1, 9, 9, 9), 4096, dtype=dtype), [location])
    output = aggregator.get_output()
    assert isinstance(output, torch.Tensor)
    assert output.dtype == torch.float32
    np.testing.assert_allclose(output, 4096, rtol=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_float64_is_summed_in_float64(known: bool, sampler: zp.GridSampler) -> None:
    options: dict[str, Any] = {"grid": sampler} if known else {"patch_overlap": sampler.patch_overlap}
    aggregator = zp.PatchAggregator((70, 12, 13), "crop", **options)
    for location in sampler.locations:
        aggregator.add_batch(torch.full((1, 1, *sampler.patch_size), 1 + 1e-12).double(), [location])
    output = aggregator.get_output()
    assert isinstance(output, torch.Tensor)
    assert output.dtype == torch.float64


def test_the_output_has_the_dtype_asked_for(sampler: zp.GridSampler, patches: list[Any]) -> None:
    assert blended(sampler, "hann", patches, dtype=torch.float16).dtype == torch.float16


def test_gradients_are_not_kept(sampler: zp.GridSampler, patches: list[Any]) -> None:
    tracked = [torch.from_numpy(patch).requires_grad_() for patch in patches]
    with zp.PatchAggregator((70, 12, 13), "hann", grid=sampler) as aggregator:
        aggregator.add_batch(torch.stack(tracked), sampler.locations)
        output = aggregator.get_output()
    assert isinstance(output, torch.Tensor)
    assert not output.requires_grad


@pytest.mark.parametrize("known", [True, False])
def test_batches_may_come_from_inference_mode(
    known: bool, sampler: zp.GridSampler, patches: list[Any]
) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), "hann", grid=sampler if known else None, max_memory=0)
    for patch, location in zip(patches, sampler.locations, strict=True):
        with torch.inference_mode(sum(location.index) % 2 == 0):
            aggregator.add_batch(torch.from_numpy(patch)[None] * 1, [location])
    output = aggregator.get_output()
    assert isinstance(output, torch.Tensor)
    assert not output.is_inference()
    np.testing.assert_allclose(output, dense("hann", sampler, patches), rtol=1e-6)


# Memory


def test_tiles_are_freed_after_their_last_contributor() -> None:
    n, p, o = (160, 48, 64), 32, 16
    sampler = grid_over(n, p, o)
    front = o * n[1] * n[2] + (p - o) * o * n[2] + (p - o) * (p - o) * p
    aggregator = zp.PatchAggregator(n, "hann", grid=sampler, max_memory=0)  # no patch arrives before its turn
    most = 0
    for location in sampler.locations:
        aggregator.add_batch(torch.ones(1, 1, p, p, p), [location])
        blend: Any = aggregator._heads[None].blend
        most = max(most, sum(sums.voxels.size for sums in blend._sums.values()))
    assert 0 < most <= front < math.prod(n)
    assert blend._sums == {}
    np.testing.assert_allclose(aggregator.get_output(), 1, rtol=1e-6)


def test_patches_without_overlap_need_no_tiles() -> None:
    sampler = grid_over((64, 32, 32), 32)
    aggregator = zp.PatchAggregator((64, 32, 32), "hann", grid=sampler)
    for location in sampler.locations:
        aggregator.add_batch(torch.ones(1, 1, 32, 32, 32), [location])
        blend: Any = aggregator._heads[None].blend
        assert blend._sums == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_disk", [True, False])
def test_arbitrary_locations_in_bounded_memory_give_the_same_bits(
    mode: str, on_disk: bool, target: Path, rng: np.random.Generator
) -> None:
    sampler = grid_over((140, 40, 80), (30, 30, 30), 10)
    patches = random_patches(sampler, rng, channels=1)
    outputs = []
    for max_memory in (None, "1.5 MB"):  # a tile of 64 x 40 x 64 voxels takes 1.3 MB
        output = target / str(max_memory) if on_disk else None
        with zp.PatchAggregator(
            (140, 40, 80), mode, sampler.patch_overlap, output=output, max_memory=max_memory
        ) as aggregator:
            for location, patch in zip(sampler.locations, patches, strict=True):
                aggregator.add_batch(torch.from_numpy(patch)[None], [location])
            blend: Any = aggregator._heads[None].blend
            outputs.append(aggregator.get_output())
    assert blend.tiles.peak_bytes <= 1.5e6
    voxels = [output.data if isinstance(output, zp.Image) else output.numpy() for output in outputs]
    np.testing.assert_array_equal(*voxels)
    if on_disk:
        assert sorted(path.name for path in target.iterdir()) == ["1.5 MB", "None"]


def test_the_scratch_file_is_beside_the_output(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    make = tempfile.TemporaryFile

    def spy(**options: Any) -> Any:
        folders.append(options["dir"])
        return make(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", spy)
    for output in (None, target):
        with zp.PatchAggregator(8, "hann", output=output, max_memory=0) as aggregator:
            aggregator.add_batch(torch.ones(1, 1, 8, 8, 8), [zp.PatchLocation((0, 0, 0), (8, 8, 8))])
            aggregator.get_output()
    assert folders == [None, target.parent]


def test_memory_is_divided_among_the_keys(rng: np.random.Generator) -> None:
    batch = torch.ones(1, 1, 64, 64, 64)
    location = zp.PatchLocation((0, 0, 0), (64, 64, 64))
    with zp.PatchAggregator(64, "hann", max_memory="2 MiB") as aggregator:
        aggregator.add_batch(batch, [location])
        aggregator.add_batch(batch, [location])
        blend: Any = aggregator._heads[None].blend
        assert blend.tiles.bytes == 2 * 2**20
    with zp.PatchAggregator(64, "hann", max_memory="2 MiB") as aggregator:
        aggregator.add_batch({"a": batch, "b": batch}, [location])
        held: list[Any] = [head.blend for head in aggregator._heads.values()]
        assert [blend.tiles.bytes for blend in held] == [0, 0]
        assert torch.equal(torch.as_tensor(aggregator.get_output("a")), batch[0])


def test_patches_of_a_grid_that_wait_for_their_turn_take_bounded_memory(
    sampler: zp.GridSampler, patches: list[Any]
) -> None:
    batch = torch.from_numpy(np.stack(patches[::-1]))
    with (
        zp.PatchAggregator((70, 12, 13), "hann", grid=sampler, max_memory="2 kB") as aggregator,
        pytest.raises(MemoryLimitError, match="before their turn"),
    ):
        aggregator.add_batch(batch, sampler.locations[::-1])


# On disk


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("reduce", [None, "argmax"])
def test_an_image_on_disk_equals_the_tensor(
    known: bool, reduce: str | None, sampler: zp.GridSampler, patches: list[Any], target: Path
) -> None:
    options: dict[str, Any] = {"grid": sampler} if known else {"patch_overlap": sampler.patch_overlap}
    outputs: list[Any] = []
    for output in (None, target):
        with zp.PatchAggregator((70, 12, 13), "hann", output=output, reduce=reduce, **options) as aggregator:
            for location, patch in zip(sampler.locations, patches, strict=True):
                aggregator.add_batch(torch.from_numpy(patch)[None], [location])
            outputs.append(aggregator.get_output())
    tensor, image = outputs
    assert isinstance(image, zp.LabelMap if reduce else zp.ScalarImage)
    np.testing.assert_array_equal(image.data, tensor.numpy())
    np.testing.assert_array_equal(zp.Image(target).data, tensor.numpy())
    stored = np.asarray(zarr.open_group(target, mode="r")["0"])
    np.testing.assert_array_equal(
        stored.reshape(tensor.shape[::-1][:3] if reduce else (2, 13, 12, 70)),
        tensor.numpy()[0].T if reduce else tensor.numpy().transpose(0, 3, 2, 1),
    )
    assert sorted(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("known", [True, False])
def test_each_shard_file_is_written_once(
    known: bool, target: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    sampler = grid_over((70, 32, 33), (24, 20, 20), 4)
    patches = random_patches(sampler, rng)
    written: Counter[Any] = Counter()
    write_shard = zpatch.store.staged_image.write_shard

    def spy(array: Any, shard: tuple[int, ...], *args: Any, **options: Any) -> Any:
        written[array.shard_file(shard)] += 1
        return write_shard(array, shard, *args, **options)

    monkeypatch.setattr(zpatch.store.staged_image, "write_shard", spy)
    order = rng.permutation(len(patches)).tolist()
    grid = sampler if known else None
    with zp.PatchAggregator((70, 32, 33), "hann", grid=grid, output=target) as aggregator:
        for number in order:
            aggregator.add_batch(torch.from_numpy(patches[number])[None], [sampler.locations[number]])
        aggregator.get_output()
    assert set(written.values()) == {1}
    assert len(written) == 3  # 70 voxels along I in chunks of 32


def test_an_output_that_is_never_finished_leaves_nothing(
    sampler: zp.GridSampler, patches: list[Any], target: Path
) -> None:
    with zp.PatchAggregator((70, 12, 13), "hann", grid=sampler, output=target) as aggregator:
        aggregator.add_batch(torch.from_numpy(np.stack(patches[:-1])), sampler.locations[:-1])
        assert not target.exists()
    assert list(target.parent.iterdir()) == []


def test_outputs_of_all_keys_appear_together_or_not_at_all(
    sampler: zp.GridSampler, patches: list[Any], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = torch.from_numpy(np.stack(patches))
    finish = ImageSink.finish

    def failing(sink: ImageSink) -> Any:
        if sink.stage.folder.name == "edge":
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(sink)

    monkeypatch.setattr(ImageSink, "finish", failing)
    with zp.PatchAggregator((70, 12, 13), "hann", grid=sampler, output=target) as aggregator:
        aggregator.add_batch({"seg": batch, "edge": batch}, sampler.locations)
        with pytest.raises(StoreError, match=r"blended.zarr: it cannot be written to \(No space left"):
            aggregator.get_output("seg")
        with pytest.raises(OptionError, match="an earlier call failed half-way; make a new aggregator"):
            aggregator.get_output("seg")
    assert list(target.parent.iterdir()) == []


def test_a_full_disk_is_an_error_with_the_name_of_the_output(
    sampler: zp.GridSampler, patches: list[Any], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zpatch.store.staged_image, "write_shard", full)
    with (
        zp.PatchAggregator((70, 12, 13), "hann", grid=sampler, output=target) as aggregator,
        pytest.raises(StoreError, match=r"blended.zarr: it cannot be written to \(No space left"),
    ):
        aggregator.add_batch(torch.from_numpy(np.stack(patches)), sampler.locations)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("reduce", "dtype"),
    [(lambda v: v > 1.5, np.uint8), (torch.Tensor.half, np.float32), (torch.Tensor.bfloat16, np.float32)],
    ids=["bool", "float16", "bfloat16"],
)
def test_reduced_voxels_are_stored_in_a_type_of_nifti(
    reduce: Any, dtype: Any, sampler: zp.GridSampler, patches: list[Any], target: Path
) -> None:
    outputs: list[Any] = []
    for output in (None, target):
        with zp.PatchAggregator((70, 12, 13), grid=sampler, reduce=reduce, output=output) as aggregator:
            aggregator.add_batch(torch.from_numpy(np.stack(patches)), sampler.locations)
            outputs.append(aggregator.get_output())
    tensor, image = outputs
    assert image.dtype == dtype
    np.testing.assert_array_equal(image.data, tensor.float().numpy())


def test_an_existing_output_is_refused(sampler: zp.GridSampler, target: Path) -> None:
    target.mkdir(parents=True)
    with pytest.raises(StoreExistsError, match=r"blended.zarr: it exists already; choose another name"):
        zp.PatchAggregator((70, 12, 13), grid=sampler, output=target)


def test_the_affine_of_an_output_is_that_of_the_subject_at_its_resolution(target: Path) -> None:
    affine = np.array([[0, -2, 0, 5], [1, 0, 0.5, 6], [0, 0, 3, 7], [0, 0, 0, 1]], dtype=float)
    subject = zp.Subject(t1=zp.ScalarImage(np.zeros((8, 8, 8)), affine=affine))
    grid = zp.GridSampler(subject, 8)
    for name, m in (("same", 8), ("half", 4)):
        with zp.PatchAggregator(8, output_shape=m, grid=grid, output=target / name) as aggregator:
            aggregator.add_batch(torch.zeros(1, 1, m, m, m), grid.locations)
            image = aggregator.get_output()
        assert isinstance(image, zp.Image)
        # The outer corner of the first voxel stays where it is.
        corner, wanted = image.affine @ [-0.5, -0.5, -0.5, 1], affine @ [-0.5, -0.5, -0.5, 1]
        np.testing.assert_allclose(corner, wanted)
        np.testing.assert_allclose(image.spacing, np.array(subject.t1.spacing) * 8 / m)


# Reductions


@pytest.mark.parametrize("mode", ["crop", "hann"])
@pytest.mark.parametrize(
    ("reduce", "on_dense"),
    [
        ("argmax", lambda v: v.argmax(axis=0)[None]),
        ("softmax", lambda v: np.exp(v) / np.exp(v).sum(axis=0)),
        ("sigmoid", lambda v: 1 / (1 + np.exp(-v))),
        (("threshold", 1.5), lambda v: v > 1.5),
        (lambda v: v[:1] - v[1:], lambda v: v[:1] - v[1:]),
    ],
    ids=["argmax", "softmax", "sigmoid", "threshold", "function"],
)
@pytest.mark.parametrize("known", [True, False])
def test_reductions_are_those_of_the_blended_volume(
    known: bool, reduce: Any, on_dense: Any, mode: str, sampler: zp.GridSampler, patches: list[Any]
) -> None:
    options: dict[str, Any] = {"grid": sampler} if known else {"patch_overlap": sampler.patch_overlap}
    with zp.PatchAggregator((70, 12, 13), mode, reduce=reduce, **options) as aggregator:
        aggregator.add_batch(torch.from_numpy(np.stack(patches)), sampler.locations)
        output = aggregator.get_output()
    np.testing.assert_allclose(output, on_dense(dense(mode, sampler, patches)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_reduction_whose_number_of_channels_depends_on_the_values_is_refused(
    known: bool, on_disk: bool, target: Path
) -> None:
    sampler = grid_over((128, 64, 64), 64)
    batch = torch.ones(2, 2, 64, 64, 64)
    batch[1] = 2
    with zp.PatchAggregator(
        (128, 64, 64),
        grid=sampler if known else None,
        reduce=lambda voxels: voxels[: int(voxels.max())],
        output=target if on_disk else None,
    ) as aggregator:

        def blend() -> None:  # with a grid the last patch completes a tile
            aggregator.add_batch(batch, sampler.locations)
            aggregator.get_output()

        with pytest.raises(ModelError, match="made 2 channels of some voxels and 1 of others; the number of"):
            blend()
        with pytest.raises(OptionError, match="an earlier call failed half-way"):
            aggregator.get_output()
    assert not target.exists()


def test_dicts_make_an_output_for_each_key(sampler: zp.GridSampler, patches: list[Any], target: Path) -> None:
    batch = torch.from_numpy(np.stack(patches))
    for output in (None, target):
        with zp.PatchAggregator((70, 12, 13), "hann", grid=sampler, output=output) as aggregator:
            aggregator.add_batch({"seg": batch, "edge": batch[:, :1] * 2}, sampler.locations)
            outputs: list[Any] = [aggregator.get_output(key) for key in ("seg", "edge")]
        seg, edge = (value if output is None else torch.from_numpy(value.data) for value in outputs)
        assert torch.equal(seg[:1] * 2, edge)
    assert sorted(path.name for path in target.iterdir()) == ["edge", "seg"]


def test_each_key_may_have_its_own_shape_reduction_type_and_fill(target: Path) -> None:
    location = zp.PatchLocation((0, 0, 0), (8, 8, 8))
    batch = {"seg": torch.ones(1, 3, 8, 8, 8), "depth": torch.full((1, 1, 4, 4, 4), 2.5)}
    for output in (None, target):
        with zp.PatchAggregator(
            (8, 8, 10),
            "average",
            output_shape={"seg": (8, 8, 10), "depth": (4, 4, 5)},
            reduce={"seg": "argmax", "depth": None},
            dtype={"seg": torch.int16, "depth": torch.float64},
            fill={"seg": 9, "depth": -1},
            output=output,
        ) as aggregator:
            aggregator.add_batch(batch, [location])
            outputs: list[Any] = [aggregator.get_output(key) for key in ("seg", "depth")]
        if output:
            assert [type(image) for image in outputs] == [zp.LabelMap, zp.ScalarImage]
            np.testing.assert_allclose(outputs[1].spacing, 2)
            outputs = [torch.from_numpy(image.data) for image in outputs]
        seg, depth = outputs
        assert (seg.dtype, seg.shape) == (torch.int16, (1, 8, 8, 10))
        assert (depth.dtype, depth.shape) == (torch.float64, (1, 4, 4, 5))
        assert seg[0, 0, 0].tolist() == [0] * 8 + [9] * 2
        assert depth[0, 0, 0].tolist() == [2.5] * 4 + [-1]


@pytest.mark.parametrize("option", ["output_shape", "reduce", "dtype", "fill"])
@pytest.mark.parametrize("by_key", [True, False])
def test_an_option_by_key_has_a_value_for_each_key(option: str, by_key: bool) -> None:
    value = {"output_shape": 8, "reduce": "argmax", "dtype": torch.uint8, "fill": 0}[option]
    options: dict[str, Any] = {option: {"seg": value}}
    aggregator = zp.PatchAggregator(8, **options)
    tensor: Any = torch.ones(1, 2, 8, 8, 8)
    with pytest.raises(UnknownNameError, match=rf"no output '(edge|None)' in {option}.* seg"):
        aggregator.add_batch(
            {"seg": tensor, "edge": tensor} if by_key else tensor, [zp.PatchLocation((0, 0, 0), (8, 8, 8))]
        )


@pytest.mark.parametrize("option", ["output_shape", "reduce", "dtype", "fill"])
def test_an_option_by_key_has_no_other_keys(option: str) -> None:
    value = {"output_shape": 8, "reduce": "argmax", "dtype": torch.uint8, "fill": 0}[option]
    options: dict[str, Any] = {option: {"seg": value, "sge": value}}
    with pytest.raises(OptionError, match=rf"^{option}: no output 'sge' in the network; did you mean 'seg'"):
        zp.PatchAggregator(8, **options).add_batch(
            {"seg": torch.ones(1, 2, 8, 8, 8)}, [zp.PatchLocation((0, 0, 0), (8, 8, 8))]
        )


@pytest.mark.parametrize("by_key", [True, False])
def test_a_reduction_of_one_channel_that_gives_one_value_is_refused(by_key: bool) -> None:
    reduce: Any = {"seg": "argmax", "dist": "softmax"} if by_key else "softmax"
    tensor: Any = torch.ones(1, 1, 8, 8, 8)
    batch = {"seg": torch.ones(1, 2, 8, 8, 8), "dist": tensor} if by_key else tensor
    named = "'dist' " if by_key else ""
    with pytest.raises(OptionError, match=f"would give 1 everywhere, as the output {named}has one channel"):
        zp.PatchAggregator(8, reduce=reduce).add_batch(batch, [zp.PatchLocation((0, 0, 0), (8, 8, 8))])


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("has_grid", [False, True])
def test_voxels_that_are_not_finite_are_counted_and_a_warning_says_so(
    target: Path, sampler: zp.GridSampler, patches: list[Any], is_stored: bool, has_grid: bool
) -> None:
    batch = torch.from_numpy(np.stack(patches)).float()
    batch[0, :, :2, 1, 1] = torch.nan
    batch[0, 0, 3, 1, 1] = torch.inf
    options: dict[str, Any] = {"grid": sampler} if has_grid else {"patch_overlap": sampler.grid.patch_overlap}
    output = target if is_stored else None
    with zp.PatchAggregator(
        (70, 12, 13), "crop", reduce=("threshold", 0), output=output, **options
    ) as blended:
        blended.add_batch({"seg": batch}, sampler.locations)
        with pytest.warns(UserWarning, match="^3 blended voxels of 'seg' are NaN or infinite$"):
            found: Any = blended.get_output("seg")
        if is_stored:
            assert found.statistics["not_finite"] == 3
        assert blended.get_output("seg") is found


def test_an_unknown_key_is_an_error_with_the_known_ones(sampler: zp.GridSampler, patches: list[Any]) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler)
    aggregator.add_batch({"seg": torch.from_numpy(np.stack(patches))}, sampler.locations)
    with pytest.raises(UnknownNameError, match=r"no output 'sge' .*did you mean 'seg'"):
        aggregator.get_output("sge")


@pytest.mark.parametrize("keys", [None, ["seg"], ["seg", "edge"]])
def test_batches_with_other_keys_are_refused_and_change_nothing(
    keys: list[str] | None, sampler: zp.GridSampler, patches: list[Any]
) -> None:
    def batch_of(part: slice, keys: list[str] | None) -> Any:
        batch = torch.from_numpy(np.stack(patches[part]))
        return batch if keys is None else dict.fromkeys(keys, batch)

    first, rest = slice(0, 1), slice(1, None)
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler)
    aggregator.add_batch(batch_of(first, keys), sampler.locations[first])
    for others in (None, [], ["seg"], ["edge"], ["seg", "edge"]):
        if others != keys:
            with pytest.raises(OptionError, match="all tensors or all dicts of the same keys: one has"):
                aggregator.add_batch(batch_of(rest, others), sampler.locations[rest])
    aggregator.add_batch(batch_of(rest, keys), sampler.locations[rest])
    assert aggregator.get_output(keys[0] if keys else None) is not None


def test_a_dict_without_keys_is_refused(sampler: zp.GridSampler) -> None:
    with pytest.raises(OptionError, match="a dict without keys; it must hold a tensor for each output"):
        zp.PatchAggregator((70, 12, 13), grid=sampler).add_batch({}, [])


@pytest.mark.parametrize("key", ["../outside", "a/b", ""])
def test_a_key_that_is_not_a_valid_name_is_refused_before_anything_is_written(
    key: str, sampler: zp.GridSampler, patches: list[Any], target: Path
) -> None:
    with (
        pytest.raises(ZpatchError, match="output"),
        zp.PatchAggregator((70, 12, 13), grid=sampler, output=target) as aggregator,
    ):
        aggregator.add_batch({key: torch.from_numpy(np.stack(patches))}, sampler.locations)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_keys_that_differ_in_case_only_are_refused_on_disk(
    sampler: zp.GridSampler, patches: list[Any], target: Path
) -> None:
    batch = torch.from_numpy(np.stack(patches))
    with zp.PatchAggregator((70, 12, 13), grid=sampler) as aggregator:
        aggregator.add_batch({"Seg": batch, "seg": batch}, sampler.locations)
    with (
        pytest.raises(ZpatchError, match="output names 'Seg' and 'seg' differ in case only"),
        zp.PatchAggregator((70, 12, 13), grid=sampler, output=target) as aggregator,
    ):
        aggregator.add_batch({"Seg": batch, "seg": batch}, sampler.locations)


# Other resolutions


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", MODES)
@given(
    sampler=grids(),
    ratios=st.tuples(*[st.floats(0.3, 3)] * 3),
    seed=st.integers(0, 2**32),
)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_a_field_at_another_resolution_comes_out_whole(
    known: bool, mode: str, sampler: zp.GridSampler, ratios: tuple[float, float, float], seed: int
) -> None:
    shape = sampler.grid.spatial_shape
    output_shape = [max(1, round(n * ratio)) for n, ratio in zip(shape, ratios, strict=True)]
    field = np.random.default_rng(seed).uniform(1, 2, (1, *output_shape)).astype(np.float32)
    factors = [m / n for m, n in zip(output_shape, shape, strict=True)]
    options: dict[str, Any] = {"grid": sampler} if known else {"patch_overlap": sampler.grid.patch_overlap}
    aggregator = zp.PatchAggregator(shape, mode, output_shape=output_shape, **options)
    for location in sampler.locations:
        box = location.scaled(factors)
        axes = zip(box.index, box.size, output_shape, strict=True)
        seen = field[0][np.ix_(*(np.arange(a, a + p).clip(0, m - 1) for a, p, m in axes))]
        aggregator.add_batch(torch.from_numpy(seen)[None, None], [location])
    np.testing.assert_allclose(aggregator.get_output(), field, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_is_rounded_differently_is_fitted(mode: str) -> None:
    sampler = grid_over((31, 31, 31), 9, 2)  # a network of stride 2 makes 5 voxels of 9
    aggregator = zp.PatchAggregator(31, mode, output_shape=16, grid=sampler)
    for location in sampler.locations:
        aggregator.add_batch(torch.full((1, 1, 5, 5, 5), 3.0), [location])
    np.testing.assert_allclose(aggregator.get_output(), 3, rtol=1e-6)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "factor"), [((3, 40, 40), 2), ((5, 40, 40), 2), ((6, 20, 20), 4), ((2, 20, 20), 16)]
)
def test_a_volume_smaller_than_the_patch_keeps_its_place_in_a_smaller_output(
    shape: tuple[int, int, int], factor: int, mode: str, known: bool
) -> None:
    sampler = grid_over(shape, 16, 0, "edge")
    output_shape = [max(1, int(n / factor + 0.5)) for n in shape]
    options: dict[str, Any] = {"grid": sampler} if known else {}
    aggregator = zp.PatchAggregator(shape, mode, output_shape=output_shape, **options)
    for location in sampler.locations:
        axes = zip(location.index, location.size, shape, strict=True)
        ramps = np.meshgrid(*(np.arange(a, a + p).clip(0, n - 1.0) for a, p, n in axes), indexing="ij")
        batch = torch.nn.functional.avg_pool3d(torch.from_numpy(np.stack(ramps))[None], factor)
        aggregator.add_batch(batch, [location])
    output = aggregator.get_output()
    assert output.shape == (3, *output_shape)
    centres = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(shape, output_shape, strict=True)]
    wanted = np.stack(np.meshgrid(*centres, indexing="ij"))
    np.testing.assert_allclose(output, wanted, atol=factor / 2)  # half a voxel of the output


@pytest.mark.parametrize("known", [True, False])
def test_a_network_that_shrinks_patches_without_output_shape_is_refused_for_small_volumes_too(
    known: bool,
) -> None:
    sampler = grid_over((3, 40, 40), 16, 0, "edge")
    options: dict[str, Any] = {"grid": sampler} if known else {}
    aggregator = zp.PatchAggregator((3, 40, 40), "hann", **options)
    with pytest.raises(ModelError, match="output_shape= must say how it scales"):
        aggregator.add_batch(torch.ones(1, 1, 8, 8, 8), [sampler.locations[0]])


# Coverage


@pytest.mark.parametrize("mode", MODES)
def test_voxels_without_a_patch_get_the_fill(mode: str) -> None:
    aggregator = zp.PatchAggregator(8, mode, fill=-5)
    aggregator.add_batch(torch.ones(1, 2, 4, 4, 4), [zp.PatchLocation((2, 2, 2), (4, 4, 4))])
    wanted = np.full((2, 8, 8, 8), -5.0)
    wanted[:, 2:6, 2:6, 2:6] = 1
    np.testing.assert_array_equal(aggregator.get_output(), wanted)


def test_a_voxel_that_no_patch_covers_is_an_error_with_its_box() -> None:
    aggregator = zp.PatchAggregator(8, "average")
    aggregator.add_batch(torch.ones(1, 1, 8, 8, 5), [zp.PatchLocation((0, 0, 0), (8, 8, 5))])
    with pytest.raises(
        IncompleteCoverageError,
        match=r"covers 192 voxels, the first ones from \(0, 0, 5\) to \(8, 8, 8\); add patches .*give fill=",
    ):
        aggregator.get_output()


@pytest.mark.parametrize("reduce", [None, "argmax", "softmax", ("threshold", 0.5), lambda v: v[:1] * 2])
def test_the_fill_is_not_reduced(reduce: Any) -> None:
    aggregator = zp.PatchAggregator(8, reduce=reduce, fill=200)
    batch = torch.rand(1, 3, 8, 8, 4)
    aggregator.add_batch(batch, [zp.PatchLocation((0, 0, 0), (8, 8, 4))])
    output = aggregator.get_output()
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output[..., :4], reduce_channels(batch[0], reduce))
    assert (output[..., 4:] == 200).all()


def test_a_fill_that_is_no_class_is_refused_with_the_first_batch() -> None:
    aggregator = zp.PatchAggregator(8, reduce="argmax", fill=-1)
    with pytest.raises(OptionError, match=r"fill=-1 does not fit the output, which is of torch.uint8"):
        aggregator.add_batch(torch.ones(1, 3, 8, 8, 4), [zp.PatchLocation((0, 0, 0), (8, 8, 4))])


@pytest.mark.parametrize("known", [True, False])
def test_missing_patches_may_be_added_after_the_error(
    known: bool, sampler: zp.GridSampler, patches: list[Any], target: Path
) -> None:
    batch = torch.from_numpy(np.stack(patches))
    grid = sampler if known else None
    with zp.PatchAggregator((70, 12, 13), "hann", grid=grid, output=target) as aggregator:
        aggregator.add_batch({"a": batch[:-1], "b": batch[:-1]}, sampler.locations[:-1])
        with pytest.raises(IncompleteCoverageError):
            aggregator.get_output("a")
        aggregator.add_batch({"a": batch[-1:], "b": batch[-1:]}, sampler.locations[-1:])
        image = aggregator.get_output("a")
        assert isinstance(image, zp.Image)
        np.testing.assert_allclose(image.data, dense("hann", sampler, patches), rtol=1e-6)


@pytest.mark.parametrize("fill", [None, 0])
def test_an_aggregator_without_patches_has_no_output(fill: float | None) -> None:
    aggregator = zp.PatchAggregator(8, fill=fill)
    with pytest.raises(IncompleteCoverageError, match="no patch was added"):
        aggregator.get_output()
    aggregator.add_batch(torch.ones(0, 1, 8, 8, 8), [])
    with pytest.raises(IncompleteCoverageError, match="no patch was added"):
        aggregator.get_output()


def test_a_missing_patch_of_a_grid_is_an_error_with_its_box(
    sampler: zp.GridSampler, patches: list[Any]
) -> None:
    left_out = 5
    box = sampler.locations[left_out]
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler)
    for number, patch in enumerate(patches[:-1]):
        if number != left_out:
            aggregator.add_batch(torch.from_numpy(patch)[None], [sampler.locations[number]])
    with pytest.raises(IncompleteCoverageError) as error:
        aggregator.get_output()
    assert f"2 of {len(patches)} patches are missing" in str(error.value)
    assert f"from {box.index_ini} to {box.index_fin}; add every patch of the grid once" in str(error.value)


def test_a_repeated_patch_of_a_grid_is_an_error_with_its_place(
    sampler: zp.GridSampler, patches: list[Any]
) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler)
    batch = torch.from_numpy(patches[0])[None]
    aggregator.add_batch(batch, sampler.locations[:1])
    with pytest.raises(IncompleteCoverageError, match=r"the patch at \(0, 0, 0\) was added twice"):
        aggregator.add_batch(batch, sampler.locations[:1])


# What does not fit


@pytest.mark.parametrize("known", [True, False])
def test_a_batch_and_its_locations_have_the_same_length(
    known: bool, sampler: zp.GridSampler, patches: list[Any]
) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler if known else None)
    with pytest.raises(ModelError, match="a batch of 3 patches has 2 locations"):
        aggregator.add_batch(torch.from_numpy(np.stack(patches[:3])), sampler.locations[:2])


@pytest.mark.parametrize("known", [True, False])
def test_a_patch_has_the_shape_of_its_location(known: bool, sampler: zp.GridSampler) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler if known else None)
    with pytest.raises(
        ModelError, match=r"the patch at \(0, 0, 0\) is \(15, 8, 8\) where .* \(16, 8, 8\); .*output_shape="
    ):
        aggregator.add_batch(torch.ones(1, 1, 15, 8, 8), sampler.locations[:1])


@pytest.mark.parametrize("known", [True, False])
def test_patches_of_one_output_have_the_same_channels(known: bool, sampler: zp.GridSampler) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler if known else None)
    aggregator.add_batch(torch.ones(1, 2, 16, 8, 8), sampler.locations[:1])
    with pytest.raises(ModelError, match="channels"):
        aggregator.add_batch(torch.ones(1, 1, 16, 8, 8), sampler.locations[1:2])


@pytest.mark.parametrize("batch", [torch.ones(1, 16, 8, 8), np.ones((1, 1, 16, 8, 8)), None])
def test_a_batch_that_is_not_a_tensor_of_five_axes_is_refused(batch: Any, sampler: zp.GridSampler) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler)
    with pytest.raises(ModelError, match=r"a batch must be a tensor \(B, C, I, J, K\), not"):
        aggregator.add_batch(batch, sampler.locations[:1])


@pytest.mark.parametrize(
    "location", [zp.PatchLocation((1, 0, 0), (16, 8, 8)), zp.PatchLocation((0, 0, 0), (8, 8, 8))]
)
def test_a_location_that_is_not_of_the_grid_is_refused(
    location: zp.PatchLocation, sampler: zp.GridSampler
) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler)
    with pytest.raises(PatchLocationError) as error:
        aggregator.add_batch(torch.ones(1, 1, *location.size), [location])
    assert f"the patch at {location.index} of size {location.size} is not of this grid" in str(error.value)


@pytest.mark.parametrize("known", [True, False])
def test_after_an_error_inside_a_batch_an_aggregator_refuses_all_calls(
    known: bool, sampler: zp.GridSampler, target: Path
) -> None:
    with zp.PatchAggregator((70, 12, 13), grid=sampler if known else None, output=target) as aggregator:
        batch = {"a": torch.ones(1, 1, 16, 8, 8), "b": torch.ones(1, 1, 15, 8, 8)}
        with pytest.raises(ModelError, match="the patch at"):
            aggregator.add_batch(batch, sampler.locations[:1])
        for step in (lambda: aggregator.add_batch(batch, sampler.locations[:1]), aggregator.get_output):
            with pytest.raises(OptionError, match="an earlier call failed half-way; make a new aggregator"):
                step()
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_closed_aggregator_keeps_its_output_and_refuses_other_calls(
    known: bool, sampler: zp.GridSampler, patches: list[Any]
) -> None:
    batch = torch.from_numpy(np.stack(patches))
    grid = sampler if known else None
    finished, unfinished = (zp.PatchAggregator((70, 12, 13), grid=grid) for _ in range(2))
    for aggregator in (finished, unfinished):
        aggregator.add_batch(batch, sampler.locations)
    output = finished.get_output()
    for aggregator in (finished, unfinished):
        aggregator.close()
        aggregator.close()
    assert finished.get_output() is output
    for step in (lambda: unfinished.add_batch(batch, sampler.locations), unfinished.get_output):
        with pytest.raises(OptionError, match="the aggregator is closed; make a new aggregator"):
            step()


def test_nothing_can_be_added_after_the_output_was_taken(sampler: zp.GridSampler, patches: list[Any]) -> None:
    aggregator = zp.PatchAggregator((70, 12, 13), grid=sampler)
    batch = torch.from_numpy(np.stack(patches))
    aggregator.add_batch(batch, sampler.locations)
    aggregator.get_output()
    with pytest.raises(OptionError, match="the output was taken already; make a new aggregator"):
        aggregator.add_batch(batch, sampler.locations)
