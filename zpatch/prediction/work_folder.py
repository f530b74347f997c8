"""The folder of a subject that is predicted: what was written by any process, until all of it is there."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from zpatch.digests import Json
from zpatch.geometry.voxel_grid import VoxelGrid
from zpatch.images.image import Image
from zpatch.planning.prediction_plan import PlannedHead, PredictionPlan
from zpatch.prediction.damaged_tiles import damaged_in, damaged_of, damaged_warnings, note_damaged
from zpatch.prediction.shard_ledger import ShardLedger, begin
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import RAW_HEADER, UNFINISHED
from zpatch.store.store import read_small_array
from zpatch.volume_files.nifti_writer import make_header


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """The folder in which the outputs of a subject are written until they are committed.

    ``output`` is the store that they are written for; ``path`` is a folder in its ``.unfinished``, named
    ``<subject>/<digest of all that the voxels depend on>``, with a folder for each output.
    """

    output: Path
    path: Path

    @classmethod
    def begin(cls, output: Path, subject: str, header: Json, *, writes: bool = True) -> Self:
        """Begin or resume a subject. Raises StoreExistsError if it was begun with another ``header``.

        ``writes=False`` only looks what an earlier run has left.
        """
        return cls(output, begin(output / UNFINISHED / subject, header, writes=writes))

    def ledger(self, head: PlannedHead) -> ShardLedger:
        """The written shards of an output."""
        return ShardLedger(self.path / head.head.name)

    def note_damaged(self, images: Sequence[Image]) -> None:
        """Note what was read as 0 in this process because it is damaged; before a shard made of it counts."""
        for image in images:
            note_damaged(self.path, image.source.damaged())

    def damaged(self) -> list[str]:
        """The errors of all that was noted as damaged, by any process."""
        return damaged_in(self.path)

    def remove(self) -> None:
        """Remove all that was written for the subject.

        First under another name: a worker that a cluster has given up may still write to it.
        """
        aside = self.path.parent.with_name(f".{uuid.uuid4().hex}")
        self.path.parent.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def finish_subject(
    plan: PredictionPlan, folder: WorkFolder, committed: Sequence[ImageRecord] = ()
) -> list[tuple[Path, ImageRecord]]:
    """Complete the images of a subject, once all their shards are written: their folders, and their records.

    ``committed`` are the images that are mended, if they are. Raises IncompleteCoverageError if a shard is
    missing. May be repeated.
    """
    ledgers = [folder.ledger(head) for head in plan.heads]
    mended: list[ImageRecord | None] = [*committed] or [None] * len(ledgers)
    damaged = folder.damaged()
    return [
        (ledger.folder, _finished(head, plan.native, ledger, before, damaged))
        for head, ledger, before in zip(plan.heads, ledgers, mended, strict=True)
    ]


def _finished(
    head: PlannedHead,
    image: Image,
    ledger: ShardLedger,
    mended: ImageRecord | None,
    damaged: Sequence[str],
) -> ImageRecord:
    """Complete an image, with the NIfTI header of the image it was predicted from if the grid is the same.

    ``damaged`` are the errors of what was read as 0.
    """
    record, like = head.record, None
    source, grid = image.record, VoxelGrid(record.spatial_shape, record.affine_array)
    if image.folder and source and source.orientation.is_identity and grid.is_same(image.grid):
        like = read_small_array(image.folder, RAW_HEADER, source.files).tobytes()
    header = make_header(
        record.spatial_shape,
        record.shape_czyx[0],
        np.dtype(record.dtype),
        record.affine_array,
        spatial_unit=record.spatial_unit,
        like=like,
    )
    if mended is not None:
        return ledger.finish(record, header, damaged_of(mended), mended=mended)
    return ledger.finish(record, header, damaged_warnings(damaged), damaged_tiles=len(damaged))
