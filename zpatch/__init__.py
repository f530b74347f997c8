"""Patch-based deep learning on volumes that do not fit in memory.

NIfTI cohorts in, patches to torch, predictions out, and nothing is ever loaded whole. Names are imported
when they are first used: ``import zpatch`` pulls in neither torch nor dask nor nibabel.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zpatch.aggregator import PatchAggregator
    from zpatch.cohort import Cohort, Subject
    from zpatch.conversion import convert
    from zpatch.errors import ZpatchError
    from zpatch.geometry import PatchLocation
    from zpatch.image import Image, LabelMap, SamplingMap, ScalarImage
    from zpatch.inference import predict
    from zpatch.loader import SubjectsLoader
    from zpatch.nifti_export import export
    from zpatch.normalization import Normalize
    from zpatch.patch import Patch, PatchBatch, collate
    from zpatch.patch_queue import Queue
    from zpatch.report import write_report
    from zpatch.samplers import GridSampler, LabelSampler, UniformSampler, WeightedSampler
    from zpatch.verification import verify

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
    "aggregator": ["PatchAggregator"],
    "cohort": ["Cohort", "Subject"],
    "conversion": ["convert"],
    "errors": ["ZpatchError"],
    "geometry": ["PatchLocation"],
    "image": ["Image", "LabelMap", "SamplingMap", "ScalarImage"],
    "inference": ["predict"],
    "loader": ["SubjectsLoader"],
    "nifti_export": ["export"],
    "normalization": ["Normalize"],
    "patch": ["Patch", "PatchBatch", "collate"],
    "patch_queue": ["Queue"],
    "report": ["write_report"],
    "samplers": ["GridSampler", "LabelSampler", "UniformSampler", "WeightedSampler"],
    "verification": ["verify"],
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
