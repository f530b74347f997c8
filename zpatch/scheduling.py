"""The door to dask's schedulers, and to reading ahead in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from zpatch.errors import OptionError

T = TypeVar("T")

Scheduler = Literal["sync", "threads"]


def run_graph(graph: dict[str, Any], key: str, scheduler: Scheduler = "sync") -> Any:
    """Compute one key of a Dask graph, in this thread (``sync``) or in dask's pool (``threads``)."""
    return _getter(scheduler)(graph, key)


def _getter(scheduler: Scheduler) -> Callable[..., Any]:
    if scheduler == "sync":
        from dask.local import get_sync

        return get_sync
    if scheduler == "threads":
        from dask.threaded import get

        return get
    raise OptionError(f"scheduler must be 'sync' or 'threads', not {scheduler!r}")


def thread_count(scheduler: Scheduler) -> int:
    """How many tasks the scheduler runs at a time."""
    if scheduler == "sync":
        return 1
    from dask.system import CPU_COUNT

    return CPU_COUNT


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is in use: two are alive at most."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="zpatch-read-ahead") as pool:
        upcoming = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
            del item
