"""The shuffle of an epoch: patches are handed out in another order than they are read in, not far from it.

The patch that is read as number ``n`` gets the key ``n + d``, with d from 0 to ``window - 1``. Patches are
handed out in the order of their keys, those of one key in the order of reading. So

- a patch is handed out fewer than ``window`` places before or after its number,
- at most ``window`` patches wait at any time, half as many on average, and fewer before the first one,
- the place of a patch is known before it is read, from the keys of patches near it.

Each d is uniformly distributed, but 16 patches that are read one after the other are spread evenly: one d is
drawn from each sixteenth of the window, as in stratified sampling. They are often of one subject, and
independent draws would put more of them into one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from zpatch.sampling.randomness import Purpose, rng

SPREAD = 16
BLOCK = 64 * SPREAD  # keys that are drawn together


@dataclass(frozen=True, slots=True)
class Shuffle:
    """The order of the ``total`` patches of an epoch, as a pure function of its fields.

    A ``window`` of 1 keeps the order of reading.
    """

    seed: int
    epoch: int
    total: int
    window: int

    def places(self, first: int, stop: int) -> NDArray[np.int64]:
        """The places in the order of the patches that are read as numbers ``first`` to ``stop - 1``.

        >>> sorted(Shuffle(seed=0, epoch=0, total=5, window=3).places(0, 5).tolist())
        [0, 1, 2, 3, 4]
        """
        # All patches before these are handed out earlier than any of them, all after these later.
        low, high = max(0, first - self.window), min(self.total, stop + self.window)
        places = np.empty(high - low, np.int64)
        places[np.argsort(self._keys(low, high), kind="stable")] = np.arange(low, high)
        return places[first - low : stop - low]

    def _keys(self, first: int, stop: int) -> NDArray[np.int64]:
        low = first // BLOCK
        late = [_distances(self.seed, self.epoch, self.window, n) for n in range(low, -(-stop // BLOCK))]
        return np.arange(first, stop) + np.concatenate(late)[first - low * BLOCK : stop - low * BLOCK]


@lru_cache(maxsize=8)
def _distances(seed: int, epoch: int, window: int, block: int) -> NDArray[np.int64]:
    """How far the keys of a block are from the numbers of their patches, (BLOCK,)."""
    generator = rng(seed, epoch, draw=block, purpose=Purpose.SHUFFLE)
    parts = np.broadcast_to(np.arange(SPREAD), (BLOCK // SPREAD, SPREAD))
    drawn = generator.permuted(parts, axis=1) + generator.random(parts.shape)
    return (drawn * (window / SPREAD)).astype(np.int64).reshape(-1)
