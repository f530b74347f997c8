"""The buffer of a queue: patches that arrived wait here until the shuffle hands them out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from zpatch.epochs.epoch_plan import EpochPlan
from zpatch.loading.patch_feed import Arrival, PatchFeed
from zpatch.sampling.patch import Patch


class PatchBuffer:
    """The patches of a feed in the order in which plans hand them out; at most ``max_length`` wait."""

    def __init__(self, feed: PatchFeed, max_length: int) -> None:
        self.feed = feed
        self.is_closed = False
        self._max_length = max_length
        self._waiting: dict[tuple[int, int], Arrival] = {}
        self._in_use: Arrival | None = None  # the patch that was handed out last

    def __len__(self) -> int:
        return len(self._waiting)

    def iter_patches(self, plan: EpochPlan, consumed: int, *, reads_ahead: bool) -> Iterator[Patch]:
        """The patches of a plan after the first ``consumed``, each valid until the next one is asked for.

        Where the feed ``reads_ahead``, patches of the next plan fill the buffer as it drains.
        """
        serial = self.feed.begin(plan, consumed)
        self._drop_before(serial)
        for number in itertools.islice(plan.order(), consumed, None):
            while (serial, number) not in self._waiting:
                self._receive(serial)
            self._in_use = self._waiting.pop((serial, number))
            assert self._in_use.patch is not None
            yield self._in_use.patch
            self.release()
            consumed += 1
            room = self._max_length if reads_ahead else min(self._max_length, plan.total - consumed)
            if self.feed.has_workers and consumed < plan.total and len(self._waiting) < room:
                self._receive(serial)

    def release(self) -> None:
        """Release the slot of the patch that was handed out last."""
        if self._in_use is not None:
            self.feed.release(self._in_use)
        self._in_use = None

    def _receive(self, serial: int) -> None:
        try:
            arrival = self.feed.take()
        except BaseException:  # Ctrl-C too: patches in flight may be lost
            self.close()
            raise
        if arrival.failure is not None and arrival.serial == serial:
            raise arrival.failure
        self._waiting[arrival.serial, arrival.number] = arrival

    def _drop_before(self, serial: int) -> None:
        """Drop the patches of earlier runs; a QueueError where one of this run has failed already."""
        for key in [key for key in self._waiting if key[0] < serial]:
            self.feed.release(self._waiting.pop(key))
        for arrival in self._waiting.values():
            if arrival.failure is not None and arrival.serial == serial:
                raise arrival.failure

    def close(self) -> None:
        """End the workers of the feed, and drop the patches that they sent."""
        self.is_closed = True
        self._waiting, self._in_use = {}, None
        self.feed.close()
