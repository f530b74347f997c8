"""Boxes of a new grid against scipy on the whole volume, compiled and in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from zpatch.chunks.scaling import Scaling
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.resampling import loops
from zpatch.resampling.interpolation import Interpolation
from zpatch.resampling.resampler import Resampler

ORDERS = {"nearest": 0, "linear": 1, "cubic": 3}
TOLERANCE = {"nearest": 0.0, "linear": 1e-5, "cubic": 1e-4}  # of the range of values
COMPILED = loops._compiled
INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32"]

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(*[st.integers(1, 14)] * 3)
factors = st.one_of(st.floats(0.3, 3.0), st.sampled_from([0.5, 1.0, 2.0]))


@pytest.fixture(scope="module", params=["compiled", "numpy"])
def loop(request: pytest.FixtureRequest) -> Iterator[str]:
    """The loops that resample: the compiled ones, or those of numpy."""
    if request.param == "compiled" and COMPILED is None:
        pytest.skip("installed without a compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(loops, "_compiled", None)
        yield str(request.param)


def dense(volume: NDArray[Any], matrix: NDArray[Any], shape: Triple, order: int) -> NDArray[np.float64]:
    """The whole volume on the new grid, by scipy."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    places = matrix[:3, :3] @ at + matrix[:3, 3:]
    found = ndimage.map_coordinates(volume.astype(np.float64), places, order=order, mode="nearest")
    return np.asarray(found).reshape(shape)


def resampled(
    volume: NDArray[Any],
    matrix: NDArray[Any],
    box: PatchLocation,
    interpolation: Interpolation,
    scaling: Scaling | None = None,
) -> NDArray[Any]:
    """A box (I, J, K), made of no more than the voxels that it says it needs."""
    i, j, k = volume.shape
    planned = Resampler((i, j, k), matrix, interpolation).box(box)
    assert planned.needed.lies_within((i, j, k))
    needed = np.array(volume[planned.needed.to_slices()].T, order="C").T[None]
    out = np.empty((1, *box.size[::-1]), interpolation.dtype_of(volume.dtype)).transpose(0, 3, 2, 1)
    planned.write(needed, out, *([] if scaling is None else [scaling]))
    return np.asarray(out[0])


def parallel(rng: np.random.Generator, shape: Triple, sizes: Any) -> NDArray[np.float64]:
    """A grid whose axes are those of the volume, in any order, direction and size, over the border or not."""
    matrix, axes = np.eye(4), rng.permutation(3)
    matrix[:3, :3] = 0
    for axis, (target, size) in enumerate(zip(axes, sizes, strict=True)):
        backwards = rng.random() < 0.5
        matrix[axis, target] = -size if backwards else size
        matrix[axis, 3] = (shape[axis] - 1 if backwards else 0) + rng.choice([0.0, rng.uniform(-3, 3)])
    return matrix


def oblique(rng: np.random.Generator, shape: Triple, sizes: Any) -> NDArray[np.float64]:
    """A grid that is rotated against the volume, about its middle."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * sizes
    matrix[:3, 3] = np.array(shape) / 2 - matrix[:3, :3] @ np.full(3, 5.0)
    return matrix


def halfway(matrix: NDArray[Any], shape: Triple) -> NDArray[np.bool_]:
    """The voxels of a grid that lie halfway between two voxels, but for rounding."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    places = matrix[:3, :3] @ at + matrix[:3, 3:] + 0.5
    return np.asarray((np.abs(places - np.round(places)) < 1e-9).any(axis=0)).reshape(shape)


def some_box(rng: np.random.Generator, shape: Triple) -> PatchLocation:
    first = [int(rng.integers(0, n)) for n in shape]
    stop = [int(rng.integers(a + 1, n + 1)) for a, n in zip(first, shape, strict=True)]
    return PatchLocation.between(first, stop)


@pytest.mark.parametrize("mode", list(ORDERS))
@pytest.mark.parametrize("grid", [parallel, oblique])
@given(seed=seeds, shape=shapes, sizes=st.tuples(factors, factors, factors), dtype=st.sampled_from(INTEGERS))
def test_a_box_equals_the_same_box_of_the_whole_volume(
    loop: str, mode: str, grid: Any, seed: int, shape: Triple, sizes: Any, dtype: str
) -> None:
    rng, target = np.random.default_rng(seed), (11, 9, 10)
    matrix, box = grid(rng, shape, sizes), some_box(rng, target)
    low, high = np.iinfo(dtype).min // 4, np.iinfo(dtype).max // 4
    volume = rng.integers(low, high, shape, endpoint=True).astype(dtype)
    expected = dense(volume, matrix, target, ORDERS[mode])[box.to_slices()]
    found = resampled(volume, matrix, box, Interpolation(mode))
    if mode == "nearest":
        assert found.dtype == volume.dtype
        is_tie = halfway(matrix, target)[box.to_slices()] if grid is oblique else np.zeros(box.size, bool)
        assert np.array_equal(found[~is_tie], expected[~is_tie])
        return
    assert found.dtype == (np.float64 if volume.itemsize > 2 else np.float32)
    assert np.abs(found - expected).max() <= TOLERANCE[mode] * (high - low)


@given(seed=seeds, shape=shapes, sizes=st.tuples(factors, factors, factors))
def test_compiled_loops_and_numpy_give_the_same_to_a_millionth(seed: int, shape: Triple, sizes: Any) -> None:
    if COMPILED is None:
        pytest.skip("installed without a compiler")
    rng = np.random.default_rng(seed)
    volume = rng.random(shape, dtype=np.float32)
    for grid, mode in [(g, m) for g in (parallel, oblique) for m in ORDERS]:
        matrix, box = grid(rng, shape, sizes), some_box(rng, (11, 9, 10))
        found = []
        for compiled in (COMPILED, None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loops, "_compiled", compiled)
                found.append(resampled(volume, matrix, box, Interpolation(mode)))
        assert np.abs(found[0] - found[1]).max() <= 2e-6


@given(seed=seeds, shape=shapes, sizes=st.tuples(factors, factors, factors))
def test_axes_that_shrink_are_smoothed_first(loop: str, seed: int, shape: Triple, sizes: Any) -> None:
    rng = np.random.default_rng(seed)
    volume, matrix = rng.integers(-900, 900, shape).astype(np.int16), np.diag([*sizes, 1.0])
    smooth = volume.astype(np.float64)
    for axis, factor in enumerate(sizes):
        if factor > 1:
            sigma = np.sqrt((factor**2 - 1) / (8 * np.log(2)))
            smooth = ndimage.gaussian_filter1d(smooth, sigma, axis, mode="nearest")
    box = some_box(rng, (6, 5, 7))
    for mode in ("linear", "cubic"):
        expected = dense(smooth, matrix, (6, 5, 7), ORDERS[mode])[box.to_slices()]
        found = resampled(volume, matrix, box, Interpolation(mode, antialias=True))
        assert np.abs(found - expected).max() <= TOLERANCE[mode] * 1800


@pytest.mark.parametrize("grid", [parallel, oblique])
@given(seed=seeds, shape=shapes, sizes=st.tuples(factors, factors, factors))
def test_a_label_is_the_class_with_the_largest_indicator_the_lowest_of_equal_ones(
    loop: str, grid: Any, seed: int, shape: Triple, sizes: Any
) -> None:
    rng, target = np.random.default_rng(seed), (8, 9, 7)
    matrix, box = grid(rng, shape, sizes), some_box(rng, target)
    volume = rng.integers(-2, 3, shape).astype(rng.choice(["int8", "int16", "int64", "float32"]))
    classes = np.unique(volume)
    shares = np.stack([dense(volume == c, matrix, target, 1)[box.to_slices()] for c in classes])
    found = resampled(volume, matrix, box, Interpolation("linear", of_labels=True))
    assert found.dtype == volume.dtype
    ordered = np.sort(shares, axis=0)
    is_tie = len(classes) > 1 and (np.abs(ordered[-1] - ordered[-2]) < 1e-8)
    expected = classes[(shares >= shares.max(axis=0) - 1e-8).argmax(axis=0)]
    assert np.array_equal(found, expected), f"ties: {np.sum(is_tie)}"


def test_the_lowest_of_two_equal_classes_wins() -> None:
    volume = np.array([3, 1, 2, 2], np.uint8).reshape(4, 1, 1)
    matrix = np.diag([2.0, 1, 1, 1])
    matrix[0, 3] = 0.5
    found = resampled(volume, matrix, PatchLocation((0, 0, 0), (2, 1, 1)), Interpolation(of_labels=True))
    assert found.ravel().tolist() == [1, 2]


@given(seed=seeds, shape=shapes)
def test_voxels_of_the_same_size_stay_as_they_are(loop: str, seed: int, shape: Triple) -> None:
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=shape).astype(np.float32)
    for mode in ORDERS:
        found = resampled(volume, np.eye(4), some := some_box(rng, shape), Interpolation(mode))
        assert np.array_equal(found, volume[some.to_slices()])


def test_slope_intercept_and_bounds_are_applied_to_the_result(loop: str) -> None:
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    matrix, box = np.diag([0.5, 1, 1, 1]), PatchLocation((0, 0, 0), (4, 3, 4))
    plain = resampled(volume, matrix, box, Interpolation())
    scaled = resampled(volume, matrix, box, Interpolation(), Scaling(2.0, -3.0, 0.0, 20.0))
    assert np.allclose(scaled, np.clip(plain * 2 - 3, 0, 20))


def test_a_box_needs_no_voxel_beyond_its_halo() -> None:
    matrix = np.diag([1.5, 1.5, 1.5, 1])
    for mode, halo in (("nearest", 1), ("linear", 1), ("cubic", 16)):
        planned = Resampler((400,) * 3, matrix, Interpolation(mode)).box(PatchLocation((100,) * 3, (20,) * 3))
        assert min(planned.needed.index) >= 150 - halo
        assert max(planned.needed.index_fin) <= 150 + 30 + halo


def test_channels_are_resampled_alike(loop: str) -> None:
    volume = np.random.default_rng(0).integers(0, 99, (3, 5, 6, 6)).astype(np.uint8)  # (c, z, y, x)
    resampler = Resampler((6, 6, 5), np.diag([0.7, 1.4, 1, 1]), Interpolation())
    planned = resampler.box(PatchLocation((0, 0, 0), (8, 4, 5)))
    assert planned.needed.size == (6, 6, 5)
    together = np.empty((3, 8, 4, 5), np.float32)
    planned.write(volume.transpose(0, 3, 2, 1), together)
    for channel in range(3):
        alone = np.empty((1, 8, 4, 5), np.float32)
        planned.write(volume[channel : channel + 1].transpose(0, 3, 2, 1), alone)
        assert np.array_equal(together[channel], alone[0])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mode": "spline"}, "one of nearest, linear, cubic, not 'spline'"),
        ({"mode": "cubic", "of_labels": True}, "makes values that are no classes"),
        ({"mode": "nearest", "antialias": True}, "is not for interpolation='nearest'"),
        ({"antialias": True, "of_labels": True}, "is not for a label map"),
    ],
)
def test_interpolations_that_make_no_sense_are_refused(options: Any, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        Interpolation(**options)


def test_complex_voxels_are_only_picked() -> None:
    assert Interpolation("nearest").dtype_of(np.dtype(np.complex64)) == np.complex64
    with pytest.raises(OptionError, match="complex voxels"):
        Interpolation().dtype_of(np.dtype(np.complex64))
