"""The peers in feeding: each gives epochs of batches from its own store of the cohort, or from its files.

As in read/peers.py, a library is imported when its function runs, and used in the way that its documentation
calls fastest. Stored voxels are sent between processes, and batches are cast once: that is half the bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import data
from benchmarks.feed.batches import (
    BATCH,
    MAX_LENGTH,
    PATCH,
    PER_SUBJECT,
    WORKERS,
    ZPATCHES,
    Batch,
    Box,
    Contender,
    Epoch,
    Pair,
    batches_ahead,
    names_of,
    no_store,
    random_box,
)
from benchmarks.read.peers import BLOSC, CHUNK, Voxels

BLOSC_OF_LABELS = {**BLOSC, "cname": "lz4hc", "clevel": 4}  # as zpatch's preset packs label maps

BLOSC2, MONAI = "DataLoader + blosc2 as in nnU-Net", "MONAI PersistentDataset"
TENSORSTORE, TENSORSTORE_THREADS = "DataLoader + tensorstore", "tensorstore's own two threads"
TORCHIO, TORCHIO_GZ = "TorchIO 1 Queue, .nii", "TorchIO 1 Queue, .nii.gz"
TORCHIO_2 = "TorchIO 2 Queue, .nii"
TORCHIO_2_ANEW, TORCHIO_2_ANEW_GZ = (
    f"TorchIO 2 Queue, {kind}, new subjects each epoch" for kind in (".nii", ".nii.gz")
)
TORCHIO_2_FOLDER = Path(sys.prefix) / "torchio-2"  # a separate one, as both packages have the same name

Sample = dict[str, Any]


# torch's DataLoader over random crops.


class _RandomPatches(Dataset[Sample]):
    """Random patches by number, ``PER_SUBJECT`` for each subject; each worker opens a subject once."""

    def __init__(self, cohort: Path, store: Path) -> None:
        self.names = names_of(cohort)
        self.store = store
        self._opened: dict[str, Pair] = {}
        self._rng: np.random.Generator | None = None

    def __len__(self) -> int:
        return PER_SUBJECT * len(self.names)

    def __getitems__(self, numbers: list[int]) -> Sample:
        """A batch, read into shared memory, to which torch would copy it otherwise."""
        if self._rng is None:
            self._rng = np.random.default_rng(torch.initial_seed())
        subjects = [self.names[number // PER_SUBJECT] for number in numbers]
        pairs = [self._pair(subject) for subject in subjects]
        boxes = [random_box(image.shape, self._rng) for image, _ in pairs]
        image, label = (_shared(len(numbers), dtype) for dtype in (torch.int16, torch.uint8))
        self.fill(image[:, 0].numpy(), label[:, 0].numpy(), pairs, boxes)
        return {"image": image, "label": label, "subject": subjects}

    def _pair(self, subject: str) -> Pair:
        if subject not in self._opened:
            self._opened[subject] = self.open(subject)
        return self._opened[subject]

    def open(self, subject: str) -> Pair:
        """Image and label map."""
        raise NotImplementedError

    def fill(self, image: Voxels, label: Voxels, pairs: Sequence[Pair], boxes: Sequence[Box]) -> None:
        """Read the boxes of each pair."""
        for n, (pair, box) in enumerate(zip(pairs, boxes, strict=True)):
            image[n], label[n] = (voxels[box] for voxels in pair)

    def epochs(self, start_method: str | None = None) -> Epoch:
        """Through a DataLoader."""
        loader: DataLoader[Any] = DataLoader(
            self,
            BATCH,
            shuffle=True,
            num_workers=WORKERS,
            collate_fn=_unchanged,
            persistent_workers=True,
            multiprocessing_context=start_method,
        )

        def epoch() -> Iterator[Batch]:
            for batch in loader:
                yield Batch(batch["image"].float(), batch["label"], batch["subject"])

        return epoch


def _shared(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Shared memory, as torch's default collate_fn allocates it in a worker."""
    shared: Any = torch.UntypedStorage
    storage = shared._new_shared(count * PATCH**3 * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).reshape(count, 1, PATCH, PATCH, PATCH)


def _unchanged(batch: Any) -> Any:
    return batch


class _Blosc2Patches(_RandomPatches):
    def open(self, subject: str) -> Pair:
        import blosc2

        blosc2.set_nthreads(1)
        files = (str(self.store / f"{subject}-{name}.b2nd") for name in ("ct", "seg"))
        one = {"nthreads": 1}
        image, labels = (blosc2.open(file, mode="r", mmap_mode="r", dparams=one) for file in files)
        return image, labels


def _make_blosc2(cohort: Path, store: Path) -> None:
    """As nnU-Net, except that single bytes are not shuffled, which would only slow down reading."""
    import blosc2

    store.mkdir()
    for name in names_of(cohort):
        for voxels, what in zip(data.subject_voxels(cohort, name), ("ct", "seg"), strict=True):
            shuffle = blosc2.Filter.SHUFFLE if voxels.itemsize > 1 else blosc2.Filter.NOFILTER
            blosc2.asarray(
                np.array(voxels),
                urlpath=str(store / f"{name}-{what}.b2nd"),
                mode="w",
                chunks=(PATCH,) * 3,
                blocks=(CHUNK,) * 3,
                cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [shuffle]},
            )


class _TensorstorePatches(_RandomPatches):
    def open(self, subject: str) -> Pair:
        if not self._opened:
            self._context = _tensorstore_context(threads=1)
        return _tensorstore_pair(self.store, subject, self._context)

    def fill(self, image: Voxels, label: Voxels, pairs: Sequence[Pair], boxes: Sequence[Box]) -> None:
        _tensorstore_fill(image, label, pairs, boxes, self._context)()


def _tensorstore_fill(
    image: Voxels, label: Voxels, pairs: Sequence[Pair], boxes: Sequence[Box], context: Any
) -> Callable[[], object]:
    """Begin to read the boxes of each pair, all at once; the function that is returned waits for them."""
    import tensorstore

    asked = []
    for n, (pair, box) in enumerate(zip(pairs, boxes, strict=True)):
        for target, source in zip((image, label), pair, strict=True):
            out = tensorstore.array(target[n], context=context)
            asked.append(out.write(tensorstore.cast(source[box], out.dtype)))
    return lambda: [future.result() for future in asked]


def _tensorstore_context(threads: int) -> Any:
    """Files are mapped, and nothing is cached."""
    import tensorstore

    limit = {"limit": threads}
    return tensorstore.Context(
        {"data_copy_concurrency": limit, "file_io_concurrency": limit, "file_io_mode": {"mode": "memmap"}}
    )


def _tensorstore_pair(store: Path, subject: str, context: Any) -> Pair:
    import tensorstore

    specs = (_tensorstore_spec(store / f"{subject}-{name}") for name in ("ct", "seg"))
    image, labels = (tensorstore.open(spec, context=context).result() for spec in specs)
    return image, labels


def _tensorstore_spec(path: Path) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": str(path)}
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
    }


def _make_tensorstore(cohort: Path, store: Path) -> None:
    import tensorstore

    for name in names_of(cohort):
        image, labels = data.subject_voxels(cohort, name)
        for what, voxels, packed in (("ct", image, BLOSC), ("seg", labels, BLOSC_OF_LABELS)):
            spec = _tensorstore_spec(store / f"{name}-{what}")
            created = {**spec, "metadata": _zarr3_metadata(voxels, packed)}
            tensorstore.open(created, create=True).result().write(voxels).result()


def _zarr3_metadata(voxels: Any, packed: dict[str, Any]) -> dict[str, Any]:
    """Blosc in shards of whole planes, as zpatch's shards are."""
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {"name": "blosc", "configuration": {**packed, "typesize": voxels.itemsize, "blocksize": 0}}
    sharding = {
        "chunk_shape": [CHUNK] * 3,
        "codecs": [little if voxels.itemsize > 1 else {"name": "bytes"}, blosc],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    layer = [2 * CHUNK, *(-(-n // 64) * 64 for n in voxels.shape[1:])]
    return {
        "shape": list(voxels.shape),
        "data_type": voxels.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layer}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _open_tensorstore_threads(cohort: Path, store: Path) -> Epoch:
    context = _tensorstore_context(threads=WORKERS)
    pairs = {name: _tensorstore_pair(store, name, context) for name in names_of(cohort)}

    def start(batch: Batch, boxes: list[Box]) -> Callable[[], object]:
        image, label = (of[:, 0].numpy() for of in (batch.image, batch.label))
        return _tensorstore_fill(image, label, [pairs[s] for s in batch.subjects], boxes, context)

    return batches_ahead(pairs, start)


# Whole volumes, and patches cut from them.


def _open_monai(cohort: Path, store: Path) -> Epoch:
    """Volumes are cached as stored. Four subjects make five batches, each with two patches of each."""
    from monai.data import DataLoader as MonaiLoader
    from monai.data import PersistentDataset, set_track_meta
    from monai.transforms import Compose, LoadImaged, RandSpatialCropSamplesd

    set_track_meta(False)
    files = [
        {"image": str(folder / "ct.nii"), "label": str(folder / "seg.nii"), "subject": folder.name}
        for folder in sorted((cohort / "nii").iterdir())
    ]
    crop = RandSpatialCropSamplesd(["image", "label"], (PATCH,) * 3, PER_SUBJECT, random_size=False)
    steps = [
        LoadImaged("image", dtype=np.int16, ensure_channel_first=True),
        LoadImaged("label", dtype=np.uint8, ensure_channel_first=True),
        crop,
    ]
    volumes = PersistentDataset(files, Compose(steps), store)
    together = BATCH // 2
    parts = PER_SUBJECT * together // BATCH
    loader = MonaiLoader(
        volumes, batch_size=together, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )

    def epoch() -> Iterator[Batch]:
        for found in loader:
            for part in range(parts):
                image, label, subjects = (found[key][part::parts] for key in ("image", "label", "subject"))
                yield Batch(image.float(), label, subjects)

    return epoch


def _make_monai(cohort: Path, store: Path) -> None:
    for _ in _open_monai(cohort, store)():
        pass


def _torchio_of(name: str, kind: str) -> Contender:
    def open_it(cohort: Path, store: Path) -> Epoch:
        import torchio as tio

        subjects = [
            tio.Subject(ct=tio.ScalarImage(ct), seg=tio.LabelMap(seg), subject=ct.parent.name)
            for ct, seg in _files(cohort, kind)
        ]
        queue = tio.Queue(
            tio.SubjectsDataset(subjects),
            MAX_LENGTH,
            PER_SUBJECT,
            tio.UniformSampler(PATCH),
            num_workers=WORKERS,
        )
        loader = tio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0)

        def epoch() -> Iterator[Batch]:
            for batch in loader:
                yield Batch(batch["ct"]["data"].float(), batch["seg"]["data"], batch["subject"])

        return epoch

    return Contender(name, "", no_store, open_it, package="torchio", transposed=True)


def _torchio_2_of(name: str, kind: str, *, anew: bool) -> Contender:
    """Its queue loads subjects in threads and keeps them; ``anew`` makes new subjects for each epoch."""

    def open_it(cohort: Path, store: Path) -> Epoch:
        import torchio as tio

        def new_loader() -> Any:
            subjects = [
                tio.Subject(ct=tio.ScalarImage(ct), seg=tio.LabelMap(seg), subject=ct.parent.name)
                for ct, seg in _files(cohort, kind)
            ]
            sampler = tio.UniformSampler(subjects[0], patch_size=PATCH)
            queue = tio.Queue(subjects, sampler, MAX_LENGTH, PER_SUBJECT, num_workers=WORKERS)
            return tio.SubjectsLoader(queue, batch_size=BATCH)

        kept = new_loader()

        def epoch() -> Iterator[Batch]:
            for batch in new_loader() if anew else kept:
                yield Batch(batch.ct.data.float(), batch.seg.data, batch.metadata["subject"])

        return epoch

    return Contender(
        name,
        "",
        no_store,
        open_it,
        kind="workers" if anew else "memory",
        package="torchio",
        folder=TORCHIO_2_FOLDER,
        transposed=True,
    )


def _files(cohort: Path, kind: str) -> list[tuple[Path, Path]]:
    folders = sorted((cohort / kind).iterdir())
    return [(folder / f"ct.{kind}", folder / f"seg.{kind}") for folder in folders]


CONTENDERS = (
    *ZPATCHES,
    Contender(
        BLOSC2,
        "blosc2",
        _make_blosc2,
        lambda cohort, store: _Blosc2Patches(cohort, store).epochs(),
        package="blosc2",
    ),
    Contender(
        TENSORSTORE,
        "tensorstore",
        _make_tensorstore,
        lambda cohort, store: _TensorstorePatches(cohort, store).epochs("spawn"),  # forked workers abort
        package="tensorstore",
    ),
    Contender(
        TENSORSTORE_THREADS,
        "tensorstore",
        _make_tensorstore,
        _open_tensorstore_threads,
        "threads",
        "tensorstore",
    ),
    Contender(MONAI, "monai", _make_monai, _open_monai, package="monai", transposed=True),
    _torchio_of(TORCHIO, "nii"),
    _torchio_of(TORCHIO_GZ, "nii.gz"),
    _torchio_2_of(TORCHIO_2, "nii", anew=False),
    _torchio_2_of(TORCHIO_2_ANEW, "nii", anew=True),
    _torchio_2_of(TORCHIO_2_ANEW_GZ, "nii.gz", anew=True),
)


def contender_of(name: str) -> Contender:
    """The contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)
