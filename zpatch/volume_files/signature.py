"""The first bytes of a file: NIfTI-1 or NIfTI-2, in which byte order, or another kind of file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zpatch.errors import NiftiError

HEADER_VERSIONS = {348: 1, 540: 2}  # by length
EXTENSION_FLAG_BYTES = 4
LEAVE_OUT = "replace it, or leave it out with exclude="

_SIGNATURES = {
    b"": ("it is empty", "copy the file again"),
    b"/annex/objects/": ("it is a git-annex pointer", "fetch the file with 'git annex get'"),
    b"version https://git-lfs": ("it is a git-lfs pointer", "fetch the file with 'git lfs pull'"),
}


@dataclass(frozen=True, slots=True)
class HeaderKind:
    """The layout of a header: its ``version`` 1 or 2, and the ``byte_order``, ``"<"`` or ``">"``.

    ``length`` is the number of bytes of the fixed part.
    """

    version: int
    length: int
    byte_order: str

    @property
    def magics(self) -> tuple[bytes, bytes]:
        """The field ``magic`` of a single file, and of a .hdr/.img pair."""
        return b"n+%d" % self.version, b"ni%d" % self.version


def header_kind(raw: bytes) -> HeaderKind | None:
    """The kind of header at the start of ``raw``, by its first field, which is its length, or None.

    >>> header_kind(bytes([0, 0, 1, 92]))
    HeaderKind(version=1, length=348, byte_order='>')
    """
    for byte_order in ("<", ">"):
        length = int.from_bytes(raw[:4], "little" if byte_order == "<" else "big")
        if length in HEADER_VERSIONS:
            return HeaderKind(HEADER_VERSIONS[length], length, byte_order)
    return None


def not_nifti(path: Path, raw: bytes, *, cut: bool) -> NiftiError:
    """The error for a file that does not start as NIfTI does, with the kind of file if it is known."""
    if cut and len(raw) > 4:
        return NiftiError(f"{path}: it ends inside its header; copy the file again")
    for start, (what, advice) in _SIGNATURES.items():
        if raw.startswith(start) and (start or not raw):
            return NiftiError(f"{path}: {what}, so it is not a NIfTI file; {advice}")
    return NiftiError(f"{path}: it is not a NIfTI file (its first bytes are no NIfTI header); {LEAVE_OUT}")
