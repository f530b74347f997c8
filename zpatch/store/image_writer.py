"""Writing one image shard by shard: statistics and index are computed from the shards as they are written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.geometry.boxes import padded_to_4d
from zpatch.records.image_record import ImageRecord, SourceFingerprint
from zpatch.store.staged_image import StagedImage
from zpatch.store.value_counts import State
from zpatch.store.voxel_index import index_builder
from zpatch.store.voxel_statistics import VoxelStatistics

Shard = tuple[int, int, int, int]
SHOWN_IMAGES = 5


class ImageTally:
    """Statistics and index of an image, computed from its shards, each added once.

    ``where`` names the image in errors.
    """

    def __init__(self, record: ImageRecord, where: str) -> None:
        self._record = record
        self._shards = padded_to_4d(record.shards)
        self._statistics = VoxelStatistics(np.dtype(record.dtype))
        self._index = index_builder(record, where)

    def update(self, shard: Shard, voxels: NDArray[Any]) -> None:
        """Add a whole shard: ``voxels`` is (c, z, y, x), clipped to the image."""
        c, z, y, x = (n * s for n, s in zip(shard, self._shards, strict=True))
        self._statistics.update(voxels, (z, y, x))
        self._index.update(voxels, (c, z, y, x))

    @contextlib.contextmanager
    def counting(self, shard: Shard, voxels: NDArray[Any]) -> Iterator[None]:
        """Add a shard in a thread, while the caller writes it.

        Counting and compressing both release the interpreter lock for much of their time.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="zpatch-statistics") as counter:
            counted = counter.submit(self.update, shard, voxels)
            yield
            counted.result()

    def state(self) -> dict[str, NDArray[Any]]:
        """The statistics and index so far, as small arrays that can be stored."""
        return self._statistics.state() | self._index.state()

    def merge(self, state: State) -> None:
        """Add the ``state`` of a tally of other shards of the image."""
        self._statistics.merge(state)
        self._index.merge(state)

    def finish(
        self,
        stage: StagedImage,
        raw_header: bytes,
        *,
        warnings: Sequence[str] = (),
        source: SourceFingerprint | None = None,
        counts: Mapping[str, int] = MappingProxyType({}),
    ) -> ImageRecord:
        """Write all files of an image except its shards, and return its record with statistics and seals.

        ``counts`` are further statistics, kept where they are not 0: how many voxels were ``skipped`` (filled
        and not predicted), how many were ``not_finite`` (predicted as NaN or infinite, before they were
        reduced), from how many ``damaged_tiles`` it was made.
        """
        record = self._record
        stats = self._statistics.result(record.slope, record.inter) | self._index.statistics()
        stats |= {name: count for name, count in counts.items() if count}
        stage.write_raw_header(raw_header)
        stage.write_index(self._index.tables())
        if record.kind != "label":
            stage.write_histogram(self._statistics.histogram(record.slope, record.inter))
        warned = (*warnings, *_voxel_warnings(stats))
        return stage.finish(dataclasses.replace(record, stats=stats, warnings=warned, source=source))


def _voxel_warnings(stats: Json) -> list[str]:
    if "not_finite" in stats:  # also where they are classes now
        return [f"the network gave NaN or infinite values in {stats['not_finite']} voxels"]
    words = {"nan": "NaN", "inf": "infinite"}
    return [f"{stats[key]} voxels are {word}" for key, word in words.items() if stats[key]]


def not_finite_text(records: Iterable[ImageRecord]) -> str | None:
    """How many voxels of some predictions are NaN or infinite, before their reduction; None if none is."""
    counts = {f"{r.subject}/{r.image}": r.stats["not_finite"] for r in records if "not_finite" in r.stats}
    if not counts:
        return None
    most = sorted(counts, key=lambda name: -counts[name])[:SHOWN_IMAGES]
    more = f" and {len(counts) - len(most)} more" if len(counts) > len(most) else ""
    named = ", ".join(f"{name} ({counts[name]})" for name in most)
    return f"the network gave NaN or infinite values in {sum(counts.values())} voxels: {named}{more}"


class ImageWriter:
    """Writes the shards of a staged image, each once, in any order.

    ``where`` names the image in errors.
    """

    def __init__(self, stage: StagedImage, record: ImageRecord, where: str) -> None:
        self.stage = stage
        self.record = record
        self._tally = ImageTally(record, where)
        self._skipped = self._not_finite = 0

    def add_shard(self, shard: Shard, voxels: NDArray[Any], *, skipped: int = 0, not_finite: int = 0) -> None:
        """Write one whole shard: ``voxels`` is (c, z, y, x), clipped to the image.

        ``skipped`` is how many of them were filled and not predicted, ``not_finite`` how many were predicted
        as NaN or infinite.
        """
        with self._tally.counting(shard, voxels):
            self.stage.write_shard(self.record, shard, voxels)
        self._skipped += skipped
        self._not_finite += not_finite

    def finish(
        self, raw_header: bytes, warnings: Sequence[str] = (), source: SourceFingerprint | None = None
    ) -> ImageRecord:
        """Write all files except the shards, and return the record with statistics and seals."""
        self.record = self._tally.finish(
            self.stage,
            raw_header,
            warnings=warnings,
            source=source,
            counts={"skipped": self._skipped, "not_finite": self._not_finite},
        )
        return self.record
