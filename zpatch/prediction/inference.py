"""``predict``: a network over whole volumes, planned, resumable, on one machine or many.

grid -> reader -> network -> blending -> shards -> store. Planning runs the network on one patch, to learn the
shape of its outputs; everything else follows from shapes.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from zpatch.blending.reduction import Reductions
from zpatch.geometry.voxel_grid import Spacing
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject
from zpatch.networks.model_files import Model
from zpatch.networks.network import Network
from zpatch.planning.model_inputs import are_slides
from zpatch.planning.planning import plan_prediction
from zpatch.planning.prediction_options import MaskFunction, PredictOptions
from zpatch.prediction.damaged_tiles import damaged_text
from zpatch.prediction.prediction_run import begun_shards, check_output, run_prediction
from zpatch.prediction.stage_times import OnTimes
from zpatch.runtime.failures import Failures
from zpatch.runtime.task_contract import CLUSTER_TIMEOUT_S, Progress
from zpatch.store.image_writer import not_finite_text
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
    reduce: Reductions = None,
    batch_size: int = 1,
    device: str | torch.device = "auto",
    amp: bool = False,
    tta: bool = False,
    model_axes: str | None = None,
    spacing: Spacing | None = None,
    orientation: str | None = None,
    align: str | None = None,
    output_grid: str = "native",
    context: int | Sequence[int] = (),
    padding_mode: str | None = None,
    normalize: str | None = None,
    mask: str | MaskFunction | None = None,
    fill: float = 0,
    strict: bool = False,
    max_memory: int | str | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    cluster_timeout: float = CLUSTER_TIMEOUT_S,
    resume: bool = True,
    overwrite: bool = False,
    verify: bool = False,
    keep_going: bool = True,
    pyramid: bool | None = None,
    progress: Progress = lambda patches: None,
    on_times: OnTimes = lambda times: None,
) -> Cohort:
    """Run a network over every subject and write its blended output into a store.

    The network is fed a contiguous batch (B, C, x, y, z) of the type of its parameters (without any,
    float32), where x, y, z are the axes I, J, K of an image. If it was trained on (z, y, x) arrays, as those
    of tifffile, zarr, scikit-image or nnU-Net, say ``model_axes="zyx"``; any order is possible.
    ``model_axes="yx"`` feeds a 2-D network (B, C, H, W), with patches of one voxel along z; it is the default
    for slides, of which one number of ``patch_size`` and ``patch_overlap`` is along x and y only.

    It returns a tensor in the same axes, stored as the image ``prediction``, or a dict of tensors, stored
    under their keys. ``reduce`` is a reduction of PatchAggregator for all outputs, or a dict with one for
    each: ``{"seg": "argmax", "dist": None}``. If it makes patches smaller or larger by a whole factor, so is
    the stored image. Several names in ``image`` are stacked as channels; ``normalize`` (``zscore`` or
    ``clip``) scales each image by its statistics: those of its store, otherwise those of one pass over its
    voxels before the prediction, here, in bounded memory. A resumed prediction makes the pass again, and it
    gives the same numbers, which are part of what is compared when it is resumed. A volume smaller than the
    patch is padded by its edge and cropped back; nothing else is padded without ``padding_mode``.
    ``device="auto"`` chooses a GPU if there is one; ``amp`` runs the network in torch's autocast, ``tta``
    averages it over all flips.

    ``spacing`` (mm: one number, or three along I, J, K) and ``orientation`` ("RAS") are those of the grid
    that the network was trained on: images are resampled linearly, label maps by the nearest voxel, as
    patches are read. The output is on the image's own grid: the blended volume is resampled linearly onto it,
    channel by channel, and then reduced. It is made as patches arrive, and never held whole.
    ``output_grid="model"`` leaves it on the model's grid. ``align`` names the image on whose grid all others
    are put first; the output is on its grid. Channels that are integers (blended with ``crop``) are classes,
    and get the nearest voxel. Images that are mapped beforehand, as with ``cohort.map``, have their own grid
    after the mapping.

    ``context=(2, 4)`` stacks, behind the images, as many voxels around the same centre that are 2 and 4 times
    as wide, from the coarser levels that `zpatch convert --pyramid` stores.

    Voxels where blended outputs are NaN or infinite are counted: a warning at the end says how many there
    are, and so do ``statistics["not_finite"]`` and the warnings of the image. ``strict`` raises ModelError at
    the first patch with such a value.

    An image of time points (OME-Zarr, Zarr, NIfTI) is refused: choose with ``image.select(time=3)``, or
    ``channels=`` to give several as channels. Those of an image in a store are channels.

    ``mask`` names an image, or is a function ``(subject, location) -> bool``. Patches wholly outside the mask
    are not run, and voxels that no patch covers get ``fill``; voxels inside are the same as without a mask.
    It is on the image's own grid, or with ``align`` on any, as is that of a slide; a function gets the
    subject on the model's grid.

    Each shard of the output is reduced and written once, after its last patch. Memory is planned before
    anything runs and does not grow with the longest axis. ``max_memory`` (bytes, or text such as "2 GiB") is
    a limit for this process and its workers together, with Python, torch and the network, which is measured
    on one batch. To hold less some patches are run twice; if that is not enough, MemoryLimitError is raised.
    Pages of the files that are read do not count, as the system takes them back when it needs them. ``jobs``
    local processes, or the Dask cluster at ``scheduler``, share the volumes and give the same bytes as one.
    WorkerError is raised if a cluster has no workers for ``cluster_timeout`` seconds, or loses its scheduler.

    All processes must see the same inputs. An input that is not there, in this process or a worker, or that
    changes before its prediction is complete, is a DamageError; the same command resumes when it is back.

    An unfinished output is resumed; it is refused with StoreExistsError if the model, the options or the
    inputs changed. ``resume=False`` refuses any existing output, ``overwrite`` starts over. Files of the
    output that are missing or have another length are made again, and so are those with other bytes if
    ``verify`` is set: the network is run for the damaged shards only. ``progress`` is called with numbers of
    patches done, and ``on_times`` at the end with the StageTimes: the seconds of reading, the network,
    blending, reducing, writing and waiting, of all processes; ``on_times=print`` prints their shares.
    Returns the predictions as a cohort.

    ``pyramid`` also writes coarser levels of each output, for viewers: each halves every axis longer than one
    voxel, until none is over 64; a coarse voxel is the mean of the fine ones, or in a label map their most
    frequent label. It is the default (None) for slides: images of one plane that are read in place from Zarr.
    Levels are made from finished shards on disk when a subject is complete. They can be added to a finished
    prediction by ``pyramid=True``, without running the network; levels that exist are kept.

    A subject whose files are missing or damaged, or on which the network fails, fails alone: the others are
    predicted and committed, then its error is raised; if several failed, an error of the first one's class
    that names all. The same call tries them again. ``keep_going=False`` raises the first error at once.
    Errors of the output, of options, of the memory limit, and of the network on its very first patch always
    are raised at once.

    >>> import tempfile, numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> subject = Subject(name="ann", t1=ScalarImage(np.ones((40, 40, 40), np.float32)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cohort = predict(torch.nn.Upsample(scale_factor=2), [subject], folder + "/out.zarr",
    ...                      image="t1", patch_size=32, patch_overlap=8, device="cpu")
    ...     cohort["ann"].prediction.shape
    (1, 80, 80, 80)
    """
    given = locals()
    chosen = {field.name: given[field.name] for field in dataclasses.fields(PredictOptions)}
    options = PredictOptions.of(**chosen, of_slides=are_slides(subjects))
    check_can_create(Path(output), overwrite=options.overwrite, resume=options.resume)
    check_output(Path(output), subjects, options)
    network = Network.of(model, options)
    begun = {} if options.overwrite else begun_shards(Path(output))
    failures = Failures(keep_going=options.keep_going)
    plans = plan_prediction(network, subjects, options, begun=begun, failures=failures)
    names = [subject.name for subject in subjects]
    predictions = run_prediction(
        network,
        plans,
        output,
        options,
        subjects=names,
        failures=failures,
        progress=progress,
        on_times=on_times,
    )
    if text := not_finite_text(predictions.store.records.values()):
        warnings.warn(f"{text}; strict=True stops at the first", stacklevel=2)
    if text := damaged_text(predictions.store.records.values()):
        warnings.warn(text, stacklevel=2)
    if failures.found:
        raise failures.error()
    return predictions
