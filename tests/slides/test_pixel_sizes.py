"""Micrometres per pixel, in all the ways in which files state them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slides_made
import tifffile
from hypothesis import given
from hypothesis import strategies as st

import zpatch as zp
from zpatch.slides import pixel_sizes
from zpatch.slides.slide_file import open_slide

GREY = np.zeros((64, 64), np.uint8)


@pytest.mark.parametrize(
    ("unit", "size", "wanted"),
    [
        ("µm", 0.25, 0.25),
        ("nm", 250, 0.25),
        ("mm", 0.00025, 0.25),
        ("m", 2.5e-7, 0.25),
        ("inch", 1e-5, 0.254),
    ],
)
def test_physical_sizes_of_ome_are_read_in_their_units(
    tmp_path: Path, unit: str, size: float, wanted: float
) -> None:
    path = slides_made.write_ome(
        tmp_path / "a.ome.tif", GREY, "YX", size=(size, 2 * size), unit=unit, levels=()
    )
    assert open_slide(path).mpp == pytest.approx((wanted, 2 * wanted))


@pytest.mark.parametrize("unit", ["parsec", "pixel", "reference frame"])
def test_units_that_are_no_lengths_leave_it_unknown(tmp_path: Path, unit: str) -> None:
    path = slides_made.write_ome(tmp_path / "a.ome.tif", GREY, "YX", unit=unit, levels=())
    assert open_slide(path).mpp is None


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"resolution": (40000, 20000), "resolutionunit": "CENTIMETER"}, (0.25, 0.5)),
        ({"resolution": (101600, 101600), "resolutionunit": "INCH"}, (0.25, 0.25)),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"resolution": (40000, 40000), "resolutionunit": "NONE"}, None),
        ({"resolution": (1, 1)}, None),
        ({}, None),
    ],
)
def test_resolutions_are_those_of_a_microscope_or_unknown(
    tmp_path: Path, options: dict[str, Any], wanted: tuple[float, float] | None
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, tile=(16, 16), **options)
    found = open_slide(tmp_path / "a.tif").mpp
    assert found is None if wanted is None else found == pytest.approx(wanted)


def test_an_imagej_stack_states_all_three(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((3, 64, 64), np.uint16),
        imagej=True,
        resolution=(4.0, 2.0),
        metadata={"axes": "ZYX", "spacing": 1.5, "unit": "micron"},
    )
    image = zp.ScalarImage(tmp_path / "a.tif")
    assert image.spacing == pytest.approx((0.25, 0.5, 1.5))
    assert image.spatial_unit == "micrometer"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Aperio|MPP = 0.2528|Left = 1", 0.2528),
        ("Aperio|MPP=0.5", 0.5),
        ("Aperio|MPP = 5e-1", 0.5),
        ("Aperio|MPP = 0|x", 0),
        ("Aperio|MPP = -0.5", 0),
        ("Aperio|MPP = 0,5", 0),
        ("Aperio|MPP = e", 0),
        ("Aperio|XMPP = 3", 0),
        ("Aperio", 0),
    ],
)
def test_aperio_notes(text: str, wanted: float) -> None:
    assert pixel_sizes.of_aperio(text) == wanted


def test_a_slide_that_states_none_by_its_notes_is_known_by_its_tags(tmp_path: Path) -> None:
    path = slides_made.write_svs(tmp_path / "a.svs", slides_made.small(), mpp=None)
    assert open_slide(path).mpp is None
    for kind, write in (("ndpi", slides_made.write_ndpi), ("scn", slides_made.write_scn)):
        slide = open_slide(write(tmp_path / f"a.{kind}", slides_made.small()))
        assert (slide.kind, slide.mpp) == (kind, pytest.approx((0.5, 0.5)))


def test_philips_notes() -> None:
    text = '<A Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">&quot;0.00022&quot; &quot;0.00025&quot;</A>'
    assert pixel_sizes.of_philips(text) == pytest.approx((0.25, 0.22))
    assert pixel_sizes.of_philips("") == (0.0, 0.0)


@given(
    st.none() | st.floats() | st.integers() | st.text() | st.tuples(st.integers(), st.integers()), st.text()
)
def test_whatever_a_file_states_is_a_length_or_unknown(value: Any, unit: str) -> None:
    for found in (
        pixel_sizes.micrometres(value, unit),
        pixel_sizes.of_resolution(value, "cm"),
        pixel_sizes.of_aperio(f"MPP = {value}"),
    ):
        assert 0 <= found < np.inf
