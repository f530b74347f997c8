"""The door to Dask: a graph computed in this thread, in threads, or by a client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from zpatch.errors import OptionError

Scheduler = Literal["sync", "threads"] | Any  # or a distributed.Client


def is_cluster(scheduler: Scheduler) -> bool:
    """Whether a scheduler is a distributed.Client."""
    return not isinstance(scheduler, str) and hasattr(scheduler, "scheduler_info")


def run_graph(graph: dict[Any, Any], keys: Any, scheduler: Scheduler = "sync") -> Any:
    """Compute one or several keys of a Dask graph, in this thread (``sync``) or dask's pool (``threads``)."""
    return _getter(scheduler)(graph, keys)


def _getter(scheduler: Scheduler) -> Callable[..., Any]:
    if scheduler == "sync":
        from dask.local import get_sync

        return get_sync
    if scheduler == "threads":
        from dask.threaded import get

        return get
    raise OptionError(
        f"scheduler must be 'sync', 'threads' or a distributed.Client, not {scheduler!r}", option="scheduler"
    )


def thread_count(scheduler: Scheduler) -> int:
    """How many tasks the scheduler runs at a time."""
    if scheduler == "sync":
        return 1
    from dask.system import CPU_COUNT

    return CPU_COUNT
