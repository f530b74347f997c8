"""Patch-based deep learning on volumes that do not fit in memory.

Cohorts of NIfTI, NRRD or MetaImage in, patches to torch, predictions out, and nothing is ever loaded whole.
The folders are the data flow::

    files                                                                         NIfTI files
        | volume_files/                                                               ^ volume_files/
        v                                                                             |
    conversion/ -> store/ -> sources/ -> images/ -> sampling/ -> loading/ -> torch    conversion/
                     ^                                                         |      ^
                     |                                                         v      |
                     +------------------------------------------------- blending/ ----+  prediction/ drives it

Slides and TIFF files go in by slides/, which sources/ reads in place.

Read them in the order geometry, runtime, volume_files, chunks, resampling, slides, records, store,
conversion, sources, images, sampling, loading, tiling, blending, networks, planning, prediction; report,
bench, pipelines, compat and cli are at the edge. Names are imported when first used: ``import zpatch`` loads
neither torch nor dask nor nibabel.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zpatch.blending.aggregator import PatchAggregator
    from zpatch.conversion.conversion import convert
    from zpatch.conversion.store_export import export
    from zpatch.errors import ZpatchError
    from zpatch.geometry.boxes import PatchLocation
    from zpatch.images.cohort import Cohort
    from zpatch.images.image import Image, LabelMap, SamplingMap, ScalarImage
    from zpatch.images.normalization import Normalize
    from zpatch.images.subject import Subject
    from zpatch.images.tissue_map import tissue_map
    from zpatch.loading.patch_queue import Queue
    from zpatch.loading.queue_stats import QueueStats
    from zpatch.loading.subjects_loader import SubjectsLoader
    from zpatch.prediction.inference import predict
    from zpatch.report.report import write_report
    from zpatch.sampling.grid_sampler import GridSampler
    from zpatch.sampling.location_sampler import LocationSampler
    from zpatch.sampling.mixed_sampler import MixedSampler
    from zpatch.sampling.patch import Patch
    from zpatch.sampling.patch_batch import PatchBatch, collate
    from zpatch.sampling.patch_sampler import RandomSampler
    from zpatch.sampling.samplers import LabelSampler, UniformSampler, WeightedSampler
    from zpatch.sources.group_read import read_group
    from zpatch.store.verification import verify

__version__ = "0.1.0"

__all__ = [
    "Cohort",
    "GridSampler",
    "Image",
    "LabelMap",
    "LabelSampler",
    "LocationSampler",
    "MixedSampler",
    "Normalize",
    "Patch",
    "PatchAggregator",
    "PatchBatch",
    "PatchLocation",
    "Queue",
    "QueueStats",
    "RandomSampler",
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
    "read_group",
    "tissue_map",
    "verify",
    "write_report",
]

_MODULES = {
    "geometry.boxes": ["PatchLocation"],
    "store.verification": ["verify"],
    "conversion.conversion": ["convert"],
    "conversion.store_export": ["export"],
    "images.cohort": ["Cohort"],
    "sources.group_read": ["read_group"],
    "images.image": ["Image", "LabelMap", "SamplingMap", "ScalarImage"],
    "images.normalization": ["Normalize"],
    "images.subject": ["Subject"],
    "images.tissue_map": ["tissue_map"],
    "sampling.grid_sampler": ["GridSampler"],
    "sampling.location_sampler": ["LocationSampler"],
    "sampling.patch": ["Patch"],
    "sampling.patch_batch": ["PatchBatch", "collate"],
    "sampling.patch_sampler": ["RandomSampler"],
    "sampling.samplers": ["LabelSampler", "UniformSampler", "WeightedSampler"],
    "sampling.mixed_sampler": ["MixedSampler"],
    "loading.patch_queue": ["Queue"],
    "loading.queue_stats": ["QueueStats"],
    "loading.subjects_loader": ["SubjectsLoader"],
    "blending.aggregator": ["PatchAggregator"],
    "prediction.inference": ["predict"],
    "report.report": ["write_report"],
    "errors": ["ZpatchError"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'zpatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"zpatch.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
