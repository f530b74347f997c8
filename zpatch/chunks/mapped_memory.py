"""Copies between arrays, one of which may be a memory map of a file that is truncated while it is read.

Reading a map of a file that was truncated, replaced or unmounted as an array ends the process by SIGBUS; the
compiled loop notices it. It also copies between orders in memory in squares, many times as fast as numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.file_mark import AGAIN
from zpatch.chunks.scaling import MAX_AXES
from zpatch.errors import DamageError
from zpatch.geometry.boxes import Voxels, reversed_axes
from zpatch.runtime import buffer_pool

try:
    from zpatch.chunks._gather import copy as _compiled
except ImportError:  # installed without a compiler
    _compiled = None  # type: ignore[assignment]


def read_mapped(voxels: Voxels, file: Path) -> Voxels:
    """The voxels (C, I, J, K) of a view of a map of ``file``, in memory. Raises DamageError."""
    copied = reversed_axes(buffer_pool.empty(reversed_axes(voxels).shape, voxels.dtype))
    if not copy_mapped(voxels, copied):
        raise DamageError(f"{file}: it was cut short or unmounted while it was read; {AGAIN}")
    return copied


def copy_between_orders(source: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy an array in memory into ``out``, of the same shape and type and of any strides."""
    copy_mapped(source, out)


def copy_mapped(source: NDArray[Any], out: NDArray[Any]) -> bool:
    """Copy an array, a view of a memory map, into ``out``, of the same shape and type and of any strides.

    Returns False if the file has been cut short, or cannot be read any more; ``out`` is then incomplete.
    """
    if _compiled is None or source.ndim > MAX_AXES or source.dtype.hasobject:
        np.copyto(out, source)
        return True
    return bool(_compiled(source.view(), out))
