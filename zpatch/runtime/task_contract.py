"""What a task is, and what a Dask cluster must know of a run of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

Progress = Callable[[int], None]
TaskFunction = Callable[[Task, Progress], Result]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Dask cluster that runs tasks.

    ``address`` is that of its scheduler, or the scheduler's file. ``folder`` must be seen by all workers, as
    tasks write below it. ``names`` has one name a task, for the cluster's dashboard.
    """

    address: str
    folder: Path
    names: Sequence[str]
