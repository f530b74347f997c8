"""Running one region of a prediction plan: read, run the network, blend, write.

Batches are read ahead in one thread, and shards are encoded and written in another, while this thread runs
the network and blends its outputs. Each hands over one thing at a time, so none gets far ahead of the others.
The process holds what the plan says: under a limit of memory what is freed is returned to the system at once,
without one it is kept for the next batch as long as there is room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from zpatch.blending.blend import add_batch
from zpatch.blending.grid_blend import GridBlend
from zpatch.blending.reduction import Finaliser, fitting_fill, not_finite
from zpatch.blending.regridding import Regridder
from zpatch.blending.sinks import BlendedSink, CompleteShard, FinalisingSink, ShardAssembler
from zpatch.errors import ModelError
from zpatch.geometry.boxes import Bools, PatchLocation, Triple
from zpatch.networks.model_axes import ModelAxes
from zpatch.networks.network import Network, Outputs
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import OUTPUT_BUFFERS, PlannedHead, PredictionPlan, Region
from zpatch.planning.probe import read_batch
from zpatch.prediction.shard_ledger import ShardLedger
from zpatch.prediction.stage_times import StageClock
from zpatch.prediction.work_folder import WorkFolder
from zpatch.records.image_record import ImageRecord
from zpatch.runtime.process_memory import private_bytes, return_freed
from zpatch.runtime.task_contract import Progress
from zpatch.runtime.tasks import read_ahead
from zpatch.sampling.patch import torch_dtype
from zpatch.sources.chunk_cache import cached
from zpatch.store.image_writer import Shard
from zpatch.store.lock import writing_to
from zpatch.tiling.volume_tiles import Tiling

KEPT_SLACK = 2**24  # of memory that is kept, for pieces that fit nowhere

Batch = tuple[list[PatchLocation], torch.Tensor]


def run_region(
    plan: PredictionPlan,
    region: Region,
    network: Network,
    folder: WorkFolder,
    options: PredictOptions,
    progress: Progress,
    check_inputs: Callable[[], None] = lambda: None,
    clock: StageClock | None = None,
) -> None:
    """Fill the shards of a region that are not written yet, in the subject's ``folder``.

    ``progress`` is called with numbers of patches, of an earlier run too. A region that is run twice gives
    the same bytes. ``check_inputs`` is called before a shard counts as written, after all that it is made of
    was read. ``clock`` counts the time of each stage. Raises ModelError if the network fails.
    """
    clock = clock or StageClock()
    shards = region.wanted(plan.heads)
    wanted = [unwritten(h, folder.ledger(h).has, of) for h, of in zip(plan.heads, shards, strict=True)]
    needed = plan.needed(wanted)
    if done_before := plan.count_run(plan.needed(shards)) - plan.count_run(needed):
        progress(done_before)
    kept = _KeptMemory(plan)

    def check() -> None:
        check_inputs()
        folder.note_damaged(plan.images)

    with _Blender(plan, wanted, folder, options, check, clock) as blender:
        with network.running(keeps_memory=options.max_memory is None):
            batches = read_ahead(_batches(plan, region, needed, network.axes, clock))
            for locations, inputs in clock.waiting_for(batches):
                with clock.stage("network"):
                    outputs = network(inputs, plan.subject.name, locations)
                    if options.strict:
                        _check_finite(outputs, inputs, plan.subject.name, locations)
                with clock.stage("blending"):
                    blender.add(outputs, locations)
                del outputs
                kept.check(inputs.nbytes)
                progress(len(locations))
        with clock.stage("blending"):
            blender.finish()


class _KeptMemory:
    """Freed memory that is kept for the next batch: returned when that would hold more than the plan says."""

    def __init__(self, plan: PredictionPlan) -> None:
        self._before = private_bytes()
        self._most = plan.region_bytes - plan.outputs_bytes // OUTPUT_BUFFERS - KEPT_SLACK

    def check(self, batch_bytes: int) -> None:
        """Return it if the process has no room for the next batch and its outputs in new memory."""
        if private_bytes() - self._before > self._most - 2 * batch_bytes:
            return_freed()


def unwritten(head: PlannedHead, is_written: Callable[[Shard], bool], shards: Bools) -> Bools:
    """Those of some shards of an output, over their positions, that are not written."""
    left = shards.copy()
    for position in np.argwhere(shards).tolist():
        left[*position] = not is_written(_stored(head.tiling, position))
    return left


def _stored(tiling: Tiling, position: Sequence[int]) -> Shard:
    """The number of the shard at a position along the axes of the volume."""
    i, j, k = position
    i, j, k = tiling.stored_shard((i, j, k))
    return 0, k, j, i


def _batches(
    plan: PredictionPlan, region: Region, needed: Bools, axes: ModelAxes, clock: StageClock
) -> Iterator[Batch]:
    """The batches with needed patches, as float32 (B, C, I, J, K)."""
    caches = [
        cached(view.image.source, plan.grid_of(view), plan.swept_axis, region.patches) for view in plan.views
    ]
    views = [
        dataclasses.replace(view, image=view.image.with_source(source))
        for view, (source, _) in zip(plan.views, caches, strict=True)
    ]
    for positions in plan.batches(needed):
        locations = [plan.grid.at(position) for position in positions]
        with clock.stage("reading"):
            batch = read_batch(views, locations, axes)
        for _, done in caches:
            done(positions[-1])
        yield locations, batch


def _check_finite(
    outputs: Outputs, inputs: torch.Tensor, subject: str, locations: Sequence[PatchLocation]
) -> None:
    """Raise ModelError at the first patch with a value that is NaN or infinite."""
    for name, batch in outputs.items():
        for patch, patch_in, location in zip(batch, inputs, locations, strict=False):  # add_batch counts them
            if count := not_finite(patch):
                raise ModelError(
                    f"subject {subject!r}: the output {name!r} is NaN or infinite in {count} voxels of the "
                    f"patch at {location.index}, its input in {not_finite(patch_in)}; without strict=True "
                    f"they are counted, and reported at the end"
                )


class _Blender:
    """Blends what the network gives into the shards of each head."""

    def __init__(
        self,
        plan: PredictionPlan,
        wanted: Sequence[Bools],
        folder: WorkFolder,
        options: PredictOptions,
        check_inputs: Callable[[], None],
        clock: StageClock,
    ) -> None:
        self._subject = plan.subject.name
        self._sinks: list[ShardSink] = []
        self._blends: dict[str, GridBlend] = {}
        for head, shards in zip(plan.heads, wanted, strict=True):
            fill = fitting_fill(options.fill, _kept_dtype(head))
            expected = _expected(head, shards, plan.skipped)
            sink = ShardSink(
                folder.ledger(head),
                head.record,
                folder.output,
                check_inputs,
                clock,
                expected=expected,
                fill=fill,
            )
            reduction, channels = options.reduction_of(head.head.name), head.head.kept_channels
            finaliser = Finaliser(reduction, _kept_dtype(head), channels=channels)
            final: BlendedSink = _TimedSink(FinalisingSink(finaliser, sink, fill), clock)
            if head.tiling.output is not None:
                final = Regridder(head.tiling, final, wanted=shards, skipped=plan.skipped)
            self._sinks.append(sink)
            self._blends[head.head.name] = GridBlend(head.tiling, final, wanted=shards, skipped=plan.skipped)

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
        """Wait until all is written. Raises IncompleteCoverageError if a patch is missing."""
        for blend in self._blends.values():
            blend.finish()
        for sink in self._sinks:
            sink.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()


class _TimedSink:
    """Hands on blended voxels; the time counts as reducing."""

    def __init__(self, sink: BlendedSink, clock: StageClock) -> None:
        self._sink = sink
        self._clock = clock

    def put(self, first: Triple, voxels: torch.Tensor, *, empty: torch.Tensor | None = None) -> None:
        """Take in blended voxels."""
        with self._clock.stage("reducing"):
            self._sink.put(first, voxels, empty=empty)


def _kept_dtype(head: PlannedHead) -> torch.dtype:
    return torch_dtype(np.dtype(head.record.dtype), widen=False)


def _expected(head: PlannedHead, shards: Bools, skipped: Bools | None) -> dict[Shard, int] | None:
    """How many voxels of each of some shards any patch is run for; None for all."""
    if skipped is None:
        return None
    return {
        _stored(head.tiling, (i, j, k)): head.tiling.count_made((i, j, k), ~skipped)
        for i, j, k in np.argwhere(shards).tolist()
    }


class ShardSink:
    """Writes final voxels into shards of an image, and an entry for each shard into its ledger.

    ``check_inputs`` is called before a shard is written, and may raise. A thread encodes and writes one
    shard while the next one is filled; ``clock`` counts its time, and that of waiting for it. ``expected``
    says for each shard how many voxels of a channel arrive, if not all do; the others get the value ``fill``.
    """

    def __init__(
        self,
        ledger: ShardLedger,
        record: ImageRecord,
        store: Path,
        check_inputs: Callable[[], None],
        clock: StageClock,
        *,
        expected: Mapping[Shard, int] | None = None,
        fill: float = 0,
    ) -> None:
        self._check_inputs = check_inputs
        self._clock = clock
        self._record = record
        self._store = store
        self._ledger = ledger
        self._expected = expected or {}
        self._shards = ShardAssembler(record, expected=expected, fill=fill)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zpatch-write")
        self._last: Future[Any] | None = None

    def put(self, first: Triple, voxels: torch.Tensor, *, skipped: int = 0, not_finite: int = 0) -> None:
        """Take in final voxels, and start to write each shard that they complete after the one before it."""
        for shard in self._shards.put(first, voxels, skipped=skipped, not_finite=not_finite):
            self._start(shard)

    def _start(self, shard: CompleteShard) -> None:
        self.wait()
        self._last = self._pool.submit(self._write, shard)

    def _write(self, shard: CompleteShard) -> None:
        counts = {"skipped": shard.skipped, "not_finite": shard.not_finite}
        with self._clock.stage("writing"):
            self._check_inputs()
            with writing_to(self._store):
                self._ledger.write(self._record, shard.number, shard.voxels, **counts)

    def finish(self) -> None:
        """Write the shards of which no voxel arrives, and wait until all are written."""
        for number, expected in self._expected.items():
            if not expected:
                self._start(self._shards.filled(number))
        self.wait()

    def wait(self) -> None:
        """Wait until all complete shards are written."""
        if self._last is not None:
            with self._clock.stage("waiting"):
                self._last.result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)
