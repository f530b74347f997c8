"""The contenders in prediction: each runs a network over a volume, patch by patch, into a label map on disk.

As in read/peers.py, a library is imported when its function runs, and used as its documentation says, with
the options that are its fastest here. All but zpatch read a memory map of the raw volume and write an
uncompressed file, which is faster than any store.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peer import Peer
from benchmarks.predict.networks import SmallUNet
from benchmarks.read.peers import BLOSC, in_stored_order, raw_voxels

PATCH, OVERLAP, CLASSES = 128, 32, 3
SPLIT = 100.5  # between two grey values, so that no two classes are ever nearly alike
ZPATCH, FLOOR = "zpatch", "floor: read, network, blend in numpy, argmax, write"
SLIDING_WINDOW = "MONAI SlidingWindowInferer"
ZARR_MERGER = "MONAI PatchInferer, ZarrAvgMerger"
PATCHLY = "patchly, in chunks"
MERGER_CHUNK, PATCHLY_CHUNK = 64, 256  # their fastest

Labels = NDArray[np.uint8]
Model = Callable[[torch.Tensor], torch.Tensor]


def network(patches: torch.Tensor) -> torch.Tensor:
    """Scores (B, 3, I, J, K) of patches (B, 1, I, J, K), in memory in the order of the patches."""
    return _with_scores(patches, torch.empty_like(patches.expand(-1, CLASSES, -1, -1, -1)))


def contiguous_network(patches: torch.Tensor) -> torch.Tensor:
    """The same scores in contiguous memory, as most layers of torch write theirs."""
    return _with_scores(patches, torch.empty((len(patches), CLASSES, *patches.shape[2:])))


@functools.cache
def _unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return SmallUNet(classes=CLASSES).eval().requires_grad_(requires_grad=False)


def unet(patches: torch.Tensor) -> torch.Tensor:
    """The scores of a small U-Net."""
    scores: torch.Tensor = _unet()(patches)
    return scores


def _with_scores(patches: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    scores[:, 0] = patches[:, 0]
    torch.neg(patches[:, 0], out=scores[:, 1])
    scores[:, 2] = SPLIT
    return scores


def classes_of(scores: NDArray[np.float32]) -> Labels:
    """The class of each voxel, the first of the largest; ``numpy.argmax`` takes fifteen times as long."""
    best = scores[0].copy()
    labels = np.zeros(best.shape, np.uint8)
    for number, those in enumerate(scores[1:], start=1):
        np.maximum(labels, np.uint8(number) * (those > best), out=labels)
        np.maximum(best, those, out=best)
    return labels


def write_classes(file: Path, slabs: Iterable[NDArray[np.float32]], shape: Sequence[int]) -> None:
    """Write a label map of ``shape`` from the scores (C, z, y, x) of its slabs, plane by plane."""
    with file.open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        for slab in slabs:
            for plane in slab.swapaxes(0, 1):
                stream.write(classes_of(plane).data)


@dataclass(frozen=True, slots=True)
class Contender(Peer):
    """A way to predict: ``predict(head, store, output)`` writes what ``labels(output)`` reads, (z, y, x).

    ``head`` is a folder of ``data.plain_head`` and ``store`` the zpatch store of the same volume. ``slow``
    contenders are repeated less often.
    """

    name: str
    predict: Callable[[Path, Path, Path], object]
    labels: Callable[[Path], Labels]
    package: str = "zpatch"
    slow: bool = False


def zpatch_options(patch: int = PATCH) -> dict[str, Any]:
    """The options of the prediction for zpatch; the overlap is a quarter of the patch."""
    return {
        "image": "ct",
        "patch_size": patch,
        "patch_overlap": patch // 4,
        "overlap_mode": "hann",
        "reduce": "argmax",
    }


def predict_with_zpatch(model: Model, store: Path, output: Path, **options: Any) -> None:
    """Predict the one image of a store."""
    import zpatch as zp

    zp.predict(model, zp.Cohort(store), output, device="cpu", **options)


def zpatch_labels(output: Path) -> Labels:
    """The label map in a store of predictions, (z, y, x)."""
    import zpatch as zp

    return in_stored_order(zp.Cohort(output)["sub-01"].prediction.data)


def _zpatch(network: Model, head: Path, store: Path, output: Path) -> None:
    predict_with_zpatch(network, store, output, **zpatch_options())


def _floor(network: Model, head: Path, store: Path, output: Path) -> None:
    """One accumulator of the whole volume; plane by plane, so that products stay in the cache."""
    from zpatch.geometry.patch_grid import axis_starts
    from zpatch.tiling.windows import partition_of_unity

    voxels = raw_voxels(head)
    starts = [axis_starts(n, PATCH, OVERLAP) for n in voxels.shape]
    weights = [
        [w.astype(np.float32) for w in partition_of_unity("hann", s, s + PATCH, OVERLAP)] for s in starts
    ]
    sums = np.zeros((CLASSES, *voxels.shape), np.float32)
    for position in np.ndindex(*map(len, starts)):
        along_z, along_y, along_x = (w[n] for w, n in zip(weights, position, strict=True))
        in_plane = along_y[:, None] * along_x
        box = tuple(slice(s[n], s[n] + PATCH) for s, n in zip(starts, position, strict=True))
        patch = torch.from_numpy(voxels[box].astype(np.float32))
        scores, target = network(patch[None, None])[0].numpy(), sums[:, *box]
        for plane, weight in enumerate(along_z):
            target[:, plane] += scores[:, plane] * (weight * in_plane)
    write_classes(output, [sums], voxels.shape)


def _sliding_window(network: Model, head: Path, store: Path, output: Path) -> None:
    """Volume and scores in memory; constant windows, which are cheaper than Gaussian ones."""
    from monai.inferers.inferer import SlidingWindowInferer

    inferer = SlidingWindowInferer(PATCH, sw_batch_size=1, overlap=OVERLAP / PATCH, mode="constant")
    with torch.inference_mode():
        scores = inferer(_whole(head), network)
    assert isinstance(scores, torch.Tensor)
    write_classes(output, [scores[0].numpy()], scores.shape[2:])


def _zarr_merger(network: Model, head: Path, store: Path, output: Path) -> None:
    """Sums, counts and means as Zarr arrays on disk, the scores of a cube of 64 in a chunk; then the classes.

    The stores are named, as zarr 3 loses MONAI's own temporary ones while they are in use.
    """
    import zarr
    from monai.inferers.inferer import PatchInferer
    from monai.inferers.merger import ZarrAvgMerger
    from monai.inferers.splitter import SlidingWindowSplitter
    from zarr.codecs import BloscCodec, BytesCodec

    zarr.config.set({"threading.max_workers": 1, "codec_pipeline.batch_size": 64})
    codecs = [BytesCodec(), BloscCodec(**BLOSC, typesize=4)]
    inferer = PatchInferer(
        SlidingWindowSplitter(PATCH, OVERLAP),
        ZarrAvgMerger,
        store=str(output / "means"),
        value_store=str(output / "sums"),
        count_store=str(output / "counts"),
        codecs=codecs,
        value_codecs=codecs,
        count_codecs=codecs,
        chunks=(1, CLASSES, *[MERGER_CHUNK] * 3),
    )
    with torch.inference_mode():
        means = inferer(_whole(head), network)
    planes = range(0, means.shape[2], MERGER_CHUNK)
    slabs = (means[0, :, start : start + MERGER_CHUNK] for start in planes)
    write_classes(output / "labels.npy", slabs, means.shape[2:])


def _patchly(network: Model, head: Path, store: Path, output: Path) -> None:
    """Its aggregator in chunks, which reduces a chunk after its last patch."""
    from patchly import Aggregator, GridSampler  # type: ignore[import-untyped]

    voxels = raw_voxels(head)
    sampler = GridSampler(voxels, voxels.shape, (PATCH,) * 3, (PATCH - OVERLAP,) * 3, (PATCHLY_CHUNK,) * 3)
    labels = np.zeros(voxels.shape, np.uint8)
    aggregator = Aggregator(sampler, output=labels, weights="gaussian", softmax_dim=0, spatial_first=False)
    with torch.inference_mode():
        for patch, box in sampler:
            scores = network(torch.from_numpy(patch.astype(np.float32))[None, None])[0]
            aggregator.append(scores.numpy(), box)
    with output.open("wb") as stream:
        np.save(stream, aggregator.get_output())


def _whole(head: Path) -> torch.Tensor:
    """The volume as a batch (1, 1, z, y, x), float32, in memory."""
    return torch.from_numpy(raw_voxels(head).astype(np.float32))[None, None]


def _mapped(output: Path) -> Labels:
    labels: Labels = np.load(output, mmap_mode="r")
    return labels


NETWORKS: Mapping[str, Model] = {"keeps": network, "contiguous": contiguous_network, "unet": unet}


def contenders(network: Model) -> tuple[Contender, ...]:
    """All contenders, with a network to run."""

    def run(predict: Callable[[Model, Path, Path, Path], object]) -> Callable[[Path, Path, Path], object]:
        return functools.partial(predict, network)

    merged = run(_zarr_merger)
    return (
        Contender(ZPATCH, run(_zpatch), zpatch_labels),
        Contender(FLOOR, run(_floor), _mapped),
        Contender(SLIDING_WINDOW, run(_sliding_window), _mapped, "monai"),
        Contender(PATCHLY, run(_patchly), _mapped, "patchly"),
        Contender(ZARR_MERGER, merged, lambda output: _mapped(output / "labels.npy"), "monai", slow=True),
    )


def contender_of(name: str, network: Model = network) -> Contender:
    """The contender of that name, with a network to run."""
    return next(contender for contender in contenders(network) if contender.name == name)
