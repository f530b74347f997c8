"""Boxes over the border of their volume: filled as by numpy.pad, and read from inside only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reading import assert_same_bytes, both_loops, draw_box, many_examples, random_voxels, stored
from reading import loop as loop

from zpatch.errors import OptionError, PatchLocationError
from zpatch.geometry.boxes import PatchLocation
from zpatch.geometry.padding import PADDING_MODES, PaddedBox, check_padding_mode
from zpatch.images.image import ScalarImage
from zpatch.sources import group_read
from zpatch.sources.group_read import read_group

Draw = st.DataObject

every_mode = pytest.mark.parametrize("mode", PADDING_MODES)


def padded(volume: NDArray[Any], margin: int, mode: str, fill: float = 0) -> NDArray[Any]:
    """A volume (C, I, J, K), padded by numpy."""
    choice: dict[str, Any] = {"constant_values": fill} if mode == "constant" else {}
    widths = [(0, 0)] + [(margin, margin)] * 3
    return np.pad(volume, widths, mode=mode, **choice)  # type: ignore[call-overload, no-any-return]


def shifted(box: PatchLocation, by: int) -> tuple[slice, ...]:
    return (slice(None), *(slice(a + by, b + by) for a, b in zip(box.index_ini, box.index_fin, strict=True)))


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    mode=st.sampled_from(PADDING_MODES),
)
def test_boxes_over_the_border_are_those_of_the_volume_padded_by_numpy(
    data: Draw, shape: list[int], mode: str
) -> None:
    margin = 8
    volume = np.arange(2 * np.prod(shape)).reshape(2, *shape)
    whole = padded(volume, margin, mode, 7)
    boxes = [
        PatchLocation(tuple(i - margin for i in box.index), box.size)
        for box in (draw_box(data, whole.shape[1:]) for _ in range(3))
    ]
    found = ScalarImage(volume).read_group(boxes, padding_mode=mode, fill=7)
    for box, patch in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(patch, whole[shifted(box, margin)])


@many_examples
@given(
    starts=st.tuples(*[st.integers(-40, 40)] * 3),
    size=st.tuples(*[st.integers(1, 20)] * 3),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    mode=st.sampled_from(PADDING_MODES),
)
@example(starts=(-40, 0, 30), size=(3, 1, 2), shape=(1, 1, 1), mode="reflect")
def test_a_padded_box_needs_the_smallest_box_inside(
    starts: tuple[int, int, int], size: tuple[int, int, int], shape: tuple[int, int, int], mode: str
) -> None:
    box = PatchLocation(starts, size)
    split = PaddedBox.of(box, shape, mode)
    assert split.inner.lies_within(shape)
    for axis, positions in enumerate(split.take):
        start, stop, n = starts[axis], starts[axis] + size[axis], shape[axis]
        margin = max(0, -start, stop - n)
        line = padded(np.arange(n).reshape(1, n, 1, 1), margin, mode, -1)[0, :, margin, margin]
        expected = line[start + margin : stop + margin]
        used = expected[expected >= 0]
        np.testing.assert_array_equal(
            np.where(positions < 0, -1, positions + split.inner.index[axis]), expected
        )
        if used.size:
            assert split.inner.index_ini[axis] == used.min()
            assert split.inner.index_fin[axis] == used.max() + 1


@both_loops
@every_mode
@pytest.mark.parametrize(("codec", "scheduler"), [("lz4", "sync"), ("zstd", "threads")])
def test_padding_reads_only_from_inside_a_stored_image(
    tmp_path: Path, mode: str, codec: str, scheduler: group_read.Scheduler
) -> None:
    voxels = random_voxels((2, 9, 10, 11), "<i2")
    image = stored(tmp_path / "image", voxels, chunk=4, shard=2, codec=codec)
    whole = padded(voxels.transpose(0, 3, 2, 1), 5, mode, -3)
    boxes = [PatchLocation((-5, 2, 6), (7, 6, 8)), PatchLocation((3, -5, -5), (13, 20, 19)),
             PatchLocation((2, 2, 2), (3, 3, 3)), PatchLocation((11, 10, 9), (5, 5, 5)),
             PatchLocation((-5, -5, -5), (2, 2, 2))]  # fmt: skip
    found = image.read_group(boxes, padding_mode=mode, fill=-3, scheduler=scheduler)
    for box, patch in zip(boxes, found, strict=True):
        assert_same_bytes(patch, whole[shifted(box, 5)])


@both_loops
@every_mode
@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_padded_boxes_of_a_scaled_image_are_written_to_memory_of_any_type_and_layout(
    tmp_path: Path, mode: str, dtype: str
) -> None:
    voxels = np.arange(9 * 10 * 11, dtype=np.int16).reshape(9, 10, 11) % 101
    image = stored(tmp_path / "image", voxels, chunk=4, shard=2, slope=0.5, inter=-3.0)
    values = (voxels.T.astype(np.float32) * np.float32(0.5) - np.float32(3))[None].astype(dtype)
    box = PatchLocation((-4, 5, 1), (9, 9, 20))
    out = np.zeros((2, *box.size, 2), dtype)[:1, ::-1, :, :, 1]
    [[found]] = read_group([image], [box], padding_mode=mode, fill=2.5, out=[[out]])
    assert found is out
    np.testing.assert_array_equal(found, padded(values, 30, mode, 2.5)[shifted(box, 30)])


@both_loops
def test_boxes_over_the_border_and_inside_may_be_read_together(tmp_path: Path) -> None:
    voxels = random_voxels((8, 8, 8), "|u1")
    image = stored(tmp_path / "image", voxels, chunk=3, shard=1)
    boxes = [PatchLocation((0, 0, 0), (2, 2, 2)), PatchLocation((7, 7, 7), (2, 2, 2))] * 2
    found = image.read_group(boxes, padding_mode="edge")
    for patch in found[::2]:
        assert_same_bytes(patch[0], voxels.T[:2, :2, :2])
    for patch in found[1::2]:
        assert (patch == voxels[7, 7, 7]).all()


BOX = PatchLocation((-1, 0, 0), (2, 2, 2))


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("|u1", -1024), ("|u1", -1024.0), ("|u1", 256), ("<i2", 0.5), ("<i2", np.nan), ("<i2", np.inf),
        ("<i8", 2**63), ("<u8", 2**70), ("|b1", 2), ("<f2", 1e6), ("<f4", -1e300), (">i2", np.int64(2**15)),
    ],
)  # fmt: skip
def test_a_fill_that_is_not_a_value_of_the_type_is_refused(dtype: str, fill: float) -> None:
    image = ScalarImage(np.ones((2, 2, 2), dtype))
    why = f"{image!r} cannot be padded with fill={fill}, which is no value of {image.dtype}; choose another"
    with pytest.raises(OptionError, match=re.escape(why)):
        image.read_group([BOX], padding_mode="constant", fill=fill)
    for mode in PADDING_MODES[1:]:
        assert (image.read_group([BOX], padding_mode=mode, fill=fill)[0] == 1).all()


def test_the_error_for_a_fill_names_the_image(tmp_path: Path) -> None:
    image = stored(tmp_path / "image", np.ones((2, 2, 2), np.uint8), chunk=2, shard=1)
    with pytest.raises(
        OptionError, match=r"^ScalarImage\(.+/.+, shape \(1, 2, 2, 2\), uint8\) cannot be padded"
    ):
        image.read_group([BOX], padding_mode="constant", fill=-1)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("|u1", 255), ("|u1", 3.0), ("<i2", -1024), ("<u8", 2**64 - 1), ("|b1", 1), ("<f2", -1024),
        ("<f4", 0.1), ("<f4", np.nan), (">f4", -np.inf), ("<f8", 1e300), ("<c8", 0.5),
    ],
)  # fmt: skip
def test_a_fill_of_the_type_is_written_outside(dtype: str, fill: float) -> None:
    volume = np.ones((2, 2, 2), dtype)
    [found] = ScalarImage(volume).read_group([BOX], padding_mode="constant", fill=fill)
    assert_same_bytes(found[0], np.concatenate([np.full((1, 2, 2), fill, dtype), volume[:1]]))


def test_a_fill_may_be_a_value_of_the_type_of_the_memory_that_boxes_are_read_into() -> None:
    out = np.zeros((1, 2, 2, 2), np.float32)
    read_group(
        [ScalarImage(np.ones((2, 2, 2), np.uint8))], [BOX], padding_mode="constant", fill=-0.5, out=[[out]]
    )
    assert (out[0, :, 0, 0] == [-0.5, 1]).all()


def test_each_image_may_have_its_own_fill() -> None:
    images = [ScalarImage(np.ones((2, 2, 2), np.int16)), ScalarImage(np.ones((2, 2, 2), np.uint8))]
    (one,), (other,) = read_group(images, [BOX], padding_mode="constant", fill=[-1024, 9])
    assert (one[0, :, 0, 0] == [-1024, 1]).all()
    assert (other[0, :, 0, 0] == [9, 1]).all()


def test_without_a_padding_mode_nothing_is_padded() -> None:
    with pytest.raises(PatchLocationError, match="is not inside"):
        ScalarImage(np.zeros((2, 2, 2))).read_group([PatchLocation((1, 1, 1), (2, 1, 1))])


@pytest.mark.parametrize("mode", ["mirror", "", "CONSTANT", "empty", "linear_ramp"])
def test_an_unknown_padding_mode_is_refused_with_the_known_ones(mode: str) -> None:
    why = f"one of constant, edge, reflect, symmetric, wrap, not '{mode}'"
    with pytest.raises(OptionError, match=why):
        ScalarImage(np.zeros((2, 2, 2))).read_group([], padding_mode=mode)
    with pytest.raises(OptionError, match=why):
        check_padding_mode(mode)


def test_all_padding_modes_and_none_are_accepted() -> None:
    for mode in (None, *PADDING_MODES):
        check_padding_mode(mode)
