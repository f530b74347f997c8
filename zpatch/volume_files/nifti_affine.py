"""Which affine of a NIfTI header counts: sform, qform or voxel sizes, whatever the header contains."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.errors import VolumeFileError
from zpatch.geometry.affines import Affine, is_usable, max_corner_distance

MAX_FORM_VOXELS = 0.01


def best_affine(path: Path, header: Any, preferred: str, warnings: list[str]) -> tuple[Affine, str]:
    """The preferred affine if it is usable, else the other one, else voxel sizes alone, and its name.

    With ``sform`` preferred this is the order of nibabel. Invalid voxel sizes of ``header`` are corrected in
    place; each oddity adds a line to ``warnings``.
    """
    _mend_voxel_sizes(header, warnings)
    with np.errstate(all="ignore"):  # sforms and quaternions may be any bits
        return _first_usable(path, header, preferred, warnings)


def _mend_voxel_sizes(header: Any, warnings: list[str]) -> None:
    """Correct invalid voxel sizes of the parsed header, as nibabel does when it loads a file."""
    sizes = header["pixdim"]
    if sizes[0] not in (-1, 1):
        sizes[0] = 1  # as the standard says of 0
    odd = ~(np.isfinite(sizes[1:4]) & (sizes[1:4] > 0))
    if odd[: int(header["dim"][0])].any():
        warnings.append("a voxel size is zero, negative or not finite: taken as its magnitude, or as 1 mm")
    magnitudes = np.abs(sizes[1:4])
    usable = np.isfinite(magnitudes) & (magnitudes > 0)
    sizes[1:4] = np.where(usable, magnitudes, 1)


def _first_usable(path: Path, header: Any, preferred: str, warnings: list[str]) -> tuple[Affine, str]:
    order = ("qform", "sform") if preferred == "qform" else ("sform", "qform")
    found: dict[str, Affine] = {}
    for name in order:
        if int(header[f"{name}_code"]) <= 0:
            continue
        with contextlib.suppress(ValueError):
            affine = np.asarray(getattr(header, f"get_{name}")(), dtype=np.float64)
            if is_usable(affine):
                found[name] = affine
                continue
        warnings.append(f"its {name} is singular or not finite")
    if found:
        name = next(iter(found))
        if len(found) == 2 and _differ(header, *found.values()):
            warnings.append(f"its sform and its qform put voxels apart; its {name} is taken")
        return found[name], name
    if warnings and "form is singular" in warnings[-1]:
        raise VolumeFileError(f"{path}: neither its sform nor its qform is usable; repair its header")
    affine = np.asarray(header.get_base_affine(), dtype=np.float64)
    warnings.append("it has neither sform nor qform: only voxel sizes are known")
    if not is_usable(affine):
        warnings.append("its voxel sizes are too large or too small: taken as 1 mm")
        affine = np.eye(4)
    return affine, "pixdim"


def _differ(header: Any, first: Affine, second: Affine) -> bool:
    i, j, k = (int(n) for n in (*header["dim"][1:4], 1, 1)[:3])
    return max_corner_distance(first, second, (i, j, k)) > MAX_FORM_VOXELS
