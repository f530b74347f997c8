"""The values that were used last, by key: a bounded cache for all threads of a process, also after a fork."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """At most ``limit`` values; the least recently used one is dropped first. Lives as long as its process.

    The lock is held for a look-up only, not while a value is made. A forked child inherits the values, and
    gets a new lock: another thread of the parent may have held the old one.

    >>> squares = Recent(limit=2)
    >>> [squares.get(n, lambda n=n: n * n) for n in (1, 2, 1, 3)]
    [1, 4, 1, 9]
    >>> squares.get(1, lambda: "made again"), squares.get(2, lambda: "made again")
    (1, 'made again')
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, Value] = OrderedDict()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def get(
        self, key: Key, make: Callable[[], Value], is_current: Callable[[Value], bool] = lambda value: True
    ) -> Value:
        """The value of a key; made where there is none, or where it is no longer current."""
        with self._lock:
            if key in self._values and is_current(self._values[key]):
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._limit:
                self._values.popitem(last=False)
        return value

    def forget(self, is_stale: Callable[[Key], bool]) -> None:
        """Drop the values of some keys."""
        with self._lock:
            for key in list(filter(is_stale, self._values)):
                del self._values[key]
