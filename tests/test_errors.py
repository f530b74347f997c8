"""Every error is in one tree, is also the built-in that a caller expects, and says what to do."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from zpatch import errors
from zpatch.errors import UnknownNameError, ZpatchError

BUILT_INS: dict[str, type[Exception]] = {
    "SourceError": ValueError,
    "VolumeFileError": ValueError,
    "StoreError": OSError,
    "NotAStoreError": FileNotFoundError,
    "StoreExistsError": FileExistsError,
    "StoreLockedError": BlockingIOError,
    "DamageError": OSError,
    "UnknownNameError": KeyError,
    "PatchSizeError": ValueError,
    "PatchOverlapError": ValueError,
    "PatchLocationError": IndexError,
    "SamplingError": ValueError,
    "NothingToDrawError": ValueError,
    "QueueError": RuntimeError,
    "WorkerError": RuntimeError,
    "ModelError": RuntimeError,
    "IncompleteCoverageError": ValueError,
    "MemoryLimitError": MemoryError,
    "OptionError": ValueError,
}
CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__
]
BRANCH = re.compile(r"^ {4}((?:│   |    )*)[├└]── (\w+)(?: \((\w+)\))?  +\S")


def tree_in_docstring() -> dict[str, tuple[str, ...]]:
    """Class name -> names of its bases, from the tree in the module's docstring."""
    assert errors.__doc__ is not None
    bases: dict[str, tuple[str, ...]] = {"ZpatchError": ("Exception",)}
    parents = ["ZpatchError"]
    for line in errors.__doc__.splitlines():
        if match := BRANCH.match(line):
            depth = len(match[1]) // 4 + 1
            parents[depth:] = [match[2]]
            bases[match[2]] = tuple(filter(None, (parents[depth - 1], match[3])))
    return bases


def test_the_tree_in_the_docstring_lists_every_class_with_its_bases() -> None:
    drawn = {name: sorted(bases) for name, bases in tree_in_docstring().items()}
    assert drawn == {error.__name__: sorted(base.__name__ for base in error.__bases__) for error in CLASSES}


def test_each_error_except_the_base_has_a_built_in_in_the_table() -> None:
    assert BUILT_INS.keys() == {error.__name__ for error in CLASSES} - {"ZpatchError"}


@pytest.mark.parametrize("name", BUILT_INS)
def test_each_error_is_caught_as_its_built_in_and_as_a_zpatch_error(name: str) -> None:
    for caught in (BUILT_INS[name], ZpatchError):
        with pytest.raises(caught, match="what, where"):
            raise getattr(errors, name)("what, where, what to do")


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_keeps_its_text_between_processes(error: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(error("what, where, 'what to do'")))
    assert type(copy) is error
    assert str(copy) == "what, where, 'what to do'"


def test_an_unknown_name_is_reported_with_the_nearest_names() -> None:
    error = UnknownNameError.among("subject", "sub-1", ["sub-01", "sub-11", "control"], "the cohort")
    text = str(error)
    assert text.startswith("no subject 'sub-1' in the cohort; did you mean ")
    assert "'sub-01'" in text
    assert "'sub-11'" in text
    assert "'control'" not in text
    assert "(it has: sub-01, sub-11, control)" in text


def test_an_unknown_name_near_no_other_is_reported_without_a_guess() -> None:
    text = str(UnknownNameError.among("image", "flair", ["t1", "seg"], "subject 'a'"))
    assert "did you mean" not in text
    assert text.endswith("(it has: t1, seg)")


def test_an_unknown_name_among_very_many_is_reported_with_the_first_eight_and_their_number() -> None:
    text = str(UnknownNameError.among("subject", "x", (f"case{n:03}" for n in range(500)), "the cohort"))
    assert "case007, ... 500 in all)" in text
    assert "case008" not in text


def test_an_unknown_name_where_there_are_none_says_so() -> None:
    assert str(UnknownNameError.among("split", "train", [], "the cohort")).endswith("(it has: none)")


def test_an_unknown_name_need_not_be_a_string() -> None:
    assert "no image '3' in" in str(UnknownNameError.among("image", 3, ["t1"], "subject 'a'"))
