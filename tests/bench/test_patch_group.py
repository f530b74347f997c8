"""Groups of patches: their files, and where random patches are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import zpatch as zp
from zpatch.bench.patch_group import PatchGroup


def test_a_group_lists_the_shard_files_that_reading_it_opens(cohort: zp.Cohort, cohort_store: Path) -> None:
    group = PatchGroup.drawn(cohort[0], (16, 16, 16), 2, np.random.default_rng(0))
    files = group.shard_files()
    assert {file.relative_to(cohort_store).parts[:2] for file in files} == {
        ("sub-01", "t1"),
        ("sub-01", "seg"),
    }
    assert all(file.is_file() for file in files)


def test_random_patches_are_inside_and_reach_both_ends(cohort: zp.Cohort) -> None:
    subject = cohort[0]
    i, j, k = subject.spatial_shape
    group = PatchGroup.drawn(subject, (i - 1, j, k), 32, np.random.default_rng(0))
    assert {location.index for location in group.locations} == {(0, 0, 0), (1, 0, 0)}
