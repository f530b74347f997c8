"""The buffer of a queue: patches that have arrived wait here until it is their turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from zpatch.errors import QueueError
from zpatch.loading.epoch_plan import EpochPlan
from zpatch.loading.patch_feed import Arrival, PatchFeed
from zpatch.sampling.patch import Patch


class PatchBuffer:
    """What a feed gives, in the order in which plans hand it out; at most ``max_length`` patches wait."""

    def __init__(self, feed: PatchFeed, max_length: int) -> None:
        self.feed = feed
        self.is_closed = False
        self._max_length = max_length
        self._ready: dict[tuple[int, int], Arrival] = {}
        self._lent: Arrival | None = None

    def __len__(self) -> int:
        return len(self._ready)

    def iter_patches(self, plan: EpochPlan, consumed: int, *, reads_ahead: bool) -> Iterator[Patch]:
        """The patches of a plan after those that are consumed, each lent until the next one is asked for.

        Where the feed ``reads_ahead``, those of the next plan fill the buffer as it drains.
        """
        serial = self.feed.begin(plan, consumed)
        self._let_go(but_from=serial)
        for number in itertools.islice(plan.order(), consumed, None):
            while (serial, number) not in self._ready:
                self._receive(serial)
            self._lent = self._ready.pop((serial, number))
            assert self._lent.patch is not None
            yield self._lent.patch
            self.release()
            consumed += 1
            room = self._max_length if reads_ahead else min(self._max_length, plan.total - consumed)
            if self.feed.has_workers and consumed < plan.total and len(self._ready) < room:
                self._receive(serial)

    def release(self) -> None:
        """Give the slot of what is lent to the next patch, though nobody may have asked for that."""
        if self._lent is not None:
            self.feed.free(self._lent)
        self._lent = None

    def _receive(self, serial: int) -> None:
        try:
            arrival = self.feed.take()
        except BaseException:  # Ctrl-C too: what was on its way may be lost
            self.close()
            raise
        if arrival.failure is not None and arrival.serial == serial:
            raise QueueError(arrival.failure)
        self._ready[arrival.serial, arrival.number] = arrival

    def _let_go(self, but_from: int) -> None:
        """Forget what arrived for runs before one."""
        for key in [key for key in self._ready if key[0] < but_from]:
            self.feed.free(self._ready.pop(key))
        for arrival in self._ready.values():
            if arrival.failure is not None and arrival.serial == but_from:
                raise QueueError(arrival.failure)

    def close(self) -> None:
        """End the workers of the feed, and forget what they have sent."""
        self.is_closed = True
        self._ready, self._lent = {}, None
        self.feed.close()
