"""``predict``: a network over whole volumes, planned, resumable, on one machine or many.

grid -> reader -> network -> blending -> shards -> store. Planning runs the network on one patch, to see
what it gives; all else follows from shapes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from zpatch.blending.reduction import Reduction
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject
from zpatch.prediction.model_files import Model
from zpatch.prediction.network import Network, torch_device
from zpatch.prediction.planning import plan_prediction
from zpatch.prediction.prediction_options import MaskFunction, PredictOptions
from zpatch.prediction.prediction_run import begun_shards, run_prediction
from zpatch.runtime.task_contract import Progress
from zpatch.store.store_writer import check_can_create


def predict(
    model: Model,
    subjects: Sequence[Subject],
    output: str | os.PathLike[str],
    *,
    image: str | Sequence[str],
    patch_size: int | Sequence[int],
    patch_overlap: int | Sequence[int] = 0,
    overlap_mode: str = "hann",
    reduce: Reduction = None,
    batch_size: int = 1,
    device: str | torch.device = "auto",
    amp: bool = False,
    tta: bool = False,
    padding_mode: str | None = None,
    normalize: str | None = None,
    mask: str | MaskFunction | None = None,
    fill: float = 0,
    max_memory: int | str | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda patches: None,
) -> Cohort:
    """Run a network over every subject and write its blended output into a store.

    The network takes (B, C, I, J, K) float32 and gives a tensor, kept as the image ``prediction``, or a dict
    of tensors, kept under their keys; one that makes patches smaller or larger gives an image as much smaller
    or larger. Several names in ``image`` are stacked as channels; ``normalize`` (``zscore`` or ``clip``)
    scales each by its stored statistics. A volume smaller than the patch is padded up to it by its edge and
    cropped back; nothing else is padded unless ``padding_mode`` says so. ``device="auto"`` takes a GPU where
    there is one; ``amp`` runs the network in torch's autocast, ``tta`` averages it over all flips.

    ``mask`` names an image, or is a function ``(subject, location) -> bool``: patches that lie wholly outside
    are not run, and voxels that no patch was run for get ``fill``; those inside the mask are as without it.

    Each shard of the output is reduced and written once, when its last patch has come. Memory is that of
    the front, planned beforehand; ``max_memory`` (bytes, or as in "2 GiB") is kept, if need be by running
    some patches twice, or refused with MemoryLimitError. ``jobs`` local processes, or the Dask cluster at
    ``scheduler``, share the volumes out and give the same bytes as one. An output that was begun is gone on
    with, and refused if model, options or inputs are others (``resume=False`` refuses any); ``overwrite``
    starts over. ``progress`` is told the patches done. Returns the predictions as a cohort.
    """
    options = PredictOptions.of(
        image=image,
        patch_size=patch_size,
        patch_overlap=patch_overlap,
        overlap_mode=overlap_mode,
        reduce=reduce,
        batch_size=batch_size,
        padding_mode=padding_mode,
        normalize=normalize,
        mask=mask,
        fill=fill,
        max_memory=max_memory,
        jobs=jobs,
        scheduler=scheduler,
    )
    check_can_create(Path(output), overwrite=overwrite, resume=resume)
    network = Network(model, torch_device(device), amp=amp, tta=tta)
    begun = {} if overwrite else begun_shards(Path(output))
    plans = plan_prediction(network, subjects, options, begun=begun)
    return run_prediction(network, plans, output, options, overwrite=overwrite, progress=progress)
