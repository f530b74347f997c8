"""MixedSampler: each draw picks one of several samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import NothingToDrawError, OptionError
from zpatch.images.subject import Subject
from zpatch.sampling.patch_sampler import MAX_REJECTIONS, Accept, RandomSampler


class MixedSampler(RandomSampler):
    """Each draw picks one of several samplers, with a probability in proportion to its weight.

    ``parts`` are pairs of a weight and a sampler; all samplers have the same patch size, context and padding.
    The probabilities are ``weight / sum`` over the samplers that can draw from the subject: where no voxel
    is of a wanted class, the others take the draws. A subject from which none of them can draw is a
    SamplingError. ``accept`` and ``max_rejections`` are for the whole mixture: a location that is rejected
    is drawn again by any of them.

    ``MixedSampler([(2, UniformSampler(96)), (1, LabelSampler(96))])`` takes a third of the patches around
    foreground, as nnU-Net does, and all of them anywhere in a subject without foreground.

    >>> from zpatch.images.image import LabelMap
    >>> from zpatch.sampling.samplers import LabelSampler, UniformSampler
    >>> labels = np.zeros((8, 8, 8), np.uint8)
    >>> labels[4, 5, 3] = 2
    >>> mixed = MixedSampler([(2, UniformSampler(4)), (1, LabelSampler(4, "seg"))])
    >>> places = [place.index for place in mixed.locations(Subject(seg=LabelMap(labels)), 3000, rng=0)]
    >>> 1000 < places.count((2, 3, 1)) < 1100  # 1000 by class, and 2000 / 125 by chance
    True
    """

    def __init__(
        self,
        parts: Sequence[tuple[float, RandomSampler]],
        *,
        accept: Accept | None = None,
        max_rejections: int = MAX_REJECTIONS,
    ) -> None:
        self.parts = _checked_parts(parts)
        first = self.parts[0][1]
        super().__init__(
            first.patch_size,
            context=first.context,
            padding_mode=first.padding_mode,
            fill=first.fill,
            accept=accept,
            max_rejections=max_rejections,
        )

    def fitted(self, subject: Subject) -> Self:
        """The mixture of the samplers as they fit the subject."""
        return self._with_parts([sampler.fitted(subject) for _, sampler in self.parts])

    def with_classes(self, label_name: str, probabilities: Mapping[int, float]) -> MixedSampler:
        """The mixture whose LabelSamplers of a map have these probabilities, if none were given."""
        return self._with_parts([one.with_classes(label_name, probabilities) for _, one in self.parts])

    def _with_parts(self, samplers: Sequence[Any]) -> Self:
        """The mixture of other samplers in the same proportions; itself if they are the same."""
        if all(one is before for one, (_, before) in zip(samplers, self.parts, strict=True)):
            return self
        parts = [(weight, one) for one, (weight, _) in zip(samplers, self.parts, strict=True)]
        return type(self)(parts, accept=self.accept, max_rejections=self.max_rejections)

    def check(self, subject: Subject) -> None:
        """Refuse a subject that none of the samplers can take a patch of, as far as that is known."""
        why: list[NothingToDrawError] = []
        for _, sampler in self.parts:
            try:
                sampler.check(subject)
            except NothingToDrawError as error:
                why.append(error)
        if len(why) == len(self.parts):
            raise why[0]

    def classes(self, subject: Subject) -> dict[str, bool]:
        """Whether the subject has each class that is drawn, by its description, where that is known."""
        return {name: found for _, one in self.parts for name, found in one.classes(subject).items()}

    def starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The first voxels (count, 3) of patches of a subject."""
        starts = np.empty((count, 3), dtype=np.int64)
        pending, left, why = np.arange(count), dict(enumerate(self.parts)), ""
        while pending.size and left:
            weights = np.array([weight for weight, _ in left.values()])
            drawn = rng.choice(list(left), size=pending.size, p=weights / weights.sum())
            missed = [pending[:0]]
            for number, (_, sampler) in list(left.items()):
                rows = pending[drawn == number]
                try:
                    starts[rows] = sampler.starts(subject, len(rows), rng)
                except NothingToDrawError as error:
                    missed.append(rows)
                    why = str(error)
                    del left[number]
            pending = np.concatenate(missed)
        if pending.size:
            raise NothingToDrawError(f"no sampler of the mixture can draw: {why}")
        return starts

    def __repr__(self) -> str:
        acceptance = "".join(f", {name}={value!r}" for name, value in self._acceptance().items())
        return f"MixedSampler({list(self.parts)!r}{acceptance})"


def _checked_parts(parts: Sequence[tuple[float, RandomSampler]]) -> tuple[tuple[float, RandomSampler], ...]:
    """Pairs of a weight above 0 and a sampler of patches that are all alike; OptionError for others."""
    checked = []
    for part in parts:
        weight, sampler = part if isinstance(part, tuple | list) and len(part) == 2 else (part, None)
        if not isinstance(sampler, RandomSampler):
            raise OptionError(
                f"MixedSampler takes pairs of a weight and a sampler that draws, as "
                f"[(2, UniformSampler(96)), (1, LabelSampler(96))], not {part!r}"
            )
        if not (isinstance(weight, int | float) and 0 <= weight < float("inf")):
            raise OptionError(f"the weight of {sampler!r} must be finite and at least 0, not {weight!r}")
        if sampler.accept is not None:
            raise OptionError("accept= is for the whole mixture; say MixedSampler([...], accept=...)")
        if weight > 0:
            checked.append((float(weight), sampler))
    if not checked:
        raise OptionError("MixedSampler needs at least one sampler of a weight above 0")
    shared = [(one.patch_size, one.context, one.padding_mode, one.fill) for _, one in checked]
    if any(options != shared[0] for options in shared):
        raise OptionError(
            f"the samplers of a mixture must have one patch_size, context=, padding_mode= and fill=; "
            f"these differ: {', '.join(repr(one) for _, one in checked)}"
        )
    return tuple(checked)
