"""Pipeline: the transform of another library, as what acts on subjects and what acts on patches.

A library transforms a volume and takes patches of the result. Here nothing is loaded whole: deterministic
transforms become lazy images, which patches are read from; random ones act on each patch, read with a margin
where they move voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zpatch.digests import digest
from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.subject import Subject
from zpatch.sampling.patch import Patch

MOST_KEPT = 100_000  # results of passes over volumes, a few numbers each

Remember = Callable[[str, Callable[[], Any]], Any]
Margin = Callable[[Triple, Affine], Triple]


def no_margin(patch_size: Triple, affine: Affine) -> Triple:
    """The margin of a transform that needs no voxels around a patch."""
    return (0, 0, 0)


def together(
    margins: Sequence[Margin], how: Callable[[Iterable[int]], int], patch_size: Triple, affine: Affine
) -> Triple:
    """The margin of several transforms: the ``sum`` of theirs, one after the other, or the ``max`` of any."""
    i, j, k = (how(axis) for axis in zip(*(margin(patch_size, affine) for margin in margins), strict=True))
    return i, j, k


@dataclass(frozen=True, slots=True)
class SubjectStep:
    """A transform that acts on subjects: ``act(subject, remember)`` gives a lazy one.

    ``remember(name, make)`` keeps what a pass over a volume has found, so that each process makes one pass.
    """

    name: str
    act: Callable[[Subject, Remember], Subject]


@dataclass(frozen=True, slots=True)
class PatchStep:
    """A transform that acts on patches; ``margin(patch_size, affine)`` is how far it reads around one."""

    name: str
    act: Callable[[Patch], Patch]
    margin: Margin = no_margin


@dataclass(frozen=True)
class Pipeline:
    """A transform taken apart: ``steps`` of subjects, then ``patches``, of patches that have a margin.

    A queue applies both. Elsewhere, take patches of ``of_subject(subject)``, and call ``on_patch`` with each.
    ``after`` are functions of patches without their margin, which ``then`` adds.
    """

    steps: tuple[SubjectStep, ...] = ()
    patches: tuple[PatchStep, ...] = ()
    after: tuple[Callable[[Patch], Patch], ...] = ()
    _kept: dict[tuple[str, int, str], Any] = field(default_factory=dict, compare=False, repr=False)

    def of_subject(self, subject: Subject) -> Subject:
        """The subject after all steps that act on subjects; lazy, but for passes over volumes."""
        if not self.steps:
            return subject
        images = " ".join(f"{name} {image.identity()}" for name, image in subject.images.items())
        identity = digest(images.encode())
        for number, step in enumerate(self.steps):
            try:
                subject = step.act(subject, self._remember(identity, number))
            except OptionError as error:
                raise OptionError(f"{step.name} of subject {subject.name!r}: {error}") from None
        return subject

    def _remember(self, identity: str, number: int) -> Remember:
        def remember(name: str, make: Callable[[], Any]) -> Any:
            key = identity, number, name
            if key not in self._kept:
                if len(self._kept) >= MOST_KEPT:
                    self._kept.clear()
                self._kept[key] = make()
            return self._kept[key]

        return remember

    def margin(self, subject: Subject, patch_size: Triple) -> Triple:
        """Voxels around a patch that are read with it, on each side, and cropped after all transforms."""
        if not self.patches:
            return (0, 0, 0)
        affine = next(iter(subject.images.values())).affine
        return together([step.margin for step in self.patches], sum, patch_size, affine)

    def on_patch(self, patch: Patch, location: PatchLocation) -> Patch:
        """The patch at a location, of one read with its margin, after all transforms that act on patches."""
        for step in self.patches:
            patch = step.act(patch)
        patch = patch if patch.location == location else patch.cropped(location)
        for function in self.after:
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
