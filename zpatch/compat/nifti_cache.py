"""Files as images that patches can be read from, each converted once into a cache; and saved images.

The cache is the folder ``ZPATCH_CACHE``, else ``zpatch`` in ``XDG_CACHE_HOME`` or in ``~/.cache``. Nothing is
removed from it; its entries may be deleted at any time that they are not in use. It is better to convert a
cohort beforehand with ``zpatch convert``, in several processes and into one store.
"""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from zpatch.conversion.case_lists import SOLE_IMAGE
from zpatch.conversion.cases import HEADER, VOXELS, is_image_name, stem_of, usable_name
from zpatch.conversion.conversion import committed, run_conversion
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.conversion_plan import ConversionPlan, plan_conversion
from zpatch.conversion.store_export import SUFFIXES
from zpatch.digests import digest
from zpatch.errors import OptionError, SourceError, StoreError, StoreLockedError
from zpatch.geometry.affines import Affine
from zpatch.images.image import IMAGE_CLASSES, Image, stored_image
from zpatch.records.image_record import Kind
from zpatch.store.lock import take_lock
from zpatch.store.store import open_store
from zpatch.volume_files.formats import files_of, read_header
from zpatch.volume_files.nifti_writer import make_header, write_nifti

POLL_S = 0.1
MAX_NAME = 64  # characters of a subject's name, the first ones of the name of its file

# Types that NIfTI does not have, and types that represent all their values.
SAVED_AS: Mapping[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(bool): np.dtype(np.uint8),
    np.dtype(np.float16): np.dtype(np.float32),
}

# Advice for convert, and the same advice for an image.
OF_IMAGES = {"label_patterns=": "ScalarImage", " with exclude=": ""}

_log = logging.getLogger("zpatch")


def cached_image(path: str | os.PathLike[str], kind: Kind = "scalar") -> Image:
    """The image of a NIfTI, NRRD or MetaImage file, which is converted when it is first used.

    The conversion is logged once, to the logger ``zpatch``. A file that has changed since is converted again.
    Of several processes that open one file at a time, one converts it and the others wait. A path of another
    kind (an image in a store, an OME-Zarr image, a Zarr array) is opened without conversion. A file that
    cannot be converted is a SourceError, as is a label map whose values are not whole numbers.
    """
    file = Path(os.path.abspath(os.path.expanduser(path)))
    if not is_image_name(file.name) or file.is_dir():
        return IMAGE_CLASSES[kind](file)
    if file.suffix == VOXELS:
        file = file.with_suffix(HEADER)
    entry = cache_folder() / _key(file, kind)
    store = entry / "store.zarr"
    if not _is_there(store):
        with _locked(entry):
            if not _is_there(store):
                _convert(file, kind, store)
                _log.warning("converted %s once, into %s", file, entry)
    [record] = open_store(store).records.values()
    return stored_image(store / record.subject / record.image, record)


def _is_there(store: Path) -> bool:
    """Whether the image of a store is converted."""
    return (manifest := committed(store)) is not None and len(manifest.records) > 0


def save_image(path: str | os.PathLike[str], voxels: NDArray[Any], affine: Affine) -> None:
    """Write voxels (C, I, J, K) to a NIfTI file, .nii or .nii.gz, with channels as its fourth axis."""
    file = Path(path).expanduser()
    if not file.name.endswith(SUFFIXES):
        raise OptionError(
            f"{file}: images are saved as NIfTI; use a name that ends in {' or '.join(SUFFIXES)}"
        )
    if voxels.ndim != 4:
        raise OptionError(
            f"{file}: an image is (C, I, J, K), not {voxels.shape}; save one image of the batch"
        )
    channels, i, j, k = voxels.shape
    dtype = SAVED_AS.get(voxels.dtype, voxels.dtype)
    header = make_header((i, j, k), channels, dtype, affine)
    write_nifti(file, header, (channel.T for channel in voxels), dtype=dtype)


def cache_folder() -> Path:
    """The folder of the cache."""
    chosen = os.environ.get("ZPATCH_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "zpatch"


def _key(file: Path, kind: Kind) -> str:
    """The cache's name for a file in its current state; for an image in several files, in that of all."""
    try:
        states = [one.stat() for one in files_of(file)]
    except OSError as error:
        raise SourceError(
            f"{error.filename}: it cannot be read ({error.strerror}); check its path and permissions"
        ) from None
    parts = [str(file), kind, *(f"{state.st_size} {state.st_mtime_ns}" for state in states)]
    return digest("\n".join(parts).encode(errors="surrogateescape"))


def _locked(entry: Path) -> IO[str]:
    """The lock of an entry of the cache, once no other process has it."""
    while True:
        try:
            return take_lock(entry)
        except StoreLockedError:
            time.sleep(POLL_S)
        except StoreError as error:
            raise StoreError(f"{error}; set ZPATCH_CACHE to a folder with write permission") from None


def _convert(file: Path, kind: Kind, store: Path) -> None:
    reasons: list[str] = []
    try:
        read_header(file)  # so that an error names the file, not the list
        run_conversion(_plan(file, kind, store), store, on_case=lambda one: reasons.append(one.reason))
    except SourceError as error:
        reason = reasons[0] if reasons else str(error)
        for option, name in OF_IMAGES.items():
            reason = reason.replace(option, name)
        raise SourceError(reason) from None


def _plan(file: Path, kind: Kind, store: Path) -> ConversionPlan:
    name = usable_name(stem_of(file))[:MAX_NAME].rstrip("-._") or SOLE_IMAGE
    column = SOLE_IMAGE if kind == "scalar" else f"{kind}:{SOLE_IMAGE}"
    listing = store.with_name("file.csv")
    with listing.open("w", newline="") as stream:
        csv.writer(stream).writerows([["subject", column], [name, str(file)]])
    return plan_conversion(listing, ConvertOptions(format="csv"))
