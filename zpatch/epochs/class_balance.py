"""The balance of classes over a cohort: how often subjects come, and which class is drawn in each.

Let class c have the share p_c, and n_c subjects of the cohort have it, and let r_c = p_c / n_c. Subject i is
visited in proportion to the sum W_i of r_c over its classes, and in it class c is drawn with probability
r_c / W_i. The sum of all W_i is that of all p_c, as each r_c is in n_c of them. So the centre of a patch is
of class c with probability::

    sum over subjects i with c of (W_i / sum p) * (r_c / W_i) = n_c * r_c / sum p = p_c / sum p

whatever the rarity of c. A class counts as present in a subject if any voxel has it. Where none of these can
be the centre of a patch, the other classes of the subject take its draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.epochs.subject_weights import SubjectWeights, checked_weights
from zpatch.errors import OptionError
from zpatch.images.cohort import first_alike
from zpatch.images.subject import Subject
from zpatch.sampling.centre_maps import label_classes, recorded_labels
from zpatch.sampling.patch_sampler import PatchSampler

EXAMPLE = "class_balance={'seg': {1: 1, 2: 1, 3: 2}}"


@dataclass(frozen=True, slots=True)
class ClassBalance:
    """The shares that classes of the label map ``label_name`` have among the centres of patches."""

    label_name: str
    shares: Mapping[int, float]

    @classmethod
    def of(cls, given: Any) -> Self:
        """The balance that a user gives, as ``{"seg": {1: 1, 2: 1, 3: 2}}``; OptionError for others."""
        shares = next(iter(given.values())) if isinstance(given, Mapping) and len(given) == 1 else None
        if not isinstance(shares, Mapping):
            raise OptionError(f"class_balance must be classes of one label map, as {EXAMPLE}, not {given!r}")
        found = checked_weights(list(shares.values()), "the shares of class_balance")
        if not found.any():
            raise OptionError(f"class_balance needs a class with a share above 0, as {EXAMPLE}")
        wanted = {label: share for label, share in zip(shares, found.tolist(), strict=True) if share > 0}
        return cls(next(iter(given)), wanted)

    def sampler(self, sampler: PatchSampler, rates: Mapping[int, float]) -> PatchSampler:
        """The sampler whose LabelSampler of the map draws its classes at some rates."""
        balanced = sampler.with_classes(self.label_name, rates)
        if balanced is sampler:
            raise OptionError(
                f"class_balance chooses the classes that a LabelSampler of {self.label_name!r} draws, and "
                f"{sampler!r} has none without label_probabilities; say LabelSampler({sampler.patch_size}, "
                f"{self.label_name!r}), alone or as a part of a MixedSampler"
            )
        return balanced

    def over(self, subjects: Sequence[Subject], sampler: PatchSampler) -> tuple[PatchSampler, SubjectWeights]:
        """The sampler and the weights of subjects by which the classes of patches have their shares."""
        present = classes_present(subjects, self.label_name, list(self.shares))
        counts = present.sum(axis=0)
        missing = [str(label) for label, count in zip(self.shares, counts, strict=True) if not count]
        if missing:
            raise OptionError(
                f"no subject has class {' or '.join(missing)} in {self.label_name!r}; correct class_balance"
            )
        rates = np.array(list(self.shares.values())) / counts
        by_class = dict(zip(self.shares, rates.tolist(), strict=True))
        return self.sampler(sampler, by_class), SubjectWeights.of(present @ rates)


def classes_present(subjects: Sequence[Subject], label_name: str, labels: list[int]) -> NDArray[np.bool_]:
    """Which subjects have which classes of a label map, (N, C).

    By the records of stored maps; other maps are read.
    """
    present = np.zeros((len(subjects), len(labels)), dtype=bool)
    for number, first in enumerate(first_alike(subjects).tolist()):
        if first < number:
            present[number] = present[first]
            continue
        image = subjects[number][label_name]
        known = recorded_labels(image)
        present[number] = [
            label_classes(image).has(label) if known is None else label in known for label in labels
        ]
    return present
