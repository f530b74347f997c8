"""Resampling a whole file into another file: the contenders, in turns, and the memory of zpatch."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.measure import settle
from benchmarks.peer import Peer
from benchmarks.read.peers import in_stored_order, zpatch_image
from benchmarks.space.reading import SPACING, TOLERANCE_HU, expected_box, new_shape

ZPATCH, SITK, SKIMAGE = (
    "zpatch.convert, spacing=1",
    "SimpleITK Resample",
    "scikit-image resize, as in nnU-Net",
)
PLAIN = "zpatch.convert, not resampled"

Voxels = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Contender(Peer):
    """A way to resample: ``convert(source, output)`` writes what ``voxels(output)`` reads, (z, y, x).

    ``source`` is a folder of ``data.head``. ``bare`` ones do not resample, and are not compared.
    """

    name: str
    convert: Callable[[Path, Path], object]
    voxels: Callable[[Path], Voxels]
    package: str = "zpatch"
    bare: bool = False

    @property
    def distribution(self) -> str:
        """The name under which its library is installed."""
        return {"skimage": "scikit-image"}.get(self.package, self.package)


def _zpatch(source: Path, output: Path) -> None:
    import zpatch as zp

    assert not zp.convert(source, output, spacing=SPACING).failures


def _plain(source: Path, output: Path) -> None:
    import zpatch as zp

    assert not zp.convert(source, output).failures


def _stored(output: Path) -> Voxels:
    return in_stored_order(zpatch_image(output).data)


def _sitk(source: Path, output: Path) -> None:
    """One thread; float32 results, written as ``.npy``, as its own writers take longer."""
    sitk: Any = importlib.import_module("SimpleITK")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = sitk.ReadImage(str(data.file_of(source)))
    offset = [(SPACING - size) / 2 for size in image.GetSpacing()]
    direction = np.array(image.GetDirection()).reshape(3, 3)
    resampled = sitk.Resample(
        image,
        new_shape(image.GetSize()),
        sitk.Transform(),
        sitk.sitkLinear,
        (np.array(image.GetOrigin()) + direction @ offset).tolist(),
        (SPACING,) * 3,
        image.GetDirection(),
        0.0,
        sitk.sitkFloat32,
    )
    np.save(output, sitk.GetArrayViewFromImage(resampled))


def _skimage(source: Path, output: Path) -> None:
    """As nnU-Net: read by SimpleITK as float32, resized in float64, all axes in one as their spacings differ
    by less than three times; but linearly, where nnU-Net takes splines for images.
    """
    sitk: Any = importlib.import_module("SimpleITK")
    transform: Any = importlib.import_module("skimage.transform")
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(data.file_of(source)))).astype(np.float32)
    shape = new_shape(voxels.shape[::-1])[::-1]
    resized = transform.resize(voxels.astype(float), shape, 1, mode="edge", anti_aliasing=False)
    np.save(output, resized.astype(np.float32))


def _mapped(output: Path) -> Voxels:
    voxels: Voxels = np.load(output, mmap_mode="r")
    return voxels


CONTENDERS = (
    Contender(ZPATCH, _zpatch, _stored),
    Contender(PLAIN, _plain, _stored, bare=True),
    Contender(SITK, _sitk, _mapped, "SimpleITK"),
    Contender(SKIMAGE, _skimage, _mapped, "skimage"),
)


def contender_of(name: str) -> Contender:
    """The contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)


def conversions_of(name: str, small: str, source: str, folder: str) -> Callable[[str], float]:
    """Answers with the seconds of a conversion of ``source``; the voxels of ``small`` are compared first.

    Both spacings divide its extent, as ``resize`` stretches a volume to whole voxels.
    """
    settle(one_core=True)
    contender, output = contender_of(name), Path(folder, "output.npy")

    def convert(head: Path) -> tuple[float, Voxels]:
        _remove(output)
        os.sync()
        begin = time.perf_counter()
        contender.convert(head, output)
        return time.perf_counter() - begin, contender.voxels(output)

    def answer(_question: str) -> float:
        seconds, voxels = convert(Path(source))
        _check_shape(contender, voxels, Path(source))
        _remove(output)
        return seconds

    _, voxels = convert(Path(small))
    _check_shape(contender, voxels, Path(small))
    if not contender.bare:
        expected = expected_box(data.voxels_of(Path(small)), (0, 0, 0), voxels.shape[::-1])
        apart = np.abs(voxels - expected).max()
        assert apart <= TOLERANCE_HU, f"{name}: a voxel differs by {apart} HU"
    return answer


def _check_shape(contender: Contender, voxels: Voxels, source: Path) -> None:
    stored = data.stored_shape(source)
    expected = stored if contender.bare else new_shape(stored[::-1])[::-1]
    assert voxels.shape == expected, f"{contender.name} wrote {voxels.shape}"
    assert voxels.dtype == (np.int16 if contender.bare else np.float32)


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


# Memory.


def convert_once(name: str, source: str, output: str) -> None:
    """Convert with the contender of that name."""
    contender_of(name).convert(Path(source), Path(output))


def modules_after(name: str, source: str, output: str) -> list[str]:
    """Names of the modules that are loaded after a conversion."""
    convert_once(name, source, output)
    return sorted(sys.modules)


def stated_bytes(name: str, source: Path) -> int:
    """The bytes that the plan of a conversion by zpatch states, as ``zpatch convert --dry-run`` does."""
    from zpatch.conversion.conversion_options import ConvertOptions
    from zpatch.conversion.conversion_plan import plan_conversion

    options = ConvertOptions(spacing=SPACING) if name == ZPATCH else ConvertOptions()
    return plan_conversion(source, options).peak_bytes
