"""Comparison of patches of transformed volumes with those that a pipeline gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import ks_2samp

Statistic = Callable[[torch.Tensor], torch.Tensor]


def along_the_last_axis(voxels: torch.Tensor) -> torch.Tensor:
    """How much neighbours differ."""
    return voxels.diff(dim=-1).std()


STATISTICS = (torch.mean, torch.std, along_the_last_axis)


def assert_distributed_alike(
    found: Sequence[Any], wanted: Sequence[Any], statistics: Sequence[Statistic] = STATISTICS
) -> None:
    """By the Kolmogorov-Smirnov test of some statistics of each patch."""
    for of in statistics:
        seen, expected = ([float(of(torch.as_tensor(voxels))) for voxels in part] for part in (found, wanted))
        assert ks_2samp(seen, expected).pvalue > 1e-3


def random_crop(volume: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """A cube of a volume (C, I, J, K), at a location that is drawn uniformly."""
    first = [int(rng.integers(0, n - size + 1)) for n in volume.shape[1:]]
    return volume[(slice(None), *(slice(f, f + size) for f in first))]
