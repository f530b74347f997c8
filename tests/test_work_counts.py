"""What a thread counts of its work."""

from __future__ import annotations

import contextlib
import threading
import time

from zpatch.work_counts import Work, count, count_fetched, during, worked


def since(before: list[int]) -> list[int]:
    return [now - then for now, then in zip(worked(), before, strict=True)]


def test_each_moment_counts_for_the_innermost_stage() -> None:
    before, begin_ns = worked(), time.monotonic_ns()
    with during(Work.DECODING):
        time.sleep(0.02)
        with during(Work.FETCHING):
            time.sleep(0.03)
            with during(Work.DECODING):
                time.sleep(0.01)
    taken_ns = time.monotonic_ns() - begin_ns
    found = since(before)
    assert found[Work.DECODING] >= 0.03e9
    assert found[Work.FETCHING] >= 0.03e9
    assert sum(found) <= taken_ns


def test_time_that_was_measured_elsewhere_is_taken_from_the_open_stage() -> None:
    before = worked()
    with during(Work.DECODING):
        time.sleep(0.03)
        count_fetched(20_000_000, 2, 100)
    found = since(before)
    assert found[Work.FETCHING] == 20_000_000
    assert found[Work.DECODING] >= 10_000_000
    assert (found[Work.NEW_CHUNKS], found[Work.FETCHED_BYTES]) == (2, 100)


def test_time_counts_also_if_the_work_fails_and_not_afterwards() -> None:
    before = worked()
    with contextlib.suppress(ZeroDivisionError), during(Work.PADDING):
        time.sleep(0.01)
        raise ZeroDivisionError
    found = since(before)
    assert found[Work.PADDING] >= 0.01e9
    time.sleep(0.01)
    assert since(before) == found


def test_threads_count_for_themselves() -> None:
    before = worked()
    thread = threading.Thread(target=count, args=[Work.REJECTED, 5])
    thread.start()
    thread.join()
    assert since(before) == [0] * len(Work)
