"""Predicting on another grid and returning to the scan's own: the contenders, in turns, and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import settle
from benchmarks.predict.networks import SmallUNet
from benchmarks.predict.peers import Contender, Labels, write_classes, zpatch_labels
from benchmarks.predict.runs import most_held, name_imports, remove, seconds_of
from benchmarks.read.peers import raw_voxels
from benchmarks.space.reading import VOXEL_MM, interpolated

SPACING = 1.5
PATCH, OVERLAP, CLASSES = 96, 48, 8
NATIVE, MODEL = 'zpatch, output_grid="native"', 'zpatch, output_grid="model"'
LOGITS = "nnU-Net's order: logits in memory, resampled, argmax"
ROOMY = "64 GiB"  # a limit that changes nothing, but for which the network's memory is measured

Predict = Callable[[Path, Path, Path], object]


def network() -> torch.nn.Module:
    """A small U-Net with random weights."""
    torch.manual_seed(0)
    return SmallUNet(classes=CLASSES).eval()


def zpatch_options(output_grid: str) -> dict[str, Any]:
    """The options of the prediction for zpatch."""
    return {
        "image": "ct",
        "patch_size": PATCH,
        "patch_overlap": OVERLAP,
        "overlap_mode": "hann",
        "reduce": "argmax",
        "spacing": SPACING,
        "output_grid": output_grid,
        "device": "cpu",
    }


def _zpatch_on(output_grid: str) -> Predict:
    def predict(head: Path, store: Path, output: Path) -> None:
        import zpatch as zp

        zp.predict(network(), zp.Cohort(store), output, **zpatch_options(output_grid))

    return predict


def _logits(head: Path, store: Path, output: Path) -> None:
    """nnU-Net's order in few lines: the volume resampled, a sliding window with all logits in memory, logits
    resampled, argmax.

    It is cheaper than nnU-Net: torch resamples, in float32, where nnU-Net calls scikit-image in float64; each
    array is let go when the next one is made; and classes are found plane by plane. Windows are those of
    zpatch, so that labels can be compared.
    """
    voxels = raw_voxels(head)
    factors = [SPACING / size for size in VOXEL_MM[::-1]]
    shape = [max(1, math.floor(n / factor + 0.5)) for n, factor in zip(voxels.shape, factors, strict=True)]
    with torch.inference_mode():
        image = torch.from_numpy(voxels.astype(np.float32))[None, None]
        image = interpolated(image, shape, [1 / factor for factor in factors])
        scores = _blended(image)
        del image
        scores = interpolated(scores[None], voxels.shape, factors)[0]
        write_classes(output, [scores.numpy()], voxels.shape)


def _blended(image: torch.Tensor) -> torch.Tensor:
    """The blended logits (C, z, y, x) of a volume (1, 1, z, y, x)."""
    from zpatch.geometry.patch_grid import axis_starts
    from zpatch.tiling.windows import partition_of_unity

    shape = image.shape[2:]
    starts = [axis_starts(n, PATCH, OVERLAP) for n in shape]
    weights = [
        [torch.from_numpy(w.astype(np.float32)) for w in partition_of_unity("hann", s, s + PATCH, OVERLAP)]
        for s in starts
    ]
    model, sums = network(), torch.zeros((CLASSES, *shape))
    for position in np.ndindex(*map(len, starts)):
        along_z, along_y, along_x = (w[n] for w, n in zip(weights, position, strict=True))
        z, y, x = (slice(s[n], s[n] + PATCH) for s, n in zip(starts, position, strict=True))
        # The network is fed as zpatch does: its axes are those of the image, x, y, z.
        patch = image[:, :, z, y, x].transpose(2, 4).contiguous()
        scores = model(patch)[0].transpose(1, 3)
        sums[:, z, y, x] += scores * (along_z[:, None, None] * along_y[:, None] * along_x)
    return sums


def _mapped(output: Path) -> Labels:
    labels: Labels = np.load(output, mmap_mode="r")
    return labels


CONTENDERS = (
    Contender(NATIVE, _zpatch_on("native"), zpatch_labels),
    Contender(MODEL, _zpatch_on("model"), zpatch_labels),
    Contender(LOGITS, _logits, _mapped),
)


def contender_of(name: str) -> Contender:
    """The contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)


def predictions_of(name: str, head: str, store: str, output: str) -> Callable[[str], float]:
    """Answers with the seconds of a prediction, whose output stays if the question is ``keep``."""
    settle(one_core=True)
    torch.set_num_threads(1)
    contender, target = contender_of(name), Path(output)

    def answer(question: str) -> float:
        seconds = seconds_of(contender, Path(head), Path(store), target)
        if question != "keep":
            remove(target)
        return seconds

    return answer


def other_labels(native: str, logits: str) -> float:
    """The share of voxels for which zpatch and the peer give different classes, on the scan's own grid."""
    ours, theirs = zpatch_labels(Path(native)), _mapped(Path(logits))
    assert ours.shape == theirs.shape
    assert len(np.unique(theirs)) > 1, "a prediction of one class shows nothing"
    return float(np.mean([np.mean(a != b) for a, b in zip(ours, theirs, strict=True)]))


def network_seconds(head: str) -> dict[str, float]:
    """Seconds of the network alone for the patches of a prediction, and their number."""
    from zpatch.geometry.patch_grid import axis_starts

    settle(one_core=True)
    torch.set_num_threads(1)
    sizes = zip(raw_voxels(Path(head)).shape, VOXEL_MM[::-1], strict=True)
    counts = [len(axis_starts(math.floor(n * size / SPACING + 0.5), PATCH, OVERLAP)) for n, size in sizes]
    model, patch, taken = network(), torch.randn((1, 1, *[PATCH] * 3)), []
    with torch.inference_mode():
        for _ in range(4):
            begin = time.perf_counter()
            model(patch)
            taken.append(time.perf_counter() - begin)
    return {"seconds": float(np.median(taken[1:])) * math.prod(counts), "patches": math.prod(counts)}


# Memory.


def memory_of(modules: str, name: str, head: str, store: str, output: str) -> int:
    """The most bytes that this process holds during a prediction; its imports are listed in a file."""
    torch.set_num_threads(1)
    contender, target = contender_of(name), Path(output)
    peak = most_held(lambda: contender.predict(Path(head), Path(store), target))
    name_imports(modules)
    remove(target)
    return peak


def stated_bytes(store: str) -> dict[str, int]:
    """The bytes that the plans of such predictions state, with the network's, by the name of a contender."""
    import zpatch as zp
    from zpatch.networks.network import Network
    from zpatch.planning.planning import plan_prediction
    from zpatch.planning.prediction_options import PredictOptions

    torch.set_num_threads(1)
    found = {}
    for name, output_grid in {NATIVE: "native", MODEL: "model"}.items():
        options = PredictOptions.of(**zpatch_options(output_grid), max_memory=ROOMY)
        (plan,) = plan_prediction(Network.of(network(), options), zp.Cohort(store), options)
        found[name] = plan.peak_bytes
    return found
