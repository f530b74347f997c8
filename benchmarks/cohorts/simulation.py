"""A conversion and a prediction of 100,000 cases on a simulated cluster: what the coordinator does for each.

The code of zpatch is the real one, down to the calls of Dask's client; tasks do nothing, and nothing is
written to the output. Seconds are those of the processor. Functions run in fresh processes.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.cohorts.cluster import Assumptions, SimulatedCluster, check_once, simulated
from benchmarks.cohorts.stores import Subject
from zpatch.records.image_record import ImageRecord

ADDRESS = "tcp://simulated:8786"
SHAPE = (2048, 512, 512)  # of a volume, int16: 1 GiB
PATCH, OVERLAP, CLASSES = 128, 32, 5
TASK_S = {"convert": 60.0, "predict": 30.0}

Figures = dict[str, float]


def assumed(kind: str) -> Assumptions:
    """The cluster of a run."""
    return Assumptions(task_s=TASK_S[kind])


class _Memory:
    """Bytes of Python's objects, if ``traced``: the most above those that there were at the beginning."""

    def __init__(self, traced: bool) -> None:
        self._traced = traced
        if traced:
            gc.collect()
            tracemalloc.start()

    @property
    def now(self) -> int:
        return tracemalloc.get_traced_memory()[0] if self._traced else 0


def convert(source: str, tasks: str, traced: str = "") -> Figures:
    """A conversion of that many cases, all like the one in ``source``; with ``traced``, its memory."""
    from zpatch.conversion import conversion
    from zpatch.conversion.conversion_options import ConvertOptions
    from zpatch.conversion.conversion_plan import plan_conversion
    from zpatch.store.store_writer import StoreWriter

    with tempfile.TemporaryDirectory() as folder:
        conversion.convert(source, Path(folder) / "one")
        answer = _staged_like(Path(folder) / "one")
        plan = plan_conversion(Path(source), ConvertOptions())
        memory = _Memory(bool(traced))
        plan = dataclasses.replace(plan, cases=tuple(_renamed(plan.cases[0], int(tasks))))
        cluster, got = SimulatedCluster(assumed("convert"), answer), Counter[int]()
        most = 0

        def count(outcome: Any) -> None:
            nonlocal most
            got[int(outcome.subject[4:])] += 1
            if len(got) in (int(tasks) // 2, int(tasks)):
                most = max(most, memory.now)

        with simulated(cluster), mock.patch.object(StoreWriter, "commit", new=_no_commit):
            seconds, _ = _timed(
                lambda: conversion.run_conversion(
                    plan, Path(folder) / "store", scheduler=ADDRESS, on_case=count
                )
            )
        check_once(got, int(tasks))
        return _figures(cluster, int(tasks), seconds, most)


def _no_commit(writer: object, images: object) -> None:
    """A mock would keep all images."""


def _renamed(case: Any, count: int) -> Iterator[Any]:
    for number in range(count):
        name = Subject(number).name
        yield dataclasses.replace(
            case,
            case=dataclasses.replace(case.case, subject=name),
            images=tuple(dataclasses.replace(image, subject=name) for image in case.images),
        )


def _staged_like(store: Path) -> Callable[[Any], Any]:
    """Makes the result of a task, with records of its own as they arrive from a worker."""
    from zpatch.conversion.case_staging import StagedCase
    from zpatch.store.store import open_store

    records = [record.to_json() for record in open_store(store).records.values()]

    def answer(task: Any) -> StagedCase:
        subject = task.case.case.subject
        found = [ImageRecord.from_json({**record, "subject": subject}, "") for record in records]
        return StagedCase(tuple((task.staging / record.image, record) for record in found))

    return answer


def predict(cases: str, traced: str = "") -> Figures:
    """A prediction of that many volumes of 1 GiB; with ``traced``, its memory."""
    from zpatch.prediction.shared_work import RegionOutcome, SharedWork, finished_jobs
    from zpatch.prediction.stage_times import StageClock, StageTimes
    from zpatch.runtime.failures import Failures

    options, network = _prediction_options(), _network()
    memory = _Memory(bool(traced))
    seconds_of_plan, jobs = _timed(lambda: [_job(number, options) for number in range(int(cases))])
    got, most, work = Counter[int](), 0, SharedWork(network, options, jobs)
    times = StageTimes({"network": 20.0, "reading": 5.0, "writing": 5.0}, total=30.0)
    cluster = SimulatedCluster(assumed("predict"), lambda task: RegionOutcome(times))
    with tempfile.TemporaryDirectory() as folder, simulated(cluster):
        finished = finished_jobs(
            work, _sent(network, options), Path(folder), Failures(), lambda done: None, StageClock()
        )

        def drain() -> None:
            nonlocal most
            for job in finished:
                got[int(job.plan.subject.name[4:])] += 1
                if len(got) in (int(cases) // 2, int(cases)):
                    most = max(most, memory.now)

        seconds, _ = _timed(drain)
    check_once(got, int(cases))
    tasks = len(work.tasks)
    plan = jobs[0].plan
    return {
        **_figures(cluster, tasks, seconds, most),
        "plan_seconds": seconds_of_plan / int(cases),
        "cases": int(cases),
        "regions": len(plan.regions),
        "patches": plan.patches,
        "patches_run": plan.patches_run,
        "shards": plan.shards_out,
        "bytes_in": 2 * math.prod(SHAPE),
        "bytes_out": plan.bytes_out,
    }


def _prediction_options() -> Any:
    from zpatch.planning.prediction_options import PredictOptions

    return PredictOptions.of(
        image="t1", patch_size=PATCH, patch_overlap=OVERLAP, reduce="argmax", scheduler=ADDRESS, device="cpu"
    )


def _network() -> Any:
    import torch

    from zpatch.networks.network import Network

    return Network.of(torch.nn.Conv3d(1, CLASSES, 1).eval(), _prediction_options())


def _sent(network: Any, options: Any) -> Any:
    from zpatch.prediction.shared_work import SentNetwork

    return SentNetwork.of(network, options)


def _job(number: int, options: Any) -> Any:
    """The job of a volume, planned as for a cluster."""
    from zpatch.planning.model_inputs import ModelInputs
    from zpatch.planning.planning import _slabs, candidates, first_fitting
    from zpatch.planning.prediction_plan import Head
    from zpatch.prediction.subject_job import SubjectJob
    from zpatch.prediction.work_folder import WorkFolder

    inputs = ModelInputs.of(_volume(number), options)
    head = Head("prediction", CLASSES, 4, (PATCH,) * 3, 1, "|u1")
    slabs = _slabs(inputs, options, 100_000)
    plan = first_fitting(candidates(inputs, [head], options, slabs=slabs), None)
    folder = WorkFolder(Path("/out"), Path("/out/.unfinished") / plan.subject.name / ("0" * 32))
    return SubjectJob(plan, folder, f"{number:032x}", (f"{number:032x}",))


def _volume(number: int) -> Any:
    """A subject whose image is in a store of which only the record exists."""
    from zpatch.images.image import stored_image
    from zpatch.images.subject import Subject as StoredSubject

    record = ImageRecord(
        subject=Subject(number).name,
        image="t1",
        kind="scalar",
        shape=SHAPE,
        dtype="<i2",
        axes="zyx",
        chunks=(32, 32, 32),
        shards=(64, 512, 512),
        codec="lz4",
        affine=((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
    )
    image = stored_image(Path("/store") / record.subject / "t1", record)
    return StoredSubject.of({"t1": image}, name=record.subject, split=None, metadata={})


def ledger_bytes() -> Figures:
    """What the entry of one shard takes in the ledger of an unfinished output."""
    import numpy as np

    from zpatch.prediction.shard_ledger import ShardLedger

    record = _job(0, _prediction_options()).plan.heads[0].record
    with tempfile.TemporaryDirectory() as folder:
        ledger = ShardLedger(Path(folder) / "image")
        voxels = np.random.default_rng(0).integers(0, CLASSES, record.shards).astype(np.uint8)[None]
        ledger.write(record, (0, 0, 0, 0), voxels)
        (entry,) = Path(folder).rglob("0.0.0.0.json")
        return {"entry_bytes": entry.stat().st_size, "shard_voxels": voxels.size}


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.thread_time()
    found = function()
    return time.thread_time() - begin, found


def _figures(cluster: SimulatedCluster, tasks: int, seconds: float, most: int) -> Figures:
    return {
        "tasks": tasks,
        "begun_again": cluster.begun - tasks,
        "deaths": cluster.deaths,
        "moved": cluster.moved,
        "hours": cluster.now / 3600,
        "most_in_flight": cluster.most_in_flight,
        "coordinator_seconds": seconds - cluster.seconds,
        "held_bytes": most,
    }
