"""The subjects of a queue: as its transform prepares them, and checked before the first patch.

Checks use what is known without reading voxels.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, overload, runtime_checkable

from zpatch.errors import NothingToDrawError, OptionError, UnknownNameError, ZpatchError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_sampler import PatchSampler

OnBad = Literal["error", "skip"]
ON_BAD: tuple[str, ...] = get_args(OnBad)

Transform = Callable[[Patch], Patch]
MOST_LISTED = 10


@runtime_checkable
class SubjectTransform(Protocol):
    """A transform of patches that also acts on their subject, lazily, before patches are taken."""

    def of_subject(self, subject: Subject) -> Subject:
        """The subject that patches are taken of."""

    def margin(self, subject: Subject, patch_size: Triple) -> Triple:
        """How many voxels around a patch ``on_patch`` needs on each side."""

    def on_patch(self, patch: Patch, location: PatchLocation) -> Patch:
        """The patch at ``location`` after the rest of the transform.

        It is read with its margin, as far as that is inside the volume, which ``on_patch`` crops.
        """


AnyTransform = Transform | SubjectTransform


class PreparedSubjects(Sequence[Subject]):
    """Subjects as a transform makes them, when they are accessed."""

    def __init__(self, subjects: Sequence[Subject], transform: SubjectTransform) -> None:
        self._subjects, self._transform = subjects, transform

    def __len__(self) -> int:
        return len(self._subjects)

    @overload
    def __getitem__(self, index: int) -> Subject: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Subject]: ...
    def __getitem__(self, index: int | slice) -> Subject | Sequence[Subject]:
        if isinstance(index, slice):
            return PreparedSubjects(self._subjects[index], self._transform)
        return self._transform.of_subject(self._subjects[index])


def prepared(subjects: Sequence[Subject], transform: AnyTransform | None) -> Sequence[Subject]:
    """The subjects as a transform makes them before patches are taken, if it acts on subjects."""
    if not isinstance(transform, SubjectTransform):
        return subjects
    if isinstance(subjects, Cohort):
        return subjects.map(transform.of_subject)
    return PreparedSubjects(subjects, transform)


def fitted_sampler(subjects: Any, sampler: PatchSampler) -> PatchSampler:
    """The sampler as it fits the first subject: patches of slides have one plane. OptionError for others."""
    check_sequence(subjects, sampler)
    return sampler.fitted(first) if isinstance(first := subjects[0], Subject) else sampler


def subjects_of_queue(
    subjects: Any, sampler: PatchSampler, transform: AnyTransform | None, on_bad: str, *, lack_classes: bool
) -> tuple[Sequence[Subject], list[int]]:
    """The subjects that a queue takes patches of, as its transform makes them, and their numbers before.

    OptionError for others; with ``lack_classes``, not for those without a voxel of the wanted classes.
    """
    found = prepared(subjects, transform)
    bad = _bad_subjects(found, sampler, are_alike=transform is None, lack_classes=lack_classes)
    return usable_subjects(found, bad, on_bad), [n for n in range(len(found)) if n not in bad]


def check_sequence(subjects: Any, patch_sampler: Any) -> None:
    """Refuse what is no sequence of subjects (one subject, a path, an iterator), and what is no sampler."""
    if isinstance(subjects, PatchSampler):
        raise OptionError("the subjects come first: Queue(subjects, patch_sampler)")
    if isinstance(subjects, Subject):
        raise OptionError(
            f"a queue needs a list of subjects, and {subjects.name!r} is a single one; "
            f"say Queue([subject], ...)"
        )
    if isinstance(subjects, str | os.PathLike):
        path = os.fspath(subjects)
        raise OptionError(
            f"a queue needs a list of subjects, and {path!r} is a path; "
            f"say Queue(zpatch.Cohort({path!r}), ...)"
        )
    if not (hasattr(subjects, "__len__") and hasattr(subjects, "__getitem__")):
        raise OptionError(
            f"a queue needs a list of subjects, or another sequence of them, not {type(subjects).__name__}; "
            f"say Queue(list(subjects), ...)"
        )
    if not len(subjects):
        raise OptionError("a queue needs at least one subject")
    if not isinstance(patch_sampler, PatchSampler):
        made = f"{patch_sampler.__name__}(96)" if isinstance(patch_sampler, type) else "UniformSampler(96)"
        raise OptionError(f"a queue needs a patch sampler, as {made}, not {patch_sampler!r}")


def usable_subjects(
    subjects: Sequence[Subject], bad: Mapping[int, ZpatchError], on_bad: str
) -> Sequence[Subject]:
    """The subjects that patches can be taken of, in their order.

    Others are errors, all of them in one; with ``on_bad="skip"`` they are left out with one warning.
    """
    if not bad:
        return subjects
    if on_bad == "error" or sum(number >= 0 for number in bad) == len(subjects):
        raise _as_one(bad, len(subjects), "")
    warnings.warn(str(_as_one(bad, len(subjects), "left out")), stacklevel=3)
    kept = [number for number in range(len(subjects)) if number not in bad]
    if isinstance(subjects, Cohort):
        names = subjects.names
        return subjects.select([names[number] for number in kept])
    return [subjects[number] for number in kept]


def _bad_subjects(
    subjects: Sequence[Subject], sampler: PatchSampler, *, are_alike: bool, lack_classes: bool
) -> dict[int, ZpatchError]:
    """What is wrong with each subject, by its number, and with a class that no subject has, as number -1.

    Known are the images, their grids, and by the manifest the classes of label maps. With ``are_alike`` a
    subject must have all images that most subjects have.
    """
    bad: dict[int, ZpatchError] = {}
    images: dict[int, tuple[str, frozenset[str]]] = {}
    classes: dict[str, bool] = {}
    for number, first in enumerate(sampler.alike(subjects).tolist()):
        if first < number and first not in bad:
            images[number] = images[first]
            continue
        try:
            subject = subjects[number]
            images[number] = subject.name, frozenset(subject.images)
            sampler.check(subject)
            for name, is_there in sampler.classes(subject).items():
                classes[name] = classes.get(name, False) or is_there
        except ZpatchError as error:
            if not (lack_classes and isinstance(error, NothingToDrawError)):
                bad[number] = error
    names = {name for name, _ in images.values()}
    if unknown := [name for name in sampler.subject_names if name not in names]:
        where = "the queue, leave out its rows"
        raise UnknownNameError.among("subject", unknown[0], sorted(names), where)
    if are_alike:
        bad = {**dict(_without_images(images)), **bad}
    bad = dict(sorted(bad.items()))
    missing = [name for name, is_there in classes.items() if not is_there]
    if missing and not lack_classes:
        bad[-1] = OptionError(f"no subject has {' or '.join(missing)}; correct label_probabilities")
    return bad


def _without_images(images: Mapping[int, tuple[str, frozenset[str]]]) -> Iterator[tuple[int, ZpatchError]]:
    """The subjects that lack an image which most subjects have."""
    times = Counter(name for _, names in images.values() for name in names)
    usual = [name for name, count in times.items() if 2 * count > len(images)]
    for number, (subject, names) in images.items():
        if lacking := [name for name in sorted(usual) if name not in names]:
            listed, has = ", ".join(map(repr, lacking)), ", ".join(names)
            yield number, OptionError(f"subject {subject!r} has no {listed}, as most have (it has: {has})")


def _as_one(bad: Mapping[int, ZpatchError], count: int, done: str) -> ZpatchError:
    """All complaints as one error, of the class of the first."""
    first = next(iter(bad.values()))
    number = len([n for n in bad if n >= 0])
    if len(bad) == 1 and not done and (number == 0 or count == 1):
        return first
    listed = [str(error) for error in bad.values()][:MOST_LISTED]
    more = [f"... and {len(bad) - MOST_LISTED} more"] if len(bad) > MOST_LISTED else []
    advice = "" if done or number == count else "\n  say on_bad='skip' to leave them out"
    head = f"{number} of {count} subjects cannot be used" + (f", and are {done}" if done else "")
    return type(first)(f"{head}:\n  " + "\n  ".join([*listed, *more]) + advice)
