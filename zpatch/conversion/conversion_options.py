"""The options of a conversion, checked, and the memory that follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from zpatch.chunks.codec import check_codec
from zpatch.chunks.layout import CHUNK_VOXELS, SHARD_BYTES
from zpatch.errors import OptionError
from zpatch.geometry.orientation import orientation_to
from zpatch.geometry.voxel_grid import Spacing, checked_spacing
from zpatch.runtime.byte_sizes import parse_bytes
from zpatch.runtime.task_contract import CLUSTER_TIMEOUT_S, check_cluster_timeout

FORMATS = ("auto", "bids", "nnunet", "msd", "json", "csv", "glob")
AFFINES = ("sform", "qform")
INTERPOLATIONS = ("linear", "cubic")

BASE_BYTES = 64 * 2**20
LIVE_SLABS = 2
PYRAMID_SLABS = 2


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options of ``convert``.

    ``format`` is one of ``FORMATS``: the convention of the source, or ``auto`` to detect it. ``codec`` is a
    preset, ``chunk`` the side of a chunk in voxels. ``affine`` is the one to take where a header has both,
    sform or qform. ``pyramid`` adds coarser levels; ``orient`` turns volumes so that their axes point to
    RAS, say. ``spacing`` (in mm, one number, or three along I, J, K of the store; None keeps an
    axis) resamples images: ``interpolation`` is linear or cubic, label maps get the nearest voxel, and
    ``antialias`` smooths the axes whose voxels grow. Patterns are globs: of file names in
    ``label_patterns`` and ``sampling_patterns``, of subjects in ``include`` and ``exclude``. ``limit`` is
    the largest number of cases; ``strict`` fails a case for a warning. ``jobs`` cases are converted at a
    time. To stay below ``max_memory`` (bytes, or a text such as ``"2 GiB"``) shards are made smaller; where
    that is not enough the plan is refused. A Dask cluster may be without workers for ``cluster_timeout``
    seconds. An invalid value is an OptionError.

    >>> ConvertOptions(codec="zstd", orient="RAS").chunk
    32
    """

    format: str = "auto"
    codec: str = "lz4"
    chunk: int = CHUNK_VOXELS
    affine: str = "sform"
    pyramid: bool = False
    orient: str | None = None
    spacing: Spacing | None = None
    interpolation: str = "linear"
    antialias: bool = False
    label_patterns: Sequence[str] = ()
    sampling_patterns: Sequence[str] = ()
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    limit: int | None = None
    strict: bool = False
    jobs: int = 1
    max_memory: int | str | None = None
    cluster_timeout: float = CLUSTER_TIMEOUT_S

    @property
    def chooses_subjects(self) -> bool:
        """Whether patterns choose among the subjects."""
        return bool(self.include or self.exclude)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise OptionError(
                f"format must be one of {', '.join(FORMATS)}, not {self.format!r}", option="format"
            )
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"limit must be at least 1 subject, not {self.limit}", option="limit")
        check_codec(self.codec)
        check_cluster_timeout(self.cluster_timeout)
        if self.max_memory is not None:
            parse_bytes(self.max_memory)
        if self.jobs < 1:
            raise OptionError(f"jobs must be at least 1, not {self.jobs}", option="jobs")
        if self.affine not in AFFINES:
            raise OptionError(f"affine must be sform or qform, not {self.affine!r}", option="affine")
        if self.orient is not None:
            orientation_to(np.eye(4), self.orient)
        if self.spacing is not None:
            checked_spacing(self.spacing, (1.0, 1.0, 1.0))
        if self.interpolation not in INTERPOLATIONS:
            raise OptionError(
                f"interpolation must be linear or cubic, not {self.interpolation!r}; label maps keep the "
                f"nearest voxel",
                option="interpolation",
            )
        if self.spacing is None and (self.antialias or self.interpolation != "linear"):
            option = "antialias" if self.antialias else "interpolation"
            raise OptionError(f"{option}= is for resampling; say spacing= too", option=option)
        if self.chunk < 1:
            raise OptionError(f"chunk must be at least 1 voxel, not {self.chunk}", option="chunk")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Options by name; one that does not exist is an OptionError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise OptionError(f"convert has no option {name!r}; it has {', '.join(known)}")
        return cls(**options)

    @property
    def max_memory_bytes(self) -> int | None:
        """The memory limit in bytes."""
        return None if self.max_memory is None else parse_bytes(self.max_memory)

    @property
    def live_slabs(self) -> int:
        """How many slabs are in memory at a time."""
        return self.jobs * (LIVE_SLABS + (PYRAMID_SLABS if self.pyramid else 0))

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard: as usual, or fewer where the memory limit demands it."""
        if self.max_memory_bytes is None:
            return SHARD_BYTES
        return max(1, min(SHARD_BYTES, (self.max_memory_bytes - self.base_bytes) // self.live_slabs))

    @property
    def base_bytes(self) -> int:
        """Memory of the code that works on slabs."""
        return self.jobs * BASE_BYTES
