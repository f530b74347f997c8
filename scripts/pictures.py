#!/usr/bin/env python
"""Draw the pictures of the documentation from the cohort of the quickstart.

    python scripts/pictures.py docs/pictures

Needs matplotlib and, for the picture of a slide, scikit-image and tifffile. The picture of the report is
taken from its page by headless Chromium.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from check_site import opened_browser
from make_cohort import make_cohort
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import zpatch as zp
from zpatch.tiling.windows import OVERLAP_MODES, partition_of_unity

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results.md"
COLOURS = {0: "#4c78a8", 1: "#e45756", 2: "#54a24b"}
NAMES = {0: "background", 1: "grey matter", 2: "white matter"}
INK, PAPER = "#333333", "white"
DPI = 110


def main(folder: Path) -> None:
    """Draw all pictures."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        scans, store = Path(made) / "scans", Path(made) / "cohort.zarr"
        make_cohort(scans, subjects=1, seed=0, zoom=1)
        zp.convert(scans, store)
        subject = zp.Cohort(store)[0]
        draw_patches(subject, folder / "patches.png")
        draw_labels(subject, folder / "label-draws.png")
        draw_sweep(subject, folder / "sweep.png")
        zp.write_report(store, Path(made) / "report.html")
        draw_report(Path(made) / "report.html", folder / "report.png")
    draw_blending(folder / "blending.png")
    draw_speeds(folder / "speeds.svg")
    draw_slide(folder / "slide.png")


def new_figure(width: float, height: float) -> Figure:
    """A figure of some inches on white paper."""
    return Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")


def plane_of(image: Any, axis: int, at: int) -> Any:
    """One plane of an image for imshow: the two other axes across and upwards."""
    index = [0, 0, 0]
    size = list(image.spatial_shape)
    index[axis], size[axis] = at, 1
    plane = image.read(zp.PatchLocation(tuple(index), tuple(size)))[0]
    return np.take(plane, 0, axis).T


def show_plane(axes: Any, image: Any, axis: int, at: int) -> None:
    """Draw one plane in grey."""
    axes.imshow(plane_of(image, axis, at), cmap="gray", origin="lower", vmin=0, vmax=1100)
    axes.set_axis_off()


def draw_patches(subject: Any, path: Path) -> None:
    """Patches of a LabelSampler on three planes of a brain."""
    sampler = zp.LabelSampler(48, "seg", {0: 1, 1: 2, 2: 2})
    middle = [n // 2 for n in subject.spatial_shape]
    figure = new_figure(9, 3.15)
    places = sampler.locations(subject, 60, rng=4)
    for axes, axis in zip(figure.subplots(1, 3), (2, 1, 0), strict=True):
        show_plane(axes, subject.t1, axis, middle[axis])
        across, up = (a for a in range(3) if a != axis)
        on_plane = [p for p in places if p.index[axis] <= middle[axis] < p.index_fin[axis]][:8]
        for place, colour in zip(on_plane, list("rgbcmy") * 2, strict=False):
            corner = place.index[across], place.index[up]
            axes.add_patch(Rectangle(corner, 48, 48, fill=False, edgecolor=colour, linewidth=1.4))
        axes.set_title(f"{'IJK'[across]} and {'IJK'[up]}", color=INK, fontsize=10)
    save(figure, path)


def draw_labels(subject: Any, path: Path) -> None:
    """Centres that a LabelSampler draws in a slab, beside those of a UniformSampler."""
    samplers = {
        "UniformSampler(48)": zp.UniformSampler(48),
        'LabelSampler(48, "seg", {0: 1, 1: 2, 2: 2})': zp.LabelSampler(48, "seg", {0: 1, 1: 2, 2: 2}),
    }
    at = subject.spatial_shape[2] // 2
    figure = new_figure(8.4, 4.1)
    for axes, (title, sampler) in zip(figure.subplots(1, 2), samplers.items(), strict=True):
        show_plane(axes, subject.t1, 2, at)
        places = np.array([place.index for place in sampler.locations(subject, 6000, rng=1)]) + 24
        near = places[abs(places[:, 2] - at) <= 1]
        labels = subject.seg.data[0][tuple(near.T)]
        for label, colour in COLOURS.items():
            shown = near[labels == label]
            text = f"{NAMES[label]} ({np.mean(labels == label):.0%})"
            axes.scatter(
                shown[:, 0], shown[:, 1], s=16, color=colour, label=text, edgecolors="white", linewidths=0.3
            )
        axes.set_title(title, fontsize=9, color=INK)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            fontsize=8,
            frameon=False,
            ncols=3,
            handletextpad=0.1,
            columnspacing=0.8,
        )
    save(figure, path)


def draw_sweep(subject: Any, path: Path) -> None:
    """A sweep as frames: what is final, what is held, what is still to come."""
    plane = plane_of(subject.t1, 1, subject.spatial_shape[1] // 2)
    height, width = plane.shape
    patch, overlap = 48, 16
    starts = sorted({p.index[0] for p in zp.GridSampler(subject, 48, patch_overlap=overlap).locations})
    figure = new_figure(9, 2.9)
    for frame, axes in enumerate(figure.subplots(1, 4)):
        done = round((frame + 1) * len(starts) / 4) - 1
        front, stop = starts[done], starts[done] + patch
        final = starts[done + 1] if done + 1 < len(starts) else width
        axes.imshow(plane, cmap="gray", origin="lower", vmin=0, vmax=1100)
        axes.axvspan(0, final, color="#54a24b", alpha=0.45, linewidth=0)
        axes.axvspan(final, min(stop, width), color="#f2a33a", alpha=0.5, linewidth=0)
        for up in range(0, height - patch + 1, patch - overlap):
            axes.add_patch(Rectangle((front, up), patch, patch, fill=False, edgecolor="#ffe14d", linewidth=1))
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        axes.set_title(f"{done + 1} of {len(starts)} rows of patches", fontsize=9, color=INK)
    figure.supxlabel(
        "green: final and written    orange: sums that are held    yellow: the last row of patches",
        fontsize=9,
        color=INK,
    )
    save(figure, path)


def draw_blending(path: Path) -> None:
    """The weights of overlapping patches along one axis, in the four modes, and their sum."""
    starts = np.array([0, 20, 40, 52])
    figure = new_figure(9, 4.6)
    for axes, mode in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, OVERLAP_MODES, strict=True):
        total = np.zeros(84)
        for start, weights in zip(starts, partition_of_unity(mode, starts, starts + 32, 12), strict=True):
            axes.fill_between(np.arange(start, start + 32), weights, step="mid", alpha=0.3, linewidth=0)
            axes.step(np.arange(start, start + 32), weights, where="mid", linewidth=1.2)
            total[start : start + 32] += weights
        axes.step(np.arange(84), total, where="mid", color=INK, linewidth=1, linestyle="--", label="sum")
        axes.set_title(mode, fontsize=10, color=INK)
        axes.set(ylim=(0, 1.15), xlim=(-1, 84))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.supxlabel(
        "voxel along one axis: patches of 32, overlap 12, the last one flush with the border", fontsize=9
    )
    figure.supylabel("weight", fontsize=9)
    save(figure, path)


def speeds() -> dict[str, float]:
    """Patches per second of each loader, from the recorded benchmark."""
    section = RESULTS.read_text().partition("\n## feed\n")[2].partition("\n### The first batch")[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([\d,]+) \(", section, re.MULTILINE)
    return {name: float(rate.replace(",", "")) for name, rate in rows}


def draw_speeds(path: Path) -> None:
    """Bars of patches per second: zpatch, and what other loaders reach in the same run."""
    found = {name: rate for name, rate in speeds().items() if wanted(name)}
    names = sorted(found, key=lambda name: found[name])
    figure = new_figure(8, 0.42 * len(names) + 0.9)
    axes = figure.subplots()
    colours = ["#00897b" if name.startswith("zpatch") else "#b0b0b0" for name in names]
    bars = axes.barh(
        [re.sub(r", [\d.]+$", "", name) for name in names], [found[n] for n in names], color=colours
    )
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=9, color=INK)
    axes.set_xlabel("patches of 96 x 96 x 96 voxels per second, 2 workers on 2 cores", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    save(figure, path)


def wanted(name: str) -> bool:
    """Whether a row of the benchmark is a loader that people use."""
    return name in ("zpatch, lz4", "zpatch, none") or name.startswith(("DataLoader", "MONAI", "TorchIO"))


def draw_report(page: Path, path: Path) -> None:
    """The section of the first subject of a report, as a browser shows it."""
    with opened_browser() as browser:
        tab = browser.new_page(viewport={"width": 1000, "height": 760})
        tab.goto(page.as_uri())
        tab.get_by_role("heading", name="sub-01", exact=True).evaluate("heading => heading.scrollIntoView()")
        tab.screenshot(path=path)
    make_small(path)


def draw_slide(path: Path) -> None:
    """The thumbnail of a stained section, and the tissue that is found on it."""
    import skimage.data
    import tifffile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.tif"
        tifffile.imwrite(file, skimage.data.immunohistochemistry(), photometric="rgb", tile=(128, 128))
        slide = zp.ScalarImage(file, slide_mpp=0.5)
        pixels = slide.data[..., 0].transpose(2, 1, 0)
        places = zp.GridSampler(zp.Subject(slide=slide), 128, patch_overlap=32).locations
    dark = 255 - pixels.mean(2)
    warmth = pixels[..., 0].astype(float) - pixels[..., 2]
    classes = np.argmax([60 - dark, dark - 60 - warmth, dark - 60 + warmth], axis=0)
    tints = np.array([[255, 255, 255], [40, 80, 220], [200, 60, 20]])[classes]
    overlay = np.where(classes[..., None] > 0, 0.5 * pixels + 0.5 * tints, pixels).astype(np.uint8)
    figure = new_figure(8, 4.2)
    titles = "slide and patches", "classes over the slide"
    for axes, picture, title in zip(figure.subplots(1, 2), (pixels, overlay), titles, strict=True):
        axes.imshow(picture[:384, :384])
        axes.set_axis_off()
        axes.set_title(title, fontsize=10, color=INK)
    outlines = [box_of(place) for place in places if max(place.index[:2]) + 128 <= 384]
    figure.axes[0].add_collection(LineCollection(outlines, colors="#00897b", linewidths=1.2))
    save(figure, path, dpi=70)


def box_of(place: Any) -> list[tuple[int, int]]:
    """The outline of a patch on a plane."""
    (i, j, _), (p, q, _) = place.index, place.size
    return [(i, j), (i + p, j), (i + p, j + q), (i, j + q), (i, j)]


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a picture, without a date, so that the same picture has the same bytes."""
    if path.suffix == ".svg":
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "zpatch", "svg.fonttype": "none"}):
            figure.savefig(path, metadata={"Date": None})
        return
    figure.savefig(path, dpi=dpi)
    make_small(path)


def make_small(path: Path) -> None:
    """Write a picture again with a palette."""
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
