"""One subject of a report: its histograms, and the problems of reading it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

import zpatch as zp
from zpatch.report.labels import LabelColours
from zpatch.report.subject_section import (
    SubjectSection,
    drawings_of,
    histogram_of,
    overlays_of,
    stored_images,
)


def test_a_histogram_counts_the_foreground(cohort_store: Path) -> None:
    for subject in zp.Cohort(cohort_store):
        image = subject.t1
        found = histogram_of(image.folder, image.record)
        values = image.data[image.data != 0].astype(np.float64)
        inside = np.histogram(values, len(found.counts), (found.low, found.high))[0]
        tolerance = 0 if image.record.dtype == "<i2" else 0.01 * inside.sum()
        np.testing.assert_allclose(found.counts, inside, atol=tolerance)
        assert found.counts.sum() > 0.98 * values.size


def test_label_maps_are_overlays_of_the_images_on_their_grid(cohort: zp.Cohort) -> None:
    images = stored_images(cohort[0])
    maps = overlays_of(images)
    [drawing] = drawings_of(images, maps)
    assert drawing.image.record.image == "t1"
    assert drawing.overlays == maps
    assert [(overlay.image.record.image, overlay.is_dashed) for overlay in maps] == [("seg", False)]
    [alone] = drawings_of([overlay.image for overlay in maps], maps)
    assert (alone.image.record.image, alone.overlays) == ("seg", ())


def test_an_unreadable_image_is_one_problem_however_many_planes_fail(
    cohort_store: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))
    shutil.rmtree(copy / "sub-01" / "t1" / "0" / "c")
    section = SubjectSection.of(zp.Cohort(copy)["sub-01"], LabelColours([1, 2]), [])
    [image] = section.images
    assert len(image.problems) == 3
    assert [(problem.image, problem.is_damage) for problem in section.unread] == [("t1", True)]
