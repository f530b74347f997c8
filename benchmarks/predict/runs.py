"""Measurements of stage predict, each in a fresh process: predictions in turns, memory, two processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.convert.bench import import_only
from benchmarks.measure import POLL_S, Run, held_bytes, settle, tree_of
from benchmarks.predict.peers import (
    CLASSES,
    NETWORKS,
    Contender,
    Labels,
    classes_of,
    contender_of,
    network,
    predict_with_zpatch,
    zpatch_labels,
    zpatch_options,
)
from benchmarks.read.peers import in_stored_order, raw_voxels, zpatch_image

SLAB = 64
COSTLY_PATCH = 64


def predictions_of(name: str, network: str, head: str, store: str, output: str) -> Callable[[str], float]:
    """Answers ``turn`` with the seconds of a prediction; ``check`` also compares its voxels.

    Those of a network with a field of view depend on the windows, and are not compared.
    """
    settle(one_core=True)
    torch.set_num_threads(1)
    contender, target = contender_of(name, NETWORKS[network]), Path(output)

    def answer(question: str) -> float:
        seconds = seconds_of(contender, Path(head), Path(store), target)
        if question == "check" and network != "unet":
            check(contender.labels(target), raw_voxels(Path(head)))
        remove(target)
        return seconds

    return answer


def seconds_of(contender: Contender, head: Path, store: Path, output: Path) -> float:
    """The time of a prediction, with no output of an earlier one and no writes waiting; its output stays."""
    remove(output)
    os.sync()
    begin = time.perf_counter()
    contender.predict(head, store, output)
    return time.perf_counter() - begin


def remove(output: Path) -> None:
    """Remove a file or a store, if it exists."""
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def check(labels: Labels, voxels: NDArray[Any]) -> None:
    """Compare with the network on the whole volume: the network is pointwise, so no class changes."""
    assert labels.shape == voxels.shape
    assert labels.dtype == np.uint8
    for start in range(0, len(voxels), SLAB):
        slab = torch.from_numpy(voxels[start : start + SLAB].astype(np.float32))
        expected = classes_of(network(slab[None, None])[0].numpy())
        assert np.array_equal(labels[start : start + SLAB], expected), f"other labels from plane {start} on"


# Memory.


def memory_of(modules: str, name: str, head: str, store: str, output: str) -> int:
    """The most bytes that this process and its descendants hold during a prediction.

    Its imports are written to the file ``modules``, because they are too many for a pipe.
    """
    contender, target = contender_of(name), Path(output)
    peak = most_held(lambda: contender.predict(Path(head), Path(store), target))
    name_imports(modules)
    remove(target)
    return peak


def memory_of_zpatch(modules: str, store: str, output: str, patch: str, limit: str) -> int:
    """The same for zpatch on any store. The prediction is compared."""
    options = zpatch_options(int(patch)) | {"max_memory": int(limit) if limit else None}
    peak = most_held(lambda: predict_with_zpatch(network, Path(store), Path(output), **options))
    name_imports(modules)
    check(zpatch_labels(Path(output)), in_stored_order(zpatch_image(Path(store)).data))
    return peak


def name_imports(modules: str) -> None:
    """Write the names of all modules that this process has imported into a file."""
    Path(modules).write_text("\n".join(sorted(sys.modules)))


def stated_bytes(store: str, patch: str) -> int:
    """The bytes that the plan of such a prediction states."""
    import zpatch as zp
    from zpatch.networks.network import Network
    from zpatch.planning.planning import plan_prediction
    from zpatch.planning.prediction_options import PredictOptions

    options = PredictOptions.of(**zpatch_options(int(patch)), device="cpu")
    (plan,) = plan_prediction(Network.of(network, options), zp.Cohort(store), options)
    return plan.peak_bytes


def memory_of_imports(modules: str) -> int:
    """Bytes of an idle process that has imported the modules listed in a file."""
    import_only(*Path(modules).read_text().split())
    return held_bytes(tree_of(os.getpid()))


def most_held(run: Run) -> int:
    """The most bytes that this process and its descendants hold during a run, sampled every 20 ms."""
    peak, over = 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(POLL_S):
            peak = max(peak, held_bytes(tree_of(os.getpid())))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return peak


# One process or two.


def costly_network() -> torch.nn.Module:
    """A small network that takes much longer than everything else in a prediction."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv3d(16, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv3d(16, CLASSES, 1),
    ).eval()


def costly_predictions(store: str, jobs: str) -> Callable[[str], dict[str, Any]]:
    """Answers, for a path to write to, with the seconds of a prediction by ``jobs`` processes, their start
    included, and a digest of its voxels."""
    torch.set_num_threads(1)
    model = costly_network()

    def answer(output: str) -> dict[str, Any]:
        begin = time.perf_counter()
        options = zpatch_options(COSTLY_PATCH)
        predict_with_zpatch(model, Path(store), Path(output), jobs=int(jobs), **options)
        seconds = time.perf_counter() - begin
        labels = zpatch_labels(Path(output)).tobytes()
        return {"seconds": seconds, "labels": hashlib.sha256(labels).hexdigest()}

    return answer


def costly_patches() -> Callable[[str], float]:
    """Answers, for a number of patches, with the seconds that the network alone takes for them."""
    torch.set_num_threads(1)
    model, patch = costly_network(), torch.zeros((1, 1, *[COSTLY_PATCH] * 3))

    def answer(count: str) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            for _ in range(int(count)):
                model(patch)
        return time.perf_counter() - begin

    return answer
