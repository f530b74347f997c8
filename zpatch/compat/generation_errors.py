"""Errors that are also of the class that TorchIO raises, and begin with its words.

A script that catches TorchIO's ``RuntimeError`` of an empty map, or matches its text, works as it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zpatch.errors import NothingToDrawError, OptionError, PatchSizeError, UnknownNameError


class EmptyMapError(NothingToDrawError, RuntimeError):
    """No voxel of a map can be the centre of a patch."""


class NoLabelMapError(UnknownNameError, RuntimeError):
    """A subject has no label map."""


class LargePatchError(PatchSizeError, RuntimeError):
    """A patch is larger than the volume."""


class WrongTypeError(OptionError, TypeError):
    """An argument is of the wrong type."""


@contextmanager
def raised_as_in_torchio(empty_map: str) -> Iterator[None]:
    """Raise what a random sampler raises as RuntimeErrors too; ``empty_map`` is what TorchIO says of one."""
    try:
        yield
    except NothingToDrawError as error:
        raise EmptyMapError(f"{empty_map}: {error}") from error
    except PatchSizeError as error:
        raise LargePatchError(f"Patch size cannot be larger than image size: {error}") from error
    except UnknownNameError as error:
        if "has no label map" not in str(error):
            raise
        raise NoLabelMapError(f"No label maps found in subject: {error}") from error


def check_subject_sampler(sampler: Any, shuffles: bool, clash: str, no_length: OptionError) -> None:
    """Refuse a ``subject_sampler`` beside ``shuffle_subjects``, in the words ``clash``, or without length."""
    if sampler is not None and shuffles:
        raise OptionError(f"{clash}; say shuffle_subjects=False with it")
    if sampler is not None and not hasattr(sampler, "__len__"):
        raise no_length
