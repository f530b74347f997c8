"""Predictions in progress: which regions are left, who fills them, and when a subject is complete.

Work in progress lies in ``.unfinished`` of the output, a folder for each subject, until all its shards are
written; then its images are committed at once. What its voxels depend on stands beside them, and in the name
of their folder, so that nothing is gone on with that was begun otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from zpatch.digests import Json, compact_json, digest
from zpatch.errors import ModelError, OptionError, StoreExistsError, WorkerError
from zpatch.images.cohort import Cohort
from zpatch.prediction.model_identity import identity
from zpatch.prediction.network import Network
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import PredictionPlan
from zpatch.prediction.region_run import RunOptions, finish_subject, run_region
from zpatch.prediction.shard_ledger import HEADER, begin, check_same, header_of
from zpatch.runtime.task_contract import Cluster, Progress
from zpatch.runtime.tasks import run_tasks
from zpatch.store.lock import writing_to
from zpatch.store.names import MANIFEST, UNFINISHED
from zpatch.store.store import open_store
from zpatch.store.store_writer import StoreWriter


def run_prediction(
    network: Network,
    plans: Sequence[PredictionPlan],
    output: str | os.PathLike[str],
    options: PredictOptions,
    *,
    overwrite: bool = False,
    progress: Progress = lambda patches: None,
) -> Cohort:
    """Carry out the plans of some subjects, or go on with them."""
    store = Path(output)
    _refuse_own_input(plans, options, store)
    if options.jobs > 1 and network.device.type != "cpu":
        raise OptionError(
            f"jobs shares out processors; one process feeds {network.device}: leave jobs=1", option="jobs"
        )
    if options.jobs > 1 or options.scheduler is not None:
        _check_can_be_sent(network, options)
    header = _header(network, options)
    expected = [plan.subject.name for plan in plans]
    attributes = {"tool": "zpatch predict", "expected_subjects": expected, "prediction": header}
    open_writer = (
        functools.partial(StoreWriter.create, overwrite=overwrite) if overwrite else StoreWriter.resume
    )
    with open_writer(store, attributes) as writer:
        check_same(writer.attributes["prediction"], header, store)
        check_same({"subjects": writer.attributes["expected_subjects"]}, {"subjects": expected}, store)
        unfinished = writer.path / UNFINISHED
        with writing_to(writer.path):
            inputs = digest(compact_json(header).encode())
            jobs = [_begun(plan, inputs, unfinished / plan.subject.name, writer) for plan in plans]
        left = [job for job in jobs if job is not None]
        if done_before := sum(p.patches_run for p, job in zip(plans, jobs, strict=True) if job is None):
            progress(done_before)
        run_options = RunOptions(options.reduce, options.padding_mode or "edge", options.fill)
        for job in _carried_out(network, left, run_options, unfinished, options, progress):
            with writing_to(writer.path):
                finished = finish_subject(job.plan, job.folder)
            writer.commit(
                [(folder, dataclasses.replace(record, inputs=job.inputs)) for folder, record in finished]
            )
            shutil.rmtree(job.folder.parent)
        shutil.rmtree(unfinished, ignore_errors=True)
    return Cohort(output)


def begun_shards(output: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the shards of all predictions that are in an output, or were begun, by subject and name.

    What is gone on with must be written in the same ones.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    if (output / MANIFEST).exists():
        for (subject, name), record in open_store(output).records.items():
            found.setdefault(subject, {})[name] = record.shards
    for file in (output / UNFINISHED).glob(f"*/{HEADER}"):
        if (header := header_of(file.parent)) is not None:
            shards = {name: tuple(head["shards"]) for name, head in header["heads"].items()}
            found[file.parent.name] = shards
    return found


def _refuse_own_input(plans: Sequence[PredictionPlan], options: PredictOptions, output: Path) -> None:
    target = output.resolve()
    images = [image for plan in plans for image in plan.images]
    images += [plan.subject[options.mask] for plan in plans if isinstance(options.mask, str)]
    if any(image.opened.path and image.opened.path.resolve().is_relative_to(target) for image in images):
        raise StoreExistsError(f"{output}: it is the store that is read; choose another output")


def _check_can_be_sent(network: Network, options: PredictOptions) -> None:
    """Refuse what no other process can have, before anything is touched."""
    for what, value in (("model", network), ("reduce function", options.reduce)):
        try:
            cloudpickle.dumps(value)
        except Exception as error:  # a user's class may fail in any way
            raise ModelError(
                f"the {what} cannot be sent to other processes ({type(error).__name__}: {error}); leave out "
                f"jobs and scheduler, or give one that can be pickled"
            ) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A subject that is to be predicted in a folder; ``inputs`` is a digest of all that it is made from."""

    plan: PredictionPlan
    folder: Path
    inputs: str


def _begun(plan: PredictionPlan, prediction: str, folder: Path, writer: StoreWriter) -> _Job | None:
    """The job of a subject; None where its predictions are committed. ``prediction`` is a digest of what all
    subjects depend on."""
    header = _subject_header(plan)
    inputs = digest(compact_json(header).encode())
    name = plan.subject.name
    committed = [writer.records.get((name, head.head.name)) for head in plan.heads]
    if any(committed):
        if any(record is None or record.inputs != inputs for record in committed):
            raise StoreExistsError(
                f"{writer.path}: the prediction of {name!r} was made from other inputs, mask or shards; "
                f"say overwrite=True to start over, or choose another output"
            )
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return _Job(plan, begin(folder, {**header, "prediction": prediction}), inputs)


def _header(network: Network, options: PredictOptions) -> Json:
    """What all voxels depend on."""
    return {
        "model": network.identity,
        "device": network.device.type,
        "amp": network.amp,
        "tta": network.tta,
        "image": list(options.image),
        "patch_size": list(options.patch_size),
        "patch_overlap": list(options.patch_overlap),
        "overlap_mode": options.overlap_mode,
        "reduce": identity(options.reduce) if callable(options.reduce) else repr(options.reduce),
        "batch_size": options.batch_size,
        "padding_mode": options.padding_mode,
        "normalize": options.normalize,
        "mask": identity(options.mask) if callable(options.mask) else options.mask,
        "fill": repr(float(options.fill)),
    }


def _subject_header(plan: PredictionPlan) -> Json:
    """What the voxels of one subject depend on beside that."""
    masked_out = "" if plan.skipped is None else digest(plan.skipped.tobytes())
    return {
        "inputs": [image.identity() for image in plan.images],
        "patches_outside_mask": masked_out,
        "heads": {
            head.head.name: {
                "dtype": head.record.dtype,
                "shape": head.record.shape,
                "shards": head.record.shards,
            }
            for head in plan.heads
        },
    }


def _carried_out(
    network: Network,
    jobs: Sequence[_Job],
    run_options: RunOptions,
    unfinished: Path,
    options: PredictOptions,
    progress: Progress,
) -> Iterator[_Job]:
    """Run all regions of some jobs, and give each job when all its regions are done."""
    tasks = [(number, region) for number, job in enumerate(jobs) for region in range(len(job.plan.regions))]
    left = Counter(number for number, _ in tasks)
    names = [f"predict-{jobs[number].plan.subject.name}-{region}" for number, region in tasks]
    work = _Work(network, tuple(jobs), run_options)
    shared = unfinished / f"work-{uuid.uuid4().hex}.pickle"
    is_local = options.scheduler is None and min(options.jobs, len(tasks)) <= 1
    try:
        if not is_local and tasks:
            with writing_to(unfinished.parent):
                shared.write_bytes(cloudpickle.dumps(work))
        function = work.do if is_local else functools.partial(_do_shared, shared, options.jobs > 1)
        cluster = None if options.scheduler is None else Cluster(options.scheduler, unfinished, names)
        for number, result in run_tasks(
            function, tasks, jobs=options.jobs, cluster=cluster, progress=progress
        ):
            if isinstance(result, WorkerError):
                raise WorkerError(f"{names[number]}: {result}")
            left[tasks[number][0]] -= 1
            if not left[tasks[number][0]]:
                yield jobs[tasks[number][0]]
    finally:
        shared.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """All that tasks need; a task is the numbers of a job and of its region."""

    network: Network
    jobs: tuple[_Job, ...]
    options: RunOptions

    def do(self, task: tuple[int, int], progress: Progress) -> None:
        """Do a task here."""
        job = self.jobs[task[0]]
        run_region(job.plan, job.plan.regions[task[1]], self.network, job.folder, self.options, progress)


def _do_shared(path: Path, alone: bool, task: tuple[int, int], progress: Progress) -> None:
    """Do a task in another process; ``alone`` is one of as many as there are processors."""
    if alone:
        torch.set_num_threads(1)
    _work_at(path).do(task, progress)


@functools.lru_cache(maxsize=1)
def _work_at(path: Path) -> _Work:
    try:
        work: _Work = cloudpickle.loads(path.read_bytes())
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"the model cannot be had in another process ({error}); its code must be importable there"
        ) from error
    model: Any = work.network.model
    if isinstance(model, torch.nn.Module):
        model.eval()  # once for all tasks: several may run in threads of this process
    return work
