"""Randomness as a function of position: no state, no order, no global generator.

Every draw has an address (seed, epoch, subject, draw). Philox (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011) turns an address into a stream directly, so that any worker can
produce any draw without having produced those before it.
"""

from __future__ import annotations

import operator
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes never meet."""

    LOCATIONS = 1
    TRANSFORM = 2
    SUBJECT_ORDER = 3
    SHUFFLE = 4


def rng(
    seed: int,
    epoch: int = 0,
    subject: int = 0,
    draw: int = 0,
    *,
    purpose: Purpose = Purpose.LOCATIONS,
) -> np.random.Generator:
    """The generator at an address.

    Each address owns 2**64 blocks of the counter; the seed may have up to 64 bits.

    >>> float(rng(7, 1, 2, 3).random()) == float(rng(7, 1, 2, 3).random())
    True
    """
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    counter = np.array([0, draw, subject, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def as_generator(source: np.random.Generator | int | None) -> np.random.Generator:
    """A generator as it is; the one of an integer seed; a fresh one from the system for None."""
    if isinstance(source, np.random.Generator):
        return source
    return np.random.default_rng() if source is None else rng(operator.index(source))
