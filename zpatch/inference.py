"""A network over whole volumes: grid -> reader -> model -> blending -> store."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zpatch import schema
from zpatch.accumulation import SweptBlend, add_checked
from zpatch.blending import check_overlap_mode
from zpatch.cohort import Cohort, Subject
from zpatch.errors import ModelError, OptionError, StoreExistsError, ZpatchError
from zpatch.geometry import PatchLocation, Triple, patch_overlap_triple, patch_size_triple
from zpatch.grid import PatchGrid
from zpatch.image import Image
from zpatch.padding import check_padding_mode
from zpatch.reduction import Reduction, check_reduction, kind_of, reduce_channels
from zpatch.scheduling import Progress, read_ahead
from zpatch.store import read_small_array
from zpatch.store_writer import StoreWriter, check_can_create
from zpatch.volume_sink import ImageSink

READ_TOGETHER = 8
DEFAULT_OUTPUT = "prediction"

Model = Callable[[torch.Tensor], Any]


def load_model(spec: str) -> Model:
    """A network by name, as ``zpatch predict --model`` takes it.

    ``package.module:factory`` is called without arguments and gives the network; a ``.pt2`` file is one of
    torch.export, any other file TorchScript.
    """
    module_name, colon, factory = spec.partition(":")
    try:
        if Path(spec).is_file():
            if spec.endswith(".pt2"):
                return torch.export.load(spec).module()
            return torch.jit.load(spec, map_location="cpu")  # type: ignore[no-untyped-call, no-any-return]
        if not colon:
            raise ModelError(f"model {spec!r} is no file; name one, or a factory as package.module:factory")
        sys.path.insert(0, os.getcwd())
        model = getattr(importlib.import_module(module_name), factory)()
    except ZpatchError:
        raise
    except Exception as error:  # a user's module may fail in any way
        raise ModelError(f"model {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(model):
        raise ModelError(f"model {spec!r} gave {type(model).__name__}, which cannot be called")
    return model  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, eq=False)
class PredictionPlan:
    """What a prediction will do to one subject. ``swept_axis`` is the longest, so that the front is small."""

    subject: Subject
    images: tuple[Image, ...]
    grid: PatchGrid
    swept_axis: int

    @classmethod
    def of(
        cls, subject: Subject, names: Sequence[str], size: Triple, overlap: Triple, *, border: bool
    ) -> PredictionPlan:
        """Plan the patches of a subject; a volume smaller than the patch is padded up to it."""
        images = tuple(subject[name] for name in names)
        shapes = {image.spatial_shape for image in images}
        if len(shapes) > 1:
            raise OptionError(f"the images {', '.join(names)} of {subject.name!r} differ in shape: {shapes}")
        shape = shapes.pop()
        grid = PatchGrid.over(shape, size, overlap, border=border)
        return cls(subject, images, grid, max(range(3), key=lambda axis: (shape[axis], axis)))


def plan_prediction(
    subjects: Sequence[Subject],
    image: str | Sequence[str],
    patch_size: int | Sequence[int],
    patch_overlap: int | Sequence[int] = 0,
    padding_mode: str | None = None,
) -> list[PredictionPlan]:
    """The plan of each subject; nothing is read or written."""
    names = [image] if isinstance(image, str) else list(image)
    if not names:
        raise OptionError("image= names no image to predict from")
    size = patch_size_triple(patch_size)
    overlap = patch_overlap_triple(patch_overlap, size)
    check_padding_mode(padding_mode)
    if not len(subjects):
        raise OptionError("there is no subject to predict")
    for name, times in Counter(subject.name for subject in subjects).items():
        if times > 1:
            raise OptionError(f"{times} subjects are called {name!r}; give each a name of its own")
    return [
        PredictionPlan.of(subject, names, size, overlap, border=padding_mode is not None)
        for subject in subjects
    ]


def predict(
    model: Model,
    subjects: Sequence[Subject],
    output: str | os.PathLike[str],
    *,
    image: str | Sequence[str],
    patch_size: int | Sequence[int],
    patch_overlap: int | Sequence[int] = 0,
    overlap_mode: str = "hann",
    reduce: Reduction = None,
    batch_size: int = 1,
    device: str | torch.device = "auto",
    amp: bool = False,
    padding_mode: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda patches: None,
) -> Cohort:
    """Run a network over every subject and write its blended output into a new store.

    The network takes (B, C, I, J, K) float32 and gives a tensor of the same spatial shape, kept as the image
    ``prediction``, or a dict of such tensors, kept under their keys. Several names in ``image`` are
    stacked as channels. A volume smaller than the patch is padded up to it by its edge and cropped back;
    nothing else is padded unless ``padding_mode`` says so. ``device="auto"`` takes a GPU where there is one;
    ``amp`` runs the network in torch's autocast. ``progress`` is told the patches done.

    Each chunk of the output is reduced and written once, when its last patch has come; memory is that of the
    front, whatever the volume's size. Returns the predictions as a cohort.
    """
    check_overlap_mode(overlap_mode)
    check_reduction(reduce)
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, not {batch_size}")
    check_can_create(Path(output), overwrite=overwrite)
    plans = plan_prediction(subjects, image, patch_size, patch_overlap, padding_mode)
    _refuse_own_input(plans, Path(output))
    target = _device(device)
    attributes = {
        "tool": "zpatch predict",
        "expected_subjects": [plan.subject.name for plan in plans],
        "prediction": {
            "image": image if isinstance(image, str) else list(image),
            "patch_size": list(plans[0].grid.patch_size),
            "patch_overlap": list(plans[0].grid.patch_overlap),
            "overlap_mode": overlap_mode,
            "reduce": repr(reduce),
        },
    }
    with (
        _evaluating(model, target),
        StoreWriter.create(Path(output), attributes, overwrite=overwrite) as writer,
    ):
        for plan in plans:
            run = _Run(plan, writer, overlap_mode, reduce)
            run.carry_out(model, batch_size, target, amp, padding_mode or "edge", progress)
    return Cohort(output)


def _refuse_own_input(plans: Sequence[PredictionPlan], output: Path) -> None:
    target = output.resolve()
    folders = {image.folder.resolve() for plan in plans for image in plan.images if image.folder}
    if any(folder.is_relative_to(target) for folder in folders):
        raise StoreExistsError(f"{output}: it is the store that is read; choose another output")


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise OptionError(
            f"device must be auto, cpu, cuda, cuda:1 or another of torch's, not {device!r}"
        ) from None


@contextlib.contextmanager
def _evaluating(model: Model, device: torch.device) -> Iterator[None]:
    """Put a network on the device and into evaluation mode, and back into its mode at the end."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    model.to(device)
    modes = {module: module.training for module in model.modules()}
    with contextlib.suppress(NotImplementedError):  # an exported program has its mode fixed
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Run:
    """One subject on its way through the network into the store."""

    def __init__(
        self, plan: PredictionPlan, writer: StoreWriter, overlap_mode: str, reduce: Reduction
    ) -> None:
        self._plan = plan
        self._writer = writer
        self._overlap_mode = overlap_mode
        self._reduce = reduce
        self._heads: dict[str, tuple[SweptBlend, ImageSink]] = {}

    def carry_out(
        self,
        model: Model,
        batch_size: int,
        device: torch.device,
        amp: bool,
        padding_mode: str,
        progress: Progress,
    ) -> None:
        try:
            with torch.inference_mode(), torch.autocast(device.type, enabled=amp):
                for locations, inputs in read_ahead(self._batches(batch_size, padding_mode)):
                    outputs = self._apply(model, inputs.to(device), locations)
                    self._add(outputs, locations)
                    progress(len(locations))
            for blend, _ in self._heads.values():
                blend.finish()
            self._writer.commit([(sink.stage.folder, sink.finish()) for _, sink in self._heads.values()])
        finally:
            for _, sink in self._heads.values():
                sink.stage.discard()

    def _batches(
        self, batch_size: int, padding_mode: str
    ) -> Iterator[tuple[list[PatchLocation], torch.Tensor]]:
        """Batches in sweep order; patches of several batches are read together, as they share chunks."""
        locations = self._plan.grid.locations(self._plan.swept_axis)
        together = batch_size * max(1, READ_TOGETHER // batch_size)
        while group := list(itertools.islice(locations, together)):
            channels = [image.read_group(group, padding_mode=padding_mode) for image in self._plan.images]
            for first in range(0, len(group), batch_size):
                part = slice(first, first + batch_size)
                stacked = [
                    np.concatenate(images) for images in zip(*(c[part] for c in channels), strict=True)
                ]
                yield group[part], _batch_of(stacked)

    def _apply(
        self, model: Model, inputs: torch.Tensor, locations: Sequence[PatchLocation]
    ) -> dict[str, torch.Tensor]:
        try:
            outputs = model(inputs)
        except Exception as error:  # a network may fail in any way; say where it did
            raise ModelError(
                f"the model failed on subject {self._plan.subject.name!r}, patches at "
                f"{', '.join(str(location.index) for location in locations)}, given {tuple(inputs.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        heads = dict(outputs) if isinstance(outputs, Mapping) else {DEFAULT_OUTPUT: outputs}
        return {str(key): tensor for key, tensor in heads.items()}

    def _add(self, outputs: Mapping[str, torch.Tensor], locations: Sequence[PatchLocation]) -> None:
        try:
            for key, tensor in outputs.items():
                add_checked(self._head(key), tensor, locations)
        except ModelError as error:
            raise ModelError(f"subject {self._plan.subject.name!r}: {error}") from error

    def _head(self, key: str) -> SweptBlend:
        if key not in self._heads:
            sink = self._sink(key)
            blend = SweptBlend(
                self._plan.grid, self._overlap_mode, sink, lambda v: reduce_channels(v, self._reduce)
            )
            self._heads[key] = blend, sink
        return self._heads[key][0]

    def _sink(self, key: str) -> ImageSink:
        schema.check_name(key, "output")
        first = self._plan.images[0]
        header = None
        if first.folder and first.record and first.record.orientation.is_identity:
            header = read_small_array(first.folder, schema.RAW_HEADER, first.record.files).tobytes()
        return ImageSink(
            self._writer.stage(),
            subject=self._plan.subject.name,
            name=key,
            kind=kind_of(self._reduce),
            spatial_shape=first.spatial_shape,
            affine=first.affine,
            swept_axis=self._plan.swept_axis,
            like_header=header,
            like_record=first.record,
        )


def _batch_of(patches: list[np.ndarray[Any, np.dtype[Any]]]) -> torch.Tensor:
    """A float32 batch (B, C, I, J, K) of patches (C, I, J, K), stacked along their memory."""
    stored = np.stack([patch.transpose(0, 3, 2, 1) for patch in patches]).astype(np.float32, copy=False)
    return torch.from_numpy(stored).permute(0, 1, 4, 3, 2)
