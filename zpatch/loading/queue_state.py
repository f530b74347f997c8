"""Where a queue's stream is, as small JSON, and whether the stream of another queue is the same."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json, digest
from zpatch.errors import OptionError
from zpatch.images.image import Image
from zpatch.images.subject import Subject

VERSION = 1
MOST = 2**63  # epochs, and patches of one


def subjects_digest(subjects: Sequence[Subject]) -> str:
    """A digest of which subjects there are, in order, and of what is in them."""
    return digest("\n".join(map(_described, subjects)).encode())


def _described(subject: Subject) -> str:
    images = (
        f"{name} {image.kind} {image.shape} {_contents(image)}" for name, image in subject.images.items()
    )
    return f"{subject.name}: {', '.join(images)}"


def _contents(image: Image) -> str:
    """What the manifest says of an image's files, else all that is known of it."""
    return image.record.contents if image.record and image.record.files else image.identity()


def order_identity(sampler: Any, order: NDArray[np.int64]) -> str:
    """What tells the order of a ``subject_sampler`` from others, the same on all ranks.

    ``order`` is that of epoch 0; one that deals subjects out to ranks is told by how it does so.
    """
    if not hasattr(sampler, "num_replicas"):
        return digest(order.tobytes())
    options = ("num_replicas", "seed", "shuffle", "drop_last")
    told = ", ".join(f"{name}={getattr(sampler, name)!r}" for name in options if hasattr(sampler, name))
    return f"{type(sampler).__name__}({told})"


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
