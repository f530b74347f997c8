"""A transform of TorchIO as a Pipeline; what needs the volume in memory is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from zpatch.errors import OptionError
from zpatch.images.subject import Subject
from zpatch.pipelines.pipeline import (
    Margin,
    MarginOf,
    PatchStep,
    Pipeline,
    Remember,
    Step,
    SubjectStep,
    checked,
    followed_by,
    no_margin,
    of_several,
)
from zpatch.sampling.patch import Patch

Act = Callable[[Any], Callable[[Patch], Patch]]


@dataclass(frozen=True)
class Places:
    """Where the transforms of a generation of TorchIO act, by the names of their classes.

    ``steps`` act on subjects; those of ``pointwise`` give the same voxels on a patch as on the volume, and
    act on patches after random transforms. ``on_patches`` are random, of each voxel by itself, of all voxels
    alike, or of axes, as ``flips`` are; ``margins`` need voxels around a patch. ``refused`` says why
    something acts nowhere.
    """

    steps: Mapping[str, Step]
    pointwise: Collection[str]
    on_patches: Collection[str]
    flips: Collection[str]
    margins: Mapping[str, MarginOf]
    refused: Mapping[str, str]

    def step(self, transform: Any, on_patches: Act, follows_random: bool) -> SubjectStep | PatchStep:
        """What a transform becomes."""
        name = name_of(transform)
        acts_on_patches = follows_random and name in self.pointwise
        if name in self.steps and probability(transform) == 1 and not acts_on_patches:
            return SubjectStep(name, partial(_keeping, self.steps[name], transform))
        return PatchStep(name, on_patches(transform), self.margin(transform), self.flips_in(transform))

    def flips_in(self, transform: Any) -> bool:
        """Whether a transform may reverse axes."""
        inner: Any = getattr(transform, "transforms_dict", None) or getattr(transform, "transforms", ())
        return name_of(transform) in self.flips or any(self.flips_in(part) for part in inner)

    def margin(self, transform: Any) -> Margin:
        """What a transform of patches reads around a patch; an OptionError if it cannot act on patches."""
        name = name_of(transform)
        if name in ("Compose", "OneOf", "SomeOf"):
            inner = getattr(transform, "transforms_dict", None) or transform.transforms
            margins = [self.margin(part) for part in inner]
            return of_several(margins, transform, is_one_of=name == "OneOf")
        if name in self.on_patches or name in self.pointwise:
            return no_margin
        if name in self.margins:
            return checked(self.margins[name], transform)
        if name in self.steps:
            raise OptionError(
                f"{name} needs the whole volume, and here it is applied to some volumes only; let it be "
                f"applied to all, first in a Compose"
            )
        why = self.refused.get(name, "is not known here, and may need the whole volume")
        raise OptionError(
            f"{name} {why}: on patches it would do something else; leave it out, or say "
            f"from_torchio({name}(...), on='patch') to apply it to each patch by itself"
        )


def torchio_pipeline(transform: Any, places: Places, on_patches: Act) -> Pipeline:
    """The pipeline of a transform of TorchIO, or of a Compose of such.

    ``on_patches(transform)`` makes a function of patches of a transform. Raises OptionError, with what to do
    instead, for a transform that needs the whole volume and is not known, and for one that follows a random
    transform though it must come before.
    """
    steps: list[SubjectStep | PatchStep] = []
    for part in _flat(transform):
        follows_random = any(isinstance(step, PatchStep) for step in steps)
        steps.append(places.step(part, on_patches, follows_random))
    return followed_by(steps)


def _keeping(step: Step, transform: Any, subject: Subject, remember: Remember) -> Subject:
    """The subject after a step, with the images that are to be kept as they were, under new names."""
    kept = {new: subject[name] for name, new in (getattr(transform, "keep", None) or {}).items()}
    return step(transform, subject, remember).with_images(**kept)


def _flat(transform: Any) -> list[Any]:
    """The transforms of a Compose that is always applied, one after the other."""
    if name_of(transform) == "Compose" and probability(transform) == 1:
        return [part for inner in transform.transforms for part in _flat(inner)]
    return [transform]


def name_of(transform: Any) -> str:
    """The name of TorchIO's class of a transform, also of one that inherits what that class does."""
    does = getattr(type(transform), "apply_transform", None)
    for base in type(transform).__mro__:
        if base.__module__.startswith("torchio.") and getattr(base, "apply_transform", None) is does:
            return base.__name__
    return getattr(transform, "__name__", type(transform).__name__)


def probability(transform: Any) -> float:
    """How often a transform is applied: ``probability`` in TorchIO 1, ``p`` in TorchIO 2."""
    return float(getattr(transform, "probability", getattr(transform, "p", 1)))
