"""Predicting a whole slide under a limit of memory: the stated and the measured peak, of a fresh process."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.predict.runs import most_held, name_imports, remove
from benchmarks.slides.reading import encoded_tiles

PATCH, OVERLAP = 1024, 64
LIMIT = "1 GiB"
CHECKED = 512  # pixels a side of the squares that are compared


class Stains(torch.nn.Module):
    """A network of negligible cost: which of red and green is stronger."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch[:, :2]


def predict_slide(path: str, output: str, modules: str) -> dict[str, Any]:
    """The bytes that the plan states, the most that this process and its descendants hold, and the seconds.

    Its imports are listed in a file. Some squares of the labels are compared with those of their pixels.
    """
    import zpatch as zp

    torch.set_num_threads(1)
    subject, options = zp.Subject(slide=zp.ScalarImage(path)), _options()
    stated = _stated_bytes(subject)
    begin = time.perf_counter(), time.process_time()
    peak = most_held(lambda: zp.predict(Stains(), [subject], output, **options))
    clock, processor = time.perf_counter() - begin[0], time.process_time() - begin[1]
    name_imports(modules)
    _check(subject.slide, zp.Cohort(output)[0].prediction)
    remove(Path(output))
    return {"stated": stated, "peak": peak, "clock": clock, "processor": processor}


def _options() -> dict[str, Any]:
    flat = {"patch_size": (PATCH, PATCH, 1), "patch_overlap": (OVERLAP, OVERLAP, 0)}
    return {"image": "slide", **flat, "reduce": "argmax", "max_memory": LIMIT, "device": "cpu"}


def _stated_bytes(subject: Any) -> int:
    networks: Any = importlib.import_module("zpatch.networks.network")
    planning: Any = importlib.import_module("zpatch.planning.planning")
    chosen: Any = importlib.import_module("zpatch.planning.prediction_options")
    options = chosen.PredictOptions.of(**_options())
    (plan,) = planning.plan_prediction(networks.Network.of(Stains(), options), [subject], options)
    return int(plan.peak_bytes)


def _check(slide: Any, labels: Any) -> None:
    """The network acts on single pixels, so that its classes do not depend on patches and windows."""
    from zpatch import PatchLocation

    _, width, height, _ = slide.shape
    for part in range(5):
        first = (width - CHECKED) * part // 4, (height - CHECKED) * part // 4, 0
        box = PatchLocation(first, (CHECKED, CHECKED, 1))
        red, green, _ = slide.read(box)
        assert ((green > red) == labels.read(box)[0]).all(), f"other labels at {first}"


def decoded_bytes(path: Path) -> int:
    """The bytes of the pixels of the finest level."""
    _, (width, height), _ = encoded_tiles(path)
    return 3 * width * height
