"""Micrometres per pixel, as the writers of TIFF files note them: in tags, in descriptions, in XML."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

LARGEST_MPP = 50.0  # 300 pixels an inch are 85 micrometres: the resolution of a printer, not of a microscope
MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "um": 1.0, "nm": 1e-3, "inch": 25400.0}
_UNITS = {"micron": "um", "microns": "um", "micrometer": "um", "µm": "um", "μm": "um", "\\u00b5m": "um"}
_APERIO_MPP = re.compile(r"\bMPP\s*=\s*([0-9.eE+-]+)")
_PHILIPS_SPACING = re.compile(
    r"DICOM_PIXEL_SPACING[^>]*>\s*(?:&quot;|\")([0-9.eE+-]+)(?:&quot;|\")\s*(?:&quot;|\")([0-9.eE+-]+)"
)
_RESOLUTION_UNITS = {2: "inch", 3: "cm"}

Sizes = tuple[float, float, float]


def micrometres(value: Any, unit: str) -> float:
    """A length in micrometres; 0 where it is no positive number, or its unit is unknown.

    >>> micrometres("0.5", "µm"), micrometres(2, "parsec")
    (0.5, 0.0)
    """
    known = MICROMETRES.get(_UNITS.get(unit.lower(), unit.lower()), 0.0)
    try:
        length = float(value) * known
    except (TypeError, ValueError):
        return 0.0
    return length if 0 < length < math.inf else 0.0


def of_aperio(description: str) -> float:
    """The micrometres per pixel that the description of an Aperio slide states; 0 for none.

    >>> of_aperio("Aperio Image Library v12|AppMag = 20|MPP = 0.4990")
    0.499
    """
    found = _APERIO_MPP.search(description)
    return micrometres(found[1], "um") if found else 0.0


def of_philips(description: str) -> tuple[float, float]:
    """Those of the finest level of a Philips slide, along x and y."""
    found = _PHILIPS_SPACING.search(description)
    return (micrometres(found[2], "mm"), micrometres(found[1], "mm")) if found else (0.0, 0.0)


def of_ome(pixels: Mapping[str, Any]) -> Sizes:
    """Those of the element Pixels of OME-XML, along x, y and z; 0 where it has none.

    >>> of_ome({"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5})
    (0.5, 0.5, 0.0)
    """
    x, y, z = (
        micrometres(pixels.get(f"PhysicalSize{axis}"), str(pixels.get(f"PhysicalSize{axis}Unit", "um")))
        for axis in "XYZ"
    )
    return x, y, z


def of_resolution(per_unit: Any, unit: str) -> float:
    """That of a resolution in pixels a unit, a number or a fraction; 0 where it is none of a microscope.

    >>> of_resolution((40000, 1), "cm"), of_resolution((72, 1), "inch")
    (0.25, 0.0)
    """
    try:
        above, below = per_unit if isinstance(per_unit, tuple) else (per_unit, 1)
        length = micrometres(below / above, unit)
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return length if length <= LARGEST_MPP or unit not in ("inch", "cm") else 0.0


def of_tags(tags: Any, unit: str | None = None) -> tuple[float, float]:
    """Those of the tags XResolution and YResolution, in the ``unit`` that another note of the file states."""
    unit = unit or _RESOLUTION_UNITS.get(_value(tags, "ResolutionUnit", 2), "")
    x, y = (of_resolution(_value(tags, f"{axis}Resolution"), unit) for axis in "XY")
    return x, y


def _value(tags: Any, name: str, default: Any = None) -> Any:
    tag = tags.get(name)
    return default if tag is None else tag.value
