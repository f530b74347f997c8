"""The options of a prediction: the one list of them, checked, and the part that voxels depend on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from zpatch.blending.reduction import Reduction, Reductions, check_known, check_reduction
from zpatch.digests import Json, compact_json
from zpatch.errors import OptionError, StoreExistsError
from zpatch.geometry.boxes import (
    PatchLocation,
    Triple,
    in_plane,
    patch_overlap_triple,
    patch_size_triple,
)
from zpatch.geometry.orientation import orientation_to
from zpatch.geometry.padding import check_padding_mode
from zpatch.geometry.voxel_grid import Spacing, spacing_triple
from zpatch.images.normalization import MODES
from zpatch.images.subject import Subject
from zpatch.networks.model_identity import identity
from zpatch.runtime.byte_sizes import parse_bytes
from zpatch.runtime.task_contract import CLUSTER_TIMEOUT_S, check_cluster_timeout
from zpatch.sampling.patch_views import checked_context
from zpatch.tiling.windows import check_overlap_mode

MaskFunction = Callable[[Subject, PatchLocation], bool]

OUTPUT_GRIDS = ("native", "model")
SHOWN_CHANGES = 5
SHOWN_CHARACTERS = 40

OF_THE_GRID = ("spacing", "orientation", "align", "output_grid")
OF_THE_NETWORK = ("device", "amp", "tta", "model_axes")  # stored by the network: "auto" is a device by then
OF_THE_RUN = (
    "strict",
    "max_memory",
    "jobs",
    "scheduler",
    "cluster_timeout",
    "resume",
    "overwrite",
    "verify",
    "keep_going",
    "pyramid",
)  # the voxels are the same


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """The options of ``predict``, which documents them, in one form and checked.

    ``image`` are names of images, stacked as channels. They are put on the grid of the image ``align``,
    turned to ``orientation`` and resampled to ``spacing`` (mm along I, J, K; None keeps an axis); the output
    is on the ``output_grid``: ``native``, that of the image itself, or ``model``. ``patch_size`` and
    ``patch_overlap`` are voxels along (I, J, K). ``overlap_mode`` and ``reduce`` are those of a
    PatchAggregator (``reduce`` for all outputs, or a dict by output), ``padding_mode`` that of a GridSampler,
    ``normalize`` is a mode of Normalize. ``batch_size`` counts patches. ``device`` is one of torch's or
    ``auto``; ``amp`` is autocast, ``tta`` a mean over all flips, ``model_axes`` the axes of the network's
    batches, as ``xyz``, ``zyx`` or (2-D) ``yx``. ``mask`` is the name of an image or a function, ``fill`` the
    value where no patch is run. ``strict`` stops at the first output that is NaN or infinite. ``max_memory``
    is bytes, as a number or as text; ``jobs`` counts local processes, ``scheduler`` is the address of a Dask
    cluster, which may be without workers for ``cluster_timeout`` seconds. ``resume`` allows an existing
    output to be resumed, ``overwrite`` replaces it; ``verify`` compares every byte that is stored. With
    ``keep_going`` a subject that fails does not stop the others. ``pyramid`` adds coarser levels; if it is
    None, to slides only.

    >>> PredictOptions.of(image="t1", patch_size=96, patch_overlap=32).patch_overlap
    (32, 32, 32)
    """

    image: tuple[str, ...]
    patch_size: Triple
    patch_overlap: Triple
    overlap_mode: str = "hann"
    reduce: Reductions = None
    batch_size: int = 1
    device: str | torch.device = "auto"
    amp: bool = False
    tta: bool = False
    model_axes: str = "xyz"
    spacing: tuple[float | None, float | None, float | None] | None = None
    orientation: str | None = None
    align: str | None = None
    output_grid: str = "native"
    context: tuple[int, ...] = ()
    padding_mode: str | None = None
    normalize: str | None = None
    mask: str | MaskFunction | None = None
    fill: float = 0
    strict: bool = False
    max_memory: int | str | None = None
    jobs: int = 1
    scheduler: str | None = None
    cluster_timeout: float = CLUSTER_TIMEOUT_S
    resume: bool = True
    overwrite: bool = False
    verify: bool = False
    keep_going: bool = True
    pyramid: bool | None = None

    @classmethod
    def of(
        cls,
        *,
        image: str | Sequence[str],
        patch_size: int | Sequence[int],
        patch_overlap: int | Sequence[int] = 0,
        spacing: Spacing | None = None,
        context: int | Sequence[int] = (),
        model_axes: str | None = None,
        of_slides: bool = False,
        **options: Any,
    ) -> Self:
        """Options in the forms in which ``predict`` accepts them.

        ``of_slides`` makes one number of ``patch_size`` and ``patch_overlap`` count along I and J only, and
        the network two-dimensional, unless its axes are named.
        """
        if of_slides:
            patch_size, patch_overlap = in_plane(patch_size), in_plane(patch_overlap)
        size = patch_size_triple(patch_size)
        return cls(
            image=(image,) if isinstance(image, str) else tuple(image),
            patch_size=size,
            patch_overlap=patch_overlap_triple(patch_overlap, size),
            spacing=None if spacing is None else spacing_triple(spacing),
            context=checked_context(context),
            model_axes=("yx" if of_slides else "xyz") if model_axes is None else model_axes,
            **options,
        )

    def __post_init__(self) -> None:
        check_overlap_mode(self.overlap_mode)
        for reduce in self.reduce.values() if isinstance(self.reduce, Mapping) else (self.reduce,):
            check_reduction(reduce)
        check_padding_mode(self.padding_mode)
        if self.normalize is not None and self.normalize not in MODES:
            raise OptionError(
                f"normalize must be one of {', '.join(MODES)}, not {self.normalize!r}", option="normalize"
            )
        if not self.image:
            raise OptionError("image= names no image to predict from", option="image")
        for name, count in (("batch_size", self.batch_size), ("jobs", self.jobs)):
            if count < 1:
                raise OptionError(f"{name} must be at least 1, not {count}", option=name)
        if self.output_grid not in OUTPUT_GRIDS:
            raise OptionError(
                f"output_grid must be one of {', '.join(OUTPUT_GRIDS)}, not {self.output_grid!r}",
                option="output_grid",
            )
        if self.context and self.changes_grid:
            raise OptionError(
                "context= reads the coarser levels of stored images, which spacing=, orientation= and align= "
                "do not have; convert with --spacing, --orient and --pyramid instead",
                option="context",
            )
        if self.orientation is not None:
            orientation_to(np.eye(4), self.orientation)
        check_cluster_timeout(self.cluster_timeout)
        if self.max_memory is not None:
            parse_bytes(self.max_memory)

    @property
    def pads_border(self) -> bool:
        """Whether every volume is padded, by half the overlap; otherwise only one smaller than the patch."""
        return self.padding_mode is not None

    @property
    def changes_grid(self) -> bool:
        """Whether the network sees another grid than that of the images."""
        return any(option is not None for option in (self.spacing, self.orientation, self.align))

    @property
    def returns(self) -> bool:
        """Whether the output is on the image's own grid although the network sees another."""
        return self.changes_grid and self.output_grid == "native"

    @property
    def reading_mode(self) -> str:
        """The padding mode with which patches are read: ``edge`` where none was chosen."""
        return self.padding_mode or "edge"

    def reduction_of(self, output: str) -> Reduction:
        """The reduction of one output of the network."""
        return self.reduce[output] if isinstance(self.reduce, Mapping) else self.reduce

    def check_outputs(self, outputs: Collection[str]) -> None:
        """Raise OptionError if a dict of reductions names an output too many or too few."""
        if isinstance(self.reduce, Mapping):
            check_known(self.reduce, outputs, "reduce")
            for output in outputs:
                if output not in self.reduce:
                    raise OptionError(
                        f"reduce says nothing of the output {output!r}; add it, as none to keep its values "
                        f"(the network's outputs are {', '.join(outputs)})",
                        option="reduce",
                    )

    def stored(self) -> Json:
        """The options that all voxels depend on, as they are stored beside the voxels.

        A new option belongs here unless it is listed as one of the network or of the run. Those of another
        grid and of context are left out where there is none, as in predictions from before there was any.
        """
        others = OF_THE_NETWORK + OF_THE_RUN + (() if self.changes_grid else OF_THE_GRID)
        others += () if self.context else ("context",)
        names = [field.name for field in dataclasses.fields(self)]
        return {name: _stored(name, getattr(self, name)) for name in names if name not in others}


def _stored(name: str, value: Any) -> Any:
    """An option as JSON. Its form may not change: it is compared with that of predictions on disk."""
    if callable(value):
        return identity(value)
    if name == "reduce":
        is_dict = isinstance(value, Mapping)
        return {key: _stored(name, value[key]) for key in sorted(value)} if is_dict else repr(value)
    if name == "fill":
        return repr(float(value))  # JSON has no NaN
    return list(value) if isinstance(value, tuple) else value


def check_same(before: Json, now: Json, place: Path) -> None:
    """Raise StoreExistsError with all differences if two headers differ."""
    changes = _changes(before, json.loads(compact_json(now)))
    if changes:
        more = f" (and {len(changes) - SHOWN_CHANGES} more)" if len(changes) > SHOWN_CHANGES else ""
        raise StoreExistsError(
            f"{place}: the prediction started there differs in {', '.join(changes[:SHOWN_CHANGES])}{more}; "
            f"say overwrite=True to start over, or choose another output"
        )


def _changes(before: Json, now: Json) -> list[str]:
    changed = (key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
    return [f"{key}: {' then, '.join(_shown(before.get(key), now.get(key)))} now" for key in changed]


def _shown(before: Any, now: Any) -> tuple[str, str]:
    """Both values as text; long ones are cut to the part around the first difference."""
    texts = [compact_json({"": value})[4:-1] for value in (before, now)]
    alike = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, alike - SHOWN_CHARACTERS // 4) if max(map(len, texts)) > SHOWN_CHARACTERS else 0
    stop = start + SHOWN_CHARACTERS
    then, later = (
        f"{'...' if start else ''}{text[start:stop]}{'...' if len(text) > stop else ''}" for text in texts
    )
    return then, later
