"""The part of a report that is about one subject: pictures, histograms, statistics."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable

import numpy as np

from zpatch.geometry.affines import spacing_mm
from zpatch.report.markup import Content, Html, tag
from zpatch.report.page_parts import TIMES, count_text, facts, legend, number_text, problem_item, table
from zpatch.report.pictures import LabelColours, Panel, Picture, label_names
from zpatch.report.summary import Histogram, ImageSection, SubjectSection, shape_text, unit_text
from zpatch.store.image_record import ImageRecord

ROW_WIDTH_REM = 63  # of the pictures of a panel together
ROW_HEIGHT_REM = 22  # of the highest of them
MANY_PANELS = 3
MANY_HEIGHT_REM = 14  # where a subject has so many


def section_of(subject: SubjectSection, colours: LabelColours) -> Html:
    """The section of a subject."""
    problems = [problem_item(problem, "") for problem in subject.problems]
    parts: list[Content] = [
        tag("h2", subject.name, *([tag("small", str(subject.split))] if subject.split else []))
    ]
    if problems:
        parts.append(tag("ul", *problems, class_="problems"))
    if subject.metadata:
        parts.append(facts(subject.metadata))
    panels = sum(len(image.panels) for image in subject.images)
    height_rem = ROW_HEIGHT_REM if panels < MANY_PANELS else MANY_HEIGHT_REM
    parts += [_image(image, height_rem) for image in subject.images]
    for number, record in enumerate(subject.maps):
        labels = [
            (value, name, _amount(record, count)) for value, (name, count) in label_names(record).items()
        ]
        parts.append(legend(record.image, labels, colours, dashed=number % 2 == 1))
        parts += _skipped(record)
    return tag("section", *parts, class_="subject", id=f"subject-{subject.name}", data_name=subject.name)


def _image(image: ImageSection, height_rem: float) -> Html:
    record = image.record
    channels = record.shape_czyx[0]
    told = [
        record.kind,
        shape_text(record) + (f" {TIMES} {channels} {_channel_word(record)}" if channels > 1 else ""),
        f"{_values(spacing_mm(record.affine_array))} {unit_text(record.spatial_unit)}",
        np.dtype(record.dtype).name,
        *([str(record.source.path)] if record.source else []),
    ]
    parts: list[Content] = [tag("h3", record.image, tag("small", " \N{MIDDLE DOT} ".join(told)))]
    parts.append(tag("div", *(_panel(panel, height_rem) for panel in image.panels), class_="panels"))
    if record.kind != "label":
        beside = [] if image.histogram is None else [_histogram(image.histogram)]
        parts.append(tag("div", *beside, _statistics(record), class_="beside"))
        parts += _skipped(record)
    return tag("div", *parts)


def _panel(panel: Panel, height_rem: float) -> Html:
    """The planes of a panel, all at one scale: the highest is ``height_rem`` high, if there is room."""
    rem_per_mm = min(
        height_rem / max(picture.height_mm for picture in panel.pictures),
        ROW_WIDTH_REM / sum(picture.width_mm for picture in panel.pictures),
    )
    title = [tag("p", panel.title, class_="soft")] if panel.title else []
    planes = tag("div", *(_picture(picture, rem_per_mm) for picture in panel.pictures), class_="planes")
    return tag("div", *title, planes)


def _picture(picture: Picture, rem_per_mm: float) -> Html:
    width, ratio = picture.width_mm * rem_per_mm, picture.width_mm / picture.height_mm
    pngs = [layer for layer in (picture.png, *picture.outlines) if layer is not None]
    layers: list[Content] = [tag("img", src=_data_uri(layer), alt=picture.caption) for layer in pngs[:1]]
    layers += [tag("img", src=_data_uri(layer), alt="", class_="outline") for layer in pngs[1:]]
    if not layers:
        layers.append(tag("div", "cannot be read", class_="unread"))
    sides = zip(("left", "right", "top", "bottom"), picture.edges, strict=True)
    layers += [tag("span", letter, class_=side) for side, letter in sides if letter]
    return tag(
        "figure",
        tag("div", *layers, class_="view", style=f"aspect-ratio:{ratio:.4f}"),
        *([tag("figcaption", picture.caption)] if picture.caption else []),
        style=f"width:{width:.2f}rem",
    )


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _histogram(histogram: Histogram) -> Html:
    heights = np.sqrt(histogram.counts)  # else the noise of air hides all the rest
    heights *= 100 / max(float(heights.max(initial=0)), 1e-9)
    path = "".join(f"V{100 - height:.1f}H{n + 1}" for n, height in enumerate(heights.tolist()))
    picture = tag(
        "svg",
        tag("path", d=f"M0 100{path}V100Z"),
        viewBox=f"0 0 {len(histogram.counts)} 100",
        preserveAspectRatio="none",
        role="img",
        aria_label="histogram of the foreground",
    )
    ends = [tag("span", number_text(end)) for end in (histogram.low, histogram.high)]
    return tag("div", picture, tag("div", *ends), class_="histogram")


_STATISTICS = {
    "voxels": "count",
    "min": "min",
    "0.5 %": "percentile_0_5",
    "median": "percentile_50",
    "99.5 %": "percentile_99_5",
    "max": "max",
    "mean": "mean",
    "sd": "std",
}


def _statistics(record: ImageRecord) -> Html:
    foreground = record.stats.get("foreground")
    tables = {"all": record.stats, "foreground": foreground if isinstance(foreground, dict) else {}}
    rows = [
        (name, *(number_text(table.get(key)) for key in _STATISTICS.values()))
        for name, table in tables.items()
    ]
    return tag("div", table(["", *_STATISTICS], rows, numbers=range(1, 9)), class_="statistics")


def _skipped(record: ImageRecord) -> list[Html]:
    skipped = record.stats.get("skipped")
    voxels = math.prod(record.spatial_shape)
    if not isinstance(skipped, int) or not 0 < skipped <= voxels:
        return []
    share = skipped / voxels
    lying = f"{record.image}: {count_text(skipped)} voxels ({share:.0%}) lie outside the mask"
    return [tag("p", f"{lying}: filled, not predicted.", class_="soft")]


def _amount(record: ImageRecord, voxels: int) -> str:
    """So many voxels, and where the voxel size is in mm, how large they are together."""
    volume_ml = voxels * math.prod(spacing_mm(record.affine_array)) / 1000
    if record.spatial_unit != "millimeter" or not math.isfinite(volume_ml):
        return f"{count_text(voxels)} voxels"
    return f"{volume_ml:.3g} ml" if volume_ml < 1000 else f"{volume_ml:.0f} ml"


def _channel_word(record: ImageRecord) -> str:
    return "time points" if record.axes[0] == "t" else "channels"


def _values(values: Iterable[float]) -> str:
    return f" {TIMES} ".join(map(number_text, values))
