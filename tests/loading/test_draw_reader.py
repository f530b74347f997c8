"""Patches of a draw: the types that they are read in, and transforms that depend on their address alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from streams import item, noisy, small_subjects

import zpatch as zp
from zpatch.epochs.epoch_plan import Draw
from zpatch.loading.draw_reader import DrawReader, TransformRunner, VoxelTypes
from zpatch.sampling.patch_sampler import PatchSampler
from zpatch.sampling.patch_views import PatchView

VOXELS = np.arange(8**3, dtype=np.int16).reshape(8, 8, 8)
PLAIN = zp.ScalarImage(VOXELS)
SCALED = zp.ScalarImage(VOXELS).rescaled(0.5, -3)
CUT = zp.ScalarImage(VOXELS).rescaled(0.5, -3, low=0, high=9)
LABELS = zp.LabelMap(VOXELS.astype(np.uint16))
UNIFORM = zp.UniformSampler(4)
PADDED = zp.GridSampler(patch_size=4, padding_mode="constant", fill=0.5)


BYTES = zp.ScalarImage(VOXELS.astype(np.uint16))


@pytest.mark.parametrize(
    ("image", "sampler", "dtype", "sends_stored", "wanted"),
    [
        (PLAIN, UNIFORM, torch.float32, True, (torch.int16, 1, 0)),
        (PLAIN, UNIFORM, torch.float32, False, (torch.float32, 1, 0)),
        (PLAIN, UNIFORM, torch.float16, True, (torch.float16, 1, 0)),
        (PLAIN, UNIFORM, None, False, (torch.int16, 1, 0)),
        (PLAIN, PADDED, torch.float16, True, (torch.float16, 1, 0)),
        (PLAIN, PADDED, torch.float32, True, (torch.float32, 1, 0)),
        (BYTES, UNIFORM, torch.float32, True, (torch.uint16, 1, 0)),
        (BYTES, UNIFORM, None, False, (torch.int32, 1, 0)),
        (SCALED, UNIFORM, torch.float32, True, (torch.int16, 0.5, -3)),
        (SCALED, UNIFORM, torch.float32, False, (torch.float32, 1, 0)),
        (SCALED, UNIFORM, None, False, (torch.int16, 0.5, -3)),
        (SCALED, PADDED, None, False, (torch.float32, 1, 0)),
        (CUT, UNIFORM, torch.float64, True, (torch.float64, 1, 0)),
        (CUT, UNIFORM, None, False, (torch.float32, 1, 0)),
        (LABELS, UNIFORM, torch.float32, True, (torch.int32, 1, 0)),
        (LABELS, UNIFORM, torch.float32, False, (torch.int32, 1, 0)),
    ],
)
def test_images_are_read_as_values_or_where_that_is_asked_for_as_stored(
    image: zp.Image,
    sampler: PatchSampler,
    dtype: torch.dtype | None,
    sends_stored: bool,
    wanted: tuple[torch.dtype, float, float],
) -> None:
    place = VoxelTypes(sampler, dtype, sends_stored).place_of(
        PatchView("t1", image, padding_mode=getattr(sampler, "padding_mode", None))
    )
    assert (place.dtype, place.slope, place.inter) == wanted
    assert (place.name, place.kind, place.shape) == ("t1", image.kind, (1, 4, 4, 4))


def test_stored_voxels_are_sent_only_without_a_transform() -> None:
    reader = reader_of()
    sending = reader.sending_stored(True)
    assert sending.sending_stored(True) is sending
    assert [p.dtype for p in sending.layout_of(reader.subjects[0]).images] == [torch.int16, torch.uint8]
    assert sending.sending_stored(False).layout_of(reader.subjects[0]).images[0].dtype == torch.float32
    transformed = reader_of(noisy)
    assert transformed.sending_stored(True) is transformed


def reader_of(transform: Any = None, seed: int = 0) -> DrawReader:
    return DrawReader(small_subjects(2), UNIFORM, 5, torch.float32, transform, seed)


def draw_of(*numbers: int, epoch: int = 0, subject: int = 1, visit: int = 0) -> Draw:
    return Draw(epoch, subject, visit, numbers, numbers)


@pytest.mark.parametrize("transform", [None, noisy], ids=["plain", "noisy"])
def test_a_patch_does_not_depend_on_the_patches_read_with_it(transform: Any) -> None:
    reader = reader_of(transform)
    together = [item(patch) for patch in reader.patches(draw_of(0, 1, 2, 3, 4))]
    alone = [item(patch) for n in (4, 2, 0) for patch in reader.patches(draw_of(n))]
    assert alone == [together[n] for n in (4, 2, 0)]


@pytest.mark.parametrize("change", [{"epoch": 1}, {"subject": 0}, {"visit": 1}], ids=str)
def test_another_address_gives_another_transform(change: dict[str, int]) -> None:
    runner = TransformRunner(noisy, seed=0)
    [patch] = reader_of().patches(draw_of(0))
    one, other = (runner.run(patch, patch.location, draw, 0) for draw in (draw_of(0), draw_of(0, **change)))
    assert item(one) == item(runner.run(patch, patch.location, draw_of(0), 0))
    assert item(one) != item(other) != item(runner.run(patch, patch.location, draw_of(0, **change), 1))
    assert item(TransformRunner(noisy, seed=1).run(patch, patch.location, draw_of(0), 0)) != item(one)


def test_an_error_of_a_transform_names_the_location_of_the_patch() -> None:
    [patch] = reader_of().patches(draw_of(0))
    with pytest.raises(TypeError, match="a transform gives a Patch, not int") as failed:
        TransformRunner(lambda patch: 5, seed=0).run(patch, patch.location, draw_of(0), 0)  # type: ignore[arg-type, return-value]
    assert failed.value.__notes__ == [f"in the transform of the patch at {patch.location.index}"]


def test_the_layout_of_a_patch_before_a_transform_is_that_of_its_subject() -> None:
    reader = reader_of()
    [patch] = reader.patches(draw_of(0))
    places = reader.layout_of(reader.subjects[1]).images
    assert [place.name for place in places] == list(patch)
    assert [tuple(image.data.shape) for image in patch.images.values()] == [place.shape for place in places]
    assert reader.name_of(1) == patch.subject == "sub-01"
