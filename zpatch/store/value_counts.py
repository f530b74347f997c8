"""How often each integer occurs; the compiled loop does the counting."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from zpatch.store._count import count as _compiled
except ImportError:
    _compiled = None  # type: ignore[assignment]

MAX_COUNTED_VALUES = 2**22


def is_counted_at_once(dtype: np.dtype[Any]) -> bool:
    """Whether compiled loops count the values of a type, however many there are."""
    return _compiled is not None and dtype.kind in "iu" and dtype.itemsize <= 2 and dtype.isnative


def value_counts(voxels: NDArray[Any]) -> tuple[int, NDArray[np.int64]] | None:
    """The least of some integers, and how often it and each after it occurs; None if spread too widely.

    >>> value_counts(np.array([3, 5, 3], np.int16))
    (3, array([2, 0, 1]))
    """
    if is_counted_at_once(voxels.dtype):
        values = 2 ** (8 * voxels.dtype.itemsize)
        counts = np.zeros(values, dtype=np.int64)
        _compiled(np.ascontiguousarray(voxels), counts)
        origin = 0
        if voxels.dtype.kind == "i":
            counts, origin = np.roll(counts, values // 2), -values // 2
        used = np.flatnonzero(counts)
        return origin + int(used[0]), counts[used[0] : used[-1] + 1]
    low, high = int(voxels.min()), int(voxels.max())
    if high - low >= MAX_COUNTED_VALUES:
        return None
    shifted = voxels - np.uint64(low) if voxels.dtype == np.uint64 else voxels.astype(np.int64) - low
    return low, np.bincount(shifted.astype(np.int64).reshape(-1))
