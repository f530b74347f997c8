"""How overlapping patches are blended: per-axis weights that sum to one at every voxel.

All modes are one thing. On each axis patch number ``i``, which starts at ``s_i``, has a weight vector
``q_i`` with ``sum_i q_i(x) = 1`` for every voxel ``x``::

    average, hann, gaussian   q_i(x) = w(x - s_i) / sum_k w(x - s_k)
    crop                      q_i(x) = 1 for the last patch that keeps x, else 0

A voxel's weight is the product over the axes, so these products sum to one as well: accumulators hold
the answer directly, without a weight volume and without a division at the end.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import OptionError

OverlapMode = Literal["crop", "average", "hann", "gaussian"]

OVERLAP_MODES: tuple[str, ...] = get_args(OverlapMode)


def check_overlap_mode(mode: str) -> None:
    """Refuse a mode that does not exist."""
    if mode not in OVERLAP_MODES:
        raise OptionError(f"overlap_mode must be one of {', '.join(OVERLAP_MODES)}, not {mode!r}")


def window(mode: str, patch_length: int) -> NDArray[np.float64]:
    """The weights ``w(0 .. p-1)`` of one patch on one axis, before normalisation; all positive.

    ``hann`` is ``sin^2(pi (n + 1) / (p + 1))``: the Hann window without its two zeros, so that a voxel
    that only one patch covers keeps a weight. ``gaussian`` has ``sigma = p / 8`` about the patch's
    centre. ``crop`` weighs what it keeps alike, as ``average`` does.
    """
    n = np.arange(patch_length, dtype=np.float64)
    if mode == "hann":
        return np.asarray(np.sin(np.pi * (n + 1) / (patch_length + 1)) ** 2)
    if mode == "gaussian":
        return np.exp(-0.5 * ((n - (patch_length - 1) / 2) / (patch_length / 8)) ** 2)
    check_overlap_mode(mode)
    return np.ones(patch_length)


def kept_by_crop(
    start: int, patch_length: int, overlap: int, axis_start: int, axis_stop: int
) -> tuple[int, int]:
    """What ``crop`` keeps of a patch, relative to its start: half the overlap is cut from each side,
    except at the edges of the volume, which ends at ``axis_start`` and ``axis_stop``."""
    half = overlap // 2
    first = 0 if start <= axis_start else half
    last = patch_length if start + patch_length >= axis_stop else patch_length - half
    return first, last


def partition_of_unity(
    mode: str, starts: NDArray[np.int64], patch_length: int, overlap: int
) -> NDArray[np.float64]:
    """Weights ``(number of patches, patch_length)`` of all patches on one axis.

    ``starts`` ascend, and the patches leave no gap. Each voxel's weights sum to one; where only one
    patch covers a voxel its weight is exactly 1.

    >>> partition_of_unity("average", np.array([0, 2]), 4, 2)
    array([[1. , 1. , 0.5, 0.5],
           [0.5, 0.5, 1. , 1. ]])
    """
    voxels = (starts - starts[0])[:, None] + np.arange(patch_length)
    if mode == "crop":
        return _last_keeper(voxels, patch_length, overlap)
    weights = np.broadcast_to(window(mode, patch_length), voxels.shape)
    totals = np.bincount(voxels.ravel(), weights.ravel())
    return np.asarray(weights / totals[voxels])


def _last_keeper(voxels: NDArray[np.int64], patch_length: int, overlap: int) -> NDArray[np.float64]:
    owner = np.full(voxels.max() + 1, -1)
    for i, first_voxel in enumerate(voxels[:, 0].tolist()):
        a, b = kept_by_crop(first_voxel, patch_length, overlap, 0, len(owner))
        owner[first_voxel + a : first_voxel + b] = i
    return (owner[voxels] == np.arange(len(voxels))[:, None]).astype(np.float64)
