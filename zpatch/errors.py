"""Every error that zpatch raises on purpose, as one tree.

Each is also the built-in that a caller would expect, so that ``except ValueError`` keeps working::

    ZpatchError
    ├── SourceError (ValueError)                an input file or folder cannot be used
    │   └── VolumeFileError                     a file is not the NIfTI, NRRD or MetaImage that it should be
    ├── StoreError (OSError)                    a store cannot be used
    │   ├── NotAStoreError (FileNotFoundError)  there is no store at that path
    │   ├── StoreExistsError (FileExistsError)  the path exists already
    │   ├── StoreLockedError (BlockingIOError)  another process is writing to the store
    │   └── DamageError                         a file is missing or was changed after it was written
    ├── UnknownNameError (KeyError)             no subject, split or image has that name
    ├── PatchSizeError (ValueError)             a patch size is malformed or does not fit
    ├── PatchOverlapError (ValueError)          an overlap is odd, negative or too large
    ├── PatchLocationError (IndexError)         a location is outside its image
    ├── SamplingError (ValueError)              a map cannot be drawn from
    │   └── NothingToDrawError                  no voxel of it can be the centre of a patch
    ├── QueueError (RuntimeError)               a queue or one of its workers failed
    ├── WorkerError (RuntimeError)              a task failed because its workers were killed
    ├── ModelError (RuntimeError)               a network cannot be loaded, or its output cannot be used
    ├── IncompleteCoverageError (ValueError)    patches are missing, repeated or leave voxels uncovered
    ├── MemoryLimitError (MemoryError)          the plan needs more memory than is allowed
    └── OptionError (ValueError)                an option has an invalid value

An error about an option names it in ``option``, and writes other options in its text as Python does:
``max_memory``, ``fill=``, ``padding_mode='edge'``. The command line replaces these by its own flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    r"""The text of an error, on one line and with control characters escaped.

    >>> one_line(ValueError("a\nb\x1b[2J"))
    'a b\\x1b[2J'
    """
    return visible(" ".join(line.strip() for line in str(error).splitlines()))


def visible(text: str) -> str:
    r"""A text with its control characters escaped: those of a file must not reach the terminal.

    >>> visible("a\x1b[2J")
    'a\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ZpatchError(Exception):
    """Base of all errors of zpatch; ``option`` is the name of the option that the error is about, or None.

    >>> try:
    ...     raise PatchSizeError("a patch of 96 voxels does not fit axis K (80 voxels)")
    ... except ZpatchError as error:
    ...     print(error.option, isinstance(error, ValueError))
    patch_size True
    """

    option: str | None = None


class SourceError(ZpatchError, ValueError):
    """An input file or folder cannot be used."""


class VolumeFileError(SourceError):
    """A file is not the NIfTI, NRRD or MetaImage that it should be."""


NiftiError = VolumeFileError  # the name of earlier versions


class StoreError(ZpatchError, OSError):
    """A store cannot be used."""


class NotAStoreError(StoreError, FileNotFoundError):
    """There is no store at that path."""


class StoreExistsError(StoreError, FileExistsError):
    """The path exists already."""


class StoreLockedError(StoreError, BlockingIOError):
    """Another process is writing to the store."""


class DamageError(StoreError):
    """A file is missing or was changed after it was written."""


class UnknownNameError(ZpatchError, KeyError):
    """No subject, split or image has that name."""

    def __str__(self) -> str:  # KeyError shows its text quoted and escaped
        return str(self.args[0]) if self.args else ""

    @classmethod
    def among(cls, kind: str, name: object, known: Iterable[str], where: str) -> UnknownNameError:
        """The error for ``name``, with the nearest of the ``known`` names.

        >>> print(UnknownNameError.among("image", "t2", ["t1", "seg"], "subject 'sub-01'"))
        no image 't2' in subject 'sub-01'; did you mean 't1'? (it has: t1, seg)
        """
        names = list(known)
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        shown = ", ".join(names[:8]) + (f", ... {len(names)} in all" if len(names) > 8 else "")
        return cls(f"no {kind} {str(name)!r} in {where}{hint} (it has: {shown or 'none'})")


class PatchSizeError(ZpatchError, ValueError):
    """A patch size is malformed or does not fit the volume."""

    option = "patch_size"


class PatchOverlapError(ZpatchError, ValueError):
    """An overlap is odd, negative or not smaller than the patch."""

    option = "patch_overlap"


class PatchLocationError(ZpatchError, IndexError):
    """A location is outside its image."""


class SamplingError(ZpatchError, ValueError):
    """A label map or sampling map cannot be drawn from."""


class NothingToDrawError(SamplingError):
    """No voxel of a label map or sampling map can be the centre of a patch."""


class QueueError(ZpatchError, RuntimeError):
    """A queue or one of its workers failed."""


class WorkerError(ZpatchError, RuntimeError):
    """A task failed because its workers were killed again and again."""


class ModelError(ZpatchError, RuntimeError):
    """A network cannot be loaded, failed, or gave an output that cannot be used."""


class IncompleteCoverageError(ZpatchError, ValueError):
    """Patches are missing, repeated, or leave voxels uncovered."""


class MemoryLimitError(MemoryError, ZpatchError):  # MemoryError first: only it can make its instances
    """The plan needs more memory than is allowed."""


class OptionError(ZpatchError, ValueError):
    """An option has an invalid value.

    >>> OptionError("jobs must be at least 1, not 0", option="jobs").option
    'jobs'
    """

    def __init__(self, *arguments: object, option: str | None = None) -> None:
        super().__init__(*arguments)
        self.option = option
