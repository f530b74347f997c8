"""Memory of boxes that nobody looks at any more, kept for the next boxes of their size.

Fresh memory of a patch's size comes from the system page by page, and that takes as long as filling it.
Patches of one size come and go all the time, so their memory is handed on.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT_SIZES = 6
KEPT_BYTES = 32 * 2**20  # of each size
LEAST_BYTES = 2**17  # below that, malloc keeps memory itself

_spare: OrderedDict[int, deque[NDArray[np.uint8]]] = OrderedDict()


class _Lease:
    """Memory in use; arrays that look at it keep it alive."""

    __slots__ = ("__array_interface__", "_memory", "_returns")

    def __init__(self, nbytes: int) -> None:
        self._returns = _spare_of(nbytes)
        try:
            self._memory = self._returns.pop()
        except IndexError:
            self._memory = np.empty(nbytes, dtype=np.uint8)
        self.__array_interface__ = self._memory.__array_interface__

    def __del__(self) -> None:
        self._returns.append(self._memory)


def _spare_of(nbytes: int) -> deque[NDArray[np.uint8]]:
    # No lock: each step is one that other threads cannot come between, and to lose a block is harmless.
    spare = _spare.pop(nbytes, None)
    if spare is None:
        spare = deque(maxlen=KEPT_BYTES // nbytes)
    _spare[nbytes] = spare
    if len(_spare) > KEPT_SIZES:
        with contextlib.suppress(KeyError):
            _spare.popitem(last=False)
    return spare


def empty(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """As numpy.empty: an array of its own, C-contiguous, of any contents.

    >>> empty((2, 3), np.int16).shape
    (2, 3)
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if not LEAST_BYTES <= nbytes <= KEPT_BYTES:
        return np.empty(shape, dtype=dtype)
    memory: NDArray[Any] = np.asarray(_Lease(nbytes)).view(dtype)
    return memory.reshape(shape)
