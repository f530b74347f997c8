"""Random numbers as a function of an address: no state, no order, no global generator.

The address of a draw is (seed, epoch, subject, draw). Philox (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011) turns an address into a stream directly, so that any worker can produce any draw
without the draws before it.
"""

from __future__ import annotations

import operator
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes never overlap."""

    LOCATIONS = 1
    TRANSFORM = 2
    SUBJECT_ORDER = 3
    SHUFFLE = 4
    REDRAW = 5


def rng(
    seed: int,
    epoch: int = 0,
    subject: int = 0,
    draw: int = 0,
    *,
    purpose: Purpose = Purpose.LOCATIONS,
) -> np.random.Generator:
    """The generator at an address.

    Each address has 2**64 blocks of Philox's counter; the seed may have up to 64 bits.

    >>> float(rng(7, 1, 2, 3).random()) == float(rng(7, 1, 2, 3).random())
    True
    """
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    counter = np.array([0, draw, subject, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def as_generator(source: np.random.Generator | int | None) -> np.random.Generator:
    """The generator itself, the generator of an integer seed, or for None a new one seeded by the system."""
    if isinstance(source, np.random.Generator):
        return source
    return np.random.default_rng() if source is None else rng(operator.index(source))
