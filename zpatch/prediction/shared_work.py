"""The regions of all jobs, run here or in other processes that get the network and the jobs in one file."""

from __future__ import annotations

import dataclasses
import functools
import io
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cloudpickle
import torch

from zpatch.digests import file_digest
from zpatch.errors import ModelError, WorkerError
from zpatch.networks.network import Network
from zpatch.planning.prediction_options import PredictOptions
from zpatch.prediction.region_run import run_region
from zpatch.prediction.stage_times import StageClock, StageTimes
from zpatch.prediction.stored_jobs import StoredJobs, changed_file, new_file, opened_code
from zpatch.prediction.subject_job import SubjectJob
from zpatch.runtime.failures import Failures, is_of_subject, without_locals
from zpatch.runtime.task_contract import Cluster, Progress
from zpatch.runtime.tasks import run_tasks
from zpatch.sources.input_files import check_all
from zpatch.store.lock import writing_to


@dataclass(frozen=True, slots=True, eq=False)
class RegionOutcome:
    """How a task ended: the time it took, and the error of its subject, if there is one."""

    times: StageTimes
    error: Exception | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SharedWork:
    """Everything that tasks need; a task is the number of a job and that of its region."""

    network: Network
    options: PredictOptions
    jobs: Sequence[SubjectJob]

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """All regions of all jobs."""
        return [
            (number, region)
            for number, job in enumerate(self.jobs)
            for region in range(len(job.plan.regions))
        ]

    def do(self, task: tuple[int, int], progress: Progress) -> RegionOutcome:
        """Do a task in this process."""
        job = self.jobs[task[0]]
        check = functools.partial(check_all, job.plan.seals)
        region, clock = job.plan.regions[task[1]], StageClock()
        try:
            with clock.task():
                run_region(job.plan, region, self.network, job.folder, self.options, progress, check, clock)
        except Exception as error:
            if self.options.keep_going and is_of_subject(error):
                return RegionOutcome(clock.times, without_locals(error))
            raise
        return RegionOutcome(clock.times)


@dataclass(frozen=True, slots=True, eq=False)
class SentNetwork:
    """The network and the options, pickled once for all other processes; the jobs are in a file beside."""

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

    def write(self, folder: Path, jobs: Sequence[SubjectJob]) -> WorkFile:
        """Write the file of a ``SharedWork``, and free the memory of the pickled network.

        The folder is made, and neither it nor its files can be opened by other users: they hold code.
        """
        folder.mkdir(mode=0o700, parents=True)
        path = folder / "work.pickle"
        with new_file(path) as file:
            file.write(self.stream.getbuffer())
            self.stream.close()
            cloudpickle.dump(StoredJobs.write(folder / "jobs.pickle", jobs), file)
            return WorkFile(path, file_digest(file))


@dataclass(frozen=True, slots=True)
class WorkFile:
    """The file of a ``SharedWork``, and the digest of its bytes, which each task is sent with.

    Unpickling runs code, so another file in its place is refused.
    """

    path: Path
    digest: str

    def load(self) -> SharedWork:
        """The work, in another process. Raises ModelError, or StoreError if the file is not the one."""
        with opened_code(self.path) as file:
            if file_digest(file) != self.digest:
                raise changed_file(self.path)
            return SharedWork(*(cloudpickle.load(file) for _ in dataclasses.fields(SharedWork)))


def finished_jobs(
    work: SharedWork,
    sent: SentNetwork | None,
    unfinished: Path,
    failures: Failures,
    progress: Progress,
    clock: StageClock,
) -> Iterator[SubjectJob]:
    """Run all regions of all jobs; yields each job when all its regions are done.

    ``clock`` counts the time of all processes. If a region fails, the others of its subject are run
    nevertheless: the next run needs not to.
    """
    tasks, options = work.tasks, work.options
    left = Counter(number for number, _ in tasks)
    names = [f"predict-{work.jobs[number].plan.subject.name}-{region}" for number, region in tasks]
    shared, file = unfinished / f"work-{uuid.uuid4().hex}", None
    is_local = options.scheduler is None and min(options.jobs, len(tasks)) <= 1
    try:
        if sent is not None and not is_local and tasks:
            with writing_to(unfinished.parent):
                file = sent.write(shared, work.jobs)
        function = work.do if file is None else functools.partial(_do_shared, file, options.jobs > 1)
        cluster = None
        if options.scheduler is not None:
            cluster = Cluster(options.scheduler, unfinished, names, options.cluster_timeout)
        for number, result in run_tasks(
            function, tasks, jobs=options.jobs, cluster=cluster, progress=progress
        ):
            job, _ = tasks[number]
            if isinstance(result, WorkerError):
                result = RegionOutcome(StageTimes(), WorkerError(f"{names[number]}: {result}"))
            clock.add(result.times)
            if result.error is not None:
                failures.add(work.jobs[job].plan.subject.name, result.error)
                continue  # the job never has all its regions
            left[job] -= 1
            if not left[job]:
                yield work.jobs[job]
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def _do_shared(file: WorkFile, alone: bool, task: tuple[int, int], progress: Progress) -> RegionOutcome:
    """Do a task in another process; in one thread if the process is ``alone``, one per processor."""
    if alone:
        torch.set_num_threads(1)
    _check_seen(file, task[0])
    return _work_in(file).do(task, progress)


@functools.cache
def _check_seen(file: WorkFile, job: int) -> None:
    """Refuse, once in each process, inputs of a job that are not the same here."""
    for seal in _work_in(file).jobs[job].plan.seals:
        seal.check_seen()


@functools.lru_cache(maxsize=1)
def _work_in(file: WorkFile) -> SharedWork:
    work = file.load()
    model: Any = work.network.model
    if isinstance(model, torch.nn.Module):
        model.eval()  # once for all tasks: several may run in threads of this process
    return work
