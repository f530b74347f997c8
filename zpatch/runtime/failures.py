"""Failures of single subjects: which errors are those of a subject, so that the others go on without it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zpatch.errors import (
    DamageError,
    ModelError,
    NotAStoreError,
    SourceError,
    StoreError,
    UnknownNameError,
    WorkerError,
    one_line,
)

OF_A_SUBJECT = (DamageError, NotAStoreError, SourceError, UnknownNameError, ModelError, WorkerError, OSError)
SHOWN_REASONS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """A subject that failed, and the error that says why."""

    subject: str
    error: Exception

    def __str__(self) -> str:
        return f"{self.subject}: {one_line(self.error)}"


def is_of_subject(error: Exception) -> bool:
    """Whether an error is that of one subject: of its files, of a network on its voxels, of its worker.

    An error of the output, of an option or of a memory limit is not: it would be that of all subjects.

    >>> is_of_subject(DamageError("a chunk is missing")), is_of_subject(StoreError("the disk is full"))
    (True, False)
    """
    if isinstance(error, StoreError) and not isinstance(error, DamageError | NotAStoreError):
        return False
    return isinstance(error, OF_A_SUBJECT)


def without_locals(error: Exception) -> Exception:
    """The same error, whose traceback keeps no array alive."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error


class Failures:
    """The subjects of a run that failed; each is reported to ``on_failure``.

    Without ``keep_going`` the first error is raised.

    >>> failures = Failures(keep_going=True)
    >>> with failures.caught("ann"):
    ...     raise DamageError("a chunk is missing")
    >>> print(failures.error())
    a chunk is missing
    """

    def __init__(
        self, *, keep_going: bool = False, on_failure: Callable[[Failure], None] = lambda failure: None
    ) -> None:
        self.found: list[Failure] = []
        self._subjects: set[str] = set()
        self._keep_going = keep_going
        self._on_failure = on_failure

    @contextlib.contextmanager
    def caught(
        self, subject: str, *, but: type[Exception] | tuple[type[Exception], ...] = ()
    ) -> Iterator[None]:
        """Note an error of the block as that of a subject; raise it if it is another, or one of ``but``."""
        try:
            yield
        except Exception as error:
            if isinstance(error, but):
                raise
            self.add(subject, error)

    def add(self, subject: str, error: Exception) -> None:
        """Note the error of a subject, once; raise it if it is not the subject's own."""
        if not (self._keep_going and is_of_subject(error)):
            raise error
        if subject not in self._subjects:
            self._subjects.add(subject)
            self.found.append(Failure(subject, without_locals(error)))
            self._on_failure(self.found[-1])

    def error(self) -> Exception:
        """The error of the only subject that failed; of several, one of the first's class that names all."""
        first, *others = self.found
        if not others:
            return first.error
        shown = [str(failure) for failure in self.found[:SHOWN_REASONS]]
        if names := [failure.subject for failure in self.found[SHOWN_REASONS:]]:
            shown.append(f"and {', '.join(names)}")
        error = type(first.error)(f"{len(self.found)} subjects failed: {'; '.join(shown)}")
        error.__cause__ = first.error
        return error
