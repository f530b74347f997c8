"""An array on disk, as data: boxes in its own axis order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from reading import stored

from zpatch.chunks.gather import read_region
from zpatch.geometry.boxes import PatchLocation
from zpatch.sources.voxel_sources import ShardSource


def test_a_box_of_an_array_has_the_voxels_of_its_location(tmp_path: Path) -> None:
    voxels = np.arange(3 * 7 * 8 * 9, dtype=np.int16).reshape(3, 7, 8, 9)
    image = stored(tmp_path / "image", voxels, chunk=3, shard=1)
    assert isinstance(image.source, ShardSource)
    array, location = image.source.array, PatchLocation((4, 2, 1), (5, 4, 3))
    assert array.box(location) == ((0, 1, 2, 4), (3, 4, 6, 9))
    assert array.box(location, range(1, 2)) == ((1, 1, 2, 4), (2, 4, 6, 9))
    found = read_region(array, *array.box(location, range(1, 3)))
    np.testing.assert_array_equal(found, voxels[1:3, 1:4, 2:6, 4:9])
