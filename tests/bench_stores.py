"""Shared by the tests of the benchmark: small stores, and groups of patches at given places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.bench.patch_group import PatchGroup
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.cohort import Cohort

QUICK: dict[str, Any] = {"seconds": 0.01, "jobs": 1}


MakeStore = Callable[..., Path]


def periodic(*shape: int) -> np.ndarray[Any, Any]:
    """A volume of equal chunks of 16 voxels a side, in which all voxels of a chunk differ."""
    place = np.indices(shape) % 16
    voxels: np.ndarray[Any, Any] = (place[0] + 16 * place[1] + 256 * place[2]).astype(np.int16)
    return voxels


def group_of(store: Path, *boxes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> PatchGroup:
    return PatchGroup(Cohort(store)[0], tuple(PatchLocation(index, size) for index, size in boxes))
