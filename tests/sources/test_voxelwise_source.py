"""Functions of each voxel are computed for the boxes that are read, in any composition."""

from __future__ import annotations

import pickle
from typing import Any

import dask.array as da
import numpy as np
import pytest

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.geometry.boxes import Voxels

SHAPE = (2, 21, 17, 13)
RNG = np.random.default_rng(0)
VALUES = RNG.integers(-100, 1000, SHAPE).astype(np.int16)
MASK = RNG.integers(0, 3, (1, *SHAPE[1:])).astype(np.uint8)


def above(voxels: Voxels) -> Voxels:
    return voxels > 100


def masked(voxels: Voxels, mask: Voxels) -> Voxels:
    return np.where(mask == 1, voxels, 0).astype(np.float32)


def summed(voxels: Voxels) -> Voxels:
    return voxels.sum(axis=0, keepdims=True, dtype=np.int32)


def images() -> list[zp.ScalarImage]:
    in_memory = zp.ScalarImage(VALUES)
    return [in_memory, zp.ScalarImage(da.from_array(VALUES, chunks=(2, 8, 8, 8))), in_memory.rescaled(2, 1)]


@pytest.mark.parametrize("number", range(3))
def test_boxes_are_those_of_the_function_of_the_volume(number: int) -> None:
    image, mask = images()[number], zp.LabelMap(MASK)
    boxes = [zp.PatchLocation((3, 0, 5), (8, 17, 4)), zp.PatchLocation((0, 0, 0), (1, 1, 1))]
    for made, wanted in (
        (image.voxelwise(above), above(image.data)),
        (image.voxelwise(masked, mask), masked(image.data, MASK)),
        (image.voxelwise(summed), summed(image.data)),
        (image.voxelwise(masked, mask).rescaled(3, 1), masked(image.data, MASK) * 3 + 1),
        (image.voxelwise(masked, mask).select(channels=[1]), masked(image.data, MASK)[1:]),
        (image.voxelwise(summed).oriented("LPS"), summed(image.data)[:, ::-1, ::-1]),
        (image.voxelwise(summed).window((-2, 3, 0), (9, 9, 9)), None),
        (image.resampled(2.0).voxelwise(above), above(image.resampled(2.0).data)),
        (image.voxelwise(above).voxelwise(summed), summed(above(image.data))),
        (image.voxelwise(above).map(lambda array: ~array), ~above(image.data)),
    ):
        if wanted is None:
            wanted = np.pad(summed(image.data), [(0, 0), (2, 0), (0, 0), (0, 0)])[:, :9, 3:12, :9]
        np.testing.assert_allclose(made.data, wanted)
        assert (made.shape, made.dtype) == (made.data.shape, made.data.dtype)
        for box in boxes if made.spatial_shape == SHAPE[1:] else ():
            np.testing.assert_array_equal(made.read(box), made.data[(slice(None), *box.to_slices())])
        np.testing.assert_array_equal(np.asarray(made.dask), made.data)


def test_patches_and_groups_and_processes_read_it(cohort: zp.Cohort) -> None:
    subject = cohort[0]
    name = next(name for name, image in subject.images.items() if image.kind == "scalar")
    changed = subject.with_images(**{name: subject[name].voxelwise(above)})
    with zp.Queue([changed], zp.UniformSampler(4), patches_per_volume=5, num_workers=1, seed=2) as queue:
        for patch in queue:
            box = (slice(None), *patch.location.to_slices())
            np.testing.assert_array_equal(patch[name].data, changed[name].data[box])
    sent = pickle.loads(pickle.dumps(changed[name]))
    np.testing.assert_array_equal(sent.data, changed[name].data)
    assert changed[name].source.marks() == subject[name].source.marks()


def test_memory_below_covers_inputs_and_result() -> None:
    made = zp.ScalarImage(VALUES).voxelwise(masked, zp.LabelMap(MASK))
    assert made.source.bytes_below((4, 5, 6)) == 120 * (2 * 2 + 1 + 2 * 4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda image: image.voxelwise(masked, zp.LabelMap(MASK[:, :5])), r"\(21, 17, 13\) and \(5, 17"),
        (lambda image: image.voxelwise(lambda voxels: voxels.astype(str)), "an image is of numbers"),
    ],
)  # fmt: skip
def test_images_of_other_shapes_and_results_that_are_no_numbers_are_refused(call: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        call(zp.ScalarImage(VALUES))
