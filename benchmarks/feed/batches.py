"""Batches, and the contenders that give epochs of them: zpatch here, and limits that no library can beat.

The peers are in feed/peers.py. As in read/peers.py, a library is imported when its function runs.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.read.peers import PRESET, convert

PATCH, BATCH, PER_SUBJECT, WORKERS, MAX_LENGTH = 96, 8, 10, 2, 100
ZPATCH, ZPATCH_ALONE = f"zpatch, {PRESET}", f"zpatch, {PRESET}, no workers"
ZPATCH_HC, ZPATCH_NONE = "zpatch, lz4hc", "zpatch, none"
ZPATCH_STORED, ZPATCH_MIXED = f"{ZPATCH}, dtype=None", f"{ZPATCH}, MixedSampler"
GROUPS = "zpatch's groups without a queue, two threads"
GROUPS_FLOAT, LIMIT = f"{GROUPS}, as float32", "limit: memory maps, two threads"

Box = tuple[slice, slice, slice]
Pair = tuple[Any, Any]  # a subject's image and label map, (z, y, x)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Image (float32) and label (uint8), (B, 1, n, n, n), and the subject of each."""

    image: torch.Tensor
    label: torch.Tensor
    subjects: Sequence[str]


Epoch = Callable[[], Iterator[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A way to feed: ``make(cohort, store)`` writes the store that ``open(cohort, store)`` gives epochs from.

    ``cohort`` is a folder of ``data.cohort``; a contender without a ``store`` reads its files. Contenders of
    one ``kind`` are compared. A ``transposed`` one gives (x, y, z); a ``bare`` one only numbers of patches.
    ``dtype`` is the type of its images.
    """

    name: str
    store: str
    make: Callable[[Path, Path], object]
    open: Callable[[Path, Path], Epoch]
    kind: str = "workers"
    package: str = "zpatch"
    folder: Path | None = None  # of the package, if it is not installed with the others
    transposed: bool = False
    bare: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def installed(self) -> bool:
        """Whether its library is installed."""
        if self.folder is not None:
            return (self.folder / self.package).is_dir()
        return importlib.util.find_spec(self.package) is not None

    def __str__(self) -> str:
        if self.package == "zpatch" or not self.installed:
            return self.name
        return f"{self.name}, {_version(self)}"


def _version(contender: Contender) -> str:
    if contender.folder is None:
        return version(contender.package)
    found = next(contender.folder.glob(f"{contender.package}-*.dist-info"))
    return found.name.removesuffix(".dist-info").rpartition("-")[2]


def names_of(cohort: Path) -> list[str]:
    """The subjects of a cohort."""
    return sorted(folder.name for folder in (cohort / "nii").iterdir())


def no_store(cohort: Path, store: Path) -> None:
    """Write nothing: the contender reads the files of the cohort."""


# zpatch


def zpatch_queue(store: Path, **options: Any) -> Any:
    """The queue that is measured; ``options`` replace those of zpatch.Queue that are chosen here."""
    import zpatch as zp

    sampler = options.pop("sampler", None) or zp.UniformSampler(options.pop("patch", PATCH))
    chosen = {"max_length": MAX_LENGTH, "patches_per_volume": PER_SUBJECT, "num_workers": WORKERS} | options
    return zp.Queue(zp.Cohort(store), sampler, **chosen)


def _mixed_sampler() -> Any:
    """As nnU-Net draws: a third of the patches around a voxel of a class."""
    import zpatch as zp

    return zp.MixedSampler([(2, zp.UniformSampler(PATCH)), (1, zp.LabelSampler(PATCH, "seg"))])


def _zpatch_of(
    name: str, codec: str, workers: int = WORKERS, stored: bool = False, mixed: bool = False
) -> Contender:
    def open_it(cohort: Path, store: Path) -> Epoch:
        import zpatch as zp

        options: dict[str, Any] = {"dtype": None} if stored else {}
        options |= {"sampler": _mixed_sampler()} if mixed else {}
        queue = zpatch_queue(store, num_workers=workers, **options)
        loader = zp.SubjectsLoader(queue, batch_size=BATCH)

        def epoch() -> Iterator[Batch]:
            for batch in loader:
                yield Batch(batch.ct.data, batch.seg.data, batch.subjects)

        return epoch

    kind = "workers" if workers else "threads"
    dtype = torch.int16 if stored else torch.float32
    return Contender(
        name,
        f"zpatch-{codec}",
        _make_zpatch(codec),
        open_it,
        f"zpatch, {kind}",
        transposed=True,
        dtype=dtype,
    )


def _make_zpatch(codec: str) -> Callable[[Path, Path], None]:
    return lambda cohort, store: convert(cohort / "nii", store, codec=codec)


def _groups_of(name: str, image_dtype: str) -> Contender:
    """The reads of an epoch, by two threads, into memory that no batch uses."""

    def open_it(cohort: Path, store: Path) -> Epoch:
        import zpatch as zp
        from zpatch.sources.group_read import read_group
        from zpatch.sources.voxel_source import new_voxels

        subjects, sampler = zp.Cohort(store), zp.UniformSampler(PATCH)
        rng, pool = np.random.default_rng(0), ThreadPoolExecutor(WORKERS)
        shape = 1, PATCH, PATCH, PATCH

        def read(number: int, seed: int) -> int:
            images = subjects[number].images
            locations = sampler.locations(subjects[number], PER_SUBJECT, seed)
            dtypes = image_dtype, "uint8"
            outs = [[new_voxels(shape, np.dtype(dtype)) for _ in locations] for dtype in dtypes]
            read_group([images["ct"], images["seg"]], locations, out=outs)
            return PER_SUBJECT

        def epoch() -> Iterator[int]:
            seeds = rng.integers(2**32, size=len(subjects)).tolist()
            return pool.map(read, rng.permutation(len(subjects)).tolist(), seeds)

        return epoch

    return Contender(name, f"zpatch-{PRESET}", _make_zpatch(PRESET), open_it, kind="limit", bare=True)


# Raw voxels, and tensorstore's own threads: batches are made ahead of the one that is consumed.


def _shuffled(names: Sequence[str], rng: np.random.Generator) -> Iterator[list[str]]:
    """The subjects of each batch of an epoch."""
    order = rng.permutation(np.repeat(names, PER_SUBJECT)).tolist()
    return (order[n : n + BATCH] for n in range(0, len(order), BATCH))


def random_box(shape: Sequence[int], rng: np.random.Generator) -> Box:
    start = rng.integers(0, np.subtract(shape, PATCH) + 1).tolist()
    z, y, x = (slice(a, a + PATCH) for a in start)
    return z, y, x


def _new_batch(subjects: Sequence[str]) -> Batch:
    shape = len(subjects), 1, PATCH, PATCH, PATCH
    return Batch(torch.empty(shape), torch.empty(shape, dtype=torch.uint8), subjects)


def batches_ahead(pairs: dict[str, Pair], start: Callable[[Batch, list[Box]], Callable[[], object]]) -> Epoch:
    """Epochs of batches that ``start`` begins to fill; it returns a function that waits until one is full."""
    rng = np.random.default_rng(0)

    def epoch() -> Iterator[Batch]:
        begun: deque[tuple[Batch, Callable[[], object]]] = deque()
        for subjects in itertools.chain(_shuffled(list(pairs), rng), itertools.repeat(None, WORKERS)):
            if subjects is not None:
                batch = _new_batch(subjects)
                boxes = [random_box(pairs[subject][0].shape, rng) for subject in subjects]
                begun.append((batch, start(batch, boxes)))
            if begun and (len(begun) > WORKERS or subjects is None):
                batch, wait = begun.popleft()
                wait()
                yield batch

    return epoch


def _open_limit(cohort: Path, store: Path) -> Epoch:
    pairs = {name: data.subject_voxels(cohort, name) for name in names_of(cohort)}
    pool = ThreadPoolExecutor(WORKERS)

    def fill(image: NDArray[Any], label: NDArray[Any], boxes: list[Box], subjects: Sequence[str]) -> None:
        for n, (box, subject) in enumerate(zip(boxes, subjects, strict=True)):
            image[n, 0], label[n, 0] = (voxels[box] for voxels in pairs[subject])

    def start(batch: Batch, boxes: list[Box]) -> Callable[[], object]:
        return pool.submit(fill, batch.image.numpy(), batch.label.numpy(), boxes, batch.subjects).result

    return batches_ahead(pairs, start)


ZPATCHES = (
    _zpatch_of(ZPATCH, PRESET),
    _zpatch_of(ZPATCH_ALONE, PRESET, workers=0),
    _zpatch_of(ZPATCH_HC, "lz4hc"),
    _zpatch_of(ZPATCH_NONE, "none"),
    _zpatch_of(ZPATCH_STORED, PRESET, stored=True),
    _zpatch_of(ZPATCH_MIXED, PRESET, mixed=True),
    _groups_of(GROUPS, "int16"),
    _groups_of(GROUPS_FLOAT, "float32"),
    Contender(LIMIT, "", no_store, _open_limit, kind="limit"),
)
