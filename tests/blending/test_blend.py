"""A batch is checked as a whole before any of its patches is added."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from zpatch.blending.blend import accumulation_dtype, add_batch
from zpatch.blending.grid_blend import GridBlend
from zpatch.blending.reduction import Finaliser
from zpatch.blending.sinks import FinalisingSink, TensorSink
from zpatch.errors import ModelError
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.tiling.volume_tiles import Tiling


@pytest.mark.parametrize(
    ("dtype", "mode", "summed"),
    [
        (torch.float16, "hann", torch.float32),
        (torch.bfloat16, "crop", torch.float32),
        (torch.float64, "average", torch.float64),
        (torch.complex64, "hann", torch.complex64),
        (torch.int64, "crop", torch.int64),
        (torch.bool, "crop", torch.uint8),
        (torch.uint8, "gaussian", torch.float32),
    ],
)
def test_the_type_in_which_patches_are_summed(dtype: torch.dtype, mode: str, summed: torch.dtype) -> None:
    assert accumulation_dtype(dtype, mode) == summed


def simple() -> Tiling:
    """70 x 12 x 13 voxels in 6 x 2 x 2 patches of 16 x 8 x 8."""
    return Tiling.over(PatchGrid.over((70, 12, 13), (16, 8, 8), (4, 2, 2)), "hann")


def blend_of(tiling: Tiling) -> GridBlend:
    return GridBlend(tiling, FinalisingSink(Finaliser(None), TensorSink(tiling.shape)))


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.ones(1, 16, 8, 8), r"a batch must be a tensor \(B, C, I, J, K\), not \(1, 16, 8, 8\)"),
        (np.ones((1, 1, 16, 8, 8)), "must be a tensor .* not ndarray"),
        (torch.ones(2, 1, 16, 8, 8), "a batch of 2 patches has 1 locations"),
        (torch.ones(1, 1, 15, 8, 8), r"the patch at \(0, 0, 0\) is \(15, 8, 8\) .* room for \(16, 8, 8\)"),
    ],
)
def test_a_batch_that_does_not_fit_its_locations_is_refused(batch: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        add_batch(blend_of(simple()), batch, [simple().grid.location(0)])


def test_all_batches_have_the_same_channels() -> None:
    tiling = simple()
    blend = blend_of(tiling)
    add_batch(blend, torch.ones(1, 3, 16, 8, 8), [tiling.grid.location(0)])
    with pytest.raises(ModelError, match="a batch has 2 channels where earlier batches had 3"):
        add_batch(blend, torch.ones(1, 2, 16, 8, 8), [tiling.grid.location(1)])


@pytest.mark.parametrize("length", [4, 5, 6])
def test_a_patch_one_voxel_off_by_rounding_is_cut_or_continued_by_its_edge(length: int) -> None:
    tiling = Tiling.over(PatchGrid.over((9, 9, 9), (9, 9, 9)), "hann", output_shape=(5, 5, 5))
    patch = torch.arange(length).expand(1, 1, length, length, length).float()
    sink = TensorSink(tiling.shape)
    blend = GridBlend(tiling, FinalisingSink(Finaliser(None), sink))
    add_batch(blend, patch, [tiling.grid.location(0)])
    blend.finish()
    assert sink.tensor is not None
    assert sink.tensor[0, 0, 0].tolist() == np.arange(5).clip(max=length - 1).tolist()


@pytest.mark.parametrize("length", [3, 7, 9])
def test_a_patch_more_than_one_voxel_off_is_refused(length: int) -> None:
    tiling = Tiling.over(PatchGrid.over((9, 9, 9), (9, 9, 9)), "hann", output_shape=(5, 5, 5))
    with pytest.raises(ModelError, match="output_shape= must say how it scales"):
        add_batch(blend_of(tiling), torch.ones(1, 1, length, 5, 5), [tiling.grid.location(0)])
