"""One region: what its network and its reduction give is checked before anything of it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zpatch as zp
from zpatch.errors import ModelError


def channels_below(voxels: torch.Tensor) -> torch.Tensor:
    """Two channels of the patch that the network is probed with, which is all zeros, and one of others."""
    return voxels if not voxels.any() else voxels[:1]


class ZerosFirst:
    """A network whose first patch comes out as zeros, and each later one as ones; in two channels."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(batch), 2, *batch.shape[2:]), float(self.calls > 1))


def test_a_reduction_whose_number_of_channels_depends_on_the_values_is_refused(
    cohort: zp.Cohort, tmp_path: Path
) -> None:
    text = (
        rf"subject {cohort[0].name!r}: the reduce function made 1 channels of some voxels and 2 of others; "
        r"the number of channels must not depend on the values"
    )
    with pytest.raises(ModelError, match=text):
        zp.predict(
            ZerosFirst(), cohort[:1], tmp_path / "out", image="t1", patch_size=24, reduce=channels_below
        )
