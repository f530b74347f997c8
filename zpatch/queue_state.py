"""Where a queue's stream is, as small JSON, and whether the stream of another queue is the same."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from zpatch.cohort import Subject
from zpatch.errors import OptionError
from zpatch.schema import Json, digest

VERSION = 1
MOST = 2**63  # epochs, and patches of one


def subjects_digest(subjects: Sequence[Subject]) -> str:
    """A digest of which subjects there are, in order, and of what is in them."""
    return digest("\n".join(map(_described, subjects)).encode())


def _described(subject: Subject) -> str:
    images = (
        f"{name} {image.kind} {image.shape} {image.record.contents if image.record else image.dtype}"
        for name, image in subject.images.items()
    )
    return f"{subject.name}: {', '.join(images)}"


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
    """Epoch and number of patches consumed of a state, if it is of the stream with that fingerprint."""
    try:
        version, epoch, consumed = (operator.index(state[key]) for key in ("version", "epoch", "consumed"))
        before = {**dict(state["fingerprint"]), "seed": state["seed"]}
    except (KeyError, TypeError, ValueError):
        raise OptionError(f"this is no state of a queue: {state!r:.200}") from None
    if version != VERSION or not 0 <= epoch < MOST or not 0 <= consumed < MOST:
        raise OptionError(f"a state of version {version} at patch {consumed} of epoch {epoch} is not known")
    now = {**fingerprint, "seed": seed}
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys(), key=str)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OptionError(f"the state is of another stream: {'; '.join(changed)}")
    return epoch, consumed
