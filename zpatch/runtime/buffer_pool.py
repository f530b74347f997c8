"""Memory of boxes that are no longer in use, kept for the next boxes of the same size.

The system provides new memory page by page, which for a patch takes as long as filling it. Patches of one
size are created and dropped all the time, so their memory is reused.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

KEPT_SIZES = 6
KEPT_BYTES = 32 * 2**20  # of each size
POOL_SLACK = 2**23
LARGE_BYTES = 2**22  # as numpy asks for large pages
LEAST_BYTES = 2**17  # below that, malloc keeps memory itself

_spare: OrderedDict[int, deque[NDArray[np.uint8]]] = OrderedDict()


class _Lease:
    """Memory in use; arrays that view it keep it alive."""

    __slots__ = ("__array_interface__", "_memory", "_returns")

    def __init__(self, nbytes: int) -> None:
        self._returns = _spare_of(nbytes)
        try:
            self._memory = self._returns.pop()
        except IndexError:
            self._memory = new_pages(nbytes)
        self.__array_interface__ = self._memory.__array_interface__

    def __del__(self) -> None:
        self._returns.append(self._memory)


def new_pages(nbytes: int) -> NDArray[np.uint8]:
    """Memory mapped from the system and returned to it when freed: malloc would keep it in pieces."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system may have none
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


def _spare_of(nbytes: int) -> deque[NDArray[np.uint8]]:
    # No lock: each step is atomic among threads, and to lose a block is harmless.
    spare = _spare.pop(nbytes, None)
    if spare is None:
        spare = deque(maxlen=KEPT_BYTES // nbytes)
    _spare[nbytes] = spare
    if len(_spare) > KEPT_SIZES:
        with contextlib.suppress(KeyError):
            _spare.popitem(last=False)
    return spare


def empty(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """As numpy.empty: a new C-contiguous array of undefined contents, which shares memory with no other.

    >>> empty((2, 3), np.int16).shape
    (2, 3)
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if not LEAST_BYTES <= nbytes <= KEPT_BYTES:
        return np.empty(shape, dtype=dtype)
    memory: NDArray[Any] = np.asarray(_Lease(nbytes)).view(dtype)
    return memory.reshape(shape)


class Pool(Generic[T]):
    """Boxes of memory that were given back, for the next requests of the same kind and size.

    The memory in use and the memory kept are together at most ``POOL_SLACK`` more than the most that was in
    use at once. Boxes are kept with their views: making new objects would scatter small pieces of malloc's
    memory among the large ones.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Hashable, int], list[T]] = OrderedDict()  # last used last
        self._in_use = self._most = self._spare = 0

    def take(self, kind: Hashable, nbytes: int, make: Callable[[], T]) -> T:
        """A box of a kind and size, with undefined contents: a kept one, or the result of ``make``."""
        self._in_use += nbytes
        self._most = max(self._most, self._in_use)
        kept = self._kept.get((kind, nbytes))
        if kept:
            self._spare -= nbytes
            self._kept.move_to_end((kind, nbytes))
            return kept.pop()
        while self._in_use + self._spare > self._most + POOL_SLACK:
            self._drop_one()
        return make()

    def _drop_one(self) -> None:
        key, kept = next(iter(self._kept.items()))
        if kept:
            kept.pop()
            self._spare -= key[1]
        else:
            del self._kept[key]

    def give_back(self, kind: Hashable, nbytes: int, box: T) -> None:
        """Return a box from ``take`` that is no longer in use."""
        self._in_use -= nbytes
        self._spare += nbytes
        self._kept.setdefault((kind, nbytes), []).append(box)
