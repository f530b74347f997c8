"""Predictions in progress: which regions are left, which process fills them, and when a subject is complete.

Unfinished work is stored in ``.unfinished`` of the output, in a folder for each subject, until all shards of
the subject are written; then its images are committed together. All that the voxels depend on is stored
beside them and in the name of their folder, so that a prediction is resumed with the same model, options and
inputs only.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import os
import pickle
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cloudpickle
import torch

from zpatch.digests import Json, compact_json, digest
from zpatch.errors import DamageError, ModelError, OptionError, SourceError, StoreExistsError, WorkerError
from zpatch.images.cohort import Cohort
from zpatch.images.input_files import InputSeal, check_all
from zpatch.networks.network import Network
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import PredictionPlan
from zpatch.prediction.region_run import WorkFolder, finish_subject, run_region
from zpatch.prediction.shard_ledger import HEADER, check_same, header_of
from zpatch.runtime.failures import Failures, is_of_subject, without_locals
from zpatch.runtime.task_contract import Cluster, Progress
from zpatch.runtime.tasks import run_tasks
from zpatch.store.image_record import ImageRecord
from zpatch.store.image_writer import not_finite_text
from zpatch.store.lock import writing_to
from zpatch.store.names import MANIFEST, ROOT_DOCUMENT, UNFINISHED
from zpatch.store.store import open_store
from zpatch.store.store_writer import StoreWriter
from zpatch.store.verification import damage_of, files_of


def run_prediction(
    network: Network,
    plans: Sequence[PredictionPlan],
    output: str | os.PathLike[str],
    options: PredictOptions,
    *,
    subjects: Sequence[str] = (),
    failures: Failures | None = None,
    progress: Progress = lambda patches: None,
) -> Cohort:
    """Run or resume the plans of some subjects; each subject is committed when all its shards are written.

    ``subjects`` are all that the output is meant for, if some have no plan. ``failures`` notes the subjects
    that fail; their error is raised here if no subject at all is predicted.
    """
    store, failures = Path(output), failures or Failures()
    _refuse_own_input(plans, options, store)
    if options.jobs > 1 and network.device.type != "cpu":
        raise OptionError(
            f"jobs share processors, but one process feeds {network.device}: leave jobs=1", option="jobs"
        )
    sent = _Sent.of(network, options) if options.jobs > 1 or options.scheduler is not None else None
    header = {**network.stored(), **options.stored()}
    expected = list(subjects) or [plan.subject.name for plan in plans]
    attributes = {"tool": "zpatch predict", "expected_subjects": expected, "prediction": header}
    with _opened(store, attributes, overwrite=options.overwrite) as writer:
        check_same(writer.attributes["prediction"], header, store)
        if options.strict:
            _check_finite(writer.records.values())
        check_same({"subjects": writer.attributes["expected_subjects"]}, {"subjects": expected}, store)
        jobs, done = _begun_jobs(plans, header, writer, options, failures)
        if done_before := sum(plan.patches_run for plan in done):
            progress(done_before)
        committed = len(done)
        work = _Work(network, options, tuple(jobs))
        for job in _finished_jobs(work, sent, writer.path / UNFINISHED, failures, progress):
            with failures.caught(job.plan.subject.name):
                _check_inputs(job)
                _commit(job, writer, strict=options.strict)
                committed += 1
        if not committed:
            raise failures.error()
        if not failures.found:
            shutil.rmtree(writer.path / UNFINISHED, ignore_errors=True)
    return Cohort(output)


def _begun_jobs(
    plans: Sequence[PredictionPlan],
    header: Json,
    writer: StoreWriter,
    options: PredictOptions,
    failures: Failures,
) -> tuple[list[_Job], list[PredictionPlan]]:
    """The jobs of subjects that are to be predicted, and the plans of those that are done."""
    prediction = digest(compact_json(header).encode())
    jobs, done = [], []
    for plan in plans:
        with failures.caught(plan.subject.name), writing_to(writer.path):
            job = _begun(plan, options, prediction, writer)
            if job is None:
                done.append(plan)
            else:
                jobs.append(job)
    return jobs, done


def _check_finite(records: Iterable[ImageRecord]) -> None:
    """Raise ModelError if any image of an earlier run holds voxels that are NaN or infinite."""
    if text := not_finite_text(records):
        raise ModelError(
            f"{text}, in an earlier run; leave out strict=True, or say overwrite=True to start over"
        )


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


def _refuse_own_input(plans: Sequence[PredictionPlan], options: PredictOptions, output: Path) -> None:
    target = output.resolve()
    images = [image for plan in plans for image in plan.images]
    images += [plan.subject[options.mask] for plan in plans if isinstance(options.mask, str)]
    if any(image.opened.path and image.opened.path.resolve().is_relative_to(target) for image in images):
        raise StoreExistsError(f"{output}: it is the store that is read; choose another output")
    for image in images:
        if (path := image.opened.path) and target.is_relative_to(inside := path.resolve()):
            raise StoreExistsError(f"{output}: it is inside {inside}, which is read; choose another output")


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A subject to be predicted in ``folder``.

    ``inputs`` is the digest of its own part of the header, ``identities`` are those of its images, ``seals``
    say what their files were like. If it is committed and damaged, ``committed`` are the records of its
    images.
    """

    plan: PredictionPlan
    folder: WorkFolder
    inputs: str
    identities: tuple[str, ...]
    seals: tuple[InputSeal, ...]
    committed: tuple[ImageRecord, ...] = ()


def _begun(
    plan: PredictionPlan, options: PredictOptions, prediction: str, writer: StoreWriter
) -> _Job | None:
    """The job of a subject; None if its predictions are committed and not damaged.

    ``prediction`` is the digest of the header that all subjects share. Of a damaged subject all bytes are
    compared with their seals, and the shards that are sound are kept. Damage is found by the presence and
    length of files, or with ``options.verify`` in every byte.
    """
    header = _subject_header(plan)
    inputs = digest(compact_json(header).encode())
    name = plan.subject.name
    keys = [(name, head.head.name) for head in plan.heads]
    committed = tuple(writer.records[key] for key in keys if key in writer.records)
    if committed:
        if len(committed) < len(keys) or any(record.inputs != inputs for record in committed):
            raise StoreExistsError(
                f"{writer.path}: the prediction of {name!r} was made from other inputs, mask or shards; "
                f"say overwrite=True to start over, or choose another output"
            )
        if not _is_damaged(committed, writer, verify=options.verify):
            shutil.rmtree(writer.path / UNFINISHED / name, ignore_errors=True)
            return None
    seals = tuple(
        InputSeal.of(f"image {each!r} of subject {name!r}", image.source)
        for each, image in zip(options.image, plan.images, strict=True)
    )
    folder = WorkFolder.begin(writer.path, name, {**header, "prediction": prediction})
    for head, record in zip(plan.heads, committed, strict=False):
        folder.ledger(head).adopt(writer.path / name / record.image, record)
    return _Job(plan, folder, inputs, tuple(header["inputs"]), seals, committed)


def _is_damaged(committed: Sequence[ImageRecord], writer: StoreWriter, *, verify: bool) -> bool:
    """Whether a file of some images of a subject, or the document of the subject, is damaged."""
    document = f"{committed[0].subject}/{ROOT_DOCUMENT}"
    files = itertools.chain([(document, writer.documents[document])], *map(files_of, committed))
    return any(damage_of(writer.path, key, seal, quick=not verify) for key, seal in files)


def _commit(job: _Job, writer: StoreWriter, *, strict: bool) -> None:
    """Commit the images of a job; or mend them, if they are the same as before they were damaged."""
    with writing_to(writer.path):
        finished = finish_subject(job.plan, job.folder, job.committed)
    images = [(folder, dataclasses.replace(record, inputs=job.inputs)) for folder, record in finished]
    if strict:  # shards of an earlier run
        _check_finite([record for _, record in images])
    before = [compact_json(record.to_json()) for record in job.committed]
    if before == [compact_json(record.to_json()) for _, record in images]:
        writer.mend(images)
    else:
        writer.commit(images)
    job.folder.remove()


def _check_inputs(job: _Job) -> None:
    """Compare the inputs with those of the header, before what was made of them is committed.

    If they have changed meanwhile, shards of both are discarded.
    """
    check_all(job.seals)
    images = zip(job.plan.images, job.identities, strict=True)
    is_same = all(image.identity() == before for image, before in images if image.opened.is_in_files)
    if is_same and all(seal.is_unchanged() for seal in job.seals):
        return
    job.folder.remove()
    raise DamageError(
        f"the inputs of {job.plan.subject.name!r} were changed while they were predicted, so that its "
        f"prediction is discarded; run the same command again"
    )


def _subject_header(plan: PredictionPlan) -> Json:
    """What the voxels of one subject depend on, besides the network and the options."""
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


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """Everything that tasks need; a task is the number of a job and that of its region."""

    network: Network
    options: PredictOptions
    jobs: tuple[_Job, ...]

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """All regions of all jobs."""
        return [
            (number, region)
            for number, job in enumerate(self.jobs)
            for region in range(len(job.plan.regions))
        ]

    def do(self, task: tuple[int, int], progress: Progress) -> Exception | None:
        """Do a task in this process; its result is the error of the subject, if there is one."""
        job = self.jobs[task[0]]
        check = functools.partial(check_all, job.seals)
        region = job.plan.regions[task[1]]
        try:
            run_region(job.plan, region, self.network, job.folder, self.options, progress, check)
        except Exception as error:
            if self.options.keep_going and is_of_subject(error):
                return without_locals(error)
            raise
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """The network and the options, pickled once for all other processes; the jobs follow them in the file."""

    stream: io.BytesIO

    @classmethod
    def of(cls, network: Network, options: PredictOptions) -> Self:
        """Refuse a network or a function that cannot be pickled, before anything is touched."""
        stream = io.BytesIO()
        options = dataclasses.replace(options, mask=None)  # a plan says already which patches are masked out
        for what, value in (("model", network), ("reduce function", options)):
            try:
                cloudpickle.dump(value, stream)
            except Exception as error:  # a user's class may fail in any way
                raise ModelError(
                    f"the {what} cannot be sent to other processes ({type(error).__name__}: {error}); leave "
                    f"out jobs and scheduler, or give one that can be pickled"
                ) from error
        return cls(stream)

    def write(self, path: Path, jobs: tuple[_Job, ...]) -> None:
        """Write the file of a ``_Work``, and free the memory of the pickled network."""
        with path.open("wb") as file:
            file.write(self.stream.getbuffer())
            self.stream.close()
            try:
                cloudpickle.dump(jobs, file)
            except (TypeError, pickle.PicklingError, AttributeError) as error:
                raise SourceError(
                    f"an input cannot be sent to other processes ({type(error).__name__}: {error}); leave "
                    f"out jobs and scheduler, or save it as Zarr or NIfTI and give its path"
                ) from error


def _finished_jobs(
    work: _Work, sent: _Sent | None, unfinished: Path, failures: Failures, progress: Progress
) -> Iterator[_Job]:
    """Run all regions of all jobs; yields each job when all its regions are done.

    If a region fails, the others of its subject are run nevertheless: the next run needs not to.
    """
    tasks, options = work.tasks, work.options
    left = Counter(number for number, _ in tasks)
    names = [f"predict-{work.jobs[number].plan.subject.name}-{region}" for number, region in tasks]
    shared = unfinished / f"work-{uuid.uuid4().hex}.pickle"
    is_local = options.scheduler is None and min(options.jobs, len(tasks)) <= 1
    try:
        if sent is not None and not is_local and tasks:
            with writing_to(unfinished.parent):
                sent.write(shared, work.jobs)
        function = work.do if is_local else functools.partial(_do_shared, shared, options.jobs > 1)
        cluster = None
        if options.scheduler is not None:
            cluster = Cluster(options.scheduler, unfinished, names, options.cluster_timeout)
        for number, result in run_tasks(
            function, tasks, jobs=options.jobs, cluster=cluster, progress=progress
        ):
            job, _ = tasks[number]
            if result is not None:
                if isinstance(result, WorkerError):
                    result = WorkerError(f"{names[number]}: {result}")
                failures.add(work.jobs[job].plan.subject.name, result)
                continue  # the job never has all its regions
            left[job] -= 1
            if not left[job]:
                yield work.jobs[job]
    finally:
        shared.unlink(missing_ok=True)


def _do_shared(path: Path, alone: bool, task: tuple[int, int], progress: Progress) -> Exception | None:
    """Do a task in another process; in one thread if the process is ``alone``, one per processor."""
    if alone:
        torch.set_num_threads(1)
    _check_seen(path, task[0])
    return _work_at(path).do(task, progress)


@functools.cache
def _check_seen(path: Path, job: int) -> None:
    """Refuse, once in each process, inputs of a job that are not the same here."""
    for seal in _work_at(path).jobs[job].seals:
        seal.check_seen()


@functools.lru_cache(maxsize=1)
def _work_at(path: Path) -> _Work:
    try:
        with path.open("rb") as file:
            work = _Work(*(cloudpickle.load(file) for _ in dataclasses.fields(_Work)))
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"the model cannot be loaded in another process ({error}); its code must be importable there"
        ) from error
    model: Any = work.network.model
    if isinstance(model, torch.nn.Module):
        model.eval()  # once for all tasks: several may run in threads of this process
    return work
