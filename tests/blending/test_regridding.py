"""A Regridder against the dense computation: the whole blended volume, resampled by scipy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from zpatch.blending.grid_blend import GridBlend
from zpatch.blending.reduction import Finaliser
from zpatch.blending.regridding import Regridder
from zpatch.blending.sinks import FinalisingSink
from zpatch.geometry.boxes import Bools, Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.tiling.output_cells import OutputGrid
from zpatch.tiling.volume_tiles import Tiling

FILL = -7.0
Array = NDArray[Any]

seeds = st.integers(0, 2**32).map(np.random.default_rng)


class Recorder:
    """A sink that keeps the voxels, and counts how often each is put into it."""

    def __init__(self, shape: Triple, channels: int = 2) -> None:
        self.times = np.zeros(shape, dtype=int)
        self.skipped = 0
        self.voxels = np.full((channels, *shape), FILL)

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0) -> None:
        box = tuple(slice(a, a + n) for a, n in zip(first, voxels.shape[1:], strict=True))
        self.voxels[:, *box] = voxels.numpy()
        self.times[box] += 1
        self.skipped += skipped


def output_matrix(
    volume: Triple, factors: Sequence[float], axes: Triple, flips: Sequence[bool]
) -> tuple[Triple, Array]:
    """The shape of an output and its matrix; the first faces of both are in the same place."""
    matrix, shape = np.eye(4) * [0, 0, 0, 1], [0, 0, 0]
    for axis, (n, factor, along, flip) in enumerate(zip(volume, factors, axes, flips, strict=True)):
        shape[along] = max(1, int(n / factor + 0.5))
        matrix[axis, along] = -factor if flip else factor
        matrix[axis, 3] = n - 0.5 - factor / 2 if flip else factor / 2 - 0.5
    return (shape[0], shape[1], shape[2]), matrix


@st.composite
def tilings(draw: st.DrawFn, mode: str = "linear") -> Tiling:
    """Ratios of 0.4 to 2.5, permuted and reversed axes; patches that overlap by 0 to 75 %."""
    long_axis, sides = draw(st.integers(0, 2)), []
    for axis in range(3):
        n = draw(st.integers(1, 60 if axis == long_axis else 12))
        p = draw(st.integers(max(4, -(-n // 5)), max(4, n) + 3))
        o = draw(st.sampled_from([o for o in range(0, p, 2) if 4 * o <= 3 * p]))
        sides.append((n, p, o, draw(st.integers(4, 40)), draw(st.one_of(st.just(1.0), st.floats(0.4, 2.5)))))
    shape, size, overlap, shards, factors = zip(*sides, strict=True)
    axes = draw(st.sampled_from(list(itertools.permutations(range(3)))))
    extent, matrix = output_matrix(shape, factors, axes, draw(st.tuples(*[st.booleans()] * 3)))
    return Tiling.over(
        PatchGrid.over(shape, size, overlap),
        draw(st.sampled_from(["crop", "average", "hann", "gaussian"])),
        swept_axis=draw(st.integers(0, 2)),
        shard_shape=shards,
        output=OutputGrid(extent, matrix, mode),
    )


def patches_of(tiling: Tiling, rng: np.random.Generator) -> list[torch.Tensor]:
    sizes = map(tiling.size_of, np.ndindex(tiling.grid.counts))
    return [torch.from_numpy(rng.uniform(1, 2, (2, *size)).astype(np.float32)) for size in sizes]


def blended(tiling: Tiling, patches: Sequence[torch.Tensor], skipped: Bools | None) -> tuple[Array, Bools]:
    """The dense volume, and which of its voxels are covered."""
    plain = Tiling.over(tiling.grid, tiling.mode, swept_axis=tiling.swept_axis)
    recorder = Recorder(tiling.shape)
    blend = GridBlend(plain, FinalisingSink(Finaliser(None), recorder, FILL), skipped=skipped)
    for number, patch in enumerate(patches):
        blend.add(patch, tiling.grid.location(number))
    blend.finish()
    return recorder.voxels, ~(recorder.voxels == FILL).all(axis=0)


def resampled(volume: Array, output: OutputGrid, order: int = 1) -> Array:
    at = np.stack(np.meshgrid(*map(np.arange, output.shape), indexing="ij")).reshape(3, -1)
    at = output.matrix[:3, :3] @ at + output.matrix[:3, 3:]
    return np.stack(
        [ndimage.map_coordinates(c, at, order=order, mode="nearest").reshape(output.shape) for c in volume]
    )


def run(
    tiling: Tiling,
    patches: Sequence[torch.Tensor],
    order: Sequence[int] | None = None,
    *,
    wanted: Bools | None = None,
    skipped: Bools | None = None,
) -> Recorder:
    assert tiling.output is not None
    recorder = Recorder(tiling.output.shape, len(patches[0]))
    sink = FinalisingSink(Finaliser(None), recorder, FILL)
    regridder = Regridder(tiling, sink, wanted=wanted, skipped=skipped)
    blend = GridBlend(tiling, regridder, wanted=wanted, skipped=skipped)
    for number in range(len(patches)) if order is None else order:
        blend.add(patches[number], tiling.grid.location(number))
    blend.finish()
    assert not regridder._tiles
    assert not regridder._missing
    return recorder


def in_shards(tiling: Tiling, shards: Bools) -> Bools:
    """The voxels of the output in some shards, which are given along the axes of the volume."""
    assert tiling.output is not None
    found = np.zeros(tiling.output.shape, dtype=bool)
    for i, j, k in np.argwhere(shards).tolist():
        shard = tiling.stored_shard((i, j, k))
        found[tuple(slice(n * s, (n + 1) * s) for n, s in zip(shard, tiling.shard_shape, strict=True))] = True
    return found


@given(tilings(), seeds, st.booleans())
def test_the_output_is_the_blended_volume_resampled_linearly(
    tiling: Tiling, rng: np.random.Generator, is_first_fastest: bool
) -> None:
    patches = patches_of(tiling, rng)
    if is_first_fastest:
        patches = [patch.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) for patch in patches]
    volume, _ = blended(tiling, patches, None)
    assert tiling.output is not None
    found = run(tiling, patches)
    assert (found.times == 1).all()
    np.testing.assert_allclose(found.voxels, resampled(volume, tiling.output), atol=1e-5)
    again = run(tiling, patches, rng.permutation(len(patches)).tolist())
    assert again.voxels.tobytes() == found.voxels.tobytes()


@given(tilings("nearest"), seeds)
def test_integers_are_classes_and_get_the_nearest_voxel(tiling: Tiling, rng: np.random.Generator) -> None:
    assert tiling.output is not None
    tiling = Tiling.over(tiling.grid, "crop", shard_shape=tiling.shard_shape, output=tiling.output)
    patches = [(1000 * patch).to(torch.int16) for patch in patches_of(tiling, rng)]
    volume, _ = blended(tiling, patches, None)
    at = np.stack(np.meshgrid(*map(np.arange, tiling.output.shape), indexing="ij")).reshape(3, -1)
    at = np.floor(tiling.output.matrix[:3, :3] @ at + tiling.output.matrix[:3, 3:] + 0.5).astype(int)
    i, j, k = np.clip(at, 0, np.array(tiling.shape)[:, None] - 1)
    assert np.array_equal(run(tiling, patches).voxels, volume[:, i, j, k].reshape(2, *tiling.output.shape))


@given(tilings(), seeds, st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_a_voxel_is_empty_if_any_is_that_it_is_made_from(
    tiling: Tiling, rng: np.random.Generator, share: float
) -> None:
    patches, gone = patches_of(tiling, rng), rng.random(tiling.grid.counts) < share
    volume, covered = blended(tiling, patches, gone)
    assert tiling.output is not None
    weight = resampled(covered[None].astype(float), tiling.output)[0]
    is_clear = np.abs(weight - (1 - 1e-5)) > 1e-6
    inside = weight >= 1 - 1e-5
    numbers = np.flatnonzero(~gone).tolist()
    found = run(tiling, patches, numbers, skipped=gone)
    assert (found.times <= 1).all()
    want = np.where(inside, resampled(np.where(covered, volume, 0), tiling.output), FILL)
    np.testing.assert_allclose(found.voxels[:, is_clear], want[:, is_clear], atol=3e-5)
    assert found.skipped + (found.times == 0).sum() == (found.voxels == FILL).all(axis=0).sum()
    for shard in np.ndindex(tiling.shard_counts):
        one = np.zeros(tiling.shard_counts, dtype=bool)
        one[shard] = True
        assert tiling.count_made(shard, ~gone) == found.times[in_shards(tiling, one)].sum()
    again = run(tiling, patches, rng.permutation(numbers).tolist(), skipped=gone)
    assert again.voxels.tobytes() == found.voxels.tobytes()


@given(tilings(), seeds, st.booleans())
def test_only_wanted_shards_are_made_from_the_patches_that_they_need(
    tiling: Tiling, rng: np.random.Generator, is_masked: bool
) -> None:
    patches, wanted = patches_of(tiling, rng), rng.random(tiling.shard_counts) < 0.5
    gone = rng.random(tiling.grid.counts) < 0.4 if is_masked else None
    needed = tiling.patches_for(wanted)
    numbers = np.flatnonzero(needed if gone is None else needed & ~gone).tolist()
    found, inside = run(tiling, patches, numbers, wanted=wanted, skipped=gone), in_shards(tiling, wanted)
    everything = range(len(patches)) if gone is None else np.flatnonzero(~gone).tolist()
    whole = run(tiling, patches, everything, skipped=gone)
    assert np.array_equal(found.times, whole.times * inside)
    assert np.array_equal(found.voxels[:, inside], whole.voxels[:, inside])


@given(tilings())
def test_shards_of_an_output_are_numbered_along_the_volume(tiling: Tiling) -> None:
    assert tiling.output is not None
    seen = np.zeros(tiling.output.shape, dtype=int)
    for shard in np.ndindex(tiling.shard_counts):
        one = np.zeros(tiling.shard_counts, dtype=bool)
        one[shard] = True
        box = in_shards(tiling, one)
        lengths = [axis.shard_lengths[n] for axis, n in zip(tiling.axes, shard, strict=True)]
        assert box.sum() == np.prod(lengths)
        seen += box
    assert (seen == 1).all()


def test_a_large_cell_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    shape, matrix = output_matrix((30, 20, 24), (0.7, 1.3, 0.5), (1, 0, 2), (True, False, False))
    tiling = Tiling.over(
        PatchGrid.over((30, 20, 24), (16, 12, 16), (8, 4, 4)), "hann", output=OutputGrid(shape, matrix)
    )
    patches = patches_of(tiling, rng)
    whole = run(tiling, patches).voxels
    monkeypatch.setattr("zpatch.blending.regridding.BLOCK_BYTES", 3000)
    assert run(tiling, patches).voxels.tobytes() == whole.tobytes()
