"""Shared by the tests of reports: small stores, and a page as a browser parses it."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import zpatch as zp
from zpatch.digests import digest
from zpatch.records.names import MANIFEST
from zpatch.report.report import write_report


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text without breaks between elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += "" if data.isspace() and "\n" in data else data  # line breaks between elements

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for element, attributes in self.elements if element == name]

    def pictures(self) -> list[NDArray[np.uint8]]:
        return [pixels_of(uri.partition(",")[2]) for uri in (img["src"] for img in self.all("img"))]


def pixels_of(encoded: str) -> NDArray[np.uint8]:
    """The pixels of a PNG in base64: (rows, columns) of grey, or RGB, or RGBA if it has a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    return np.asarray(image.convert("RGBA") if image.mode == "P" else image)


def save(
    path: Path, voxels: NDArray[Any], affine: NDArray[np.float64] | None = None, unit: str = "mm"
) -> None:
    """Write a NIfTI file, with voxel sizes of 1 and no sform or qform unless an affine is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units(unit, "sec" if voxels.ndim == 4 else "unknown")
    if affine is None:
        image.set_sform(None, 0)
        image.set_qform(None, 0)
    image.to_filename(path)


def store_of(folder: Path, **options: Any) -> Path:
    """Convert the files in ``folder / "source"`` to a store."""
    zp.convert(folder / "source", folder / "store.zarr", **options)
    return folder / "store.zarr"


def page_of(store: Path, folder: Path, **options: Any) -> Page:
    report = write_report(store, folder / "report.html", **options)
    assert report.bytes == (folder / "report.html").stat().st_size
    return Page((folder / "report.html").read_text())


def change(store: Path, subject: str, image: str, **values: Any) -> None:
    """Append a sealed line to the manifest that changes fields of an image's record."""
    value = {**zp.Cohort(store).store.records[subject, image].to_json(), **values}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))  # NaN too, which zpatch never writes
    sealed = json.dumps({**value, "check": digest(text.encode())}, sort_keys=True, separators=(",", ":"))
    with (store / MANIFEST).open("a") as manifest:
        manifest.write(f"{sealed}\n")
