"""The prediction of one subject: begun or resumed, checked, and committed or mended."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from zpatch.digests import Json, compact_json, digest
from zpatch.errors import DamageError, ModelError, StoreExistsError
from zpatch.networks.model_files import ModelName
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import PredictionPlan
from zpatch.prediction.damaged_tiles import check_undamaged
from zpatch.prediction.region_run import unwritten
from zpatch.prediction.work_folder import WorkFolder, finish_subject
from zpatch.records.image_record import ImageRecord, Provenance
from zpatch.records.manifest import Key
from zpatch.records.names import ROOT_DOCUMENT, UNFINISHED
from zpatch.sources.input_files import check_all
from zpatch.store.image_writer import Shard, not_finite_text
from zpatch.store.lock import writing_to
from zpatch.store.store import Store, sharded_array
from zpatch.store.store_writer import StoreWriter
from zpatch.store.verification import damage_of, files_of


def check_finite(records: Iterable[ImageRecord]) -> None:
    """Raise ModelError if any image of an earlier run holds voxels that are NaN or infinite."""
    if text := not_finite_text(records):
        raise ModelError(
            f"{text}, in an earlier run; leave out strict=True, or say overwrite=True to start over"
        )


@dataclass(frozen=True, slots=True, eq=False)
class SubjectJob:
    """A subject to be predicted in ``folder``.

    ``inputs`` is the digest of its own part of the header, ``identities`` are those of its images. If it is
    committed and damaged, ``committed`` are the records of its images.
    """

    plan: PredictionPlan
    folder: WorkFolder
    inputs: str
    identities: tuple[str, ...]
    committed: tuple[ImageRecord, ...] = ()


def begin_job(
    plan: PredictionPlan, options: PredictOptions, prediction: str, writer: StoreWriter
) -> SubjectJob | None:
    """The job of a subject; None if its predictions are committed and not damaged.

    ``prediction`` is the digest of the header that all subjects share. Of a damaged subject all bytes are
    compared with their seals, and the shards that are sound are kept. Damage is found by the presence and
    length of files, or with ``options.verify`` in every byte.
    """
    check_all(plan.seals)
    header, name = _subject_header(plan), plan.subject.name
    inputs = digest(compact_json(header).encode())
    is_other = plan.identities and tuple(header["inputs"]) != plan.identities
    if is_other or not all(seal.is_unchanged() for seal in plan.seals):
        raise DamageError(
            f"the inputs of {name!r} were changed after it was planned; run the same command again"
        )
    if committed := _committed(plan, inputs, writer.path, writer.records):
        plan = _with_committed_levels(plan, committed, keeps=options.pyramid is not True)
        is_whole = all(h.record.levels == r.levels for h, r in zip(plan.heads, committed, strict=True))
        if is_whole and not _is_damaged(committed, writer, verify=options.verify):
            shutil.rmtree(writer.path / UNFINISHED / name, ignore_errors=True)
            return None
    folder = WorkFolder.begin(writer.path, name, {**header, "prediction": prediction})
    for head, record in zip(plan.heads, committed, strict=False):
        folder.ledger(head).adopt(writer.path / name / record.image, record)
    return SubjectJob(plan, folder, inputs, tuple(header["inputs"]), committed)


def patches_left(plan: PredictionPlan, prediction: str, store: Store, *, verify: bool) -> int:
    """How many patches a run would still run for a subject; nothing is written.

    Raises StoreExistsError if it could not be resumed.
    """
    header, name = _subject_header(plan), plan.subject.name
    inputs = digest(compact_json(header).encode())
    if committed := _committed(plan, inputs, store.path, store.records):
        written = [_soundness(store.path, record, verify=verify) for record in committed]
    else:
        header = {**header, "prediction": prediction}
        folder = WorkFolder.begin(store.path, name, header, writes=False)
        written = [folder.ledger(head).has for head in plan.heads]
    left = 0
    for region in plan.regions:
        shards = region.wanted(plan.heads)
        each = zip(plan.heads, written, shards, strict=True)
        left += plan.count_run(plan.needed([unwritten(*of_head) for of_head in each]))
    return left


def _soundness(store: Path, record: ImageRecord, *, verify: bool) -> Callable[[Shard], bool]:
    """Tells whether a shard of a committed image is as it was written."""
    folder = store / record.subject / record.image
    array = sharded_array(folder, record)

    def is_sound(shard: Shard) -> bool:
        key = array.shard_file(shard).relative_to(folder).as_posix()
        return damage_of(folder, key, record.files[key], quick=not verify) is None

    return is_sound


def _committed(
    plan: PredictionPlan, inputs: str, store: Path, records: Mapping[Key, ImageRecord]
) -> tuple[ImageRecord, ...]:
    """The committed images of a plan, if any. Raises StoreExistsError if they are of other inputs."""
    keys = [(plan.subject.name, head.head.name) for head in plan.heads]
    committed = tuple(records[key] for key in keys if key in records)
    if committed and (len(committed) < len(keys) or any(record.inputs != inputs for record in committed)):
        raise StoreExistsError(
            f"{store}: the prediction of {plan.subject.name!r} was made from other inputs, mask or shards; "
            f"say overwrite=True to start over, or choose another output"
        )
    return committed


def _with_committed_levels(
    plan: PredictionPlan, committed: Sequence[ImageRecord], *, keeps: bool
) -> PredictionPlan:
    """The plan with the coarser levels that committed images have; those without any get the plan's.

    With ``keeps`` they get none.
    """
    heads = [
        dataclasses.replace(head, record=dataclasses.replace(head.record, levels=record.levels))
        if keeps or record.levels
        else head
        for head, record in zip(plan.heads, committed, strict=True)
    ]
    return dataclasses.replace(plan, heads=tuple(heads))


def _is_damaged(committed: Sequence[ImageRecord], writer: StoreWriter, *, verify: bool) -> bool:
    """Whether a file of some images of a subject, or the document of the subject, is damaged."""
    document = f"{committed[0].subject}/{ROOT_DOCUMENT}"
    files = itertools.chain([(document, writer.documents[document])], *map(files_of, committed))
    return any(damage_of(writer.path, key, seal, quick=not verify) for key, seal in files)


def commit_job(job: SubjectJob, writer: StoreWriter, model: ModelName, options: PredictOptions) -> None:
    """Commit the images of a job; or mend them, if they are the same as before they were damaged.

    ``model`` is the name of the network that they are predicted by.
    """
    with writing_to(writer.path):
        finished = finish_subject(job.plan, job.folder, job.committed)
    made = _provenances(job, model, options)
    images = [
        (folder, dataclasses.replace(record, inputs=job.inputs, provenance=origin))
        for (folder, record), origin in zip(finished, made, strict=True)
    ]
    if options.strict:  # shards of an earlier run
        check_finite([record for _, record in images])
        check_undamaged([record for _, record in images])
    before = [compact_json(record.to_json()) for record in job.committed]
    if before == [compact_json(record.to_json()) for _, record in images]:
        writer.mend(images)
    else:
        writer.commit(images)
    job.folder.remove()


def _provenances(job: SubjectJob, model: ModelName, options: PredictOptions) -> list[Provenance | None]:
    """Where each image of a job comes from: as before, if it is committed, because its voxels are."""
    if job.committed:
        return [record.provenance for record in job.committed]
    images = {view.name: view.image for view in job.plan.views}
    if isinstance(options.mask, str) and options.mask in job.plan.subject.images:
        images[options.mask] = job.plan.subject[options.mask]
    paths = {
        name: os.path.abspath(path) if (path := image.opened.path) else None for name, image in images.items()
    }
    return [Provenance(model.name, model.path, paths, version("zpatch"))] * len(job.plan.heads)


def check_inputs(job: SubjectJob) -> None:
    """Compare the inputs with those of the header, before what was made of them is committed.

    If they have changed meanwhile, shards of both are discarded.
    """
    check_all(job.plan.seals)
    images = zip(job.plan.images, job.identities, strict=True)
    is_same = all(image.identity() == before for image, before in images if image.opened.is_in_files)
    if is_same and all(seal.is_unchanged() for seal in job.plan.seals):
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
