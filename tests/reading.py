"""Shared by the tests of reading: both inner loops, images on disk, boxes, and equality of bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.chunks import gather
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.image import Image, stored_image
from zpatch.records.image_record import ImageRecord
from zpatch.store.staged_image import StagedImage
from zpatch.store.store import sharded_array

EYE = tuple(map(tuple, np.eye(4).tolist()))
DTYPES = ["|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16"]

# For properties whose examples take less than a millisecond.
many_examples = settings(max_examples=10 * settings().max_examples)

Test = TypeVar("Test", bound=Callable[..., None])

needs_compiled_loop = pytest.mark.skipif(
    gather._compiled is None, reason="the compiled loop was not built here"
)


@pytest.fixture(params=["compiled", "numpy"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The inner loop that reads: the compiled one, or numpy and numcodecs."""
    if request.param == "numpy":
        monkeypatch.setattr(gather, "_compiled", None)
    elif gather._compiled is None:
        pytest.skip("the compiled loop was not built here")
    return str(request.param)


def both_loops(test: Test) -> Test:
    """Run a test with each inner loop; its module must also import the fixture ``loop``."""
    if is_hypothesis_test(test):  # all examples use one loop
        test = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])(test)
    return pytest.mark.usefixtures("loop")(test)


def stored(
    folder: Path,
    voxels: NDArray[Any],
    *,
    chunk: int | tuple[int, ...],
    shard: int,
    codec: str = "lz4",
    **more: Any,
) -> Image:
    """An image on disk; ``voxels`` is (z, y, x) or (c, z, y, x), ``shard`` is in chunks a side.

    Chunks are ``chunk`` (z, y, x), or of three lengths from ``chunk`` on; ``more`` is for the record.
    """
    spatial = chunk if isinstance(chunk, tuple) else (chunk, chunk + 1, chunk + 2)
    chunks = ((1,) if voxels.ndim == 4 else ()) + spatial
    shards = tuple(c * shard for c in chunks)
    record = ImageRecord(
        "sub", "image", "scalar", voxels.shape, voxels.dtype.str, "czyx"[-voxels.ndim :], chunks, shards,
        codec, EYE, **more,
    )  # fmt: skip
    stage = StagedImage(folder)
    array = sharded_array(folder, record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # syncing takes longer than the rest of a test
        for place in np.ndindex(*array.shard_grid):
            box = tuple(slice(n * s, (n + 1) * s) for n, s in zip(place, array.shards, strict=True))
            stage.write_shard(record, place, voxels.reshape(array.shape)[box])
        return stored_image(folder, stage.finish(record))


def draw_box(data: st.DataObject, spatial_shape: tuple[int, ...]) -> PatchLocation:
    """A box inside a volume."""
    size = [data.draw(st.integers(1, n)) for n in spatial_shape]
    index = [data.draw(st.integers(0, n - s)) for n, s in zip(spatial_shape, size, strict=True)]
    return PatchLocation(tuple(index), tuple(size))


def random_voxels(shape: tuple[int, ...], dtype: str, seed: int = 0) -> NDArray[Any]:
    """Voxels of any bits, also NaN and infinity."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    voxels: NDArray[Any] = np.frombuffer(rng.bytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype)
    return voxels.reshape(shape).copy()


def assert_same_bytes(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Voxels of one type and shape have equal bits."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.tobytes() != expected.tobytes():
        np.testing.assert_array_equal(found, expected)  # says where they differ
        pytest.fail("the voxels are equal in value but not in their bits")
