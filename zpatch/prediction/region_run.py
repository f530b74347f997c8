"""Carrying out a prediction plan, one region at a time: read, run the network, blend, write.

Batches are read ahead in one thread, and shards are encoded and written in another, while the network runs
and its outputs are blended in this one. Each hands on one thing at a time, so that none runs away from the
others. What malloc keeps of freed memory goes back to the system where more is held than the plan says.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from zpatch.blending.blend import add_batch
from zpatch.blending.grid_blend import GridBlend, Skipped
from zpatch.blending.reduction import Finaliser, Reduction
from zpatch.blending.sinks import CompleteShard, ShardAssembler
from zpatch.errors import ModelError
from zpatch.geometry.boxes import Bools, PatchLocation, Triple
from zpatch.images.chunk_cache import cached
from zpatch.images.group_read import read_group
from zpatch.images.image import Image
from zpatch.nifti.writer import make_header
from zpatch.prediction.network import Network, Outputs
from zpatch.prediction.prediction_plan import PlannedHead, PredictionPlan, Region
from zpatch.prediction.shard_ledger import ShardLedger
from zpatch.runtime import buffer_pool
from zpatch.runtime.process_memory import resident_bytes, return_freed
from zpatch.runtime.task_contract import Progress
from zpatch.runtime.tasks import read_ahead
from zpatch.sampling.patch import torch_dtype
from zpatch.store.image_record import ImageRecord
from zpatch.store.lock import writing_to
from zpatch.store.names import RAW_HEADER
from zpatch.store.store import read_small_array

BATCHES_TO_LEARN = 4
BATCHES_BETWEEN = 32

Batch = tuple[list[PatchLocation], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class RunOptions:
    """What a region's run needs to know beside its plan."""

    reduce: Reduction = None
    padding_mode: str = "edge"
    fill: float = 0


def run_region(
    plan: PredictionPlan,
    region: Region,
    network: Network,
    folder: Path,
    options: RunOptions,
    progress: Progress,
) -> None:
    """Fill those shards of a region that are not written yet, below the subject's ``folder``.

    ``progress`` is told the patches done, now or before. A region that is run twice gives the same bytes.
    """
    shards = region.wanted(plan.heads)
    wanted = [_unwritten(head, of, folder) for head, of in zip(plan.heads, shards, strict=True)]
    needed = plan.needed(wanted)
    if done_before := plan.count_run(plan.needed(shards)) - plan.count_run(needed):
        progress(done_before)
    guard = _MemoryGuard(plan)
    with _Blender(plan, wanted, folder, options) as blender:
        with network.running():
            for locations, inputs in read_ahead(_batches(plan, region, needed, options)):
                outputs = guard.watch(network, inputs, plan.subject.name, locations)
                blender.add(outputs, locations)
                del outputs
                guard.check()
                progress(len(locations))
        blender.finish()


class _MemoryGuard:
    """Has freed memory given back where a region holds more between two batches than it should.

    That is what its plan says, and what the network keeps for its next run. It is seen in the first few: at
    first malloc gives back what it takes, until it finds that as much is wanted again and again.
    """

    def __init__(self, plan: PredictionPlan) -> None:
        return_freed()  # what an earlier region has left
        self._most = resident_bytes() + plan.region_bytes - plan.outputs_bytes
        self._of_network = 0
        self._to_learn = BATCHES_TO_LEARN
        self._since = 0  # batches, since memory was given back

    def watch(
        self, network: Network, inputs: torch.Tensor, subject: str, locations: Sequence[PatchLocation]
    ) -> Outputs:
        """What the network gives."""
        if not self._to_learn:
            return network(inputs, subject, locations)
        self._to_learn -= 1
        before = resident_bytes()
        outputs = network(inputs, subject, locations)
        given = sum(tensor.nbytes for tensor in outputs.values() if tensor.device.type == "cpu")
        self._of_network = max(self._of_network, resident_bytes() - before - given)
        return outputs

    def check(self) -> None:
        """Between two batches."""
        self._since += 1
        if resident_bytes() > self._most + 2 * self._of_network:  # malloc leaves gaps, of about as much
            return_freed()
            if self._since < BATCHES_BETWEEN:  # to take it anew each time would cost more than it saves
                self._of_network += self._of_network // 2
            self._since = 0


def _unwritten(head: PlannedHead, shards: Bools, folder: Path) -> Bools:
    ledger, left = ShardLedger(folder / head.head.name), shards.copy()
    for i, j, k in np.argwhere(shards).tolist():
        left[i, j, k] = not ledger.has((0, k, j, i))
    return left


def _batches(plan: PredictionPlan, region: Region, needed: Bools, options: RunOptions) -> Iterator[Batch]:
    """The batches to be run, as float32 (B, C, I, J, K), their memory in the order (b, c, k, j, i)."""
    caches = [cached(image.source, plan.grid, plan.swept_axis, region.patches) for image in plan.images]
    images = [image.with_source(source) for image, (source, _) in zip(plan.images, caches, strict=True)]
    channels = np.cumsum([0, *(image.num_channels for image in images)]).tolist()
    i, j, k = plan.grid.patch_size
    for positions in plan.batches(needed):
        locations = [plan.grid.at(position) for position in positions]
        stored = buffer_pool.empty((len(positions), channels[-1], k, j, i), np.float32)
        batch = stored.transpose(0, 1, 4, 3, 2)
        outs = [[patch[a:b] for patch in batch] for a, b in itertools.pairwise(channels)]
        read_group(images, locations, padding_mode=options.padding_mode, out=outs)
        for _, done in caches:
            done(positions[-1])
        yield locations, torch.from_numpy(batch)


class _Blender:
    """Blends what the network gives into the shards of each head."""

    def __init__(
        self, plan: PredictionPlan, wanted: Sequence[Bools], folder: Path, options: RunOptions
    ) -> None:
        self._subject = plan.subject.name
        store = folder.parents[2]  # .unfinished, the subject's, and what all depends on
        self._sinks = [ShardSink(ShardLedger(folder / h.head.name), h.record, store) for h in plan.heads]
        self._blends = {
            head.head.name: GridBlend(
                head.tiling,
                sink,
                Finaliser(options.reduce, _kept_dtype(head), channels=head.head.kept_channels),
                wanted=shards,
                skipped=_skipped(plan, head, options.fill),
            )
            for head, shards, sink in zip(plan.heads, wanted, self._sinks, strict=True)
        }

    def add(self, outputs: Outputs, locations: Sequence[PatchLocation]) -> None:
        """Blend a batch."""
        if outputs.keys() != self._blends.keys():
            raise ModelError(
                f"subject {self._subject!r}: the network gave {', '.join(outputs)} where for its first patch "
                f"it gave {', '.join(self._blends)}"
            )
        try:
            for key, tensor in outputs.items():
                add_batch(self._blends[key], tensor, locations)
        except ModelError as error:
            raise ModelError(f"subject {self._subject!r}: {error}") from error

    def finish(self) -> None:
        """Wait until all is written; every patch must have come."""
        for blend in self._blends.values():
            blend.finish()
        for sink in self._sinks:
            sink.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()


def _kept_dtype(head: PlannedHead) -> torch.dtype:
    return torch_dtype(np.dtype(head.record.dtype), widen=False)


def _skipped(plan: PredictionPlan, head: PlannedHead, fill: float) -> Skipped | None:
    if plan.skipped is None:
        return None
    channels, dtype = head.head.kept_channels, _kept_dtype(head)
    return Skipped(plan.skipped, lambda shape: torch.full((channels, *shape), fill, dtype=dtype))


class ShardSink:
    """Writes final voxels into shards of an image, and an entry for each shard into its ledger.

    A thread encodes and writes one shard while the next one is filled.
    """

    def __init__(self, ledger: ShardLedger, record: ImageRecord, store: Path) -> None:
        self._record = record
        self._store = store
        self._ledger = ledger
        self._shards = ShardAssembler(record)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zpatch-write")
        self._last: Future[Any] | None = None

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0) -> None:
        """Take in final voxels, and start to write each shard that they complete after the one before it."""
        for shard in self._shards.put(first, voxels, skipped=skipped):
            self.wait()
            self._last = self._pool.submit(self._write, shard)

    def _write(self, shard: CompleteShard) -> None:
        with writing_to(self._store):
            self._ledger.write(self._record, shard.number, shard.voxels, skipped=shard.skipped)

    def wait(self) -> None:
        """Wait until all complete shards are written."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)


def finish_subject(plan: PredictionPlan, folder: Path) -> list[tuple[Path, ImageRecord]]:
    """Write what makes images of the shards of a subject, all of which are written: ready to be committed."""
    return [
        (folder / head.head.name, _finished(head, plan.images[0], folder / head.head.name))
        for head in plan.heads
    ]


def _finished(head: PlannedHead, image: Image, folder: Path) -> ImageRecord:
    record, like = head.record, None
    source, keeps_grid = image.record, head.tiling.shape == image.spatial_shape
    if keeps_grid and image.folder and source and source.orientation.is_identity:
        like = read_small_array(image.folder, RAW_HEADER, source.files).tobytes()
    channels, dtype = record.shape_czyx[0], np.dtype(record.dtype)
    header = make_header(
        record.spatial_shape,
        channels,
        dtype,
        record.affine_array,
        spatial_unit=record.spatial_unit,
        like=like,
    )
    return ShardLedger(folder).finish(record, header)
