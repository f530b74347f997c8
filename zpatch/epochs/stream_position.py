"""Where a queue's stream is: an epoch and a number of patches, kept while it runs and saved as small JSON.

A state has a fingerprint of its stream, so that no queue of another stream resumes from it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json, digest
from zpatch.epochs.epoch_plan import EpochPlan
from zpatch.errors import OptionError, QueueError
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject, outline

VERSION = 1
SHUFFLE = "stratified"  # the rule that orders patches; older versions say True, and had another one
MOST = 2**63  # epochs, and patches of one


class StreamPosition:
    """The epoch of a queue, and how many of its patches were handed out.

    An iteration calls ``begin``, then ``advance`` for each patch, and ``finish`` however it ends. ``choose``
    and ``resume`` say where the next iteration begins. Without them it is the epoch after one that was handed
    out to the last patch, and the same epoch from its first patch after one that was broken off.

    ``epoch`` is the current epoch, ``consumed`` the number of its patches that were handed out, and
    ``iteration`` the number of the iteration that runs, None between two of them.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.consumed = 0
        self.iteration: int | None = None
        self._iterations = 0
        self._total: int | None = None  # patches of the epoch, once that is known
        self._is_resumed = False  # the next iteration begins after the patches that are consumed
        self._chosen: int | None = None  # the epoch to follow the iteration that runs

    @property
    def next_patch(self) -> tuple[int, int]:
        """Epoch and number of the patch that is handed out next."""
        if self.consumed and self.consumed == self._total:
            return self.epoch + 1 if self._chosen is None else self._chosen, 0
        return self.epoch, self.consumed

    def choose(self, epoch: int) -> None:
        """Let the next iteration give an epoch; the epoch of ``resume`` keeps its place.

        An iteration that runs continues, and the position stays in its epoch until it ends.
        """
        if self.iteration is not None:
            self._chosen = epoch
        elif not (self._is_resumed and epoch == self.epoch):
            self._start(epoch)

    def resume(self, plan: EpochPlan, consumed: int) -> None:
        """Let the next iteration give what is left of an epoch after ``consumed`` patches."""
        self.finish()
        self._start(plan.epoch)
        self.consumed, self._total, self._is_resumed = consumed, plan.total, True

    def begin(self, plan: EpochPlan) -> int:
        """Begin an iteration of the current epoch; the number of patches that it leaves out."""
        self._iterations += 1
        self.iteration = self._iterations
        if not self._is_resumed:
            self.consumed = 0
        self._total = plan.total
        return self.consumed

    def advance(self, patches: int = 1) -> None:
        """Count patches that are handed out."""
        self.consumed += patches
        self._is_resumed = False

    def finish(self) -> None:
        """End the iteration that runs, if any: at its last patch, or before."""
        if self.iteration is None:
            return
        self.iteration = None
        if self._chosen is not None:
            self._start(self._chosen)
        elif self.consumed == self._total:
            self._start(self.epoch + 1)

    def leave_broken_epoch(self) -> None:
        """Go to the next epoch where the last iteration was broken off, which would repeat its epoch."""
        if self.consumed and not self._is_resumed:
            self._start(self.epoch + 1)

    def _start(self, epoch: int) -> None:
        self.epoch, self.consumed, self._total = epoch, 0, None
        self._is_resumed, self._chosen = False, None


class Turn:
    """A context that one thread at a time may be in; others get a QueueError with that text, at once.

    Unlike a lock it can be pickled, and the copy is free.

    >>> turn = Turn("one at a time")
    >>> with turn:
    ...     with turn:
    ...         pass
    Traceback (most recent call last):
    zpatch.errors.QueueError: one at a time
    """

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal
        self._free = [True]  # taking the only item is atomic

    def __enter__(self) -> None:
        try:
            self._free.pop()
        except IndexError:
            raise QueueError(self._refusal) from None

    def __exit__(self, *exc: object) -> None:
        self._free.append(True)

    def __reduce__(self) -> tuple[type[Turn], tuple[str]]:
        return type(self), (self._refusal,)


def subjects_digest(subjects: Sequence[Subject]) -> str:
    """A digest of the subjects in their order, and of the contents of their images."""
    outlines = subjects.outlines() if isinstance(subjects, Cohort) else map(outline, subjects)
    return digest("\n".join(outlines).encode())


def order_identity(sampler: Any, order: NDArray[np.int64]) -> str:
    """What identifies the order of a ``subject_sampler``, the same on all ranks.

    ``order`` is the order in epoch 0. A sampler that deals subjects out to ranks is identified by its
    options.
    """
    if not hasattr(sampler, "num_replicas"):
        return digest(order.tobytes())
    options = ("num_replicas", "seed", "shuffle", "drop_last")
    given = ", ".join(f"{name}={getattr(sampler, name)!r}" for name in options if hasattr(sampler, name))
    return f"{type(sampler).__name__}({given})"


def queue_state(fingerprint: Json, seed: int, epoch: int, consumed: int) -> Json:
    """The state of a queue that has handed out ``consumed`` patches of an epoch."""
    return {
        "version": VERSION,
        "fingerprint": fingerprint,
        "seed": seed,
        "epoch": epoch,
        "consumed": consumed,
    }


def epoch_and_consumed(state: Mapping[str, Any], fingerprint: Json, seed: int) -> tuple[int, int]:
    """Epoch and number of patches consumed of a state; an OptionError if it is of another stream."""
    try:
        version, epoch, consumed = (operator.index(state[key]) for key in ("version", "epoch", "consumed"))
        before = {**dict(state["fingerprint"]), "seed": state["seed"]}
    except (KeyError, TypeError, ValueError):
        raise OptionError(f"this is not the state of a queue: {state!r:.200}") from None
    if version != VERSION or not 0 <= epoch < MOST or not 0 <= consumed < MOST:
        raise OptionError(
            f"the state is of version {version} (known: {VERSION}) at patch {consumed} of epoch {epoch}, "
            f"which is not possible; load a state that state_dict() gave"
        )
    if before.get("shuffle_patches") is True:
        raise OptionError(
            f"the state is of an older version of zpatch, which shuffled patches by another rule; begin its "
            f"epoch anew with set_epoch({epoch})"
        )
    now = {**fingerprint, "seed": seed}
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys(), key=str)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OptionError(f"the state is of another stream: {'; '.join(changed)}")
    return epoch, consumed
