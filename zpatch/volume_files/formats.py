"""The formats of volumes: which files are of which, read by what, and the files that belong to one."""

from __future__ import annotations

from pathlib import Path

from zpatch.volume_files import nifti_header
from zpatch.volume_files.nifti_header import image_of_pair
from zpatch.volume_files.volume_file import VolumeFile

SUFFIXES = nifti_header.SUFFIXES


def read_header(path: Path, *, affine: str = "sform") -> VolumeFile:
    """Read and check the header of a file.

    ``affine`` says which affine of a NIfTI header is taken where it has both: ``sform`` or ``qform``.
    """
    return nifti_header.read_header(path, affine=affine)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of an image whose header is in ``path``, itself first: both of a .hdr/.img pair."""
    is_pair = path.name.removesuffix(".gz").endswith(".hdr")
    return (path, image_of_pair(path)) if is_pair else (path,)
