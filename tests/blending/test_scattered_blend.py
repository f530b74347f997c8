"""Patches at any locations: the same voxels as in a dense volume, in memory that is bounded."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from blending_oracle import image_sink, window
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.blending.reduction import Finaliser
from zpatch.blending.scattered_blend import TILE_VOXELS, ScatteredBlend, tile_shape
from zpatch.blending.sinks import TensorSink
from zpatch.errors import IncompleteCoverageError, ModelError, OptionError
from zpatch.geometry.boxes import PatchLocation, Triple

MODES = ["crop", "average", "hann", "gaussian"]
Patches = list[tuple[NDArray[Any], PatchLocation]]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Triple, Patches]:
    """A volume, some thin, and up to 12 patches of any size that reach over its borders or are outside it."""
    shape = draw(st.tuples(*[st.integers(1, 12)] * 3))
    channels = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    patches: Patches = []
    for _ in range(draw(st.integers(1, 12))):
        i, j, k = (draw(st.integers(1, n + 4)) for n in shape)
        corner = [draw(st.integers(-p - 1, n + 1)) for n, p in zip(shape, (i, j, k), strict=True)]
        voxels = rng.uniform(1, 2, (channels, i, j, k)).astype(np.float32)
        patches.append((voxels, PatchLocation((corner[0], corner[1], corner[2]), (i, j, k))))
    return shape, patches


def dense(shape: Triple, mode: str, patches: Patches, overlap: int) -> tuple[Any, NDArray[np.bool_]]:
    """The blended volume (C, I, J, K) in float64 straight from the formulas, and where no patch is."""
    total, weights = np.zeros((len(patches[0][0]), *shape)), np.zeros(shape)
    for voxels, place in patches:
        lines = [window(mode, p) for p in place.size]
        weight = lines[0][:, None, None] * lines[1][:, None] * lines[2]
        for inside in itertools.product(*map(range, place.size)):
            at = tuple(a + v for a, v in zip(place.index, inside, strict=True))
            if any(not 0 <= a < n for a, n in zip(at, shape, strict=True)):
                continue
            if mode == "crop":
                axes = zip(place.index, inside, place.size, shape, strict=True)
                if all(
                    (v >= overlap // 2 or a <= 0) and (v < p - overlap // 2 or a + p >= n)
                    for a, v, p, n in axes
                ):
                    total[:, *at], weights[at] = voxels[:, *inside], 1
            else:
                total[:, *at] += weight[inside] * voxels[:, *inside]
                weights[at] += weight[inside]
    missing = weights == 0
    return total / np.where(missing, 1, weights), missing


def blended(
    shape: Triple, mode: str, patches: Patches, overlap: int = 0, **options: Any
) -> tuple[torch.Tensor, ScatteredBlend]:
    sink = TensorSink(shape)
    blend = ScatteredBlend(shape, mode, (overlap,) * 3, sink, Finaliser(None), **options)
    for voxels, place in patches:
        blend.add(torch.as_tensor(voxels), place)
    blend.finish()
    assert sink.tensor is not None
    return sink.tensor, blend


def patch_of(
    value: float, dtype: torch.dtype = torch.float32, size: Triple = (1, 1, 1), channels: int = 1
) -> torch.Tensor:
    return torch.full((channels, *size), value).to(dtype)


# Voxels


@pytest.mark.parametrize("mode", MODES)
@given(scene=scenes(), overlap=st.sampled_from([0, 2, 4]), tile_voxels=st.sampled_from([1, 20, TILE_VOXELS]))
def test_any_patches_agree_with_a_dense_reference_in_float64(
    mode: str, scene: tuple[Triple, Patches], overlap: int, tile_voxels: int
) -> None:
    shape, patches = scene
    wanted, missing = dense(shape, mode, patches, overlap)
    wanted[:, missing] = -7
    output, _ = blended(shape, mode, patches, overlap, fill=-7, tile_voxels=tile_voxels)
    np.testing.assert_allclose(output, wanted, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@given(scene=scenes(), tile_voxels=st.sampled_from([1, 7, 60]), max_bytes=st.integers(0, 2000))
def test_a_scratch_file_changes_no_bit_and_bounds_what_is_held(
    mode: str, scene: tuple[Triple, Patches], tile_voxels: int, max_bytes: int
) -> None:
    shape, patches = scene
    options: dict[str, Any] = {"fill": 0, "tile_voxels": tile_voxels}
    held, all_in_memory = blended(shape, mode, patches, **options)
    spilled, bounded = blended(shape, mode, patches, max_bytes=max_bytes, **options)
    assert torch.equal(spilled, held)
    assert bounded.tiles.peak_bytes <= min(max_bytes, all_in_memory.tiles.peak_bytes)


@pytest.mark.parametrize("mode", MODES)
@given(scene=scenes(), tile_voxels=st.integers(1, 400))
def test_tiles_of_any_shape_give_the_same_bits(
    mode: str, scene: tuple[Triple, Patches], tile_voxels: int
) -> None:
    shape, patches = scene
    one_tile, _ = blended(shape, mode, patches, fill=0)
    many, _ = blended(shape, mode, patches, fill=0, tile_voxels=tile_voxels)
    assert torch.equal(many, one_tile)


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
@given(scene=scenes(), order=st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_no_more_than_the_last_bits(
    mode: str, scene: tuple[Triple, Patches], order: Any
) -> None:
    shape, patches = scene
    shuffled = patches.copy()
    order.shuffle(shuffled)
    np.testing.assert_allclose(
        blended(shape, mode, shuffled, fill=0)[0], blended(shape, mode, patches, fill=0)[0], rtol=1e-6
    )


@pytest.mark.parametrize("max_bytes", [None, 0])
def test_in_crop_mode_the_last_patch_wins(max_bytes: int | None) -> None:
    places = [PatchLocation((a, 0, 0), (4, 2, 2)) for a in (0, 1, 2)]
    patches = [(np.full((1, 4, 2, 2), n, np.int16), places[n]) for n in (1, 2, 0)]
    output, _ = blended((6, 2, 2), "crop", patches, max_bytes=max_bytes, tile_voxels=4)
    assert output[0, :, 0, 0].tolist() == [0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize("mode", ["average", "hann", "gaussian"])
@pytest.mark.parametrize("value", [1.1, -3e4])
def test_any_number_of_patches_may_lie_on_a_voxel(mode: str, value: float, full: bool) -> None:
    place = PatchLocation((0, 0, 0), (2, 1, 1))
    sink = TensorSink((2, 1, 1))
    blend = ScatteredBlend((2, 1, 1), mode, (0, 0, 0), sink, Finaliser(None), max_bytes=1000)
    patch = patch_of(value, size=place.size)
    for _ in range(100_000 if full else 3_000):
        blend.add(patch, place)
    blend.finish()
    assert sink.tensor is not None
    assert sink.tensor.dtype == torch.float32
    np.testing.assert_allclose(sink.tensor, value, rtol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_are_not_hidden(mode: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1, 1], np.float32).reshape(1, 5, 1, 1)
    place = PatchLocation((0, 0, 0), (5, 1, 1))
    output, _ = blended((5, 1, 1), mode, [(np.ones_like(values), place), (values, place)])
    np.testing.assert_allclose(output, values, rtol=1e-6)


# Types


@pytest.mark.parametrize("max_bytes", [None, 0])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
def test_integers_stay_exact_in_crop_mode(dtype: torch.dtype, max_bytes: int | None) -> None:
    top = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    patch = torch.tensor([top, 0, top - 1, 1]).reshape(1, 4, 1, 1).to(dtype)
    place = PatchLocation((0, 0, 0), (4, 1, 1))
    output, _ = blended((4, 1, 1), "crop", [(patch.numpy(), place)], max_bytes=max_bytes, tile_voxels=2)
    assert output.dtype == (torch.uint8 if dtype == torch.bool else dtype)
    assert torch.equal(output, patch.to(output.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "summed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
)
def test_sums_are_in_float32_or_wider(mode: str, dtype: torch.dtype, summed: torch.dtype) -> None:
    place = PatchLocation((0, 0, 0), (3, 3, 3))
    sink = TensorSink((3, 3, 3))
    blend = ScatteredBlend((3, 3, 3), mode, (0, 0, 0), sink, Finaliser(None), max_bytes=0)
    for _ in range(300):  # float16 holds 65504 at most, and bfloat16 counts to 256
        blend.add(patch_of(4096, dtype, (3, 3, 3)), place)
    blend.finish()
    assert sink.tensor is not None
    assert sink.tensor.dtype == summed
    np.testing.assert_allclose(sink.tensor, 4096, rtol=1e-6)


def test_integers_are_averaged_in_float32() -> None:
    place = PatchLocation((0, 0, 0), (1, 1, 1))
    patches = [(np.full((1, 1, 1, 1), value, np.uint8), place) for value in (255, 254)]
    output, _ = blended((1, 1, 1), "average", patches)
    assert output.item() == 254.5


def test_all_patches_are_summed_in_one_type() -> None:
    blend = ScatteredBlend((1, 1, 1), "crop", (0, 0, 0), TensorSink((1, 1, 1)), Finaliser(None))
    place = PatchLocation((0, 0, 0), (1, 1, 1))
    blend.add(patch_of(3, torch.int32), place)
    with pytest.raises(
        ModelError, match=r"a patch is of torch.float32, where earlier patches .* torch.int32; make all"
    ):
        blend.add(patch_of(3.5), place)


# Coverage


def first_missing_box(missing: NDArray[np.bool_]) -> PatchLocation:
    """The box grown from the first missing voxel along K, then J, then I, over the whole volume at once."""
    i, j, k = (int(v) for v in np.argwhere(missing)[0])
    n = [1, 1, 1]
    for axis in (2, 1, 0):
        while True:
            n[axis] += 1
            box = missing[i : i + n[0], j : j + n[1], k : k + n[2]]
            if box.shape != tuple(n) or not box.all():
                n[axis] -= 1
                break
    return PatchLocation((i, j, k), (n[0], n[1], n[2]))


@pytest.mark.parametrize("mode", MODES)
@given(scene=scenes(), tile_voxels=st.sampled_from([1, 7, 60]), max_bytes=st.sampled_from([None, 0, 300]))
def test_missing_voxels_are_an_error_with_their_number_and_first_box(
    mode: str, scene: tuple[Triple, Patches], tile_voxels: int, max_bytes: int | None
) -> None:
    shape, patches = scene
    _, missing = dense(shape, mode, patches, 2)
    if not missing.any():
        blended(shape, mode, patches, 2, tile_voxels=tile_voxels, max_bytes=max_bytes)
        return
    sink = TensorSink(shape)
    blend = ScatteredBlend(
        shape, mode, (2, 2, 2), sink, Finaliser(None), tile_voxels=tile_voxels, max_bytes=max_bytes
    )
    for voxels, place in patches:
        blend.add(torch.from_numpy(voxels), place)
    with pytest.raises(IncompleteCoverageError) as error:
        blend.finish()
    box = first_missing_box(missing)
    told = f"covers {missing.sum()} voxels, the first ones from {box.index_ini} to {box.index_fin}; add"
    assert told in str(error.value)
    assert sink.tensor is None
    whole = PatchLocation((-2, -2, -2), tuple(n + 4 for n in shape))  # type: ignore[arg-type]
    blend.add(torch.ones(len(patches[0][0]), *whole.size), whole)
    blend.finish()
    assert sink.tensor is not None


@pytest.mark.parametrize(
    ("fill", "dtype"), [(-1, torch.uint8), (256, torch.uint8), (0.5, torch.int16), (math.nan, torch.int32)]
)
def test_a_fill_that_the_output_cannot_hold_is_refused_with_the_first_patch(
    fill: float, dtype: torch.dtype
) -> None:
    blend = ScatteredBlend(
        (1, 1, 1), "average", (0, 0, 0), TensorSink((1, 1, 1)), Finaliser(None, dtype), fill=fill
    )
    with pytest.raises(OptionError, match=rf"fill={fill} does not fit the output, which is of {dtype}"):
        blend.add(patch_of(1), PatchLocation((0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize(
    ("fill", "dtype"),
    [
        (255, torch.uint8),
        (True, torch.bool),
        (-2.0, torch.int16),
        (math.nan, torch.float16),
        (0.1, torch.float32),
        (60000, torch.uint16),
    ],
)
def test_a_fill_has_the_type_of_the_output(fill: float, dtype: torch.dtype) -> None:
    sink = TensorSink((2, 1, 1))
    blend = ScatteredBlend((2, 1, 1), "hann", (0, 0, 0), sink, Finaliser(None, dtype), fill=fill)
    blend.add(patch_of(1), PatchLocation((1, 0, 0), (1, 1, 1)))
    blend.finish()
    assert sink.tensor is not None
    wanted = torch.tensor([fill, 1]).to(dtype)
    np.testing.assert_array_equal(sink.tensor.ravel().numpy(), wanted.numpy())


# Tiles


@given(shape=st.tuples(*[st.integers(1, 3000)] * 3), voxels=st.integers(1, 10**6))
@example(shape=(1, 1, 10**7), voxels=TILE_VOXELS)
@settings(max_examples=200)
def test_tiles_have_about_as_many_voxels_as_asked_for(shape: Triple, voxels: int) -> None:
    sides = tile_shape(shape, voxels)
    assert all(1 <= side <= n for side, n in zip(sides, shape, strict=True))
    assert math.prod(sides) <= 2 * voxels
    assert math.prod(sides) >= min(voxels, math.prod(shape)) / 10


def test_tiles_are_made_where_patches_are_and_nowhere_else() -> None:
    shape = (100_000, 100_000, 100_000)
    blend = ScatteredBlend(shape, "hann", (0, 0, 0), TensorSink(shape), Finaliser(None))
    blend.add(torch.ones(1, 40, 40, 40), PatchLocation((60_000, 5, 99_990), (40, 40, 40)))
    assert 0 < blend.tiles.bytes <= 2 * TILE_VOXELS * 8
    blend.close()
    assert blend.tiles.bytes == 0


def test_each_voxel_is_handed_on_once_and_shards_are_complete_slab_by_slab(tmp_path: Path) -> None:
    shape = (150, 70, 100)
    sink: Any = image_sink(tmp_path, shape)
    seen, most_open = np.zeros(shape, dtype=int), 0
    put = sink.put

    def spy(first: Triple, voxels: torch.Tensor, *, not_finite: int) -> None:
        nonlocal most_open
        put(first, voxels)
        i, j, k = (slice(a, a + n) for a, n in zip(first, voxels.shape[1:], strict=True))
        seen[i, j, k] += 1
        most_open = max(most_open, len(sink._shards._open))

    sink.put = spy
    place = PatchLocation((0, 0, 0), shape)
    blend = ScatteredBlend(shape, "average", (0, 0, 0), sink, Finaliser(None), max_bytes=3 * 2**20)
    blend.add(torch.ones(1, *shape), place)
    blend.finish()
    assert (seen == 1).all()
    assert most_open <= 2  # a tile is 64 voxels thick, a shard 32
    sink.finish()


# The scratch file


def test_a_scratch_file_has_no_name_and_is_closed_at_the_end(tmp_path: Path) -> None:
    def files() -> int:
        return psutil.Process().num_fds()

    before = files()
    for end in (ScatteredBlend.finish, ScatteredBlend.close):
        sink = TensorSink((4, 4, 4))
        blend = ScatteredBlend(
            (4, 4, 4),
            "hann",
            (0, 0, 0),
            sink,
            Finaliser(None),
            max_bytes=64,
            scratch_folder=tmp_path,
            tile_voxels=8,
        )
        assert files() == before  # none is made before it is needed
        blend.add(torch.ones(1, 4, 4, 4), PatchLocation((0, 0, 0), (4, 4, 4)))
        assert files() == before + 1
        assert list(tmp_path.iterdir()) == []
        end(blend)
        assert files() == before
