"""Names of files in a store, and of subjects and images: which are allowed, and which fit a pattern."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from zpatch.errors import SourceError, UnknownNameError

FORMAT = 1
ROOT_DOCUMENT = "zarr.json"
MANIFEST = "manifest.jsonl"
MANIFEST_TABLE = "manifest.index"
STAGING = ".staging"
UNFINISHED = ".unfinished"
LOCK = ".lock"
RAW_HEADER = "nifti"
INDEX = "index"
HISTOGRAM = "histogram"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str, what: str) -> None:
    """Raise ``SourceError`` for a subject or image name that is not a valid folder name on all systems."""
    if not _NAME.fullmatch(name) or name.casefold() in (ROOT_DOCUMENT, MANIFEST, MANIFEST_TABLE):
        raise SourceError(
            f"{what} name {name!r} is not usable: it must start with a letter or digit and hold only "
            f"letters, digits, '.', '_' and '-' (at most 128), and not be a file of the store itself; "
            f"rename it"
        )


def check_names_differ(names: Iterable[str], what: str) -> None:
    """Raise ``SourceError`` for names that differ in case only: some file systems confuse them."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise SourceError(f"{what} names {other!r} and {name!r} differ in case only; rename one")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches any of some glob patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def chosen(
    kind: str, names: Sequence[str], include: Sequence[str], exclude: Sequence[str], place: str
) -> list[str]:
    """The names that match a pattern of ``include`` (all if there is none), and no pattern of ``exclude``.

    A pattern without a match raises ``UnknownNameError``, whose text has the ``kind`` and ``place`` of names.
    """
    found: dict[str, set[str]] = {}
    for pattern in (*include, *exclude):
        fits = re.compile(fnmatch.translate(pattern)).match
        found[pattern] = {name for name in names if fits(name)}
        if not found[pattern]:
            raise UnknownNameError.among(kind, pattern, names, place)
    included = set().union(*(found[pattern] for pattern in include)) if include else set(names)
    included = included.difference(*(found[pattern] for pattern in exclude))
    return [name for name in names if name in included]
