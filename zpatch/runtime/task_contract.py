"""What a task is: its function, its progress, and how often its worker may die."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from zpatch.errors import WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

Progress = Callable[[int], None]
TaskFunction = Callable[[Task, Progress], Result]

MAX_DEATHS = 4


def given_up() -> WorkerError:
    """The result of a task whose worker died too often."""
    return WorkerError(
        f"its worker was killed {MAX_DEATHS} times, perhaps for want of memory; try fewer --jobs"
    )
