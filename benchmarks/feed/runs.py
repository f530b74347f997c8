"""The measurements of stage feed, each in a fresh process: epochs, first batches, gaps, and memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.feed.batches import (
    BATCH,
    MAX_LENGTH,
    PATCH,
    PER_SUBJECT,
    WORKERS,
    Batch,
    Contender,
    Epoch,
    names_of,
    zpatch_queue,
)
from benchmarks.feed.peers import contender_of
from benchmarks.measure import ANONYMOUS, held_bytes, tree_of

KEY = 8  # voxels by which a patch is found
SLOWER = 1.5  # the consumer of ``gaps`` than what it consumes
SHORT = 16  # subjects of a short epoch
SETTLE_S = 0.02


def make(cohort: str, stores: str, *names: str) -> None:
    """Write the stores of some contenders that do not exist yet."""
    for contender in map(contender_of, names):
        store = Path(stores, contender.store)
        if not store.exists():
            contender.make(Path(cohort), store)


def epochs_of(name: str, cohort: str, stores: str) -> Callable[[str], Any]:
    """Answers ``check`` with nothing, and ``turn`` with the seconds of an epoch that follows another one."""
    torch.set_num_threads(1)
    contender, source = contender_of(name), Path(cohort)
    epoch = contender.open(source, Path(stores, contender.store))

    def answer(question: str) -> float | None:
        if question == "check":
            _check(contender, epoch, source)
            return None
        for _ in epoch():
            pass
        begin = time.perf_counter()
        for _ in epoch():
            pass
        return time.perf_counter() - begin

    return answer


def _check(contender: Contender, epoch: Epoch, cohort: Path) -> None:
    """Check an epoch: voxels of the first batch, types of all batches, and how often each subject appears."""
    names = names_of(cohort)
    if contender.bare:
        assert sum(epoch()) == PER_SUBJECT * len(names)
        return
    seen: Counter[str] = Counter()
    for batch in epoch():
        assert batch.image.dtype == contender.dtype
        assert batch.label.dtype == torch.uint8
        assert batch.image.shape == batch.label.shape == (BATCH, 1, PATCH, PATCH, PATCH)
        if not seen:
            _check_voxels(contender, batch, cohort)
        seen.update(batch.subjects)
    assert seen == dict.fromkeys(names, PER_SUBJECT), f"{contender.name} gave {seen}"


def _check_voxels(contender: Contender, batch: Batch, cohort: Path) -> None:
    for n, subject in enumerate(batch.subjects):
        voxels, labels = data.subject_voxels(cohort, subject)
        image, label = (found[n, 0].numpy() for found in (batch.image, batch.label))
        if contender.transposed:
            image, label = image.T, label.T
        assert any(
            np.array_equal(voxels[box], image) and np.array_equal(labels[box], label)
            for box in _places(image, voxels)
        ), f"{contender.name} gave a patch that {subject} does not have"


def _places(patch: NDArray[Any], voxels: NDArray[Any]) -> Iterator[tuple[slice, ...]]:
    """Boxes whose first voxels are those of a patch."""
    last = [n - PATCH + 1 for n in voxels.shape]
    fits = np.ones(last, dtype=bool)
    for n, value in enumerate(patch[0, 0, :KEY]):
        fits &= voxels[: last[0], : last[1], n : last[2] + n] == value
    return (tuple(slice(a, a + PATCH) for a in start) for start in np.argwhere(fits).tolist())


def gaps(name: str, cohort: str, stores: str) -> dict[str, Any]:
    """Seconds from batch to batch if the consumer is slower than the feed: within an epoch, and between two.

    ``pause`` is the seconds that the consumer takes for each batch.
    """
    torch.set_num_threads(1)
    contender = contender_of(name)
    epoch = contender.open(Path(cohort), Path(stores, contender.store))
    batches = sum(1 for _ in epoch())
    begin = time.perf_counter()
    for _ in epoch():
        pass
    pause = SLOWER * (time.perf_counter() - begin) / batches
    arrived: list[float] = []
    for _ in range(2):
        for _ in epoch():
            arrived.append(time.perf_counter())
            time.sleep(pause)
    apart = np.diff(arrived)
    within = np.delete(apart, batches - 1)
    return {"pause": pause, "within": within.tolist(), "between": [apart[batches - 1]]}


def first_batch(store: str, max_length: str, patch: str) -> float:
    """Seconds from opening a cohort to the first batch of its queue, imports not counted."""
    import zpatch as zp
    import zpatch.loading.patch_queue

    torch.set_num_threads(1)
    begin = time.perf_counter()
    queue = zpatch_queue(Path(store), max_length=int(max_length), patch=int(patch))
    next(iter(zp.SubjectsLoader(queue, batch_size=BATCH)))
    seconds = time.perf_counter() - begin
    queue.close()
    return seconds


def group_seconds(store: str) -> list[float]:
    """Seconds of one thread for the patches of each subject, its opening included."""
    import zpatch as zp
    from zpatch.sampling.patch_sampler import read_patches

    torch.set_num_threads(1)
    cohort, sampler = zp.Cohort(store), zp.UniformSampler(PATCH)
    taken = []
    for number in range(len(cohort)):
        begin = time.perf_counter()
        subject = cohort[number]
        read_patches(subject, sampler.locations(subject, PER_SUBJECT, number))
        taken.append(time.perf_counter() - begin)
    return taken


def stats_cost(store: str) -> dict[str, Any]:
    """Seconds of a warm epoch of this process, and of all that counts for ``queue.stats()``: how often it is
    called in the epoch, and how long one call takes.
    """
    import zpatch as zp
    from zpatch import work_counts
    from zpatch.chunks import gather
    from zpatch.loading.batch_feed import BatchFeed
    from zpatch.loading.worker import Worker

    torch.set_num_threads(1)
    queue = zpatch_queue(Path(store), num_workers=0)
    loader = zp.SubjectsLoader(queue, batch_size=BATCH)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        for _ in loader:
            pass
        seconds.append(time.perf_counter() - begin)
    targets = {
        "a change of stage": (work_counts, "_switch"),
        "a read": (gather, "count_fetched"),
        "a task": (Worker, "__getitem__"),
        "a batch": (BatchFeed, "batch"),
    }
    calls: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in targets.items():
            real = getattr(owner, attribute)

            def counting(*given: Any, name: str = name, real: Any = real) -> Any:
                calls[name] += 1
                return real(*given)

            stack.enter_context(replaced.object(owner, attribute, counting))
        for _ in loader:
            pass
    queue.close()
    return {"seconds": min(seconds[1:]), "calls": calls, "costs": _counting_costs()}


def _counting_costs() -> dict[str, float]:
    """Seconds that each call takes which counts for ``queue.stats()``."""
    from zpatch.geometry.boxes import PatchLocation
    from zpatch.loading.queue_stats import IterationCounts, WorkerRow
    from zpatch.loading.shared_slots import ROW, ImagePlace, SlotLayout
    from zpatch.loading.worker import Delivered
    from zpatch.work_counts import Work, count, count_fetched, during

    rows = np.zeros((WORKERS + 1, ROW), np.int64)
    counts = IterationCounts(rows, WORKERS, MAX_LENGTH, 0)
    places = [ImagePlace(n, "scalar", (1, PATCH, PATCH, PATCH), torch.float32) for n in ("ct", "seg")]
    sent = [Delivered("s", PatchLocation((0, 0, 0), (1, 1, 1)), SlotLayout.of(places), [])] * BATCH

    def change() -> None:
        with during(Work.FETCHING):
            pass

    def read() -> None:
        count(Work.KNOWN_CHUNKS, 1)
        count_fetched(0, 0, 0)

    def task() -> None:
        with WorkerRow(rows, 0).task(0):
            pass

    def batch() -> None:
        with counts.waiting(1):
            pass
        counts.hand_out([patch.nbytes for patch in sent], 1)

    with during(Work.DECODING):
        each = {
            "a change of stage": _seconds_of(change) / 2,
            "a read": _seconds_of(read),
            "a batch": _seconds_of(batch),
        }
    return {**each, "a task": _seconds_of(task) - 2 * each["a change of stage"]}


def _seconds_of(run: Callable[[], None], often: int = 20_000) -> float:
    """Seconds of one of many runs."""
    begin = time.perf_counter()
    for _ in range(often):
        run()
    return (time.perf_counter() - begin) / often


def queue_in_memory(store: str, patch: str, batched: str) -> tuple[int, int]:
    """Peak bytes of this process and its workers in two epochs of a queue, ``batched`` or patch by patch, and
    the bytes that the queue states. Without a patch size, the bytes after imports and opening the cohort.
    """
    import zpatch as zp
    import zpatch.loading.patch_queue

    torch.set_num_threads(1)
    cohort = zp.Cohort(store)
    if not patch:
        return held_bytes(tree_of(os.getpid())), len(cohort)
    queue = zpatch_queue(Path(store), patch=int(patch))
    source: Any = zp.SubjectsLoader(queue, batch_size=BATCH) if batched else queue
    peak, each = 0, 1 if batched else BATCH
    for _ in range(2):
        for number, _ in enumerate(source):
            if number % each == 0:
                time.sleep(SETTLE_S)  # until workers are idle: processes are measured one after the other
                peak = max(peak, held_bytes(tree_of(os.getpid())))
    stated = queue.max_memory
    queue.close()
    return peak, stated


def growth(store: str, epochs: str) -> dict[str, list[list[int]]]:
    """Anonymous bytes of this process and of each worker after each of some short epochs."""
    import zpatch as zp

    torch.set_num_threads(1)
    queue = zp.Queue(
        zp.Cohort(store)[:SHORT], zp.UniformSampler(PATCH), MAX_LENGTH, PER_SUBJECT, num_workers=WORKERS
    )
    loader = zp.SubjectsLoader(queue, batch_size=BATCH)
    held: list[list[int]] = []
    for _ in range(int(epochs)):
        for _ in loader:
            pass
        held.append([held_bytes([pid], [ANONYMOUS]) for pid in tree_of(os.getpid())])
    mine, *workers = map(list, zip(*held, strict=True))
    queue.close()
    return {"mine": [mine], "workers": workers}
