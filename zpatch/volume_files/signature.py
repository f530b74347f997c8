"""The first bytes of a file: NIfTI-1 or NIfTI-2, in which byte order, or another kind of file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zpatch.errors import VolumeFileError
from zpatch.volume_files.byte_streams import open_bytes

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


def stand_in(raw: bytes) -> tuple[str, str] | None:
    """What a file that starts with ``raw`` is in place of an image, and what to do; None if it is not known.

    >>> stand_in(b"")
    ('it is empty', 'copy the file again')
    """
    known = _SIGNATURES.items()
    return next((found for start, found in known if raw.startswith(start) and (start or not raw)), None)


def pointer(path: Path) -> tuple[str, str] | None:
    """What a file is in place of voxels, if it is empty or a pointer of git, and what to do."""
    with open_bytes(path) as stream:
        return stand_in(stream.read(32))


def not_nifti(path: Path, raw: bytes, *, cut: bool) -> VolumeFileError:
    """The error for a file that does not start as NIfTI does, with the kind of file if it is known."""
    if cut and len(raw) > 4:
        return VolumeFileError(f"{path}: it ends inside its header; copy the file again")
    if found := stand_in(raw):
        return VolumeFileError(f"{path}: {found[0]}, so it is not a NIfTI file; {found[1]}")
    return VolumeFileError(
        f"{path}: it is not a NIfTI file (its first bytes are no NIfTI header); {LEAVE_OUT}"
    )
