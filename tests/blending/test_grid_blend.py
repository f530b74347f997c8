"""The blend of a grid against a dense reference in float64: the same voxels in any order, each once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from blending_oracle import window
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.blending.grid_blend import GridBlend
from zpatch.blending.reduction import Finaliser
from zpatch.blending.sinks import FinalisingSink
from zpatch.errors import IncompleteCoverageError, MemoryLimitError, PatchLocationError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.tiling.volume_tiles import Tiling

MODES = ["crop", "average", "hann", "gaussian"]
FILL = -7.0

Array = NDArray[Any]


class Recorder:
    """A sink that keeps the voxels, and counts how often each is put into it."""

    def __init__(self, tiling: Tiling) -> None:
        self.times = np.zeros(tiling.shape, dtype=int)
        self.skipped = self.not_finite = 0
        self.voxels: Array = np.zeros(0)

    @property
    def without_patches(self) -> int:
        """Voxels that no patch covers: those that came, and those that did not."""
        return self.skipped + int((self.times == 0).sum())

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0) -> None:
        if not self.voxels.size:
            dtype = torch.empty(0, dtype=voxels.dtype).numpy().dtype
            self.voxels = np.full((len(voxels), *self.times.shape), FILL, dtype)
        box = tuple(slice(a, a + n) for a, n in zip(first, voxels.shape[1:], strict=True))
        self.voxels[:, *box] = voxels.numpy()
        self.times[box] += 1
        self.skipped += skipped
        self.not_finite += not_finite


def run(
    tiling: Tiling, patches: Sequence[torch.Tensor], order: Sequence[int] | None = None, **options: Any
) -> Recorder:
    """The voxels of a blend when patches, numbered as in the grid, arrive in some order."""
    recorder = Recorder(tiling)
    blend = GridBlend(tiling, FinalisingSink(Finaliser(None), recorder, FILL), **options)
    for number in range(len(patches)) if order is None else order:
        blend.add(patches[number], tiling.grid.location(number))
    blend.finish()
    assert blend.held_bytes == 0
    return recorder


def dense(tiling: Tiling, patches: Sequence[Array], skipped: Array | None = None) -> tuple[Array, Array]:
    """Voxels (C, I, J, K), and whether any patch that was not skipped weighs in each, all in float64."""
    grid, scale = tiling.grid, np.divide(tiling.shape, tiling.grid.spatial_shape)
    boxes = [box.scaled(tuple(scale)) for box in grid.locations()]
    low, high = np.min([b.index for b in boxes], axis=0), np.max([b.index_fin for b in boxes], axis=0)
    half = [
        o * m // n // 2 for o, m, n in zip(grid.patch_overlap, tiling.shape, grid.spatial_shape, strict=True)
    ]
    total, weights = np.zeros((len(patches[0]), *(high - low))), np.zeros(high - low)
    gone = np.zeros(len(grid), dtype=bool) if skipped is None else skipped.ravel()
    for patch, box, is_gone in zip(patches, boxes, gone, strict=True):
        place = [slice(*ends) for ends in zip(box.index - low, box.index_fin - low, strict=True)]
        if tiling.mode == "crop":
            cut = [
                slice(0 if a == start else h, p if b == stop else max(p - h, 0))
                for a, b, p, start, stop, h in zip(
                    box.index, box.index_fin, box.size, low, high, half, strict=True
                )
            ]
            total[:, *place][:, *cut] = patch[:, *cut]
            weights[*place][*cut] = not is_gone
        elif not is_gone:
            i, j, k = (window(tiling.mode, p) for p in box.size)
            weight = i[:, None, None] * j[:, None] * k
            total[:, *place] += weight * patch
            weights[*place] += weight
    own = tuple(slice(-first, n - first) for first, n in zip(low.tolist(), tiling.shape, strict=True))
    inside = weights[own] > 0
    with np.errstate(invalid="ignore"):
        means = total[:, *own] / (1 if tiling.mode == "crop" else weights[own])
    return np.where(inside, means, FILL), inside


@st.composite
def tilings(draw: st.DrawFn, modes: Sequence[str] = MODES, *, scaled: bool = True) -> Tiling:
    """Overlaps of 0 to 75 %, shapes that do not divide, volumes smaller than the patch, other resolutions."""
    long_axis = draw(st.integers(0, 2))
    sides = []
    for axis in range(3):
        n = draw(st.integers(1, 60 if axis == long_axis else 10))
        p = draw(st.integers(max(4, -(-n // 5)), max(4, n) + 3))
        o = draw(st.sampled_from([o for o in range(0, p, 2) if 4 * o <= 3 * p]))
        m = draw(st.sampled_from([n, n // 2, 2 * n, n // 4]) if scaled else st.just(n))
        sides.append((n, p, o, max(m, 1), draw(st.integers(4, 40))))
    shape, size, overlap, output, shard = zip(*sides, strict=True)
    return Tiling.over(
        PatchGrid.over(shape, size, overlap, border=draw(st.booleans())),
        draw(st.sampled_from(modes)),
        swept_axis=draw(st.integers(0, 2)),
        output_shape=output,
        shard_shape=shard,
    )


def sizes(tiling: Tiling) -> list[Triple]:
    """The extents of all patches in the output."""
    return [box.scaled(tuple(np.divide(tiling.shape, tiling.grid.spatial_shape))).size
            for box in tiling.grid.locations()]  # fmt: skip


def random_patches(tiling: Tiling, rng: np.random.Generator, channels: int = 2) -> list[torch.Tensor]:
    return [torch.from_numpy(rng.uniform(1, 2, (channels, *s)).astype(np.float32)) for s in sizes(tiling)]


def as_arrays(patches: Sequence[torch.Tensor]) -> list[Array]:
    return [patch.double().numpy() for patch in patches]


def simple(mode: str = "hann", **options: Any) -> Tiling:
    """70 x 12 x 13 voxels in 6 x 2 x 2 patches and 4 shards."""
    grid = PatchGrid.over((70, 12, 13), (16, 8, 8), (4, 2, 2))
    return Tiling.over(grid, mode, **{"shard_shape": (20, 12, 13), **options})


seeds = st.integers(0, 2**32).map(np.random.default_rng)


# The voxels


@pytest.mark.parametrize("mode", MODES)
def test_voxels_are_those_of_the_dense_reference(mode: str) -> None:
    @given(tilings([mode]), seeds, st.integers(1, 3))
    def check(tiling: Tiling, rng: np.random.Generator, channels: int) -> None:
        patches = random_patches(tiling, rng, channels)
        found, (wanted, _) = run(tiling, patches), dense(tiling, as_arrays(patches))
        assert found.voxels.dtype == np.float32
        assert (found.times == 1).all()
        np.testing.assert_allclose(found.voxels, wanted, rtol=1e-5)

    check()


@given(tilings(scaled=False), seeds)
def test_where_all_windows_predict_the_same_field_the_field_comes_out(
    tiling: Tiling, rng: np.random.Generator
) -> None:
    grid = tiling.grid
    padding = list(zip(grid.pad_before, grid.pad_after, strict=True))
    field = np.pad(rng.uniform(-1, 1, (2, *grid.spatial_shape)).astype(np.float32), [(0, 0), *padding])
    patches = []
    for box in grid.locations():
        place = [
            slice(a + b, a + b + p) for a, b, p in zip(box.index, grid.pad_before, box.size, strict=True)
        ]
        patches.append(torch.from_numpy(field[:, *place]))
    own = [slice(b, b + n) for b, n in zip(grid.pad_before, grid.spatial_shape, strict=True)]
    np.testing.assert_allclose(run(tiling, patches).voxels, field[:, *own], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_more_than_255_patches_on_a_voxel_are_blended_right(mode: str, rng: np.random.Generator) -> None:
    tiling = Tiling.over(PatchGrid.over((30, 30, 30), (16, 16, 16), (14, 14, 14)), mode)
    assert len(tiling.grid) == 512
    patches = random_patches(tiling, rng, 1)
    np.testing.assert_allclose(run(tiling, patches).voxels, dense(tiling, as_arrays(patches))[0], rtol=2e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_float32_or_wider_whatever_the_patches_are(
    mode: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    tiling = simple(mode)
    patches = [patch.to(dtype) for patch in random_patches(tiling, rng)]
    found = run(tiling, patches)
    assert found.voxels.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_allclose(found.voxels, dense(tiling, as_arrays(patches))[0], rtol=1e-6)


@pytest.mark.parametrize(
    "dtype",
    [np.uint8, np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64],
    ids=lambda t: t.__name__,
)
def test_integers_stay_exact_in_crop_mode(dtype: Any, rng: np.random.Generator) -> None:
    tiling = simple("crop")
    most = np.iinfo(dtype).max
    patches = [torch.from_numpy(rng.integers(most // 2, most, (1, *s), dtype=dtype)) for s in sizes(tiling)]
    found = run(tiling, patches)
    assert found.voxels.dtype == dtype
    owners = dense(tiling, [np.full((1, *s), n) for n, s in enumerate(sizes(tiling))])[0]
    for voxel in np.ndindex(tiling.shape):
        number = int(owners[0, *voxel])
        inner = np.subtract(voxel, tiling.grid.location(number).index).tolist()
        assert found.voxels[0, *voxel] == patches[number][0, *inner].item()


@pytest.mark.parametrize("mode", MODES)
def test_where_one_patch_covers_a_tile_its_voxels_are_unchanged(mode: str, rng: np.random.Generator) -> None:
    tiling = Tiling.over(PatchGrid.over((70, 8, 8), (30, 8, 8), (10, 0, 0)), mode)
    patches = random_patches(tiling, rng)
    found = run(tiling, patches).voxels
    assert np.array_equal(found[:, :20], patches[0][:, :20])
    assert np.array_equal(found[:, 50:], patches[2][:, 10:])


def test_voxels_are_finalised_once_they_are_final(rng: np.random.Generator) -> None:
    tiling = simple()
    patches = random_patches(tiling, rng)
    recorder = Recorder(tiling)
    blend = GridBlend(
        tiling, FinalisingSink(Finaliser(lambda voxels: voxels.argmax(dim=0, keepdim=True)), recorder)
    )
    for patch, location in zip(patches, tiling.grid.locations(), strict=True):
        blend.add(patch, location)
    blend.finish()
    assert np.array_equal(recorder.voxels[0], run(tiling, patches).voxels.argmax(axis=0))


@pytest.mark.parametrize("is_masked", [False, True])
def test_voxels_that_are_not_finite_are_counted_once_each(rng: np.random.Generator, is_masked: bool) -> None:
    tiling = simple()
    patches = random_patches(tiling, rng)
    patches[5][0, 2, 3, 4] = torch.nan
    patches[6][:, 9:12, 0, 0] = torch.inf
    patches[7].fill_(torch.nan)
    skipped = np.zeros(tiling.grid.counts, dtype=bool)
    skipped.ravel()[[7, 8]] = is_masked
    options = {"skipped": skipped} if is_masked else {}
    run_patches = np.flatnonzero(~skipped.ravel()).tolist()
    found = run(tiling, patches, rng.permutation(run_patches).tolist(), **options)
    bad = ~np.isfinite(found.voxels).all(axis=0)
    assert 4 <= found.not_finite == bad.sum()
    assert (bad.sum() >= 16 * 8 * 8) == (not is_masked)


# Order


@given(tilings(), seeds)
def test_patches_in_any_order_give_the_same_bytes(tiling: Tiling, rng: np.random.Generator) -> None:
    patches = random_patches(tiling, rng)
    numbers = list(range(len(patches)))
    expected = run(tiling, patches, numbers).voxels.tobytes()
    for order in (numbers[::-1], rng.permutation(numbers).tolist(), rng.permutation(numbers).tolist()):
        assert run(tiling, patches, order).voxels.tobytes() == expected


@given(tilings(), seeds)
def test_in_sweep_order_no_patch_waits(tiling: Tiling, rng: np.random.Generator) -> None:
    patches = random_patches(tiling, rng)
    inner = list(np.ndindex(tiling.grid.counts))
    order = sorted(range(len(patches)), key=lambda n: [inner[n][axis] for axis in tiling.order])
    found = run(tiling, patches, order, max_held_bytes=0)
    assert found.voxels.tobytes() == run(tiling, patches).voxels.tobytes()


def test_a_patch_may_be_overwritten_after_it_was_added(rng: np.random.Generator) -> None:
    tiling, recorders = simple(), []
    for spoil in (False, True):
        patches = random_patches(tiling, np.random.default_rng(1))
        recorders.append(recorder := Recorder(tiling))
        blend = GridBlend(tiling, FinalisingSink(Finaliser(None), recorder))
        for number in rng.permutation(len(patches)).tolist():
            blend.add(patches[number], tiling.grid.location(number))
            if spoil:
                patches[number].fill_(torch.nan)
        blend.finish()
    assert recorders[0].voxels.tobytes() == recorders[1].voxels.tobytes()


def test_patches_that_wait_take_no_more_memory_than_is_allowed(rng: np.random.Generator) -> None:
    tiling = simple()
    patches = random_patches(tiling, rng)
    with pytest.raises(
        MemoryLimitError,
        match=r"arrived before their turn take .* more than 10\.0 KiB; give them in the order of the grid",
    ):
        run(tiling, patches, range(len(patches))[::-1], max_held_bytes=10 * 1024)
    found = run(tiling, patches, range(len(patches))[::-1], max_held_bytes=sum(p.nbytes for p in patches))
    assert found.voxels.tobytes() == run(tiling, patches).voxels.tobytes()


# Coverage


def test_a_missing_patch_is_an_error_with_its_box_and_may_be_added_then(rng: np.random.Generator) -> None:
    tiling = simple()
    patches, recorder = random_patches(tiling, rng), Recorder(tiling)
    blend = GridBlend(tiling, FinalisingSink(Finaliser(None), recorder))
    for number in set(range(len(patches))) - {9, 20}:
        blend.add(patches[number], tiling.grid.location(number))
    box = tiling.grid.location(9)
    with pytest.raises(IncompleteCoverageError, match="2 of 24 patches are missing") as caught:
        blend.finish()
    assert f"the first one from {box.index_ini} to {box.index_fin}; add every" in str(caught.value)
    for number in (20, 9):
        blend.add(patches[number], tiling.grid.location(number))
    blend.finish()
    assert recorder.voxels.tobytes() == run(tiling, patches).voxels.tobytes()


def test_a_patch_that_is_added_twice_is_an_error_with_its_place() -> None:
    tiling = simple()
    blend = GridBlend(tiling, FinalisingSink(Finaliser(None), Recorder(tiling)))
    location = tiling.grid.location(1)
    blend.add(torch.ones(1, 16, 8, 8), location)
    with pytest.raises(IncompleteCoverageError, match=r"the patch at \(0, 0, 5\) was added twice"):
        blend.add(torch.ones(1, 16, 8, 8), location)


def test_a_box_that_is_not_a_patch_of_the_grid_is_refused() -> None:
    tiling = simple()
    blend = GridBlend(tiling, FinalisingSink(Finaliser(None), Recorder(tiling)))
    with pytest.raises(PatchLocationError, match="not of this grid"):
        blend.add(torch.ones(1, 16, 8, 8), PatchLocation((1, 0, 0), (16, 8, 8)))


# Some shards


@given(tilings(), seeds)
def test_only_wanted_shards_are_made_with_each_voxel_once_and_unchanged(
    tiling: Tiling, rng: np.random.Generator
) -> None:
    patches, wanted = random_patches(tiling, rng), rng.random(tiling.shard_counts) < 0.5
    needed = tiling.patches_for(wanted).ravel()
    i, j, k = (np.arange(n) // u for n, u in zip(tiling.shape, tiling.shard_shape, strict=True))
    of_shard = wanted[np.ix_(i, j, k)]
    for order in (range(len(patches)), rng.permutation(np.flatnonzero(needed)).tolist()):
        found = run(tiling, patches, order, wanted=wanted)
        assert np.array_equal(found.times, of_shard)
        if wanted.any():
            assert np.array_equal(found.voxels[:, of_shard], run(tiling, patches).voxels[:, of_shard])


def test_only_missing_patches_of_wanted_shards_are_an_error(rng: np.random.Generator) -> None:
    tiling = simple()
    wanted = np.array([False, False, False, True]).reshape(tiling.shard_counts)
    blend = GridBlend(tiling, FinalisingSink(Finaliser(None), Recorder(tiling)), wanted=wanted)
    with pytest.raises(IncompleteCoverageError, match=r"8 of 8 .* from \(48, 0, 0\) to \(64, 8, 8\)"):
        blend.finish()


# Patches that are skipped


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_skipped_patches_are_divided_out_and_voxels_without_other_patches_are_filled(
    mode: str,
) -> None:
    @given(tilings([mode]), seeds, st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    def check(tiling: Tiling, rng: np.random.Generator, share: float) -> None:
        patches, gone = random_patches(tiling, rng), rng.random(tiling.grid.counts) < share
        wanted, inside = dense(tiling, as_arrays(patches), gone)
        numbers = np.flatnonzero(~gone)
        found = run(tiling, patches, numbers.tolist(), skipped=gone)
        assert (found.times <= 1).all()
        assert found.without_patches == (~inside).sum()
        i, j, k = (np.arange(n) // u for n, u in zip(tiling.shape, tiling.shard_shape, strict=True))
        for shard in np.ndindex(tiling.shard_counts):
            made = found.times[np.ix_(*(of == n for of, n in zip((i, j, k), shard, strict=True)))]
            assert tiling.count_made(shard, ~gone) == made.sum()
        if inside.any():  # a patch may add to no voxel of a smaller output
            assert np.array_equal((found.voxels == FILL).all(axis=0), ~inside)
            np.testing.assert_allclose(found.voxels, wanted, rtol=1e-5)
        again = run(tiling, patches, rng.permutation(numbers).tolist(), skipped=gone)
        assert again.voxels.tobytes() == found.voxels.tobytes()

    check()


@given(tilings(scaled=False), seeds)
def test_a_mask_changes_no_voxel_inside_it(tiling: Tiling, rng: np.random.Generator) -> None:
    patches = random_patches(tiling, rng)
    mask = np.zeros(tiling.shape, dtype=bool)
    mask[tuple(rng.integers(0, n, 2) for n in tiling.shape)] = True
    gone = np.ones(tiling.grid.counts, dtype=bool)
    for position in np.ndindex(gone.shape):
        box = tiling.grid.at(position).clipped(tiling.grid.spatial_shape)
        gone[position] = not mask[tuple(map(slice, box.index_ini, box.index_fin))].any()
    found = run(tiling, patches, np.flatnonzero(~gone).tolist(), skipped=gone).voxels
    assert np.array_equal(found[:, mask], run(tiling, patches).voxels[:, mask])


@given(tilings(), seeds)
def test_wanted_shards_and_skipped_patches_go_together(tiling: Tiling, rng: np.random.Generator) -> None:
    patches, gone = random_patches(tiling, rng), rng.random(tiling.grid.counts) < 0.6
    wanted = rng.random(tiling.shard_counts) < 0.5
    i, j, k = (np.arange(n) // u for n, u in zip(tiling.shape, tiling.shard_shape, strict=True))
    of_shard = wanted[np.ix_(i, j, k)]
    needed = np.flatnonzero(tiling.patches_for(wanted) & ~gone).tolist()
    found = run(tiling, patches, needed, wanted=wanted, skipped=gone)
    assert (found.times <= of_shard).all()
    if needed:
        whole = run(tiling, patches, np.flatnonzero(~gone).tolist(), skipped=gone)
        assert np.array_equal(found.voxels[:, of_shard], whole.voxels[:, of_shard])


def test_a_skipped_patch_is_neither_required_nor_added(rng: np.random.Generator) -> None:
    tiling = simple()
    patches, gone = random_patches(tiling, rng), rng.random(tiling.grid.counts) < 0.5
    found = run(tiling, patches, skipped=gone)
    without = run(tiling, patches, np.flatnonzero(~gone).tolist(), skipped=gone)
    assert found.voxels.tobytes() == without.voxels.tobytes()
