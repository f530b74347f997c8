"""Tiles in bounded memory: the most recently used ones stay, the others are read back from a scratch file."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from zpatch.blending.tile_spill import ScratchFile, SpilledTiles
from zpatch.errors import StoreError


def test_space_in_a_scratch_file_is_reused() -> None:
    scratch = ScratchFile()
    first, second = torch.arange(6).reshape(2, 3), torch.arange(6, 12).reshape(3, 2)
    kept = scratch.write(first)
    freed = scratch.write(second)
    scratch.free(freed)
    again = scratch.write(second + 1)
    larger = scratch.write(torch.ones(100, dtype=torch.float64))
    assert again.offset == freed.offset
    assert larger.offset == 2 * kept.nbytes
    assert torch.equal(scratch.read(kept, torch.empty_like(first)), first)
    assert torch.equal(scratch.read(again, torch.empty_like(second)), second + 1)
    assert torch.equal(scratch.read(kept.last_channel, torch.empty_like(first[-1])), first[-1])
    scratch.close()


def test_a_full_disk_is_named_and_loses_no_tile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full_disk(**options: Any) -> Any:
        return open("/dev/full", "r+b", buffering=0)

    monkeypatch.setattr(tempfile, "TemporaryFile", full_disk)
    tiles = SpilledTiles(max_bytes=20, scratch_folder=tmp_path)
    values = [torch.full((1, 2, 2, 1), float(n)) for n in range(2)]
    tiles.put((0, 0, 0), values[0])
    with pytest.raises(StoreError) as error:
        tiles.put((0, 0, 1), values[1])
    assert f"the scratch file in {tmp_path} failed (No space left on device); free space" in str(error.value)
    for n, value in enumerate(values):
        assert torch.equal(tiles.pop((0, 0, n), (1, 2, 2, 1), torch.float32), value)
    tiles.close()


def test_a_folder_that_cannot_hold_a_scratch_file_is_named(tmp_path: Path) -> None:
    tiles = SpilledTiles(max_bytes=0, scratch_folder=tmp_path / "nowhere")
    with pytest.raises(
        StoreError, match=r"nowhere failed \(No such file or directory\); free space there, or"
    ):
        tiles.put((0, 0, 0), torch.ones(1, 1, 1, 1))


def test_the_most_recently_used_tiles_stay_in_memory() -> None:
    tiles = SpilledTiles(max_bytes=8)
    places = [(0, 0, n) for n in range(3)]
    one_voxel: Any = (1, 1, 1, 1), torch.float32
    for n in (0, 1, 2, 0, 2):
        tiles.put(places[n], tiles.pop(places[n], *one_voxel) + 1)
    assert list(tiles._held) == [places[0], places[2]]
    assert [tiles.pop(place, *one_voxel).item() for place in places] == [2, 1, 2]
    assert tiles.pop(places[0], *one_voxel).item() == 0
    assert tiles.last_channel(places[0]) is None
    tiles.close()


def test_tiles_of_different_shapes_and_types_share_a_scratch_file() -> None:
    tiles = SpilledTiles(max_bytes=0)
    shapes = [(2, 3, 1, 1), (1, 1, 2, 3), (4, 1, 1, 3)]
    dtypes = [torch.float64, torch.uint8, torch.float32, torch.complex64, torch.int64]
    kept = {}
    for n, (shape, dtype) in enumerate(itertools.product(shapes, dtypes)):
        kept[0, 0, n] = torch.arange(n, n + math.prod(shape)).reshape(shape).to(dtype)
        tiles.put((0, 0, n), kept[0, 0, n].clone())
    for place in [*kept, *reversed(kept)]:
        tile = tiles.pop(place, (1, 1, 1, 1), torch.float32)
        assert tile.dtype == kept[place].dtype
        assert torch.equal(tile, kept[place])
        last = kept[place][-1]
        tiles.put(place, tile)
        found = tiles.last_channel(place)
        assert found is not None
        assert torch.equal(found, last)
    tiles.close()
