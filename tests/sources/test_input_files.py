"""Arrays of other libraries: read box by box, and never whole."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import zpatch as zp
from zpatch.errors import OptionError, SourceError
from zpatch.sources.voxel_sources import ArraySource, LazySource

SHAPE = (40, 50, 60)


class Dataset:
    """As those of h5py: slices are read, numpy would load it whole, and it cannot be pickled."""

    def __init__(self, values: NDArray[Any], chunks: tuple[int, ...] | None = (16, 16, 16)) -> None:
        self._values = values
        self.shape, self.dtype, self.chunks = values.shape, values.dtype, chunks
        self.most = 0

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        assert all(isinstance(part, slice) for part in key)
        found = self._values[key].copy()
        self.most = max(self.most, found.size)
        return found

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise AssertionError("loaded whole")

    def __reduce__(self) -> Any:
        raise TypeError("datasets cannot be pickled")


@pytest.fixture
def values(rng: np.random.Generator) -> NDArray[np.int16]:
    return rng.integers(1, 900, SHAPE).astype(np.int16)


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("has_chunks", [True, False])
def test_a_lazy_array_is_read_box_by_box(
    values: NDArray[np.int16], channels: int | None, has_chunks: bool
) -> None:
    whole = values[None] if channels is None else np.stack([values + n for n in range(channels)])
    given = values if channels is None else whole
    dataset = Dataset(given, (16,) * given.ndim if has_chunks else None)
    image = zp.ScalarImage(dataset)
    assert isinstance(image.source, LazySource)
    assert (image.shape, image.dtype) == (whole.shape, np.int16)
    boxes = [zp.PatchLocation((1, 2, 3), (8, 9, 10)), zp.PatchLocation((30, 0, 50), (10, 50, 10))]
    for box, found in zip(boxes, image.read_group(boxes), strict=True):
        np.testing.assert_array_equal(found, whole[(slice(None), *box.to_slices())])
    assert dataset.most <= 10 * 50 * 10 * len(whole)
    np.testing.assert_array_equal(
        image.map(lambda array: array + 1).read(boxes[0])[0, 0, 0], whole[0, 1, 2, 3:13] + 1
    )


def test_a_lazy_array_is_predicted_in_chunks_and_is_resumed(values: NDArray[np.int16], out: Path) -> None:
    dataset = Dataset(values)
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(dataset))
    options: Any = {"image": "t1", "patch_size": 20, "patch_overlap": 4}
    for _ in range(2):
        found = zp.predict(torch.nn.Identity(), [subject], out, **options)[0].prediction.data
    np.testing.assert_allclose(found[0], values, rtol=1e-6)
    assert dataset.most < values.size // 4


def test_a_lazy_array_that_cannot_be_pickled_is_an_error_with_jobs(
    values: NDArray[np.int16], out: Path
) -> None:
    long = np.tile(values, (1, 1, 4))
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(Dataset(long)))
    with pytest.raises(
        SourceError, match=r"an input cannot be sent to other processes \(TypeError: datasets"
    ):
        zp.predict(torch.nn.Identity(), [subject], out, image="t1", patch_size=20, jobs=2)


def test_lazy_arrays_of_other_shapes_and_types_are_refused(values: NDArray[np.int16]) -> None:
    with pytest.raises(OptionError, match=r"not .*Dataset of shape \(50, 60\)"):
        zp.ScalarImage(Dataset(values[0]))
    with pytest.raises(OptionError, match="an image is of numbers, not of"):
        zp.ScalarImage(Dataset(values.astype("S3")))
    odd: Any = Dataset(values)
    odd.dtype = "no such type"
    with pytest.raises(OptionError, match=r"the dtype of .*Dataset is none of numpy's"):
        zp.ScalarImage(odd)


def test_arrays_in_memory_stay_what_they_were(values: NDArray[np.int16]) -> None:
    for given in (values, torch.from_numpy(values), values.tolist()):
        assert type(zp.ScalarImage(given).source) is ArraySource
    image = zp.ScalarImage(values)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).data, image.data)
