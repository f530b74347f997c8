"""Errors are of the class that the generation of TorchIO raises, and have its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from zpatch.compat import torchio1, torchio2
from zpatch.compat.transforms import is_torchio_2
from zpatch.errors import ZpatchError

SHAPE = (10, 9, 8)


@pytest.fixture(scope="module")
def torchio() -> Any:
    """The installed TorchIO, of any generation."""
    return pytest.importorskip("torchio", reason="TorchIO is not installed")


def subject1(tio: Any, **others: Any) -> Any:
    """A subject of TorchIO 1 with an image, an empty map and a map with a negative value."""
    ones = torch.ones(1, *SHAPE)
    below = ones.clone()
    below[0, 5, 5, 5] = -1
    images = {"t1": tio.ScalarImage(tensor=ones), "empty": tio.LabelMap(tensor=torch.zeros(1, *SHAPE).int())}
    return tio.Subject(**images, below=tio.ScalarImage(tensor=below), **others)


def only_t1(tio: Any) -> Any:
    return tio.Subject(t1=tio.ScalarImage(tensor=torch.ones(1, *SHAPE)))


def first(patches: Any) -> Any:
    return next(iter(patches))


def queue1(tio: Any, **options: Any) -> Any:
    dataset = tio.SubjectsDataset([subject1(tio)])
    return first(tio.Queue(dataset, 4, 2, tio.data.UniformSampler(4), **options))


class NoLength:
    """Numbers of subjects, without a length."""

    def __iter__(self) -> Any:
        return iter([0])


Case = tuple[Callable[[Any], Any], type[Exception], str]
CASES1: dict[str, Case] = {
    "an empty map": (
        lambda t: first(t.data.WeightedSampler(4, "empty")(subject1(t))),
        RuntimeError,
        "Empty probability map found",
    ),
    "an empty label map": (
        lambda t: first(t.data.LabelSampler(4, "empty")(subject1(t))),
        RuntimeError,
        "Empty probability map found",
    ),
    "no label map": (
        lambda t: first(t.data.LabelSampler(4)(only_t1(t))),
        RuntimeError,
        "No label maps found in subject",
    ),
    "a label map of another name": (
        lambda t: first(t.data.LabelSampler(4, "other")(subject1(t))),
        KeyError,
        "other",
    ),
    "a map of another name": (
        lambda t: first(t.data.WeightedSampler(4, "other")(subject1(t))),
        KeyError,
        "other",
    ),
    "a negative map": (
        lambda t: first(t.data.WeightedSampler(4, "below")(subject1(t))),
        ValueError,
        "[Nn]egative",
    ),
    "a large patch": (
        lambda t: first(t.data.UniformSampler(11)(subject1(t))),
        RuntimeError,
        r"Patch size .*cannot be larger than image size",
    ),
    "a large patch of a grid": (
        lambda t: t.data.GridSampler(subject1(t), 11),
        ValueError,
        "larger|does not fit",
    ),
    "a large overlap": (lambda t: t.data.GridSampler(subject1(t), 4, 4), ValueError, "smaller"),
    "an odd overlap": (lambda t: t.data.GridSampler(subject1(t), 4, 1), ValueError, "even"),
    "a number of patches of a grid": (
        lambda t: first(t.data.GridSampler(subject1(t), 4)(subject1(t), 3)),
        ValueError,
        "GridSampler does not support limiting the number of patches",
    ),
    "a patch size of 0": (lambda t: t.data.UniformSampler(0), ValueError, "positive|at least 1"),
    "a sampler that shuffles": (
        lambda t: queue1(t, subject_sampler=[0], shuffle_subjects=True),
        ValueError,
        "The flag shuffle_subjects cannot be set when a subject sampler is passed|mutually exclusive",
    ),
    "a sampler without length": (
        lambda t: queue1(t, subject_sampler=NoLength(), shuffle_subjects=False),
        ValueError,
        "The subject sampler passed to the queue must have a __len__ method",
    ),
    "no images": (lambda t: t.Subject(age=3), TypeError, "A subject without images cannot be created"),
    "two dictionaries": (
        lambda t: t.Subject({}, {}),
        ValueError,
        "Only one dictionary as positional argument is allowed",
    ),
    "no image to add": (
        lambda t: only_t1(t).add_image(5, "t2"),
        ValueError,
        "Image must be an instance of torchio.Image",
    ),
    "no subjects": (lambda t: t.SubjectsDataset([]), ValueError, "Subjects list is empty"),
    "other subjects": (
        lambda t: t.SubjectsDataset([5]),
        TypeError,
        "Subjects list must contain instances of torchio.Subject",
    ),
    "no transform": (
        lambda t: t.SubjectsDataset([only_t1(t)], transform=5),
        ValueError,
        "The transform must be a callable object",
    ),
}


@pytest.mark.parametrize("name", CASES1)
def test_errors_are_those_of_torchio_1(torchio: Any, name: str) -> None:
    call, kind, words = CASES1[name]
    if not is_torchio_2(torchio):
        with pytest.raises(kind, match=words):
            call(torchio)
    with pytest.raises(kind, match=words) as raised:
        call(torchio1)
    assert isinstance(raised.value, ZpatchError)


def subject2(tio: Any) -> Any:
    ones = torch.ones(1, *SHAPE)
    return tio.Subject(t1=tio.ScalarImage(ones), empty=tio.LabelMap(torch.zeros(1, *SHAPE).int()))


def queue2(tio: Any, **options: Any) -> Any:
    subject = subject2(tio)
    return first(tio.Queue([subject], tio.UniformSampler(subject, 4), **options))


CASES2: dict[str, Case] = {
    "an empty map": (
        lambda t: first(t.WeightedSampler(subject2(t), 4, "empty")),
        RuntimeError,
        "Probability map 'empty' is all zeros",
    ),
    "a sampler that shuffles": (
        lambda t: queue2(t, subject_sampler=[0]),
        ValueError,
        "shuffle_subjects must be False when subject_sampler is provided",
    ),
    "a sampler without length": (
        lambda t: (
            t.Queue(
                [subject2(t)],
                t.UniformSampler(subject2(t), 4),
                subject_sampler=NoLength(),
                shuffle_subjects=False,
            ).num_subjects
        ),
        TypeError,
        "subject_sampler must have a __len__ method",
    ),
    "no entries": (lambda t: t.Subject(), ValueError, "A Subject must contain at least one entry"),
}


@pytest.mark.parametrize("name", CASES2)
def test_errors_are_those_of_torchio_2(name: str) -> None:
    call, kind, words = CASES2[name]
    try:
        import torchio
    except ImportError:
        torchio = None
    if torchio is not None and is_torchio_2(torchio):
        with pytest.raises(kind, match=words):
            call(torchio)
    with pytest.raises(kind, match=words) as raised:
        call(torchio2)
    assert isinstance(raised.value, ZpatchError)


def test_texts_of_zpatch_follow_the_words(torchio: Any) -> None:
    sampler = torchio1.WeightedSampler(4, "empty")
    empty = torchio1.LabelMap(tensor=np.zeros((1, *SHAPE), np.uint8))
    with pytest.raises(RuntimeError) as raised:
        first(sampler(torchio1.Subject(empty=empty)))
    assert "nothing can be drawn from it" in str(raised.value)
    assert isinstance(raised.value.__cause__, ZpatchError)
