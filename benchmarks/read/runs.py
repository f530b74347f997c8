"""The measurements of stage read, each in a fresh process: seconds of contenders that alternate."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.measure import Run, alternate, drop_cache, settle
from benchmarks.read.peers import (
    ZPATCH,
    Contender,
    Group,
    Reader,
    contender_of,
    in_stored_order,
    raw_voxels,
    zpatch_image,
)

LABEL_PATCH = 64
CLASSES = 100
CENTRES = 1000
HASHED_BYTES = 64 * 2**20
TORCHIO = "TorchIO, map in memory"


@dataclass(frozen=True, slots=True)
class Plan:
    """Names of the contenders, repetitions, groups in each, voxels a side of a patch, patches of a group."""

    names: Sequence[str]
    repetitions: int
    groups: int
    patch: int
    together: int


class Groups:
    """The groups that all contenders read in a round; each round has other groups, given by its number."""

    def __init__(self, shape: tuple[int, ...], plan: Plan, seed: int = 0) -> None:
        self._shape, self._plan, self._seed = shape, plan, seed
        self._round = 0
        self.now: list[Group] = []
        self.renew()

    def renew(self) -> None:
        rng = np.random.default_rng([self._seed, self._round])
        self._round += 1
        size = (self._plan.groups, self._plan.together, 3)
        starts = rng.integers(0, np.subtract(self._shape, self._plan.patch) + 1, size=size)
        self.now = [Group.of(of_group, self._plan.patch, self._shape) for of_group in starts]

    def covering(self) -> list[Group]:
        """Groups that together read every voxel."""
        patch, together = self._plan.patch, self._plan.together
        axes = [np.append(np.arange(0, n - patch, patch), n - patch) for n in self._shape]
        starts = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        parts = np.split(starts, range(together, len(starts), together))
        return [Group.of(part, patch, self._shape) for part in parts]

    def read(self, reader: Reader) -> None:
        for group in self.now:
            reader(group)


def reading_times(head: str, stores: str, plan_text: str) -> dict[str, list[float]]:
    """Seconds of each contender for the same groups, on one core. The voxels they read are checked first."""
    settle(one_core=True)
    plan = Plan(**json.loads(plan_text))
    voxels = raw_voxels(Path(head))
    groups = Groups(voxels.shape, plan)
    runs: dict[str, Run] = {}
    for contender in map(contender_of, plan.names):
        reader = contender.open(Path(stores, contender.store))
        _check(contender, reader, groups, voxels)
        runs[contender.name] = functools.partial(groups.read, reader)
    return alternate(runs, plan.repetitions, before_round=groups.renew)


def _check(contender: Contender, reader: Reader, groups: Groups, voxels: NDArray[Any]) -> None:
    """Compare the whole volume, or a part if that is slow; pages are then cached and checksums verified."""
    for group in groups.now if contender.slow else groups.covering():
        for box, found in zip(group.boxes, reader(group), strict=not contender.bare):
            assert np.array_equal(in_stored_order(found), voxels[box]), f"{contender.name} read other voxels"


def first_times(head: str, stores: str, plan_text: str) -> dict[str, list[float]]:
    """Seconds of each contender for one group of a store that it reads for the first time, on one core.

    Each round has other links to the stores' files, which are in the page cache: so nothing is mapped and no
    checksum is verified. The store is opened before: a training run opens many at once, or for each patch.
    """
    from zpatch.chunks.mapped_shards import close_shards

    settle(one_core=True)
    plan = Plan(**json.loads(plan_text))
    groups = Groups(raw_voxels(Path(head)).shape, plan, seed=5)
    contenders = [contender_of(name) for name in plan.names]
    readers: dict[str, Reader] = {}
    links = Path(stores, "links")

    def renew() -> None:
        groups.renew()
        readers.clear()
        close_shards(links)
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir()
        for number, contender in enumerate(contenders):
            store = links / str(number)
            _link(Path(stores, contender.store).resolve(), store)
            readers[contender.name] = contender.open(store)

    runs: dict[str, Run] = {name: lambda name=name: groups.read(readers[name]) for name in plan.names}
    alternate(runs, 1, before_round=renew)
    times = alternate(runs, plan.repetitions, before_round=renew)
    shutil.rmtree(links)
    return times


def _link(store: Path, to: Path) -> None:
    if store.is_dir():
        shutil.copytree(store, to, copy_function=os.link)
    else:
        os.link(store, to)


def cold_times(head: str, stores: str, plan_text: str) -> dict[str, Any]:
    """Seconds of each contender, with opening, first without and then with its files in the page cache."""
    from zpatch.chunks.mapped_shards import close_shards

    settle(one_core=True)
    plan = Plan(**json.loads(plan_text))
    groups = Groups(raw_voxels(Path(head)).shape, plan, seed=1)
    contenders = [contender_of(name) for name in plan.names]
    paths = [Path(stores, contender.store) for contender in contenders]
    dropped: list[bool] = []
    os.sync()  # unwritten pages cannot be dropped

    def close() -> None:
        for path in paths:
            close_shards(path)

    def drop() -> None:
        close()
        dropped.extend(map(drop_cache, paths))

    def read(contender: Contender, path: Path) -> None:
        groups.read(contender.open(path))

    pairs = list(zip(contenders, paths, strict=True))
    runs: dict[str, Run] = {
        contender.name: functools.partial(read, contender, path) for contender, path in pairs
    }
    alternate(runs, 1)
    cold = alternate(runs, plan.repetitions, before_each=drop, before_round=groups.renew)
    alternate(runs, 1)
    warm = alternate(runs, plan.repetitions, before_each=close)
    return {"cold": cold, "warm": warm, "dropped": all(dropped)}


def thread_times(head: str, stores: str, plan_text: str) -> dict[str, list[float]]:
    """Seconds of one thread for its groups, and of two threads with as many groups each."""
    settle(one_core=False)
    plan = Plan(**json.loads(plan_text))
    shape = raw_voxels(Path(head)).shape
    mine, other = (Groups(shape, plan, seed) for seed in (2, 3))
    store = Path(stores, ZPATCH)
    image, reader = zpatch_image(store), contender_of(ZPATCH).open(store)
    hashed = bytes(HASHED_BYTES)
    pool = ThreadPoolExecutor(2)

    def two(work: Callable[[Groups], object]) -> Run:
        return lambda: list(pool.map(work, (mine, other)))

    def renew() -> None:
        mine.renew()
        other.renew()

    def read(groups: Groups) -> None:
        groups.read(reader)

    def digest(groups: Groups) -> None:
        hashlib.sha256(hashed)

    runs: dict[str, Run] = {
        "one": lambda: read(mine),
        "two": two(read),
        "hashing, one": lambda: digest(mine),
        "hashing, two": two(digest),
        "scheduler": lambda: mine.read(lambda group: image.read_group(group.locations, scheduler="threads")),
    }
    alternate(runs, 3)
    return alternate(runs, plan.repetitions, before_round=renew)


def graph_times(head: str, stores: str, plan_text: str) -> dict[str, list[float]]:
    """Seconds with Dask's scheduler, and with the same tasks called one after the other."""
    settle(one_core=True)
    plan = Plan(**json.loads(plan_text))
    groups = Groups(raw_voxels(Path(head)).shape, plan, seed=4)
    reader = contender_of(ZPATCH).open(Path(stores, ZPATCH))

    def direct() -> None:
        with mock.patch("zpatch.sources.group_read.run_graph", _in_order):
            groups.read(reader)

    runs: dict[str, Run] = {"graph": lambda: groups.read(reader), "direct": direct}
    alternate(runs, 3)
    return alternate(runs, plan.repetitions, before_round=groups.renew)


def _in_order(graph: dict[Any, Any], keys: list[Any], scheduler: str = "sync") -> Any:
    """Run a graph without Dask; its tasks are in the order of their dependencies."""
    results: dict[Any, Any] = {}

    def filled(argument: Any) -> Any:
        if isinstance(argument, list):
            return [filled(a) for a in argument]
        with contextlib.suppress(TypeError):  # unhashable, so not a key
            return results.get(argument, argument)
        return argument

    for name, (function, *arguments) in graph.items():
        results[name] = function(*map(filled, arguments))
    return [results[key] for key in keys]


def draw_times(source: str, store: str, side: str, repetitions: str) -> dict[str, list[float]]:
    """Seconds of drawing 1,000 centres: by zpatch, and alternating by TorchIO if ``source`` is not empty."""
    settle(one_core=True)
    runs: dict[str, Run] = {"zpatch": _zpatch_draw(store)}
    alternate(runs, 2)
    if source:
        runs[TORCHIO] = _torchio_draw(np.array(data.labels_of(Path(source), int(side))))
    return alternate(runs, int(repetitions))


def open_labels(store: str) -> None:
    """Import the modules of a draw, and open the map."""
    _zpatch_draw(store)


def draw_labels(store: str) -> None:
    """The same, and draw centres."""
    _zpatch_draw(store)()


def _zpatch_draw(store: str) -> Run:
    import zpatch as zp

    subject = zp.Cohort(store)["sub-01"]
    sampler = zp.LabelSampler(LABEL_PATCH, "seg", _equal_probabilities())
    rng = np.random.default_rng(0)
    return lambda: sampler.locations(subject, CENTRES, rng)


def _torchio_draw(labels: NDArray[np.uint8]) -> Run:
    """The work of TorchIO's sampler for positions, without cutting out patches."""
    import torch
    import torchio  # type: ignore[import-untyped]

    tensor = torch.from_numpy(np.ascontiguousarray(labels.T)[None])
    subject = torchio.Subject(seg=torchio.LabelMap(tensor=tensor))
    sampler = torchio.LabelSampler(LABEL_PATCH, "seg", _equal_probabilities())

    def draw() -> None:
        probabilities = sampler.process_probability_map(sampler.get_probability_map(subject), subject)
        cumulative = sampler.get_cumulative_distribution_function(probabilities)
        for _ in range(CENTRES):
            sampler.get_random_index_ini(probabilities, cumulative)

    return draw


def _equal_probabilities() -> dict[int, float]:
    return dict.fromkeys(range(1, CLASSES + 1), 1.0)
