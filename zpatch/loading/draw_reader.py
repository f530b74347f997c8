"""The patches of a draw: located, read as one group in the types that they arrive in, and transformed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from zpatch.chunks.scaling import UNSCALED
from zpatch.epochs.epoch_plan import Draw, EpochPlan
from zpatch.errors import OptionError, QueueError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.cohort import Cohort, first_alike
from zpatch.images.subject import Subject
from zpatch.loading.queue_subjects import AnyTransform, SubjectTransform
from zpatch.loading.shared_slots import ImagePlace, SlotLayout, new_memory
from zpatch.sampling.patch import Patch, torch_dtype
from zpatch.sampling.patch_sampler import PatchSampler
from zpatch.sampling.patch_views import PatchView, views_of
from zpatch.sampling.randomness import Purpose, rng
from zpatch.sources.group_read import read_together
from zpatch.work_counts import Work, during


@dataclass(frozen=True, slots=True)
class VoxelTypes:
    """The types that images are read in, and the slope and intercept that are left to apply to their voxels.

    That is ``dtype``; None keeps stored types, in which slope and intercept are left to apply. They are also
    left to a device that is sent stored voxels, if ``sends_stored``, where those are smaller; unless stored
    voxels cannot represent the values, as in a clipped image, or in the padding of a ``sampler`` with a
    ``fill``.
    """

    sampler: PatchSampler
    dtype: torch.dtype | None
    sends_stored: bool = False

    def place_of(self, view: PatchView) -> ImagePlace:
        """A view of a patch, not yet placed in a slot."""
        dtype, (slope, inter) = self._type_of(view)
        shape = view.image.num_channels, *self.sampler.patch_size
        return ImagePlace(view.name, view.image.kind, shape, dtype, slope=slope, inter=inter)

    def _type_of(self, view: PatchView) -> tuple[torch.dtype, tuple[float, float]]:
        image = view.image
        if image.kind == "label" or image.dtype.kind == "c":
            return torch_dtype(image.dtype), (1.0, 0.0)
        is_stored = not (image.scaling.is_bounded or self._fills_with_a_value(view))
        pending = image.scaling.slope, image.scaling.inter
        if self.dtype is None:
            dtype = torch_dtype(image.source.dtype if is_stored else image.dtype)
            return dtype, pending if is_stored else (1.0, 0.0)
        stored = torch_dtype(image.source.dtype, widen=False)
        if self.sends_stored and is_stored and stored.itemsize < self.dtype.itemsize:
            return stored, pending
        return self.dtype, (1.0, 0.0)

    def _fills_with_a_value(self, view: PatchView) -> bool:
        """Whether padding has a value that no stored voxel represents."""
        if view.padding_mode != "constant":
            return False
        image, fill = view.image, view.fill(self.sampler.fill)
        with np.errstate(all="ignore"):
            stored = np.array(fill).astype(image.source.dtype)
        return image.scaling != UNSCALED or stored != fill


class TransformRunner:
    """Calls a transform so that its result depends on (seed, epoch, subject, draw) alone.

    Torch's, numpy's and Python's global generators are seeded before each call and restored after it, and
    torch computes in one thread.
    """

    def __init__(self, transform: AnyTransform, seed: int) -> None:
        self.source = transform
        self._seed = seed

    def margin(self, subject: Subject, patch_size: Triple) -> Triple:
        """How many voxels around a patch of a subject the transform needs on each side."""
        if isinstance(self.source, SubjectTransform):
            return self.source.margin(subject, patch_size)
        return (0, 0, 0)

    def run(self, patch: Patch, location: PatchLocation, draw: Draw, number: int) -> Patch:
        """Transform patch ``number`` of the visit of a draw, which is read with its margin.

        An error names its location.
        """
        address = draw.visit << 32 | number
        stream = rng(self._seed, draw.epoch, draw.subject, address, purpose=Purpose.TRANSFORM)
        try:
            with during(Work.TRANSFORM), seeded_globals(int(stream.integers(2**63))), one_thread():
                changed: Any = (
                    self.source.on_patch(patch, location)
                    if isinstance(self.source, SubjectTransform)
                    else self.source(patch)
                )
            check_patch(changed)
        except Exception as error:
            error.add_note(f"in the transform of the patch at {location.index}")
            raise
        return changed  # type: ignore[no-any-return]


class WorkerTraceback(Exception):  # noqa: N818 - it is the text of a traceback
    """The traceback of an error in a worker: the cause of the error that the caller gets."""


@dataclass(frozen=True, slots=True)
class FailedDraw:
    """A draw that failed: the name of its subject, why, and the traceback."""

    draw: Draw
    subject: str
    reason: str
    traceback: str

    @classmethod
    def of(cls, draw: Draw, subject: str, error: BaseException) -> FailedDraw:
        """The failure of a draw by an error, with the notes of the error."""
        reason = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        return cls(draw, subject, reason, "".join(traceback.format_exception(error)))

    def error(self) -> QueueError:
        """The failure as an error, whose cause has the traceback."""
        error = QueueError(f"subject {self.subject!r} failed in epoch {self.draw.epoch}: {self.reason}")
        error.__cause__ = WorkerTraceback(f"\n\n{self.traceback}")
        return error


class DrawReader:
    """The patches of any draw of some subjects; each worker has a copy.

    They are read in the types of ``VoxelTypes``, and a ``transform`` is called with each.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        sampler: PatchSampler,
        patches_per_volume: int,
        dtype: torch.dtype | None,
        transform: AnyTransform | None,
        seed: int,
    ) -> None:
        self.subjects = subjects
        self.transform = None if transform is None else TransformRunner(transform, seed)
        self._sampler = sampler
        self._patches_per_volume = patches_per_volume
        self._types = VoxelTypes(sampler, dtype)
        self._largest: SlotLayout | None = None
        self._seed = seed

    def sending_stored(self, sends_stored: bool) -> DrawReader:
        """A reader of the same patches that sends stored voxels, or does not; with a transform none does."""
        types = dataclasses.replace(self._types, sends_stored=sends_stored and self.transform is None)
        if types == self._types:
            return self
        reader = copy.copy(self)
        reader._types, reader._largest = types, None
        return reader

    def largest_layout(self, plan: Callable[[], EpochPlan]) -> SlotLayout:
        """The layout of the largest patch; with a transform, that of the first patch of a plan after it."""
        if self._largest is None:
            self._largest = self._find_largest(plan)
        return self._largest

    def _find_largest(self, plan: Callable[[], EpochPlan]) -> SlotLayout:
        if self.transform is None:
            different = (self.subjects[number] for number in np.unique(first_alike(self.subjects)).tolist())
            return max(map(self.layout_of, different), key=attrgetter("nbytes"))
        draw = next(plan().draws())
        draw = dataclasses.replace(draw, numbers=draw.numbers[:1], places=draw.places[:1])
        try:
            return SlotLayout.of_patch(next(self.patches(draw)))
        except Exception as error:  # the same error as in a worker
            failed = FailedDraw.of(draw, self.name_of(draw.subject), error).error()
            raise failed from failed.__cause__

    def name_of(self, subject: int) -> str:
        """The name of a subject by its number."""
        if isinstance(self.subjects, Cohort):  # without making the subject
            return self.subjects.name_of(subject)
        return self.subjects[subject].name

    def layout_of(self, subject: Subject) -> SlotLayout:
        """The layout of a patch of a subject in a slot, before any transform."""
        return SlotLayout.of([self._types.place_of(view) for view in self._views(subject)])

    def _views(self, subject: Subject) -> list[PatchView]:
        return views_of(subject, self._sampler.context, self._sampler.padding_mode)

    def patches(self, draw: Draw) -> Iterator[Patch]:
        """The transformed patches of a draw, each in newly allocated memory."""
        subject = self.subjects[draw.subject]
        locations, layout = self.locations(subject, draw), self.layout_of(subject)
        wider = self._with_margin(subject, locations)
        tensors = [
            [new_memory((place.shape[0], *box.size), dtype=place.dtype) for box in wider]
            for place in layout.images
        ]
        affines = self.read(subject, layout, wider, tensors)
        for n, (number, location) in enumerate(zip(draw.numbers, locations, strict=True)):
            patch = layout.patch([of[n] for of in tensors], affines[n], wider[n], subject.name)
            yield patch if self.transform is None else self.transform.run(patch, location, draw, number)

    def _with_margin(self, subject: Subject, locations: Sequence[PatchLocation]) -> Sequence[PatchLocation]:
        """The boxes that are read for some patches: wider by the margin of the transform."""
        if self.transform is None:
            return locations
        margin = self.transform.margin(subject, self._sampler.patch_size)
        if not any(margin):
            return locations
        if self._sampler.context:
            raise OptionError(
                "a transform that moves voxels does not go with context=; leave one of them out"
            )
        return [location.widened(margin, subject.spatial_shape) for location in locations]

    def locations(self, subject: Subject, draw: Draw) -> list[PatchLocation]:
        """Where the patches of a draw are in its subject."""
        generator = rng(self._seed, draw.epoch, draw.subject, draw.visit, purpose=Purpose.LOCATIONS)
        with one_thread():  # accept= may compute
            return self._sampler.numbered(subject, draw.numbers, self._patches_per_volume, generator)

    def read(
        self,
        subject: Subject,
        layout: SlotLayout,
        locations: Sequence[PatchLocation],
        tensors: Sequence[Sequence[torch.Tensor]],
    ) -> list[list[Affine]]:
        """Read some patches of a subject as one group; the affines of each patch, in the order of images.

        ``tensors`` has a list for each image with a tensor for each location.
        """
        views, fill = self._views(subject), self._sampler.fill
        reads = [
            view.read(locations, is_scaled=(place.slope, place.inter) == (1.0, 0.0), fill=fill)
            for view, place in zip(views, layout.images, strict=True)
        ]
        readable = [[_in_a_type_of_numpy(tensor) for tensor in of] for of in tensors]
        read_together(reads, [[tensor.numpy() for tensor in of] for of in readable])
        for out, voxels in zip(itertools.chain(*tensors), itertools.chain(*readable), strict=True):
            if out is not voxels:
                out.copy_(voxels)
        return [[view.affine(at) for view in views] for at in locations]


def _in_a_type_of_numpy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or for bfloat16, which numpy does not have, one of float32 in the same order of memory."""
    is_known = tensor.dtype != torch.bfloat16
    return tensor if is_known else torch.empty_like(tensor, dtype=torch.float32)


def check_patch(changed: Any) -> None:
    """Refuse the result of a transform that is not a patch of tensors."""
    if not isinstance(changed, Patch):
        raise TypeError(f"a transform gives a Patch, not {type(changed).__name__}")
    for name, image in changed.images.items():
        if not isinstance(image.data, torch.Tensor):
            raise TypeError(f"the data of {name!r} must be a tensor, not {type(image.data).__name__}")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread, as in a worker: sums of several threads are rounded differently."""
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators, and restore them afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
