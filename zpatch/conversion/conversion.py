"""Files into a store: run the plan, commit case by case, resume."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zpatch.conversion.case_staging import CaseTask, StagedCase, stage_case
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.conversion_plan import (
    ConversionPlan,
    Failure,
    PlannedCase,
    nothing_converted,
    plan_conversion,
)
from zpatch.digests import Json
from zpatch.errors import WorkerError
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest import Manifest
from zpatch.records.names import MANIFEST
from zpatch.runtime.task_contract import Cluster, Progress
from zpatch.runtime.tasks import run_tasks
from zpatch.store.store import open_store
from zpatch.store.store_writer import StoreWriter, check_can_create

TOOL_VERSION = f"zpatch {version('zpatch')}"


@dataclass(frozen=True, slots=True, eq=False)
class CaseOutcome:
    """The outcome of a case: its records, or in ``reason`` why there are none."""

    subject: str
    records: tuple[ImageRecord, ...]
    reason: str = ""

    def to_json(self) -> Json:
        """One line of a report."""
        if self.reason:
            return {"subject": self.subject, "status": "failed", "reason": self.reason}
        images = [
            {
                "image": record.image,
                "kind": record.kind,
                "shape": record.shape,
                "dtype": record.dtype,
                "voxel_bytes": record.voxel_bytes,
                "stored_bytes": record.stored_bytes,
                "warnings": record.warnings,
            }
            for record in self.records
        ]
        return {"subject": self.subject, "status": "converted", "images": images}


@dataclass(frozen=True, slots=True, eq=False)
class ConversionReport:
    """The outcome of a conversion. ``done`` are the subjects that were in the store before, unchanged."""

    store: Path
    outcomes: tuple[CaseOutcome, ...]
    done: tuple[str, ...] = ()

    @property
    def records(self) -> list[ImageRecord]:
        """All images that were converted."""
        return [record for outcome in self.outcomes for record in outcome.records]

    @property
    def failures(self) -> list[Failure]:
        """All cases that were not."""
        return [Failure(outcome.subject, outcome.reason) for outcome in self.outcomes if outcome.reason]

    def to_json(self) -> Json:
        """The report as plain JSON."""
        return {
            "store": str(self.store),
            "already_there": list(self.done),
            "cases": [outcome.to_json() for outcome in self.outcomes],
        }


def convert(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    scheduler: str | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert a cohort of NIfTI, NRRD or MetaImage files into a store, as ``zpatch convert`` does.

    ``options`` are the fields of ConvertOptions. An existing store is resumed: only images that are
    missing or changed are converted; ``overwrite`` starts over, or with ``include`` or ``exclude`` replaces
    those subjects only. Cases are converted in local processes, or on the Dask cluster at ``scheduler``. A
    case whose files are bad is left out and listed in the report; a SourceError says that none is good.

    >>> import tempfile
    >>> import nibabel as nib
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image = nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.eye(4))
    ...     image.to_filename(f"{folder}/ann.nii.gz")
    ...     report = convert(folder, f"{folder}/cohort.zarr", codec="zstd")
    ...     again = convert(folder, f"{folder}/cohort.zarr", codec="zstd")
    >>> len(report.records), report.failures, again.done
    (1, [], ('ann',))
    """
    chosen = ConvertOptions.of(**options)
    target = Path(store)
    check_can_create(target, overwrite=overwrite, resume=True)
    plan = plan_conversion(Path(source), chosen, done=None if overwrite else committed(target))
    return run_conversion(plan, target, overwrite=overwrite, scheduler=scheduler)


def committed(store: Path) -> Manifest | None:
    """The manifest of the images that a store holds already; None where there is no store yet."""
    return open_store(store).manifest if (store / MANIFEST).exists() else None


def run_conversion(
    plan: ConversionPlan,
    store: Path,
    *,
    overwrite: bool = False,
    scheduler: str | None = None,
    progress: Progress = lambda voxel_bytes: None,
    on_case: Callable[[CaseOutcome], None] = lambda outcome: None,
) -> ConversionReport:
    """Carry out a plan. Bytes of converted voxels are reported to ``progress``, the outcome of each case to
    ``on_case``."""
    outcomes = [CaseOutcome(failure.subject, (), failure.reason) for failure in plan.failures]
    for outcome in outcomes:
        on_case(outcome)
    attributes = {"tool": TOOL_VERSION, "source": str(plan.source)}
    if overwrite and not plan.options.chooses_subjects:
        opened = StoreWriter.create(store, attributes, overwrite=True)
    else:
        opened = StoreWriter.resume(store, attributes)
    with opened as writer:
        tasks = [CaseTask(case, plan.options, plan.folder, writer.staging) for case in plan.cases]
        names = [f"convert-{case.case.subject}" for case in plan.cases]
        cluster = None
        if scheduler is not None:
            cluster = Cluster(scheduler, writer.staging, names, plan.options.cluster_timeout)
        for number, result in run_tasks(
            stage_case, tasks, jobs=plan.options.jobs, cluster=cluster, progress=progress
        ):
            outcomes.append(_outcome(plan.cases[number], result, writer))
            on_case(outcomes[-1])
        failed = [Failure(outcome.subject, outcome.reason) for outcome in outcomes if outcome.reason]
        if not plan.done and len(failed) == len(outcomes):
            if not writer.records:
                writer.abandon()
            raise nothing_converted(plan.source, failed)
    return ConversionReport(store, tuple(outcomes), plan.done)


def _outcome(case: PlannedCase, result: StagedCase | WorkerError, writer: StoreWriter) -> CaseOutcome:
    subject = case.case.subject
    if isinstance(result, WorkerError):
        return CaseOutcome(subject, (), str(result))
    if result.failure:
        return CaseOutcome(subject, (), result.failure.reason)
    writer.commit(result.images)
    return CaseOutcome(subject, tuple(record for _, record in result.images))
