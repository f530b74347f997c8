"""How often each subject comes in an epoch: in proportion to weights, by systematic sampling.

An epoch has as many visits as there are subjects, N. With the shares ``c_k = N * (w_1 + ... + w_k) / sum(w)``
of its first k subjects and one number u, uniform from 0 to 1, subject k is visited
``floor(c_k + u) - floor(c_(k-1) + u)`` times (Madow, "On the theory of systematic sampling, II", 1949). So a
subject comes ``N * w / sum(w)`` times on average and never more than one visit from that, an epoch has N
visits, and subjects of equal weights come once each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import digest
from zpatch.errors import OptionError
from zpatch.images.cohort import names_of
from zpatch.images.subject import Subject

MOST_UNITS = 2**62  # of all weights, times the number of subjects: sums of them are exact

GivenWeights = Mapping[str, float] | Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class SubjectWeights:
    """The weights of subjects (N,), as multiples of one unit; integers and equal weights have no rounding.

    >>> weights = SubjectWeights.of([1, 1, 4])
    >>> weights.visits(np.array([0, 1, 2]), 0.6).tolist()
    [1, 0, 2]
    """

    units: NDArray[np.int64]

    @classmethod
    def of(cls, weights: Sequence[float] | NDArray[np.float64]) -> Self:
        """Weights that are finite, at least 0 and not all 0; OptionError for others."""
        found = checked_weights(weights, "subject_weights")
        if not found.any():
            raise OptionError("subject_weights must not be 0 for all subjects")
        scaled = np.ldexp(found, -int(np.frexp(found.max())[1]))  # at most 1, by a power of 2
        room = MOST_UNITS / ((len(found) + 1) * (scaled.sum() + 1))
        return cls(np.rint(np.ldexp(scaled, math.floor(math.log2(room)))).astype(np.int64))

    @property
    def digest(self) -> str:
        """A digest of the weights."""
        return digest(self.units.tobytes())

    def order(
        self, order: NDArray[np.int64], rng: np.random.Generator, *, is_shuffled: bool
    ) -> NDArray[np.int64]:
        """The subjects that an epoch visits, in order, where ``order`` has each subject once.

        With ``is_shuffled`` the visits of one subject are no neighbours, except by chance.
        """
        visited = np.repeat(order, self.visits(order, rng.random()))
        return rng.permutation(visited) if is_shuffled else visited

    def visits(self, order: NDArray[np.int64], start: float) -> NDArray[np.int64]:
        """How often each subject of an ``order`` is visited, (N,), for a ``start`` from 0 to 1."""
        total = int(self.units.sum())
        ends = len(order) * np.cumsum(self.units[order]) + min(int(start * total), total - 1)
        return np.diff(ends // total, prepend=0)


def given_weights(
    given: GivenWeights, subjects: Sequence[Subject], kept: Sequence[int], count: int
) -> SubjectWeights:
    """The weights of subjects by their names, or by their numbers ``kept`` of a sequence of ``count``."""
    if isinstance(given, Mapping):
        names = names_of(subjects)
        if missing := [name for name in names if name not in given]:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise OptionError(
                f"subject_weights has no {missing[0]!r}{others}; give each subject a weight (0 leaves it out)"
            )
        return SubjectWeights.of([given[name] for name in names])
    if len(given) != count:
        raise OptionError(
            f"subject_weights has {len(given)} weights for {count} subjects; give each one, or say their "
            f"names, as {{'sub-01': 2, ...}}"
        )
    return SubjectWeights.of(np.array(given)[np.array(kept)])


def checked_weights(weights: Any, name: str) -> NDArray[np.float64]:
    """Numbers that are finite and at least 0; an OptionError for others, which names the option."""
    try:
        found = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise OptionError(f"{name} must be numbers, not {weights!r:.200}") from None
    wrong = ~(np.isfinite(found) & (found >= 0))
    if found.ndim != 1 or wrong.any():
        what = f"of shape {found.shape}" if found.ndim != 1 else f"{found[wrong][0]}"
        raise OptionError(f"{name} must be finite numbers, at least 0, one for each subject, not {what}")
    return found
