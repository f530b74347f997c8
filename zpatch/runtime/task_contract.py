"""What a task is, and what a Dask cluster must know of a run of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from zpatch.errors import OptionError

Task = TypeVar("Task")
Result = TypeVar("Result")

CLUSTER_TIMEOUT_S = 300.0

Progress = Callable[[int], None]
TaskFunction = Callable[[Task, Progress], Result]


def check_cluster_timeout(timeout_s: float) -> None:
    """Raise OptionError unless it is a number of seconds above 0."""
    if not timeout_s > 0:
        raise OptionError(
            f"cluster_timeout must be a number of seconds above 0, not {timeout_s}", option="cluster_timeout"
        )


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Dask cluster that runs tasks.

    ``address`` is that of its scheduler, or the scheduler's file. ``folder`` must be seen by all workers, as
    tasks write below it. ``names`` has one name a task, for the cluster's dashboard. ``timeout_s`` is how
    long a cluster without workers is waited for.
    """

    address: str
    folder: Path
    names: Sequence[str]
    timeout_s: float = CLUSTER_TIMEOUT_S
