"""Long training: workers are killed again and again, and the user's loop goes on from the last state.

The loop runs in a process of its own. Every patch of every epoch arrives exactly once, as in a run that
nobody disturbs, and memory, open files and processes stay as they are after the first epochs.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from numpy.typing import NDArray
from processes import children
from streams import item

import zpatch as zp
from zpatch.digests import digest
from zpatch.errors import QueueError

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")

MIB = 2**20
PATCH = 24
SAMPLER = zp.UniformSampler(PATCH)
OPTIONS: dict[str, Any] = {"max_length": 16, "patches_per_volume": 8}
EPOCH = 32  # patches, of four subjects
KILLS_EACH_EPOCH = 1.5
WARM_UP = 3  # parts of all restarts: the first third
GROWTH_BYTES = 4 * MIB  # less than two queues hold for their patches


@pytest.mark.slow
def test_a_stream_with_killed_workers_is_complete_and_memory_is_flat(cohort_store: Path, full: bool) -> None:
    epochs = 1500 if full else 6
    with forked.start(soak, str(cohort_store), epochs) as process:
        out, err = process.communicate(1000)
    assert process.wait() == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["samples"][-1]["patches"] == epochs * EPOCH
    assert found["wrong"] == []
    assert len(found["samples"]) > epochs // 2, "few workers were killed: this shows little"
    for what, bound in {"memory": GROWTH_BYTES, "files": 0, "processes": 0}.items():
        after = [sample[what] for sample in found["samples"]]
        settled = -(-len(after) // WARM_UP)
        assert max(after[settled:]) <= max(after[:settled]) + bound, (what, after)


def soak(store: str, epochs: int) -> None:
    """Train for some epochs, with kills; print what was seen, to be judged by the test."""
    gc.freeze()  # collections, after each restart, then look at what was made here only
    expected = undisturbed(store, epochs)  # before: torch raises the error about a worker in any queue
    stream = np.full_like(expected, 255)
    samples = [{"patches": patches, **held()} for patches in training(store, epochs, stream)]
    wrong = np.flatnonzero((stream != expected).any(axis=1)).tolist()
    print(json.dumps({"wrong": wrong, "samples": samples}))  # noqa: T201


def undisturbed(store: str, epochs: int) -> NDArray[np.uint8]:
    """The digests of the patches of some epochs, in order, read by a queue without workers."""
    with zp.Queue(zp.Cohort(store), SAMPLER, **OPTIONS) as queue:
        return np.stack([named(patch) for _ in range(epochs) for patch in queue])


def training(store: str, epochs: int, stream: NDArray[np.uint8]) -> Iterator[int]:
    """The user's loop, begun again from the last checkpoint: how many patches it has seen, at each new start.

    A checkpoint is the state of the queue and all that was learnt until then: of patches that came after it,
    nothing is left. The error about a killed worker may come between any two steps of the loop.
    """
    killer = random.Random(0)
    checkpoint: tuple[dict[str, Any] | None, int] = None, 0
    while checkpoint[1] < len(stream):
        with zp.Queue(zp.Cohort(store), SAMPLER, num_workers=2, **OPTIONS) as queue:
            state, seen = checkpoint
            if state is not None:
                queue.load_state_dict(state)
            try:
                while seen < len(stream):
                    for patch in queue:
                        stream[seen] = named(patch)
                        seen += 1
                        checkpoint = queue.state_dict(), seen
                        kill_some_worker(killer, KILLS_EACH_EPOCH / EPOCH)
            except QueueError as error:
                assert "was killed by SIGKILL" in str(error)  # noqa: PT017  # no other error is expected
        del queue
        yield checkpoint[1]


def named(patch: zp.Patch) -> NDArray[np.uint8]:
    """A digest of all of a patch."""
    return np.frombuffer(bytes.fromhex(digest(repr(item(patch)).encode())), np.uint8)


def kill_some_worker(killer: random.Random, probability: float) -> None:
    if killer.random() < probability and (workers := multiprocessing.active_children()):
        os.kill(killer.choice([worker.pid for worker in workers if worker.pid]), signal.SIGKILL)


def held() -> dict[str, int]:
    """Bytes, open files and processes of this process, after what is garbage is collected."""
    gc.collect()
    kinds = "RssAnon:", "RssShmem:"
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))
    return {"memory": memory, "files": len(os.listdir("/proc/self/fd")), "processes": len(children())}
