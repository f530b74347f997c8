"""Predictions in progress: which regions are left, which process fills them, and when a subject is complete.

Unfinished work is stored in ``.unfinished`` of the output, in a folder for each subject, until all shards of
the subject are written; then its images are committed together. All that the voxels depend on is stored
beside them and in the name of their folder, so that a prediction is resumed with the same model, options and
inputs only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from zpatch.digests import Json, compact_json, digest
from zpatch.errors import OptionError, StoreExistsError
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject
from zpatch.networks.model_files import ModelName
from zpatch.networks.network import Network
from zpatch.planning.prediction_options import PredictOptions, check_same
from zpatch.planning.prediction_plan import PredictionPlan
from zpatch.prediction.damaged_tiles import check_undamaged
from zpatch.prediction.shard_ledger import HEADER, header_of
from zpatch.prediction.shared_work import SentNetwork, SharedWork, finished_jobs
from zpatch.prediction.stage_times import OnTimes, StageClock
from zpatch.prediction.subject_job import (
    SubjectJob,
    begin_job,
    check_finite,
    check_inputs,
    commit_job,
    patches_left,
)
from zpatch.records.names import MANIFEST, UNFINISHED
from zpatch.runtime.failures import Failures
from zpatch.runtime.task_contract import Progress
from zpatch.sources.input_files import root_of
from zpatch.store.lock import writing_to
from zpatch.store.store import open_store
from zpatch.store.store_writer import StoreWriter


def run_prediction(
    network: Network,
    plans: Sequence[PredictionPlan],
    output: str | os.PathLike[str],
    options: PredictOptions,
    *,
    subjects: Sequence[str] = (),
    failures: Failures | None = None,
    progress: Progress = lambda patches: None,
    on_times: OnTimes = lambda times: None,
) -> Cohort:
    """Run or resume the plans of some subjects; each subject is committed when all its shards are written.

    ``subjects`` are all that the output is meant for, if some have no plan. ``failures`` notes the subjects
    that fail; their error is raised here if no subject at all is predicted. ``on_times`` is called once at
    the end.
    """
    store, failures, clock = Path(output), failures or Failures(), StageClock()
    check_output(store, [plan.subject for plan in plans], options)
    if options.jobs > 1 and network.device.type != "cpu":
        raise OptionError(
            f"jobs share processors, but one process feeds {network.device}: leave jobs=1", option="jobs"
        )
    sent = SentNetwork.of(network, options) if options.jobs > 1 or options.scheduler is not None else None
    attributes = _attributes(network, options, list(subjects) or [plan.subject.name for plan in plans])
    with _opened(store, attributes, overwrite=options.overwrite) as writer:
        _check_resumable(writer.attributes, attributes, store)
        if options.strict:
            check_finite(writer.records.values())
            check_undamaged(writer.records.values())
        jobs, done = _begun_jobs(plans, attributes["prediction"], writer, options, failures)
        if done_before := sum(plan.patches_run for plan in done):
            progress(done_before)
        committed = len(done)
        work = SharedWork(network, options, tuple(jobs))
        for job in finished_jobs(work, sent, writer.path / UNFINISHED, failures, progress, clock):
            with failures.caught(job.plan.subject.name), clock.task(), clock.stage("writing"):
                check_inputs(job)
                commit_job(job, writer, network.name or ModelName.of(network.model), options)
                committed += 1
        if not committed:
            raise failures.error()
        if not failures.found:
            shutil.rmtree(writer.path / UNFINISHED, ignore_errors=True)
    on_times(clock.times)
    return Cohort(output)


def patches_to_run(
    network: Network,
    plans: Sequence[PredictionPlan],
    output: Path,
    options: PredictOptions,
    *,
    subjects: Sequence[str],
) -> list[int]:
    """How many patches of each plan a run would still run: those that earlier runs have not done.

    The output is looked at as by a run, and not changed. Raises StoreExistsError if it cannot be resumed.
    """
    if options.overwrite or not (output / MANIFEST).exists():
        return [plan.patches_run for plan in plans]
    store, attributes = open_store(output), _attributes(network, options, subjects)
    _check_resumable(store.attributes, attributes, output)
    prediction = digest(compact_json(attributes["prediction"]).encode())
    return [patches_left(plan, prediction, store, verify=options.verify) for plan in plans]


def _attributes(network: Network, options: PredictOptions, subjects: Sequence[str]) -> Json:
    """The attributes of an output: its subjects, and all that the voxels of each depend on but its inputs."""
    header = {**network.stored(), **options.stored()}
    return {"tool": "zpatch predict", "expected_subjects": list(subjects), "prediction": header}


def _check_resumable(before: Json, now: Json, output: Path) -> None:
    if "prediction" not in before:
        raise StoreExistsError(f"{output}: it holds images that were converted; choose another name")
    check_same(before["prediction"], now["prediction"], output)
    expected, subjects = before["expected_subjects"], now["expected_subjects"]
    check_same({"subjects": expected}, {"subjects": subjects}, output)


def _begun_jobs(
    plans: Sequence[PredictionPlan],
    header: Json,
    writer: StoreWriter,
    options: PredictOptions,
    failures: Failures,
) -> tuple[list[SubjectJob], list[PredictionPlan]]:
    """The jobs of subjects that are to be predicted, and the plans of those that are done."""
    prediction = digest(compact_json(header).encode())
    jobs, done = [], []
    for plan in plans:
        with failures.caught(plan.subject.name), writing_to(writer.path):
            job = begin_job(plan, options, prediction, writer)
            if job is None:
                done.append(plan)
            else:
                jobs.append(job)
    return jobs, done


def _opened(store: Path, attributes: Json, *, overwrite: bool) -> StoreWriter:
    if overwrite:
        return StoreWriter.create(store, attributes, overwrite=True)
    return StoreWriter.resume(store, attributes)


def begun_shards(output: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of shards of all predictions in an output, finished or not, by subject and name.

    A prediction is resumed in the same shards.
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


def check_output(output: Path, subjects: Sequence[Subject], options: PredictOptions) -> None:
    """Raise StoreExistsError if the output is in what is read, or holds something that is read.

    All that is in one store, image, plate or series with an input counts as read. Images that are not there
    are not looked at.
    """
    target = output.resolve()
    others = [name for name in (options.mask, options.align) if isinstance(name, str)]
    names = [*options.image, *others]
    known = [
        subject.images for subject in subjects if isinstance(subject, Subject)
    ]  # planning refuses others
    images = [images[name] for images in known for name in names if name in images]
    places = {place for image in images for place in image.opened.places}
    for place in places:
        if (root := root_of(place)) == target:
            raise StoreExistsError(f"{output}: it is the store that is read; choose another output")
        if place.resolve().is_relative_to(target):
            raise StoreExistsError(f"{output}: it holds {place}, which is read; choose another output")
        if target.is_relative_to(root):
            raise StoreExistsError(f"{output}: it is inside {root}, which is read; choose another output")
