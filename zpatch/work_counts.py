"""What the work of this thread took: nanoseconds of each stage, chunks and bytes; differences are reported.

Each moment counts for one stage, the innermost that is open: ``during(Work.DECODING)`` leaves out what is
fetched inside of it. Counts only grow, and cost well below a microsecond each.
"""

from __future__ import annotations

import threading
import time
from enum import IntEnum


class Work(IntEnum):
    """What is counted. The first four are times in nanoseconds."""

    FETCHING = 0  # files opened, and bytes read that were not read before
    DECODING = 1  # all other reading: locations, plans, decompression, copies
    PADDING = 2
    TRANSFORM = 3
    NEW_CHUNKS = 4  # read from a file, or compared with their checksum for the first time
    KNOWN_CHUNKS = 5
    FETCHED_BYTES = 6  # encoded, of new chunks
    REJECTED = 7  # locations that a sampler's accept= refused, and that were drawn again
    EXHAUSTED = 8  # patches that were taken although refused, after max_rejections others


STAGES = (Work.FETCHING, Work.DECODING, Work.PADDING, Work.TRANSFORM)


class _Counts(threading.local):
    def __init__(self) -> None:
        self.of = [0] * len(Work)
        self.stage: Work | None = None
        self.since_ns = 0  # from when on time counts for the stage


_counts = _Counts()


class during:  # noqa: N801 - it is used as a function is
    """A context whose time counts for a stage, without that of stages inside of it.

    >>> before = worked()
    >>> with during(Work.DECODING), during(Work.FETCHING):
    ...     count(Work.NEW_CHUNKS, 2)
    >>> [now - then for now, then in zip(worked(), before)][Work.NEW_CHUNKS]
    2
    """

    __slots__ = ("_outer", "_stage")

    def __init__(self, stage: Work) -> None:
        self._stage = stage
        self._outer: Work | None = None

    def __enter__(self) -> None:
        self._outer = _switch(self._stage)

    def __exit__(self, *exc: object) -> None:
        _switch(self._outer)


def _switch(stage: Work | None) -> Work | None:
    """Let time count for a stage from now on; the stage that it counted for."""
    counts, now_ns = _counts, time.monotonic_ns()
    before = counts.stage
    if before is not None:
        counts.of[before] += now_ns - counts.since_ns
    counts.stage, counts.since_ns = stage, now_ns
    return before


def count(work: Work, amount: int = 1) -> None:
    """Add to a count of this thread."""
    _counts.of[work] += amount


def count_fetched(nanoseconds: int, chunks: int, nbytes: int) -> None:
    """Count new chunks whose fetching was measured elsewhere, and which the open stage leaves out."""
    counts = _counts
    if counts.stage is not None:
        counts.since_ns += nanoseconds
    counts.of[Work.FETCHING] += nanoseconds
    counts.of[Work.NEW_CHUNKS] += chunks
    counts.of[Work.FETCHED_BYTES] += nbytes


def worked() -> list[int]:
    """The counts of this thread so far, in the order of ``Work``, without the stage that is open."""
    return list(_counts.of)
