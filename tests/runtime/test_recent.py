"""The cache of recently used values: bounded, safe for threads, and usable after a fork."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from zpatch.runtime.recent import Recent


def never() -> str:
    return pytest.fail("the value was made again")


def test_the_least_recently_used_value_is_dropped() -> None:
    recent: Recent[int, str] = Recent(2)
    for key in (1, 2, 1, 3):
        recent.get(key, lambda key=key: str(key))  # type: ignore[misc]
    assert [recent.get(key, never) for key in (1, 3)] == ["1", "3"]
    assert recent.get(2, lambda: "made again") == "made again"


def test_an_outdated_value_is_made_again_and_then_is_the_most_recent() -> None:
    recent: Recent[int, str] = Recent(2)
    recent.get(1, lambda: "old")
    recent.get(2, lambda: "two")
    assert recent.get(1, lambda: "new", lambda value: value != "old") == "new"
    recent.get(3, lambda: "three")
    assert recent.get(1, never) == "new"
    assert recent.get(2, lambda: "made again") == "made again"


def test_values_of_stale_keys_are_dropped() -> None:
    recent: Recent[int, str] = Recent(9)
    for key in range(4):
        recent.get(key, lambda: "first")
    recent.forget(lambda key: key % 2 == 0)
    assert [recent.get(key, lambda: "second") for key in range(4)] == ["second", "first"] * 2


def test_other_values_are_found_while_one_is_made() -> None:
    recent: Recent[int, str] = Recent(9)
    recent.get(1, lambda: "one")
    found = []

    def make() -> str:
        thread = threading.Thread(target=lambda: found.append(recent.get(1, never)))
        thread.start()
        thread.join(10)
        return "two"

    assert recent.get(2, make) == "two"
    assert found == ["one"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_may_look_up_values_when_it_was_forked_during_a_look_up() -> None:
    recent: Recent[int, str] = Recent(9)
    recent.get(1, lambda: "one")
    with recent._lock:  # as another thread of the parent may hold it
        child = os.fork()
        if child == 0:  # no assert and no cleanup here: this is a copy of pytest
            signal.alarm(10)
            os._exit(0 if recent.get(1, lambda: "again") == "one" else 1)
    assert os.waitpid(child, 0)[1] == 0
