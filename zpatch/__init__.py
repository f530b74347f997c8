"""Patch-based deep learning on volumes that do not fit in memory.

NIfTI cohorts in, patches to torch, predictions out, and nothing is ever loaded whole. Names are imported
when they are first used: ``import zpatch`` pulls in neither torch nor dask nor nibabel.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zpatch.blending.aggregator import PatchAggregator
    from zpatch.conversion.conversion import convert
    from zpatch.conversion.nifti_export import export
    from zpatch.errors import ZpatchError
    from zpatch.geometry.boxes import PatchLocation
    from zpatch.images.cohort import Cohort, Subject
    from zpatch.images.image import Image, LabelMap, SamplingMap, ScalarImage
    from zpatch.images.normalization import Normalize
    from zpatch.loading.patch_queue import Queue
    from zpatch.loading.subjects_loader import SubjectsLoader
    from zpatch.prediction.inference import predict
    from zpatch.report.report import write_report
    from zpatch.sampling.patch import Patch, PatchBatch, collate
    from zpatch.sampling.samplers import GridSampler, LabelSampler, UniformSampler, WeightedSampler
    from zpatch.store.verification import verify

__version__ = "0.1.0"

__all__ = [
    "Cohort",
    "GridSampler",
    "Image",
    "LabelMap",
    "LabelSampler",
    "Normalize",
    "Patch",
    "PatchAggregator",
    "PatchBatch",
    "PatchLocation",
    "Queue",
    "SamplingMap",
    "ScalarImage",
    "Subject",
    "SubjectsLoader",
    "UniformSampler",
    "WeightedSampler",
    "ZpatchError",
    "collate",
    "convert",
    "export",
    "predict",
    "verify",
    "write_report",
]

_ROOMS = {
    "blending.aggregator": ["PatchAggregator"],
    "images.cohort": ["Cohort", "Subject"],
    "conversion.conversion": ["convert"],
    "errors": ["ZpatchError"],
    "geometry.boxes": ["PatchLocation"],
    "images.image": ["Image", "LabelMap", "SamplingMap", "ScalarImage"],
    "prediction.inference": ["predict"],
    "loading.subjects_loader": ["SubjectsLoader"],
    "conversion.nifti_export": ["export"],
    "images.normalization": ["Normalize"],
    "sampling.patch": ["Patch", "PatchBatch", "collate"],
    "loading.patch_queue": ["Queue"],
    "report.report": ["write_report"],
    "sampling.samplers": ["GridSampler", "LabelSampler", "UniformSampler", "WeightedSampler"],
    "store.verification": ["verify"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'zpatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"zpatch.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
