"""Options of an aggregator that mean nothing are refused before anything is blended."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zpatch as zp
from zpatch.blending.aggregator_options import AggregatorOptions
from zpatch.errors import OptionError, PatchOverlapError


@pytest.fixture
def sampler() -> zp.GridSampler:
    """Patches of a volume of 70 x 12 x 13 voxels."""
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(np.broadcast_to(np.uint8(0), (70, 12, 13))))
    return zp.GridSampler(subject, (16, 8, 8), (4, 2, 2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"overlap_mode": "mean"}, "overlap_mode must be one of crop, average, hann, gaussian, not 'mean'"),
        ({"reduce": "argmin"}, "reduce must be 'argmax'"),
        ({"spatial_shape": (1, 2)}, r"spatial_shape must be one integer or three, not \(1, 2\)"),
        ({"output_shape": "big"}, "output_shape must be one integer or three, not 'big'"),
        ({"spatial_shape": (70, 12, 12)}, r"over a volume of \(70, 12, 13\), not of \(70, 12, 12\)"),
        ({"spatial_shape": (70, 12, 0)}, r"spatial_shape must be at least 1 voxel on every axis, not .*0\)"),
        ({"output_shape": {"seg": 0}}, "output_shape must be at least 1 voxel on every axis, not 0"),
        ({"patch_overlap": 2}, r"patch_overlap is \(2, 2, 2\) where the grid's is \(4, 2, 2\); leave it out"),
        ({"reduce": {"seg": "argmin"}}, "reduce must be 'argmax'"),
        ({"dtype": np.float32}, "dtype must be one of torch's, such as torch.float32, not"),
        ({"dtype": torch.float16, "output": "x"}, "cannot be of torch.float16; choose torch.float32"),
        ({"max_memory": "much"}, "'much' is not a number of bytes"),
        ({"max_memory": -1}, "max_memory must be at least 0 bytes, not -1"),
        ({"fill": 0}, "fill is for arbitrary locations: every patch of a grid must be added"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], text: str, sampler: zp.GridSampler) -> None:
    with pytest.raises(OptionError, match=text):
        zp.PatchAggregator(**{"spatial_shape": (70, 12, 13), "grid": sampler, **options})


@pytest.mark.parametrize("overlap", [3, -2])
def test_an_overlap_that_cannot_be_halved_is_refused(overlap: int) -> None:
    with pytest.raises(PatchOverlapError, match="even and at least 0"):
        zp.PatchAggregator(8, "crop", overlap)


def test_options_are_kept_in_one_form_and_cannot_be_changed(tmp_path: Path) -> None:
    aggregator = zp.PatchAggregator(8, "hann", 2, {"seg": 4}, output=tmp_path / "out", max_memory="2 KiB")
    options = aggregator.options
    assert isinstance(options, AggregatorOptions)
    assert (options.spatial_shape, options.patch_overlap) == ((8, 8, 8), (2, 2, 2))
    assert (options.output, options.max_bytes) == (tmp_path / "out", 2048)
    assert options.of_head("seg").shape == (4, 4, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.overlap_mode = "crop"  # type: ignore[misc]
