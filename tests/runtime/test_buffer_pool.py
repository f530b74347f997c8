"""Reused memory: never while a view of it exists, always bounded, also with threads and after forks."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reading import random_voxels, stored

from zpatch.geometry.boxes import PatchLocation
from zpatch.runtime import buffer_pool
from zpatch.runtime.buffer_pool import KEPT_BYTES, KEPT_SIZES, LEAST_BYTES, empty

SIDE = 512  # of an array of bytes above the least size
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_spare() -> Iterator[None]:
    buffer_pool._spare.clear()
    yield
    buffer_pool._spare.clear()


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def kept_bytes() -> int:
    return sum(block.nbytes for blocks in buffer_pool._spare.values() for block in blocks)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4), (5,), (2, 300, 400), (1, 64, 64, 64)])
@pytest.mark.parametrize("dtype", ["|u1", "<c16"])
def test_an_array_is_like_one_of_numpy(shape: tuple[int, ...], dtype: str) -> None:
    array, like = empty(shape, dtype), np.empty(shape, dtype)
    assert (array.shape, array.dtype, array.strides) == (like.shape, like.dtype, like.strides)
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert array.flags.aligned
    array[...] = 1
    assert (array == 1).all()


def test_arrays_that_are_alive_share_no_memory() -> None:
    alive = [empty((SIDE, SIDE), np.uint8) for _ in range(20)]
    del alive[::2]
    alive += [empty((SIDE, SIDE), np.uint8) for _ in range(20)]
    for number, array in enumerate(alive):
        array[...] = number
    assert [int(array.min()) for array in alive] == [int(array.max()) for array in alive] == [*range(30)]


def test_memory_is_reused_when_no_view_of_it_exists_any_more() -> None:
    first = empty((SIDE, SIDE), np.uint8)
    place = address(first)
    del first
    assert address(empty((SIDE * SIDE // 4,), np.float32)) == place  # of the same size, whatever its type
    assert address(empty((SIDE + 1, SIDE), np.uint8)) != place


@pytest.mark.parametrize(
    "look",
    [
        lambda array: array[3:5, 7:9],
        lambda array: array.T[::-2],
        lambda array: array.reshape(-1).view(np.int32)[1:],
        lambda array: np.asarray(array)[None][0, 5],
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[2:4].permute(1, 0),
        lambda array: torch.from_numpy(array[1:]).view(torch.int32),
        lambda array: memoryview(array),
        lambda array: np.frombuffer(array.data, np.uint8),
        lambda array: np.broadcast_to(array, (2, SIDE, SIDE)),
        lambda array: np.lib.stride_tricks.sliding_window_view(array, (3, 3)),
        lambda array: {"deep": [array[0]]},
    ],
)
def test_a_view_of_any_kind_keeps_memory_from_being_reused(look: Any) -> None:
    array = empty((SIDE, SIDE), np.uint8)
    place = address(array)
    view = look(array)
    del array
    others = [empty((SIDE, SIDE), np.uint8) for _ in range(4)]
    assert place not in map(address, others)
    del view, others
    assert place in map(address, [empty((SIDE, SIDE), np.uint8) for _ in range(9)])


def test_voxels_in_a_tensor_do_not_change() -> None:
    tensor = torch.from_numpy(empty((SIDE, SIDE), np.uint8))[10:20]
    tensor.fill_(7)
    for _ in range(5):
        empty((SIDE, SIDE), np.uint8)[...] = 9
    assert (tensor == 7).all()


def test_a_copy_of_an_array_shares_no_memory_with_it() -> None:
    array = empty((SIDE, SIDE), np.uint8)
    array[...] = 3
    copies = [array.copy(), pickle.loads(pickle.dumps(array))]
    del array
    empty((SIDE, SIDE), np.uint8)[...] = 4
    assert all((copy == 3).all() for copy in copies)


def test_small_and_huge_arrays_are_left_to_numpy() -> None:
    for nbytes in (LEAST_BYTES - 1, KEPT_BYTES + 1):
        for _ in range(3):
            empty((nbytes,), np.uint8)
        assert nbytes not in buffer_pool._spare
    assert kept_bytes() == 0


def test_no_more_is_kept_than_the_limit_of_each_size() -> None:
    nbytes = 3 * MIB
    alive = [empty((nbytes,), np.uint8) for _ in range(30)]
    del alive
    assert len(buffer_pool._spare[nbytes]) == KEPT_BYTES // nbytes
    assert kept_bytes() <= KEPT_BYTES


def test_no_more_sizes_are_kept_than_a_few() -> None:
    alive = [empty((LEAST_BYTES + 1000 * n,), np.uint8) for n in range(20) for _ in range(2)]
    del alive
    assert len(buffer_pool._spare) == KEPT_SIZES
    assert kept_bytes() <= KEPT_SIZES * KEPT_BYTES
    # The sizes that were requested last.
    assert sorted(buffer_pool._spare) == [LEAST_BYTES + 1000 * n for n in range(20)[-KEPT_SIZES:]]


def test_a_size_in_use_is_kept_when_other_sizes_are_requested() -> None:
    for n in range(20):
        empty((SIDE, SIDE), np.uint8)
        empty((LEAST_BYTES + 1000 * n,), np.uint8)
    assert SIDE * SIDE in buffer_pool._spare


def test_many_patches_of_many_sizes_do_not_fill_the_memory() -> None:
    process = psutil.Process()
    empty((MIB,), np.uint8)[...] = 1
    before = process.memory_info().rss
    for n in range(300):
        empty((MIB + 4096 * (n % 100),), np.uint8)[...] = 1
    assert process.memory_info().rss - before < 3 * KEPT_SIZES * MIB + 16 * MIB


def test_threads_never_get_the_same_memory() -> None:
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        start.wait()
        held: list[tuple[int, NDArray[np.uint8]]] = []
        for step in range(400):
            array = empty((LEAST_BYTES + 64 * int(rng.integers(KEPT_SIZES + 2)),), np.uint8)
            mark = (number * 64 + step) % 251
            array[::1024] = mark
            held.append((mark, array))
            del array
            if len(held) > 5:
                mark, array = held.pop(int(rng.integers(len(held))))
                if not (array[::1024] == mark).all():
                    wrong.append(f"thread {number}, step {step}")
                del array

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert kept_bytes() <= KEPT_SIZES * KEPT_BYTES


def test_a_forked_child_does_not_share_memory_with_its_parent() -> None:
    array = empty((SIDE, SIDE), np.uint8)
    array[...] = 5
    empty((SIDE, SIDE), np.uint8)[...] = 6  # spare in the child too
    child = os.fork()
    if child == 0:
        right = False
        with contextlib.suppress(BaseException):
            mine = [empty((SIDE, SIDE), np.uint8) for _ in range(3)]
            for other in mine:
                other[...] = 7
            right = bool((array == 5).all()) and address(array) not in map(address, mine)
            array[...] = 8
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (array == 5).all()
    assert (empty((SIDE, SIDE), np.uint8) != 7).all()


def test_patches_share_no_memory_while_they_are_alive_and_reuse_it_afterwards(tmp_path: Path) -> None:
    voxels = random_voxels((70, 70, 70), "<i2")
    image = stored(tmp_path / "image", voxels, chunk=(32, 32, 32), shard=1)
    rng = np.random.default_rng(0)
    alive: list[tuple[PatchLocation, NDArray[Any]]] = []
    places: set[int] = set()
    for _ in range(15):
        boxes = [PatchLocation(tuple(rng.integers(0, 20, 3).tolist()), (48, 48, 48)) for _ in range(4)]
        alive += zip(boxes, image.read_group(boxes), strict=True)
        places |= {address(patch) for _, patch in alive}
        for n, (_, patch) in enumerate(alive):
            assert not any(np.shares_memory(patch, other) for _, other in alive[:n])
        for box, patch in alive:
            np.testing.assert_array_equal(patch[0], voxels.T[box.to_slices()])
        alive = [alive[n] for n in rng.permutation(len(alive))[:5]]
    assert len(places) < 15 * 4


def test_padded_patches_share_no_memory_with_their_unpadded_voxels(tmp_path: Path) -> None:
    voxels = random_voxels((70, 70, 70), "<i2")
    image = stored(tmp_path / "image", voxels, chunk=(32, 32, 32), shard=1)
    box = PatchLocation((-4, 0, 0), (64, 64, 64))
    [kept] = image.read_group([box], padding_mode="edge")
    before = kept.copy()
    for _ in range(5):
        for patch in image.read_group([box] * 2, padding_mode="edge"):
            patch[...] = 0
    np.testing.assert_array_equal(kept, before)


# A pool


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.booleans()), max_size=60))
def test_a_pool_never_keeps_much_more_than_was_in_use_at_once(steps: list[tuple[str, int, bool]]) -> None:
    pool: buffer_pool.Pool[list[int]] = buffer_pool.Pool()
    in_use: list[tuple[str, int, list[int]]] = []
    alive: list[weakref.ref[Box]] = []
    most = 0
    for kind, mib, gives_back in steps:
        nbytes = mib * 2**20
        if gives_back and in_use:
            pool.give_back(*in_use.pop(0))
        else:
            in_use.append((kind, nbytes, pool.take(kind, nbytes, lambda size=nbytes: Box(size, alive))))
        most = max(most, sum(size for _, size, _ in in_use))
        held = sum(getattr(ref(), "nbytes", 0) for ref in alive)  # keeps no box alive itself
        assert held <= most + buffer_pool.POOL_SLACK
        assert len({id(box) for *_, box in in_use}) == len(in_use)


def test_a_pool_reuses_memory_of_the_same_kind_and_size_only() -> None:
    pool: buffer_pool.Pool[object] = buffer_pool.Pool()
    box = pool.take("a", 8, object)
    pool.give_back("a", 8, box)
    assert pool.take("b", 8, object) is not box
    assert pool.take("a", 9, object) is not box
    assert pool.take("a", 8, object) is box


class Box(list[int]):
    """An object with a size, which is tracked while it is alive."""

    def __init__(self, nbytes: int, alive: list[weakref.ref[Box]]) -> None:
        super().__init__()
        self.nbytes = nbytes
        alive.append(weakref.ref(self))

    __hash__ = object.__hash__
