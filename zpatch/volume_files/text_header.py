"""What the text headers of NRRD and MetaImage share: their lines, fields and numbers, and LPS -> RAS."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import VolumeFileError
from zpatch.geometry.affines import Affine, is_usable
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.volume_files.byte_streams import check_regular, open_bytes
from zpatch.volume_files.nifti_writer import make_header
from zpatch.volume_files.signature import LEAVE_OUT, stand_in
from zpatch.volume_files.volume_file import VolumeFile
from zpatch.volume_files.voxel_parts import VoxelPart

MAX_TEXT_BYTES = 2**20
REPAIR = "repair its header"
LPS = (-1, -1, 1)  # the signs of its axes in RAS

WHOLE = re.compile(r"[+-]?[0-9]{1,18}")

_NOT_TEXT = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_SHOWN = 40
_UNITS: Mapping[str, tuple[str, float]] = {  # NIfTI has no centimeter
    **dict.fromkeys(("m", "meter", "meters"), ("meter", 1.0)),
    **dict.fromkeys(("cm", "centimeter", "centimeters"), ("millimeter", 10.0)),
    **dict.fromkeys(("um", "micron", "microns", "micrometer", "micrometers"), ("micrometer", 1.0)),
}


class HeaderLines:
    """The lines of a text header, one after another; ``position`` is the byte after the last one.

    A header that is over MAX_TEXT_BYTES long is refused, and one that is no text, as soon as that is reached.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.position = 0
        check_regular(path)
        with open_bytes(path) as stream:
            self._raw = stream.read(MAX_TEXT_BYTES)
        if found := stand_in(self._raw):
            raise VolumeFileError(f"{path}: {found[0]}, so it is not {kind}; {found[1]}")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        end = self._raw.find(b"\n", self.position)
        line = self._raw[self.position : end if end >= 0 else len(self._raw)]
        if _NOT_TEXT.search(line.removesuffix(b"\r")):
            raise self.refused("its header is no text")
        if end < 0 and len(self._raw) == MAX_TEXT_BYTES:
            raise self.refused(f"its header does not end within {format_bytes(MAX_TEXT_BYTES)}")
        if end < 0 and not line:
            raise StopIteration
        self.position = end + 1 if end >= 0 else len(self._raw)
        return line.decode(errors="surrogateescape").strip()

    def refused(self, why: str) -> VolumeFileError:
        """The error for a file that is not of its format."""
        return VolumeFileError(f"{self.path}: it is not {self.kind} ({why}); {LEAVE_OUT}")


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a header: texts by their names."""

    path: Path
    texts: Mapping[str, str]

    def text(self, *names: str) -> str:
        """The field of the first of these names that the header has; empty for none."""
        return next((self.texts[name] for name in names if name in self.texts), "")

    def whole(self, name: str, count: int | None = None) -> list[int]:
        """The whole numbers of a field; [] if the header does not have it."""
        words = self.text(name).split()
        if not all(map(WHOLE.fullmatch, words)):
            raise self.odd(name)
        self._check_count(len(words), count, name)
        return [int(word) for word in words]

    def one(self, name: str, default: int) -> int:
        """The whole number of a field."""
        return next(iter(self.whole(name, 1)), default)

    def real(self, count: int, *names: str) -> NDArray[np.float64] | None:
        """The numbers of a field, also NaN and infinity; None if the header does not have it."""
        words = self.text(*names).split()
        try:
            values = np.array([float(word) for word in words])
        except ValueError:
            raise self.odd(*names) from None
        self._check_count(len(words), count, *names)
        return values if words else None

    def _check_count(self, found: int, count: int | None, *names: str) -> None:
        if found and count is not None and found != count:
            name = next(name for name in names if name in self.texts)
            raise VolumeFileError(
                f"{self.path}: its field {name!r} has {found} values, not {count}; {REPAIR}"
            )

    def odd(self, *names: str) -> VolumeFileError:
        """The error for the first of these fields that the header has, or for all of them if it has none."""
        name = next((name for name in names if name in self.texts), None)
        if name is None:
            return VolumeFileError(f"{self.path}: its header has no field {names[0]!r}; {REPAIR}")
        return VolumeFileError(
            f"{self.path}: its field {name!r} is {shown(self.texts[name])}, which cannot be read; {REPAIR}"
        )


def shown(text: str) -> str:
    """A text of a header for an error, cut where it is long.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'"
    """
    return repr(text[:_SHOWN] + "..." * (len(text) > _SHOWN))


def checked_sides(path: Path, sides: Sequence[int]) -> list[int]:
    """The sides of an image as its header declares them; zero and negative ones are refused."""
    if not sides or min(sides) < 1 or len(sides) > 16:
        raise VolumeFileError(f"{path}: it declares impossible dimensions {list(sides)}; {REPAIR}")
    return list(sides)


def unit_of(text: str) -> tuple[str, float]:
    """The unit of space as in NIfTI, and how many of it the unit of a header is; mm if it is not known.

    >>> unit_of("cm")
    ('millimeter', 10.0)
    """
    return _UNITS.get(text.strip().lower(), ("millimeter", 1.0))


def usable_spacing(sizes: NDArray[np.float64], warnings: list[str]) -> NDArray[np.float64]:
    """Voxel sizes; as in SimpleITK a negative one reverses its axis."""
    unusable = ~np.isfinite(sizes) | (sizes == 0)
    if unusable.any():
        warnings.append("a voxel size is zero or not finite: taken as 1 mm")
    if (sizes[~unusable] < 0).any():
        warnings.append("a voxel size is negative: its axis is taken as reversed")
    return np.where(unusable, 1, sizes)


def ras_affine(
    path: Path, steps: NDArray[np.float64], origin: NDArray[np.float64], signs: Sequence[int]
) -> Affine:
    """The affine of an image with up to three axes in a space of up to three dimensions.

    A row of ``steps`` is the way from a voxel to the next one along that axis. ``signs`` turn the axes of the
    space into those of RAS. Raises VolumeFileError for an affine that is singular or not finite.
    """
    axes, dimensions = steps.shape
    if not axes <= dimensions <= 3 or dimensions - axes > 1:
        raise VolumeFileError(f"{path}: it has {axes} axes in a space of {dimensions} dimensions; {REPAIR}")
    affine = np.eye(4)
    with np.errstate(all="ignore"):  # a header may have any numbers
        affine[:dimensions, :axes] = steps.T
        if axes == 2 and dimensions == 3:
            normal = np.cross(*steps)
            affine[:3, 2] = normal / np.linalg.norm(normal)
        affine[:dimensions, 3] = origin
        affine[:3] *= np.array(signs)[:, None]
        if not is_usable(affine.astype(np.float32).astype(np.float64)):  # as in a NIfTI header
            raise VolumeFileError(
                f"{path}: its directions or its origin are singular or not finite; {REPAIR}"
            )
    return np.asarray(affine + 0.0)  # no negative zeros


def volume_of(
    path: Path,
    dims: Sequence[int],
    dtype: np.dtype[Any],
    parts: tuple[VoxelPart, ...],
    affine: Affine,
    *,
    has_directions: bool,
    unit: str,
    has_time: bool = False,
    components: int = 1,
    component_axis: int = 0,
    warnings: Sequence[str] = (),
) -> VolumeFile:
    """The volume in a file of a text header, with a NIfTI header that is made for it."""
    i, j, k, *further = dims
    stored = dtype.newbyteorder("=")
    raw_header = make_header(
        (i, j, k), math.prod(further), stored, affine, spatial_unit=unit, has_time=has_time
    )
    return VolumeFile(
        path=path,
        parts=parts,
        raw_header=raw_header,
        dims=tuple(dims),
        dtype=dtype,
        affine=affine,
        affine_source="sform" if has_directions else "pixdim",
        has_time=has_time,
        spatial_unit=unit,
        components=components,
        component_axis=component_axis,
        warnings=tuple(warnings),
    )
