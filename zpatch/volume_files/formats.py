"""The formats of volumes: which files are of which, read by what, and the files that belong to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from zpatch.volume_files import nifti_header
from zpatch.volume_files.metaimage import read_metaimage
from zpatch.volume_files.nrrd import read_nrrd
from zpatch.volume_files.volume_file import VolumeFile

_READERS: Mapping[str, Callable[[Path], VolumeFile]] = {  # of text headers; all other files are NIfTI
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
}
SUFFIXES = (*nifti_header.SUFFIXES, *_READERS)
MAPPED_SUFFIXES = (".nii", *_READERS)  # of files whose voxels can be mapped, if they are not compressed

_KINDS = {
    "a NIfTI file": nifti_header.SUFFIXES,
    "an NRRD file": (".nrrd", ".nhdr"),
    "a MetaImage file": (".mha", ".mhd"),
}


def kind_of(name: str) -> str | None:
    """The format of a file by its name; None for a name of none of them.

    >>> kind_of("CT.MHA"), kind_of("ct.png")
    ('a MetaImage file', None)
    """
    return next((kind for kind, suffixes in _KINDS.items() if name.lower().endswith(suffixes)), None)


def read_header(path: Path, *, affine: str = "sform") -> VolumeFile:
    """Read and check the header of a file.

    ``affine`` says which affine of a NIfTI header is taken where it has both: ``sform`` or ``qform``.
    """
    reader = _READERS.get(path.suffix.lower())
    return nifti_header.read_header(path, affine=affine) if reader is None else reader(path)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of an image whose header is in ``path``, itself first.

    These are both of a .hdr/.img pair, and those of voxels that a text header names.
    """
    if path.suffix.lower() in _READERS:
        return read_header(path).files
    is_pair = path.name.removesuffix(".gz").endswith(".hdr")
    return (path, nifti_header.image_of_pair(path)) if is_pair else (path,)
