"""A corpus of malformed, odd and hostile NIfTI files and cohorts, with the expected result of each.

Files are packed byte by byte, so that each has exactly the intended defect. ``FILES`` are made in the folder
of the middle one of three subjects; ``COHORTS`` are whole sources; ``BOMBS`` are files that declare or
decompress to more than fits in memory.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

Fate = Literal["fails", "warns", "converts", "is ignored"]

# Real files, in nibabel's wheel.
NIBABEL_FILES = [
    Path(nib.__file__).parent / "tests" / "data" / name
    for name in (
        "anatomical.nii",
        "functional.nii",
        "example4d.nii.gz",
        "example_nifti2.nii.gz",
        "standard.nii.gz",
        "reoriented_anat_moved.nii",
    )
]

SHAPE = (5, 4, 6)
VOXELS: NDArray[np.int16] = np.arange(np.prod(SHAPE), dtype="<i2").reshape(SHAPE[::-1]) - 30
SPACING = 2.0
BAD, GOOD = "sub-02", ("sub-01", "sub-03")

NAN, INF = float("nan"), float("inf")
TRUNCATED = "copy the file again"
NOT_NIFTI = "is not a NIfTI file"
BROKEN_GZIP = f"broken gzip data .*; {TRUNCATED}"


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of bad file.

    ``make`` writes it to a subject's folder; ``says`` is a pattern of the reason or the warning. ``voxels``
    (z, y, x) are the expected voxels in the store if it converts.
    """

    name: str
    fate: Fate
    says: str
    make: Callable[[Path], object]
    voxels: NDArray[Any]


@dataclass(frozen=True, slots=True)
class CohortKind:
    """A kind of bad cohort: ``make`` fills a folder and returns the source to convert.

    With ``fails_alone`` only the cases with bad names are refused.
    """

    name: str
    says: str
    make: Callable[[Path], Path]
    fails_alone: bool = False


FILES: list[FileKind] = []
COHORTS: list[CohortKind] = []
BOMBS: list[FileKind] = []


def kind(
    fate: Fate, says: str = "", voxels: NDArray[Any] = VOXELS, kinds: list[FileKind] = FILES
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def add(make: Callable[[Path], object]) -> Callable[[Path], object]:
        kinds.append(FileKind(make.__name__.strip("_"), fate, says, make, voxels))
        return make

    return add


def bomb(says: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    return kind("fails", says, kinds=BOMBS)


def cohort(
    says: str, *, fails_alone: bool = False
) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        COHORTS.append(CohortKind(make.__name__, says, make, fails_alone))
        return make

    return add


# Building blocks ---------------------------------------------------------------------------------------

_NIFTI1: dict[str, tuple[int, str]] = {
    "sizeof_hdr": (0, "i"),
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scaling": (112, "2f"),
    "xyzt_units": (123, "B"),
    "codes": (252, "2h"),
    "qform": (256, "6f"),
    "sform": (280, "12f"),
    "magic": (344, "4s"),
}
_NIFTI2: dict[str, tuple[int, str]] = {
    "sizeof_hdr": (0, "i"),
    "magic": (4, "8s"),
    "datatype": (12, "h"),
    "bitpix": (14, "h"),
    "dim": (16, "8q"),
    "pixdim": (104, "8d"),
    "vox_offset": (168, "q"),
    "scaling": (176, "2d"),
    "codes": (344, "2i"),
    "qform": (352, "6d"),
    "sform": (400, "12d"),
    "xyzt_units": (500, "i"),
}
_ALIKE = (1.0, SPACING, SPACING, SPACING, 0, 0, 0, 0)
_SFORM = (SPACING, 0, 0, 0, 0, SPACING, 0, 0, 0, 0, SPACING, 0)


def dim(*sides: int) -> tuple[int, ...]:
    return (len(sides), *sides, *(1,) * (7 - len(sides)))


def header(*, version: int = 1, endian: str = "<", **fields: Any) -> bytes:
    """The header of VOXELS with a valid sform and no qform, but for some ``fields``."""
    layout, length = (_NIFTI1, 348) if version == 1 else (_NIFTI2, 540)
    values = {
        "sizeof_hdr": length,
        "magic": b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n",
        "dim": dim(*SHAPE),
        "datatype": 4,
        "bitpix": 16,
        "pixdim": _ALIKE,
        "vox_offset": length + 4,
        "scaling": (1, 0),
        "xyzt_units": 2,
        "codes": (0, 1),
        "qform": (0,) * 6,
        "sform": _SFORM,
        **fields,
    }
    raw = bytearray(length)
    for name, value in values.items():
        offset, form = layout[name]
        struct.pack_into(endian + form, raw, offset, *(value if isinstance(value, tuple) else (value,)))
    return bytes(raw)


def nifti(voxels: bytes | NDArray[Any] = VOXELS, *, extension: bytes = bytes(4), **fields: Any) -> bytes:
    """A whole file: header, extension, voxels."""
    data = voxels if isinstance(voxels, bytes) else voxels.tobytes()
    return header(**fields) + extension + data


def floats(*first: float, code: str = "<f4") -> NDArray[Any]:
    """VOXELS as floats, the first ones replaced."""
    voxels = VOXELS.astype(code)
    voxels.reshape(-1)[: len(first)] = first
    return voxels


FLOAT32: dict[str, Any] = {"datatype": 16, "bitpix": 32}


def zipped(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def plain(folder: Path, data: bytes, name: str = "t1.nii") -> None:
    (folder / name).write_bytes(data)


def packed(folder: Path, data: bytes, name: str = "t1.nii.gz") -> None:
    (folder / name).write_bytes(data)


def good(folder: Path, name: str = "t1.nii.gz", **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = nifti(**fields)
    (folder / name).write_bytes(zipped(data) if name.endswith(".gz") else data)
    return folder / name


def flipped(data: bytes, byte: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def edited(fate: Fate, says: str, *names_and_fields: Any) -> None:
    """One kind for each (name, fields): a file whose header differs from the good one in these fields."""
    for name, fields in names_and_fields:
        FILES.append(
            FileKind(name, fate, says, lambda folder, f=fields: plain(folder, nifti(**f)), VOXELS)  # type: ignore[misc]
        )


# Cut off or changed on the way -------------------------------------------------------------------------


@kind("fails", TRUNCATED)
def cut_inside_the_header(folder: Path) -> None:
    plain(folder, nifti()[:200])


@kind("fails", f"ends inside its header; {TRUNCATED}")
def nifti_2_cut_inside_the_header(folder: Path) -> None:
    plain(folder, nifti(version=2)[:400])


@kind("fails", f"ends before its first voxel; {TRUNCATED}")
def cut_inside_the_extension(folder: Path) -> None:
    plain(folder, nifti(vox_offset=3520, extension=b"\1\0\0\0" + struct.pack("<2i", 3168, 6) + bytes(99)))


@kind("fails", TRUNCATED)
def cut_inside_the_voxels(folder: Path) -> None:
    plain(folder, nifti()[:-1])


@kind("fails", BROKEN_GZIP)
def gzip_cut_inside_the_header(folder: Path) -> None:
    packed(folder, zipped(nifti())[:60])


@kind("fails", BROKEN_GZIP)
def gzip_cut_after_its_magic(folder: Path) -> None:
    packed(folder, zipped(nifti())[:2])


@kind("fails", BROKEN_GZIP)
def gzip_cut_inside_the_voxels(folder: Path) -> None:
    noise = np.random.default_rng(0).bytes(VOXELS.nbytes)
    packed(folder, zipped(nifti(noise))[:-60])


@kind("fails", BROKEN_GZIP)
def gzip_cut_before_its_trailer(folder: Path) -> None:
    packed(folder, zipped(nifti())[:-8])


@kind("fails", BROKEN_GZIP)
def gzip_cut_inside_its_trailer(folder: Path) -> None:
    packed(folder, zipped(nifti())[:-3])


@kind("fails", BROKEN_GZIP)
def gzip_with_a_flipped_crc(folder: Path) -> None:
    packed(folder, flipped(zipped(nifti()), -8))


@kind("fails", BROKEN_GZIP)
def gzip_with_a_wrong_length(folder: Path) -> None:
    packed(folder, flipped(zipped(nifti()), -1, 6))


@kind("fails", BROKEN_GZIP)
def gzip_with_a_flipped_bit_in_the_voxels(folder: Path) -> None:
    stored = gzip.compress(nifti(), 0, mtime=0)  # level 0: not compressed, so that only the CRC can tell
    packed(folder, flipped(stored, -20, 3))


@kind("fails", BROKEN_GZIP)
def gzip_with_a_flipped_bit_in_the_header(folder: Path) -> None:
    packed(folder, flipped(gzip.compress(nifti(), 0, mtime=0), 15 + 290, 2))


@kind("fails", BROKEN_GZIP)
def gzip_with_a_flipped_bit_in_the_deflate_codes(folder: Path) -> None:
    packed(folder, flipped(zipped(nifti()), 14, 1))


@kind("fails", BROKEN_GZIP)
def gzip_of_an_unknown_method(folder: Path) -> None:
    packed(folder, b"\x1f\x8b\x07" + zipped(nifti())[3:])


@kind("fails", BROKEN_GZIP)
def gzip_whose_second_member_is_cut(folder: Path) -> None:
    data = nifti()
    packed(folder, zipped(data[:500]) + zipped(data[500:])[:-9])


@kind("fails", f"header declares|holds fewer|ends before its last voxel.*{TRUNCATED}")
def more_voxels_declared_than_present(folder: Path) -> None:
    plain(folder, nifti(dim=dim(5, 4, 7)))


@kind("fails", f"ends before its last voxel .*{TRUNCATED}")
def more_voxels_declared_than_the_gzip_data_hold(folder: Path) -> None:
    packed(folder, zipped(nifti(dim=dim(5, 4, 7))))


@kind("fails", f"ends before its last voxel .*{TRUNCATED}")
def gzip_padded_with_zeros_in_place_of_voxels(folder: Path) -> None:
    packed(folder, zipped(nifti()[:-40]) + bytes(40))


@kind("warns", "13 trailing bytes after the last voxel")
def trailing_bytes(folder: Path) -> None:
    plain(folder, nifti() + b"thirteen bytes"[:13])


@kind("warns", "13 trailing bytes after the last voxel")
def trailing_bytes_inside_the_gzip_data(folder: Path) -> None:
    packed(folder, zipped(nifti() + b"thirteen bytes"[:13]))


@kind("warns", "trailing bytes after the last voxel")
def fewer_voxels_declared_than_present(folder: Path) -> None:
    plain(folder, nifti(np.concatenate([VOXELS, VOXELS])))


@kind("fails", BROKEN_GZIP)
def garbage_after_the_gzip_data(folder: Path) -> None:
    packed(folder, zipped(nifti()) + b"garbage")


@kind("converts")
def zeros_after_the_gzip_data(folder: Path) -> None:
    packed(folder, zipped(nifti()) + bytes(512))


@kind("converts")
def gzip_of_several_members(folder: Path) -> None:
    data = nifti()
    packed(folder, b"".join(zipped(data[start : start + 100]) for start in range(0, len(data), 100)))


@kind("converts")
def gzip_with_a_name_and_a_comment(folder: Path) -> None:
    data = nifti()
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    trailer = struct.pack("<2I", zlib.crc32(data), len(data))
    deflated = body.compress(data) + body.flush()
    packed(folder, b"\x1f\x8b\x08\x1c" + bytes(6) + b"\3\0abcname\0comment\0" + deflated + trailer)


# Another kind than their name ------------------------------------------------------------------------------


@kind("fails", "empty|" + NOT_NIFTI)
def empty_file(folder: Path) -> None:
    plain(folder, b"")


@kind("fails", "empty|" + NOT_NIFTI)
def empty_file_called_gz(folder: Path) -> None:
    packed(folder, b"")


@kind("fails", NOT_NIFTI)
def gzip_of_nothing(folder: Path) -> None:
    packed(folder, zipped(b""))


@kind("fails", NOT_NIFTI)
def text_file(folder: Path) -> None:
    plain(folder, b"Lorem ipsum dolor sit amet.\n" * 40)


@kind("fails", NOT_NIFTI)
def web_page_of_a_login(folder: Path) -> None:
    packed(folder, b"<!DOCTYPE html>\n<html><body>Please log in to download</body></html>\n" * 9)


@kind("fails", NOT_NIFTI)
def png_image(folder: Path) -> None:
    plain(folder, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(600))


@kind("fails", NOT_NIFTI)
def hdf5_file(folder: Path) -> None:
    plain(folder, b"\x89HDF\r\n\x1a\n" + bytes(2040))


@kind("fails", NOT_NIFTI)
def dicom_file(folder: Path) -> None:
    plain(folder, bytes(128) + b"DICM" + bytes(600))


@kind("fails", NOT_NIFTI)
def file_of_zeros(folder: Path) -> None:
    plain(folder, bytes(4096))


@kind("fails", NOT_NIFTI)
def zip_called_gz(folder: Path) -> None:
    with zipfile.ZipFile(folder / "t1.nii.gz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t1.nii", nifti() * 9)


@kind("fails", NOT_NIFTI)
def xz_called_gz(folder: Path) -> None:
    packed(folder, lzma.compress(np.random.default_rng(0).bytes(900)))


@kind("fails", NOT_NIFTI)
def gzip_of_gzip(folder: Path) -> None:
    packed(folder, zipped(zipped(np.random.default_rng(0).bytes(900))))


@kind("fails", NOT_NIFTI)
def git_annex_pointer(folder: Path) -> None:
    packed(folder, b"/annex/objects/SHA256E-s352--0123456789abcdef.nii.gz\n")


@kind("fails", NOT_NIFTI)
def git_lfs_pointer(folder: Path) -> None:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 592\n"
    packed(folder, text)


@kind("warns", "its name does not fit its compression")
def gzip_called_nii(folder: Path) -> None:
    plain(folder, zipped(nifti()))


@kind("warns", "its name does not fit its compression")
def plain_file_called_gz(folder: Path) -> None:
    packed(folder, nifti())


@kind("fails", r"t1\.img.* not beside it; copy")
def header_of_a_pair_without_its_voxels(folder: Path) -> None:
    plain(folder, header(magic=b"ni1\0", vox_offset=0), "t1.hdr")


@kind("fails", TRUNCATED)
def pair_whose_voxels_are_cut(folder: Path) -> None:
    plain(folder, header(magic=b"ni1\0", vox_offset=0), "t1.hdr")
    plain(folder, VOXELS.tobytes()[:-1], "t1.img")


@kind("converts")
def pair_of_header_and_voxels(folder: Path) -> None:
    plain(folder, header(magic=b"ni1\0", vox_offset=0), "t1.hdr")
    plain(folder, VOXELS.tobytes(), "t1.img")


@kind("is ignored")
def voxels_of_a_pair_without_their_header(folder: Path) -> None:
    plain(folder, VOXELS.tobytes(), "t1.img")


# Irregular files --------------------------------------------------------------------------------------


@kind("fails", r"cannot be read \(No such file")
def broken_link(folder: Path) -> None:
    (folder / "t1.nii.gz").symlink_to("../.git/annex/objects/xx/SHA256E-s352--0.nii.gz")


@kind("fails", r"cannot be read \(Too many levels of symbolic links")
def link_to_itself(folder: Path) -> None:
    (folder / "t1.nii").symlink_to("t1.nii")


@kind("fails", r"cannot be read \(Too many levels of symbolic links")
def links_in_a_circle(folder: Path) -> None:
    (folder / "t1.nii").symlink_to("other")
    (folder / "other").symlink_to("t1.nii")


@kind("converts")
def link_to_a_file_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent.parent / "annex"
    (folder / "t1.nii.gz").symlink_to(good(elsewhere, "t1.nii.gz"))


@kind("fails", "no regular file|not a regular file")
def fifo(folder: Path) -> None:
    os.mkfifo(folder / "t1.nii")


@kind("fails", "no regular file|not a regular file")
def fifo_called_gz(folder: Path) -> None:
    os.mkfifo(folder / "t1.nii.gz")


@kind("fails", "no regular file|not a regular file")
def fifo_for_the_voxels_of_a_pair(folder: Path) -> None:
    plain(folder, header(magic=b"ni1\0", vox_offset=0), "t1.hdr")
    os.mkfifo(folder / "t1.img")


@kind("fails", "no regular file|not a regular file")
def link_to_a_device(folder: Path) -> None:
    (folder / "t1.nii").symlink_to("/dev/zero")


@kind("is ignored")
def folder_called_nii_gz(folder: Path) -> None:
    (folder / "t1.nii.gz").mkdir()


@kind("is ignored")
def companion_of_macos(folder: Path) -> None:
    packed(folder, b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100), "._t1.nii.gz")


@kind("is ignored")
def hidden_folder(folder: Path) -> None:
    good(folder / ".staging")


@kind("is ignored")
def unfinished_download(folder: Path) -> None:
    packed(folder, zipped(nifti())[:99], "t1.nii.gz.part")


@kind("is ignored")
def link_to_its_own_folder(folder: Path) -> None:
    (folder / "again").symlink_to(folder, target_is_directory=True)


@kind("fails", r"cannot be read \(Permission denied\)")
def unreadable_file(folder: Path) -> None:
    good(folder).chmod(0)


# Invalid headers ----------------------------------------------------------------------------

edited(
    "fails",
    "impossible dimensions",
    ("no_dimensions", {"dim": (0, *dim(*SHAPE)[1:])}),
    ("eight_dimensions", {"dim": (8, *dim(*SHAPE)[1:])}),
    ("a_negative_number_of_dimensions", {"dim": (-3, *dim(*SHAPE)[1:])}),
    ("a_negative_side", {"dim": dim(5, -4, 6)}),
    ("all_sides_negative", {"dim": dim(-5, -4, -6)}),
    ("a_side_of_zero", {"dim": dim(5, 4, 0)}),
    ("zero_time_points", {"dim": dim(5, 4, 6, 0)}),
    ("nifti_2_with_a_negative_side", {"version": 2, "dim": dim(5, 4, -(2**62))}),
    ("nifti_2_with_countless_dimensions", {"version": 2, "dim": (2**62, *dim(*SHAPE)[1:])}),
)
edited(
    "fails",
    f"header declares|{TRUNCATED}",
    ("sides_of_32767", {"dim": dim(32767, 32767, 32767)}),
    ("sides_whose_product_overflows_64_bits", {"dim": dim(*[32767] * 7)}),
    ("terabytes_declared_in_a_small_file", {"version": 2, "dim": dim(10**6, 10**6, 10)}),
    ("nifti_2_whose_sides_overflow_64_bits", {"version": 2, "dim": dim(2**40, 2**40, 2**40)}),
    ("voxels_that_start_near_the_end", {"vox_offset": 368}),
)
edited(
    "fails",
    "voxel type|not supported",
    ("unknown_voxel_type", {"datatype": 12345}),
    ("voxel_type_of_zero", {"datatype": 0}),
    ("negative_voxel_type", {"datatype": -4}),
    ("single_bits_as_voxels", {"datatype": 1, "bitpix": 1}),
    ("extended_precision", {"datatype": 1536, "bitpix": 128}),
    ("complex_extended_precision", {"datatype": 2048, "bitpix": 256}),
)
edited(
    "fails",
    "cannot start at byte",
    ("voxels_inside_the_header", {"vox_offset": 100}),
    ("voxels_on_the_extension_flag", {"vox_offset": 348}),
    ("voxels_before_the_file", {"vox_offset": -352}),
    ("voxels_at_nan", {"vox_offset": NAN}),
    ("voxels_at_infinity", {"vox_offset": INF}),
    ("voxels_at_a_broken_number", {"vox_offset": 352.5}),
    ("voxels_at_a_huge_offset", {"vox_offset": 1e30}),
    ("nifti_2_with_voxels_at_a_huge_offset", {"version": 2, "vox_offset": 2**62}),
    ("nifti_2_with_voxels_before_the_file", {"version": 2, "vox_offset": -(2**62)}),
)
edited(
    "fails", f"ends before its first voxel; {TRUNCATED}", ("voxels_beyond_the_file", {"vox_offset": 40000})
)
edited(
    "fails",
    f"{NOT_NIFTI}.*magic",
    ("no_magic", {"magic": b"\0\0\0\0"}),
    ("bad_magic", {"magic": b"abc\0"}),
    ("nifti_2_with_the_magic_of_nifti_1", {"version": 2, "magic": b"n+1\0\r\n\x1a\n"}),
    ("nifti_1_with_the_magic_of_nifti_2", {"magic": b"n+2\0"}),
)
edited(
    "fails",
    "copied as text.*; copy it again",
    ("nifti_2_copied_as_text", {"version": 2, "magic": b"n+2\0\n\x1a\n\0"}),
)
edited("warns", "bitpix is 8 for voxels of 16 bits", ("bitpix_of_another_type", {"bitpix": 8}))
edited("warns", "bitpix is 0 for", ("bitpix_of_zero", {"bitpix": 0}))
edited(
    "converts",
    "",
    ("an_offset_that_is_no_multiple_of_16", {"vox_offset": 359, "extension": bytes(11)}),
    ("unknown_units", {"xyzt_units": 0}),
    ("units_that_do_not_exist", {"xyzt_units": 0xFF}),
    ("space_units_that_do_not_exist", {"xyzt_units": 5}),
    ("slope_of_zero", {"scaling": (0, 7)}),
    ("slope_of_nan", {"scaling": (NAN, NAN)}),
    ("slope_of_infinity", {"scaling": (INF, 0)}),
    ("zeros_beyond_the_dimensions_in_use", {"dim": (3, *SHAPE, 0, 0, 0, 0)}),
    ("negatives_beyond_the_dimensions_in_use", {"dim": (3, *SHAPE, -1, -1, -1, -1)}),
    ("nifti_2", {"version": 2}),
)
edited(
    "fails",
    "scl_inter is (nan|-?inf); repair its header",
    ("inter_of_nan", {"scaling": (2, NAN)}),
    ("inter_of_infinity", {"scaling": (1, -INF)}),
)


@kind("fails", "impossible dimensions|cannot start at byte")
def header_of_mixed_byte_order(folder: Path) -> None:
    plain(folder, struct.pack(">i", 348) + nifti()[4:])


@kind("converts")
def header_of_the_other_byte_order(folder: Path) -> None:
    plain(folder, nifti(VOXELS.astype(">i2"), endian=">"))


@kind("fails", f"{NOT_NIFTI}.*magic")
def analyze_7_5(folder: Path) -> None:
    plain(folder, header(magic=b"\0\0\0\0", vox_offset=0, codes=(0, 0)), "t1.hdr")
    plain(folder, VOXELS.tobytes(), "t1.img")


def extended(size: int) -> dict[str, Any]:
    """Fields for a file whose one extension states a size that may not be its own, of 32."""
    return {"vox_offset": 384, "extension": b"\1\0\0\0" + struct.pack("<2i", size, 6) + b"x" * 24}


edited(
    "converts",
    "",
    ("extension", extended(32)),
    ("extension_of_size_zero", extended(0)),
    ("extension_of_negative_size", extended(-32)),
    ("extension_of_huge_size", extended(2**31 - 16)),
    ("extension_of_odd_size", extended(27)),
    ("extension_flag_without_extension", {"extension": b"\1\0\0\0"}),
)


# Geometry ----------------------------------------------------------------------------------------------

_SINGULAR = (SPACING, 0, 0, 0, SPACING, 0, 0, 0, 0, 0, SPACING, 0)
_NAN_SFORM = (NAN, *_SFORM[1:])
_NO_QFORM, _BOTH, _NEITHER = (0, 1), (1, 1), (0, 0)


def pixdim(*sizes: float, qfac: float = 1) -> tuple[float, ...]:
    return (qfac, *sizes, 0, 0, 0, 0)


edited(
    "warns",
    "sform is singular or not finite",
    ("singular_sform_beside_a_qform", {"codes": _BOTH, "sform": _SINGULAR}),
    ("sform_of_zeros_beside_a_qform", {"codes": _BOTH, "sform": (0,) * 12}),
    ("sform_of_nan_beside_a_qform", {"codes": _BOTH, "sform": _NAN_SFORM}),
    ("sform_of_infinity_beside_a_qform", {"codes": _BOTH, "sform": (*_SFORM[:-1], INF)}),
)
edited(
    "fails",
    "neither its sform nor its qform is usable; repair its header",
    ("singular_sform_alone", {"sform": _SINGULAR}),
    ("sform_of_nan_alone", {"sform": _NAN_SFORM}),
    ("qform_of_nan_alone", {"codes": (1, 0), "qform": (NAN,) * 6}),
    ("qform_of_no_rotation_alone", {"codes": (1, 0), "qform": (3, 0, 0, 0, 0, 0)}),
    ("sform_and_qform_of_nan", {"codes": _BOTH, "sform": _NAN_SFORM, "qform": (NAN,) * 6}),
)
edited(
    "warns",
    "qform is singular or not finite",
    ("qform_of_nan_beside_an_sform", {"codes": _BOTH, "qform": (NAN,) * 6}),
    ("qform_of_infinity_beside_an_sform", {"codes": _BOTH, "qform": (INF, INF, 0, 0, 0, 0)}),
    ("qform_of_no_rotation_beside_an_sform", {"codes": _BOTH, "qform": (3, 0, 0, 0, 0, 0)}),
)
edited(
    "warns",
    "neither sform nor qform",
    ("no_sform_and_no_qform", {"codes": _NEITHER}),
    ("codes_that_are_negative", {"codes": (-1, -1)}),
)
edited(
    "warns",
    "sform and its qform put voxels apart",
    ("sform_and_qform_that_differ", {"codes": _BOTH, "qform": (0, 0, 0, 5, 0, 0)}),
)
edited(
    "warns",
    "voxel size is zero, negative or not finite",
    ("voxel_size_of_zero", {"codes": _NEITHER, "pixdim": pixdim(0, 2, 2)}),
    ("voxel_size_below_zero", {"codes": _NEITHER, "pixdim": pixdim(-2, 2, 2)}),
    ("voxel_size_of_nan", {"codes": _NEITHER, "pixdim": pixdim(2, NAN, 2)}),
    ("voxel_size_of_zero_with_an_sform", {"pixdim": pixdim(0, 0, 0)}),
    ("voxel_size_below_zero_with_an_sform", {"pixdim": pixdim(-2, 2, 2)}),
    ("voxel_size_of_zero_with_a_qform", {"codes": (1, 0), "pixdim": pixdim(2, 2, 0)}),
    ("voxel_size_below_zero_with_a_qform", {"codes": (1, 0), "pixdim": pixdim(2, -2, 2)}),
)
edited(
    "converts",
    "",
    ("qfac_of_zero", {"codes": (1, 0), "pixdim": pixdim(2, 2, 2, qfac=0)}),
    ("sform_in_metres", {"xyzt_units": 1, "sform": tuple(v * 1e-7 for v in _SFORM)}),
    ("sform_with_an_origin_far_away", {"sform": (*_SFORM[:3], 1e30, *_SFORM[4:])}),
)


# Voxels ------------------------------------------------------------------------------------------------


def paired(folder: Path, labels: NDArray[Any] | bytes = VOXELS, **fields: Any) -> None:
    """An image, and a label map with these voxels and fields."""
    good(folder, "t1.nii")
    plain(folder, nifti(labels, **fields), "seg.nii")


@kind("warns", "2 voxels are NaN", floats(NAN, NAN))
def voxels_of_nan(folder: Path) -> None:
    plain(folder, nifti(floats(NAN, NAN), **FLOAT32))


@kind("warns", "3 voxels are infinite", floats(INF, -INF, INF))
def voxels_of_infinity(folder: Path) -> None:
    plain(folder, nifti(floats(INF, -INF, INF), **FLOAT32))


_NAN_EVERYWHERE = np.full(VOXELS.shape, NAN, "<f4")


@kind("warns", "120 voxels are NaN", _NAN_EVERYWHERE)
def nothing_but_nan(folder: Path) -> None:
    plain(folder, nifti(_NAN_EVERYWHERE, **FLOAT32))


_SIGNALLING: NDArray[np.float32] = np.full(VOXELS.shape, 0x7F800001, "<u4").view("<f4")


@kind("warns", "120 voxels are NaN", _SIGNALLING)
def signalling_nan(folder: Path) -> None:
    plain(folder, nifti(_SIGNALLING, **FLOAT32))


_COMPLEX = floats(1e308, -1e308, code="<c16") * (1 + 1j)


@kind("converts", "", _COMPLEX)
def complex_voxels_at_the_limit(folder: Path) -> None:
    plain(folder, nifti(_COMPLEX, datatype=1792, bitpix=128))


_LARGE = floats(1e300, -1e300, code="<f8")


@kind("converts", "", _LARGE)
def values_that_overflow_by_their_slope(folder: Path) -> None:
    plain(folder, nifti(_LARGE, datatype=64, bitpix=64, scaling=(1e38, 0)))


@kind("fails", "label map cannot hold NaN or infinity; repair")
def label_of_nan(folder: Path) -> None:
    paired(folder, floats(NAN), **FLOAT32)


@kind("fails", "label map cannot hold NaN or infinity; repair")
def label_of_infinity(folder: Path) -> None:
    paired(folder, floats(-INF), **FLOAT32)


@kind("fails", "label values must be whole numbers, not 1.5; say --label-pattern")
def label_that_is_no_whole_number(folder: Path) -> None:
    paired(folder, floats(1.5), **FLOAT32)


@kind("fails", "fit no integer type")
def label_beyond_64_bits(folder: Path) -> None:
    paired(folder, floats(1e30, code="<f8"), datatype=64, bitpix=64)


@kind("fails", "does not fit 64 bits; relabel")
def unsigned_label_beyond_64_bits(folder: Path) -> None:
    paired(folder, np.full(VOXELS.shape, 2**64 - 1, "<u8"), datatype=1280, bitpix=64)


@kind("fails", "label map cannot have voxels of type complex64")
def complex_labels(folder: Path) -> None:
    paired(folder, VOXELS.astype("<c8"), datatype=32, bitpix=64)


@kind("fails", "label map cannot have the slope 0.5")
def labels_with_a_slope(folder: Path) -> None:
    paired(folder, scaling=(0.5, 0))


@kind("fails", r"its shape \(5, 4, 3\) is not that of .*t1\.nii, \(5, 4, 6\); resample")
def labels_of_another_shape(folder: Path) -> None:
    paired(folder, VOXELS[:3], dim=dim(5, 4, 3))


def moved(millimetres: float) -> tuple[float, ...]:
    return (*_SFORM[:3], millimetres, *_SFORM[4:])


@kind("fails", r"its affine puts voxels 0\.6 voxels away from those of .*t1\.nii; resample")
def labels_over_half_a_voxel_away(folder: Path) -> None:
    paired(folder, sform=moved(0.6 * SPACING))


@kind("warns", r"its affine differs from that of t1 by 0\.4 voxels")
def labels_less_than_half_a_voxel_away(folder: Path) -> None:
    paired(folder, sform=moved(0.4 * SPACING))


@kind("converts")
def labels_less_than_a_thousandth_away(folder: Path) -> None:
    paired(folder, sform=moved(0.0008 * SPACING))


@kind("converts")
def negative_labels(folder: Path) -> None:
    paired(folder)


@kind("converts")
def labels_as_floats_that_are_whole(folder: Path) -> None:
    paired(folder, floats(), **FLOAT32)


@kind("fails", TRUNCATED)
def good_image_with_broken_labels(folder: Path) -> None:
    paired(folder, VOXELS.tobytes()[:-1])


# More than fits in memory --------------------------------------------------------------------------

_ZEROS = 2**24
_GIB = 2**30


@cache
def _zeros() -> bytes:
    return gzip.compress(bytes(_ZEROS), 9, mtime=0)


def of_zeros(count: int, start: bytes) -> bytes:
    """gzip data, a thousandth as long, that decompress to ``start`` and the given number of zeros."""
    whole, rest = divmod(count, _ZEROS)
    return zipped(start) + _zeros() * whole + (zipped(bytes(rest)) if rest else b"")


@bomb(TRUNCATED)
def gzip_that_declares_sides_of_32767(folder: Path) -> None:
    packed(folder, zipped(nifti(dim=dim(32767, 32767, 32767))))


@bomb(TRUNCATED)
def gzip_whose_sides_overflow_64_bits(folder: Path) -> None:
    packed(folder, zipped(nifti(version=2, dim=dim(2**40, 2**40, 2**40))))


@bomb(TRUNCATED)
def gzip_that_declares_a_terabyte_in_one_line(folder: Path) -> None:
    packed(folder, zipped(nifti(version=2, dim=dim(2**40, 1, 1), datatype=2, bitpix=8)))


@bomb(TRUNCATED)
def gzip_that_declares_a_billion_volumes(folder: Path) -> None:
    packed(folder, zipped(nifti(version=2, dim=dim(*SHAPE, 10**9))))


@bomb("goes on|after its last voxel|trailing")
def gzip_that_unfolds_to_far_more_than_declared(folder: Path) -> None:
    packed(folder, of_zeros(4 * _GIB, nifti()))


@bomb("memory")
def plane_larger_than_memory(folder: Path) -> None:
    raw = header(dim=dim(32767, 32767, 1), datatype=64, bitpix=64) + bytes(4)
    packed(folder, of_zeros(32767 * 32767 * 8, raw))


@bomb("header is over 64.0 MiB long; repair its header")
def header_of_a_pair_without_end(folder: Path) -> None:
    packed(folder, of_zeros(_GIB, header(magic=b"ni1\0", vox_offset=0)), "t1.hdr")
    plain(folder, VOXELS.tobytes(), "t1.img")


# Cohorts -----------------------------------------------------------------------------------------------


def goods(source: Path) -> Path:
    for subject in GOOD:
        good(source / subject)
    return source


def with_images(source: Path, *files: str) -> Path:
    """The good subjects, and further files with the same voxels."""
    for file in files:
        path = goods(source) / file
        good(path.parent, path.name)
    return source


def listing(source: Path, subject: str, name: str = "t1") -> Path:
    """A CSV file of three cases, the middle one of that name."""
    goods(source)
    lines = [f"subject,{name}", "a,sub-01/t1.nii.gz", f"{subject},sub-01/t1.nii.gz", "c,sub-03/t1.nii.gz"]
    (source / "cases.csv").write_text("\n".join(lines) + "\n")
    return source / "cases.csv"


@cohort("two files for the image 't1': .*t1.nii and .*t1.nii.gz; rename or remove one", fails_alone=True)
def two_files_for_one_image(source: Path) -> Path:
    return with_images(source, "sub-02/t1.nii", "sub-02/t1.nii.gz")


@cohort("'SUB-01' and 'sub-01' differ in case only; rename one", fails_alone=True)
def subjects_equal_but_for_case(source: Path) -> Path:
    return with_images(source, "SUB-01/t1.nii.gz")


@cohort("'T1' and 't1' differ in case only; rename one", fails_alone=True)
def images_equal_but_for_case(source: Path) -> Path:
    return with_images(source, "sub-02/t1.nii.gz", "sub-02/T1.nii.gz")


def _named(name: str, shown: str, *files: str) -> None:
    def make(source: Path) -> Path:
        return with_images(source, *files)

    COHORTS.append(CohortKind(name, f"name {shown} is not usable", make, fails_alone=True))


_named("subject_with_a_space", "'sub 02'", "sub 02/t1.nii")
_named("subject_with_a_newline", r"'sub\\n02'", "sub\n02/t1.nii")
_named("subject_in_unicode", "'söb-02'", "söb-02/t1.nii")
_named("subject_in_other_digits", "'٣'", "٣/t1.nii")
_named("subject_that_is_no_text", r"'sub-\\udcff'", os.fsdecode(b"sub-\xff/t1.nii"))
_named("subject_that_starts_with_a_dash", "'-rf'", "-rf/t1.nii")
_named("subject_of_129_characters", f"'{'x' * 129}'", f"{'x' * 129}/t1.nii")
_named("subject_called_zarr_json", "'zarr.json'", "zarr.json/t1.nii")
_named("subject_called_zarr_json_in_capitals", "'ZARR.JSON'", "ZARR.JSON/t1.nii")
_named("subject_called_as_the_manifest", "'manifest.jsonl'", "manifest.jsonl/t1.nii")
_named("image_called_zarr_json", "'zarr.json'", "sub-02/zarr.json.nii")
_named("image_with_a_space", "'t 1'", "sub-02/t 1.nii")
_named("image_with_terminal_codes", r"'\\x1b\[2Jt1'", "sub-02/\x1b[2Jt1.nii")
_named("image_called_underscore", "'_'", "sub-02/_.nii")


def _listed(name: str, subject: str, shown: str) -> None:
    def make(source: Path) -> Path:
        return listing(source, subject)

    COHORTS.append(CohortKind(name, shown, make, fails_alone="is not usable" in shown))


_listed("listed_subject_called_dot_dot", "..", r"name '\.\.' is not usable")
_listed("listed_subject_called_dot", ".", r"name '\.' is not usable")
_listed("listed_subject_with_a_slash", "a/b", "name 'a/b' is not usable")
_listed("listed_subject_above_the_store", "../../up", r"name '\.\./\.\./up' is not usable")
_listed("listed_subject_at_the_root", "/etc", "name '/etc' is not usable")
_listed("listed_subject_called_staging", ".staging", r"name '\.staging' is not usable")
_listed("listed_subject_called_lock", ".lock", r"name '\.lock' is not usable")
_listed("listed_subject_with_nul", "a\0b", r"name 'a\\x00b' is not usable|NUL|table")
_listed("listed_subject_without_a_name", "", "column subject is empty; name the case")
_listed("listed_subject_twice", "a", "'a' is on line 2 already")


@cohort("name 'a/b' is not usable")
def listed_image_with_a_slash(source: Path) -> Path:
    return listing(source, "b", "label:a/b")


@cohort("no NIfTI, NRRD or MetaImage file")
def folder_without_images(source: Path) -> Path:
    (source / "sub-01").mkdir()
    return source


@cohort("it does not exist; name the folder")
def source_that_does_not_exist(source: Path) -> Path:
    return source / "nowhere"


@cohort("no folder; name the folder")
def source_that_is_a_nifti_file(source: Path) -> Path:
    return good(source)


@cohort("it is no folder|regular file")
def source_that_is_a_fifo(source: Path) -> Path:
    os.mkfifo(source / "cohort.fifo")
    return source / "cohort.fifo"


@cohort("regular file")
def list_that_is_a_fifo(source: Path) -> Path:
    os.mkfifo(source / "cohort.csv")
    return source / "cohort.csv"


@cohort("no valid JSON")
def list_that_is_cut(source: Path) -> Path:
    (source / "list.json").write_text('{"training": [{"image": "a.nii.gz"')
    return source / "list.json"


@cohort("no usable JSON|no list of cases")
def list_that_is_nested_without_end(source: Path) -> Path:
    (source / "list.json").write_text("[" * 100_000)
    return source / "list.json"


@cohort("no list of cases")
def list_that_is_a_number(source: Path) -> Path:
    (source / "list.json").write_text("7")
    return source / "list.json"


@cohort("not UTF-8")
def list_that_is_no_text(source: Path) -> Path:
    (source / "list.csv").write_bytes(b"\xff\xfe\x00subject")
    return source / "list.csv"


@cohort("cannot be the name of a file")
def list_whose_file_name_holds_nul(source: Path) -> Path:
    (source / "list.json").write_text(json.dumps({"training": [{"image": "a\0b.nii.gz"}]}))
    return source / "list.json"


@cohort(r"no case of .* can be converted: .* \(and 1 more\)")
def every_case_bad(source: Path) -> Path:
    for subject in GOOD:
        good(source / subject).write_bytes(b"no NIfTI")
    return source
