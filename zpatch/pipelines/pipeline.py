"""Pipeline: the transform of another library, as what acts on subjects and what acts on patches.

A library transforms a volume and takes patches of the result. Here nothing is loaded whole: deterministic
transforms become lazy images, which patches are read from; random ones act on each patch, read with a margin
where they move voxels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.sampling.patch import Patch
from zpatch.sources.voxel_source import WrappedSource
from zpatch.sources.voxel_sources import DaskSource
from zpatch.sources.voxelwise_source import VoxelwiseSource

MOST_KEPT = 100_000  # results of passes over volumes, a few numbers each

Remember = Callable[[str, Callable[[], Any]], Any]
Step = Callable[[Any, Subject, Remember], Subject]  # of a transform of another library
Margin = Callable[[Triple, Affine], Triple]
MarginOf = Callable[[Any, Triple, Affine], Triple]  # of a transform of another library


def no_margin(patch_size: Triple, affine: Affine) -> Triple:
    """The margin of a transform that needs no voxels around a patch."""
    return (0, 0, 0)


def in_order(margins: Sequence[Margin]) -> Margin:
    """The margin of transforms one after the other: each must leave what those after it read."""
    found = [margin for margin in margins if margin is not no_margin]
    return partial(_added, found) if found else no_margin


def _added(margins: Sequence[Margin], patch_size: Triple, affine: Affine) -> Triple:
    total = np.zeros(3, int)
    for margin in reversed(margins):
        i, j, k = (np.array(patch_size) + 2 * total).tolist()
        total += margin((i, j, k), affine)
    i, j, k = total.tolist()
    return i, j, k


def one_of(margins: Sequence[Margin]) -> Margin:
    """The margin of one of several transforms: the largest along each axis."""
    found = [margin for margin in margins if margin is not no_margin]
    return partial(_largest, found) if found else no_margin


def _largest(margins: Sequence[Margin], patch_size: Triple, affine: Affine) -> Triple:
    i, j, k = np.max([margin(patch_size, affine) for margin in margins], axis=0).tolist()
    return i, j, k


def of_several(margins: Sequence[Margin], transform: Any, *, is_one_of: bool) -> Margin:
    """The margin of one of several transforms, or of all, as often as they may be drawn with ``replace``."""
    if is_one_of:
        return one_of(margins)
    if not getattr(transform, "replace", False):
        return in_order(margins)
    most = getattr(transform, "max_num_transforms", None) or transform.num_transforms  # of MONAI, of TorchIO
    return in_order(list(margins) * int(np.max(most)))


def checked(of: MarginOf, transform: Any) -> Margin:
    """The margin of a transform; an OptionError at once for options that it does not go with."""
    of(transform, (1, 1, 1), np.eye(4))
    return partial(of, transform)


def count_with_margin(margins: Sequence[Margin]) -> int:
    """How many transforms there are up to the last that needs a margin."""
    needing = [number for number, margin in enumerate(margins) if margin is not no_margin]
    return needing[-1] + 1 if needing else 0


@dataclass(frozen=True, slots=True)
class SubjectStep:
    """A transform that acts on subjects: ``act(subject, remember)`` gives a lazy one.

    ``remember(name, make)`` keeps what a pass over a volume has found, so that each process makes one pass.
    """

    name: str
    act: Callable[[Subject, Remember], Subject]


@dataclass(frozen=True, slots=True)
class PatchStep:
    """A transform that acts on patches; ``margin(patch_size, affine)`` is how far it reads around one.

    ``flips`` says that it may reverse axes, and ``check`` refuses subjects that it cannot act on.
    """

    name: str
    act: Callable[[Patch], Patch]
    margin: Margin = no_margin
    flips: bool = False
    check: Callable[[Subject], object] = bool


@dataclass(frozen=True)
class Pipeline:
    """A transform taken apart: ``steps`` of subjects, then ``patches``, of patches that have a margin.

    A queue applies both. Elsewhere, take patches of ``of_subject(subject)``, and call ``on_patch`` with each.
    ``after`` are functions of patches without their margin, which ``then`` adds.
    """

    steps: tuple[SubjectStep, ...] = ()
    patches: tuple[PatchStep, ...] = ()
    after: tuple[Callable[[Patch], Patch], ...] = ()
    _kept: dict[tuple[Any, int, str], Any] = field(default_factory=dict, compare=False, repr=False)

    def of_subject(self, subject: Subject) -> Subject:
        """The subject after all steps that act on subjects; lazy, but for passes over volumes."""
        given = subject
        for number, step in enumerate(self.steps):
            with _naming(step.name, given):
                subject = step.act(subject, self._remember(given, number))
        for patches in self.patches:
            with _naming(patches.name, given):
                patches.check(subject)
        return subject

    def _remember(self, subject: Subject, number: int) -> Remember:
        def remember(name: str, make: Callable[[], Any]) -> Any:
            key = _identity(subject), number, name
            if key not in self._kept:
                if len(self._kept) >= MOST_KEPT:
                    self._kept.clear()
                self._kept[key] = make()
            return self._kept[key]

        return remember

    def margin(self, subject: Subject, patch_size: Triple) -> Triple:
        """Voxels around a patch that are read with it, on each side, and cropped after all transforms."""
        affine = next(iter(subject.images.values())).affine
        return in_order([step.margin for step in self.patches])(patch_size, affine)

    def on_patch(self, patch: Patch, location: PatchLocation) -> Patch:
        """The patch at a location, of one read with its margin, after all transforms that act on patches.

        The margin is cropped after the last transform that needs one. At the border of a volume it is
        narrower on one side; before axes are reversed, it is widened there by the edge.
        """
        count = count_with_margin([step.margin for step in self.patches])
        if any(step.flips for step in self.patches[:count]):
            patch = patch.centred(location)
        for step in self.patches[:count]:
            patch = step.act(patch)
        patch = patch if patch.location == location else patch.cropped(location)
        for function in (*(step.act for step in self.patches[count:]), *self.after):
            patch = function(patch)
        return patch

    def then(self, function: Callable[[Patch], Patch]) -> Pipeline:
        """The pipeline, and after it a function of patches, as of what another library does after a crop.

        >>> from_the_volume, on_each_patch = Pipeline(), Pipeline()
        >>> len(from_the_volume.then(on_each_patch).after)
        1
        """
        if isinstance(function, Pipeline) and function.steps:
            raise OptionError(
                f"{function.steps[0].name} acts on subjects, and cannot follow; make what follows of "
                f"transforms of patches, by from_torchio or from_monai(..., on='patch')"
            )
        return replace(self, after=(*self.after, function))

    def __call__(self, patch: Patch) -> Patch:
        """The same as ``on_patch``, where nothing acts on subjects, of a patch without a margin."""
        if self.steps:
            raise OptionError(
                f"{self.steps[0].name} acts on subjects, not on patches: give the transform to a queue, or "
                f"take patches of transform.of_subject(subject) and call transform.on_patch with each"
            )
        return self.on_patch(patch, patch.location)


@contextlib.contextmanager
def _naming(step: str, subject: Subject) -> Iterator[None]:
    try:
        yield
    except OptionError as error:
        raise OptionError(f"{step} of subject {subject.name!r}: {error}") from None


def _identity(subject: Subject) -> tuple[Any, ...]:
    """What identifies the values of a subject; for images that are computed and in no file, how they are."""
    return tuple((name, _identity_of(image)) for name, image in subject.images.items())


def _identity_of(image: Image) -> tuple[Any, ...]:
    known = image.remembered("identity", image.identity)
    return known, () if image.opened.is_in_files else tuple(_computed(image.source))


def _computed(source: Any) -> Iterator[Any]:
    """The names of dask's expressions and the functions that a source computes its voxels by."""
    if isinstance(source, DaskSource):
        yield source.array.name
    if isinstance(source, VoxelwiseSource):
        yield source.function
        for one in source.inputs:
            yield from _computed(one.source)
    elif isinstance(source, WrappedSource):
        yield from _computed(source.source)


def followed_by(steps: Sequence[SubjectStep | PatchStep]) -> Pipeline:
    """The pipeline of some steps in order.

    Raises OptionError where a transform of subjects follows one of patches: it would need the volume that the
    random one makes.
    """
    subjects: list[SubjectStep] = []
    patches: list[PatchStep] = []
    for step in steps:
        if isinstance(step, PatchStep):
            patches.append(step)
        elif patches:
            raise OptionError(
                f"{step.name} needs the whole volume, as {patches[0].name} leaves it, which is never made; "
                f"put {step.name} before it"
            )
        else:
            subjects.append(step)
    return Pipeline(tuple(subjects), tuple(patches))
