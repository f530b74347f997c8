"""Where a stream is: small JSON, from which any queue of the same stream resumes, and no other queue."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import streams
import torch
from streams import SAMPLERS, Item, item, items, small_subjects, stop_forkserver, stream
from torch.utils.data.distributed import DistributedSampler

import zpatch as zp
from zpatch.epochs.epoch_plan import EpochPlan, Visits
from zpatch.epochs.stream_position import (
    StreamPosition,
    epoch_and_consumed,
    queue_state,
    subjects_digest,
)
from zpatch.errors import OptionError
from zpatch.sampling.patch_sampler import PatchSampler

# Torch says so where there are more workers than processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

OPTIONS: dict[str, Any] = {"max_length": 7, "patches_per_volume": 5, "transform": streams.noisy, "seed": 3}


@pytest.fixture(autouse=True)
def no_forkserver_is_left_behind(nothing_is_left_behind: None) -> Iterator[None]:
    yield
    stop_forkserver()


def queue_of(subjects: Any, sampler: PatchSampler | None = None, **options: Any) -> zp.Queue:
    return zp.Queue(subjects, zp.UniformSampler(6) if sampler is None else sampler, **{**OPTIONS, **options})


def states_of(queue: zp.Queue) -> list[dict[str, Any]]:
    """The state before the epoch, and after each of its patches, by way of JSON."""
    states = [queue.state_dict()]
    states += [queue.state_dict() for _ in queue]
    queue.set_epoch(0)
    return [json.loads(json.dumps(state)) for state in states]


# The position, without a queue


def plan_of(epoch: int, total: int = 3) -> EpochPlan:
    """A plan of an epoch of one subject."""
    one = Visits.of(np.array([0])), np.array([total])
    return EpochPlan(0, epoch, *one, total=total, group=1, buffer=1, shuffle=False)


def iterate(position: StreamPosition, patches: int) -> list[tuple[int, int]]:
    """Iterate and leave after some patches; what was handed out."""
    position.begin(plan_of(position.epoch))
    handed_out = []
    for _ in range(patches):
        handed_out.append(position.next_patch)
        position.advance()
    position.finish()
    return handed_out


def test_a_position_advances_from_epoch_to_epoch() -> None:
    position = StreamPosition()
    assert [iterate(position, 3) for _ in range(2)] == [[(n, 0), (n, 1), (n, 2)] for n in range(2)]
    assert position.next_patch == (2, 0)


def test_a_position_with_the_last_patch_handed_out_is_at_the_next_epoch() -> None:
    position = StreamPosition()
    position.begin(plan_of(0))
    places = []
    for _ in range(3):
        position.advance()
        places.append(position.next_patch)
    assert places == [(0, 1), (0, 2), (1, 0)]
    assert (position.epoch, position.consumed) == (0, 3)  # until the iteration ends


def test_an_epoch_that_was_broken_off_is_repeated_or_left() -> None:
    position = StreamPosition()
    iterate(position, 2)
    assert position.next_patch == (0, 2)
    assert iterate(position, 1) == [(0, 0)]
    position.leave_broken_epoch()
    assert position.next_patch == (1, 0)
    position.leave_broken_epoch()  # of the new one nothing was handed out
    assert position.next_patch == (1, 0)


def test_an_epoch_is_chosen_at_once_or_after_the_iteration_that_runs() -> None:
    position = StreamPosition()
    position.choose(4)
    assert position.next_patch == (4, 0)
    position.begin(plan_of(4))
    position.advance()
    position.choose(7)
    assert position.next_patch == (4, 1)
    position.advance()
    position.advance()
    assert position.next_patch == (7, 0)
    position.finish()
    position.finish()
    assert position.next_patch == (7, 0)


def test_a_resumed_position_begins_after_the_consumed_patches() -> None:
    position = StreamPosition()
    position.resume(plan_of(5), 2)
    assert position.begin(plan_of(5)) == 2
    position.advance()
    position.finish()
    assert position.next_patch == (6, 0)


@pytest.mark.parametrize(("chosen", "place"), [(5, (5, 2)), (6, (6, 0)), (4, (4, 0))])
def test_only_the_epoch_that_is_resumed_keeps_its_place(chosen: int, place: tuple[int, int]) -> None:
    position = StreamPosition()
    position.resume(plan_of(5), 2)
    position.choose(chosen)
    position.leave_broken_epoch()
    assert position.next_patch == place


def test_a_resumed_position_keeps_its_place_until_a_patch_is_handed_out() -> None:
    position = StreamPosition()
    position.resume(plan_of(5), 1)
    assert position.begin(plan_of(5)) == 1
    position.finish()  # the workers could not be started, say
    assert position.begin(plan_of(5)) == 1
    position.advance()
    position.finish()
    assert position.next_patch == (5, 2)
    assert position.begin(plan_of(5)) == 0


def test_a_position_resumed_during_an_iteration_ends_it() -> None:
    position = StreamPosition()
    position.begin(plan_of(0))
    first = position.iteration
    position.choose(9)
    position.resume(plan_of(2), 1)
    assert position.iteration is None
    assert position.next_patch == (2, 1)
    position.begin(plan_of(2))
    assert position.iteration not in (None, first)


# What a state is


def test_a_state_is_small_json(cohort: zp.Cohort) -> None:
    queue = queue_of(cohort)
    next(iter(queue))
    state = queue.state_dict()
    assert list(state) == ["version", "fingerprint", "seed", "epoch", "consumed"]
    assert (state["version"], state["seed"], state["epoch"], state["consumed"]) == (1, 3, 0, 1)
    text = json.dumps(state)
    assert len(text) < 600
    assert json.loads(text) == state


def test_a_state_is_as_small_for_a_long_epoch_of_many_subjects() -> None:
    short = json.dumps(queue_of(small_subjects(1), patches_per_volume=1).state_dict())
    long = json.dumps(queue_of(small_subjects(200), patches_per_volume=10**6).state_dict())
    assert len(long) < len(short) + 10


def test_a_state_is_json_for_integers_of_any_type() -> None:
    queue = queue_of(
        small_subjects(2), seed=np.int64(3), max_length=np.int32(7), patches_per_volume=np.uint8(5)
    )
    queue.set_epoch(np.int64(2))  # type: ignore[arg-type]
    assert json.loads(json.dumps(queue.state_dict()))["epoch"] == 2
    queue_of(small_subjects(2)).load_state_dict(queue.state_dict())


def test_a_state_counts_received_patches_and_is_at_the_next_epoch_after_the_last() -> None:
    queue = queue_of(small_subjects(2))
    places = [(state["epoch"], state["consumed"]) for state in states_of(queue)]
    assert places == [*((0, consumed) for consumed in range(10)), (1, 0)]


def test_a_loaded_state_is_the_state() -> None:
    states = states_of(queue_of(small_subjects(2)))
    for state in states:
        queue = queue_of(small_subjects(2), num_workers=3)
        queue.load_state_dict(state)
        assert queue.state_dict() == state


# Resuming


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_from_every_seventh_step_the_stream_resumes_with_another_number_of_workers(
    cohort: zp.Cohort, sampler: PatchSampler
) -> None:
    mapped = cohort.map(streams.normalised)
    with queue_of(mapped, sampler, num_workers=1) as queue:
        states = states_of(queue)
    whole = stream(mapped, sampler, epochs=[0, 1], **OPTIONS)
    per_epoch = len(states) - 1
    assert len(whole) >= 2 * per_epoch - 1 > 7
    for turn, consumed in enumerate([*range(0, per_epoch, 7), per_epoch - 1, per_epoch]):
        with queue_of(mapped, sampler, num_workers=turn % 4) as queue:
            queue.load_state_dict(states[consumed])
            assert items(queue) == (whole[consumed:per_epoch] or whole[per_epoch:])
            if turn == 1:
                assert items(queue) == whole[per_epoch:]


@pytest.mark.parametrize(
    "options", [{"max_length": 1}, {"max_length": 300}, {"shuffle_patches": False}], ids=str
)
@pytest.mark.parametrize("workers", [0, 2])
def test_from_every_step_the_stream_resumes(options: dict[str, Any], workers: int) -> None:
    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), epochs=[0], **{**OPTIONS, **options})
    states = states_of(queue_of(subjects, **options))
    with queue_of(subjects, num_workers=workers, **options) as queue:
        for consumed, state in enumerate(states[:-1]):
            queue.load_state_dict(state)
            assert items(queue) == whole[consumed:]


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_the_stream_resumes_with_another_start_method(
    cohort: zp.Cohort, start_method: str, full: bool
) -> None:
    if not full and start_method == "spawn":
        pytest.skip("a spawned worker gets its place as one of a forkserver does; both need --full")
    with queue_of(cohort, num_workers=2) as queue:
        states = states_of(queue)
    whole = stream(cohort, zp.UniformSampler(6), **OPTIONS)
    with queue_of(cohort, num_workers=1, start_method=start_method) as queue:
        queue.load_state_dict(states[13])
        assert items(queue) == whole[13:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_queue_in_mid_epoch_can_be_set_back_and_forth(workers: int) -> None:
    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), epochs=[0, 1, 2], **OPTIONS)
    with queue_of(subjects, num_workers=workers) as queue:
        states = []
        for _ in range(2):
            states += [queue.state_dict() for _ in queue]
        for step in (20, 3, 29, 14, 11, 0):  # states after step + 1 patches
            queue.load_state_dict(states[step])
            end = (step + 1) // 15 * 15 + 15
            for number, patch in enumerate(queue, step + 1):
                assert item(patch) == whole[number]
                if number == step + 4:
                    break
            else:
                assert number == end - 1
    assert [(state["epoch"], state["consumed"]) for state in states] == [divmod(n, 15) for n in range(1, 31)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_after_a_resumed_one_is_the_next_epoch(workers: int) -> None:
    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), epochs=[0, 1, 2], **OPTIONS)
    states = states_of(queue_of(subjects))
    with queue_of(subjects, num_workers=workers) as queue:
        queue.load_state_dict(states[9])
        assert items(queue) + items(queue) + items(queue) == whole[9:]


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_of_the_epoch_that_was_loaded_keeps_the_place_and_any_other_does_not(workers: int) -> None:
    """As a training loop does, which sets each epoch before it iterates."""
    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), epochs=[0, 1, 2], **OPTIONS)
    with queue_of(subjects) as queue:
        queue.set_epoch(1)
        iterator = iter(queue)
        for _ in range(4):
            next(iterator)
        state = queue.state_dict()
    with queue_of(subjects, num_workers=workers) as queue:
        queue.load_state_dict(state)
        for epoch, first in ((1, 15 + 4), (2, 30)):
            queue.set_epoch(epoch)
            assert items(queue) == whole[first : 15 * (epoch + 1)]
        queue.set_epoch(1)
        assert items(queue) == whole[15:30]  # once it was resumed, the epoch is whole again
        queue.load_state_dict(state)
        queue.set_epoch(0)
        assert items(queue) == whole[:15]
        queue.set_epoch(1)
        assert items(queue) == whole[15:30]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_after_an_epoch_is_the_start_of_the_next_one(workers: int) -> None:
    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), epochs=[0, 1], **OPTIONS)
    with queue_of(subjects, num_workers=workers) as queue:
        list(queue)
        ended = queue.state_dict()
    with queue_of(subjects, num_workers=workers) as queue:
        iterator = iter(queue)
        for _ in range(15):
            next(iterator)  # the last patch is here, and nobody has asked for one more
        assert queue.state_dict() == ended
    assert (ended["epoch"], ended["consumed"]) == (1, 0)
    with queue_of(subjects, num_workers=workers) as queue:
        queue.load_state_dict(ended)
        assert items(queue) == whole[15:]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 15])
def test_through_the_loader_the_stream_resumes_after_the_batches_that_were_given(batch_size: int) -> None:
    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), epochs=[0, 1], **OPTIONS)
    with queue_of(subjects, num_workers=2) as queue:
        loader = zp.SubjectsLoader(queue, batch_size)
        states = [loader.state_dict()]
        states += [json.loads(json.dumps(loader.state_dict())) for _ in loader]
    for number, state in enumerate(states):
        with queue_of(subjects, num_workers=number % 3) as queue:
            loader = zp.SubjectsLoader(queue, 2)
            loader.load_state_dict(state)
            found = values_of(loader)
        consumed = min(number * batch_size, 15)
        assert found == values_in(whole[consumed:15] or whole[15:])


Value = tuple[str, tuple[int, int, int], bytes]


def values_of(batches: Iterable[zp.PatchBatch]) -> list[Value]:
    """Subject, place and voxels of each patch of some batches."""
    return [
        (name, place.index, streams.voxel_bytes(image))
        for batch in batches
        for name, place, image in zip(batch.subjects, batch.patch_location, batch.t1.data, strict=True)
    ]


def values_in(patches: list[Item]) -> list[Value]:
    """The same of single patches."""
    return [(name, place, images[0][-1]) for name, place, images in patches]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["list", "distributed"])
def test_with_a_subject_sampler_the_stream_resumes_too(kind: str, workers: int) -> None:
    subjects = small_subjects(5)
    options = {**OPTIONS, "shuffle_subjects": False}

    def sampler() -> Any:
        return [4, 0, 2] if kind == "list" else DistributedSampler(range(5), num_replicas=2, rank=1)  # type: ignore[arg-type]

    whole = stream(subjects, zp.UniformSampler(6), epochs=[2, 3], subject_sampler=sampler(), **options)
    with zp.Queue(subjects, zp.UniformSampler(6), subject_sampler=sampler(), **options) as queue:
        queue.set_epoch(2)
        states = [json.loads(json.dumps(queue.state_dict())) for _ in queue]
    for consumed in (1, 8, 14, 15):
        options["num_workers"] = workers
        with zp.Queue(subjects, zp.UniformSampler(6), subject_sampler=sampler(), **options) as queue:
            queue.load_state_dict(states[consumed - 1])
            assert items(queue) == (whole[consumed:15] or whole[15:])


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_resumes_its_own_share(rank: int) -> None:
    subjects = small_subjects(5)
    share = {"rank": rank, "world_size": 2}
    whole = stream(subjects, zp.UniformSampler(6), **OPTIONS, **share)
    states = states_of(queue_of(subjects, **share))
    assert len(whole) == 15
    for consumed in range(0, 15, 7):
        with queue_of(subjects, num_workers=1, **share) as queue:
            queue.load_state_dict(states[consumed])
            assert items(queue) == whole[consumed:]


# Refusing


def cohort_with(**change: Any) -> list[zp.Subject]:
    """Three small subjects, of which the second one is changed."""
    subjects = small_subjects(3)
    subjects[1] = zp.Subject(**{"name": "sub-01", **subjects[1].images, **change})
    return subjects


OTHER_STREAMS: dict[str, tuple[str, Callable[[], zp.Queue]]] = {
    "sampler": ("sampler", lambda: queue_of(small_subjects(3), zp.UniformSampler(7))),
    "sampler kind": ("sampler", lambda: queue_of(small_subjects(3), zp.LabelSampler(6))),
    "seed": ("seed was 3 and is 4", lambda: queue_of(small_subjects(3), seed=4)),
    "patches_per_volume": (
        "patches_per_volume was 5 and is 6",
        lambda: queue_of(small_subjects(3), patches_per_volume=6),
    ),
    "max_length": ("max_length was 7 and is 8", lambda: queue_of(small_subjects(3), max_length=8)),
    "shuffle_subjects": (
        "shuffle_subjects was True and is False",
        lambda: queue_of(small_subjects(3), shuffle_subjects=False),
    ),
    "shuffle_patches": (
        "shuffle_patches was 'stratified' and is False",
        lambda: queue_of(small_subjects(3), shuffle_patches=False),
    ),
    "subject_sampler": (
        "subject_sampler was",
        lambda: queue_of(small_subjects(3), subject_sampler=[2, 1, 0], shuffle_subjects=False),
    ),
    "world_size": (
        "world_size was 1 and is 2",
        lambda: queue_of(small_subjects(3), rank=0, world_size=2),
    ),
    "uneven": ("uneven was 'pad' and is 'drop'", lambda: queue_of(small_subjects(3), uneven="drop")),
    "more subjects": ("cohort was", lambda: queue_of(small_subjects(4))),
    "fewer subjects": ("cohort was", lambda: queue_of(small_subjects(2))),
    "order": ("cohort was", lambda: queue_of(small_subjects(3)[::-1])),
    "name": ("cohort was", lambda: queue_of(cohort_with(name="sub-99"))),
    "shape": (
        "cohort was",
        lambda: queue_of(cohort_with(**small_subjects(1, size=13)[0].images)),
    ),
    "type": ("cohort was", lambda: queue_of(small_subjects(3, dtype=np.int32))),
    "image": ("cohort was", lambda: queue_of(cohort_with(t2=zp.ScalarImage(np.zeros((12, 12, 12)))))),
    "voxels": (
        "cohort was",
        lambda: queue_of(cohort_with(seg=zp.LabelMap(np.ones((12, 12, 12), np.uint8)))),
    ),
    "kind": ("cohort was", lambda: queue_of(cohort_with(t1=zp.LabelMap(np.zeros((12, 12, 12), np.int16))))),
}


@pytest.mark.parametrize(("text", "other"), OTHER_STREAMS.values(), ids=OTHER_STREAMS)
def test_another_stream_is_refused_by_the_name_of_the_changed_option(
    text: str, other: Callable[[], zp.Queue]
) -> None:
    queue = other()
    wanted = states_of(queue)[0]
    with pytest.raises(OptionError, match=f"the state is of another stream: .*{text}"):
        queue.load_state_dict(queue_of(small_subjects(3)).state_dict())
    assert queue.state_dict() == wanted  # and it is where it was


@pytest.mark.parametrize(
    "change",
    [{"patch_overlap": 2}, {"padding_mode": "edge"}, {"fill": 4}, {"patch_size": 8}],
    ids=lambda change: next(iter(change)),
)
def test_another_grid_is_refused(change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"patch_size": 6, "padding_mode": "constant", "fill": 3}
    state = queue_of(small_subjects(3), zp.GridSampler(**options)).state_dict()
    other = queue_of(small_subjects(3), zp.GridSampler(**{**options, **change}))
    with pytest.raises(OptionError, match=r"another stream: sampler was .GridSampler\("):
        other.load_state_dict(state)


def test_a_store_with_other_voxels_is_refused(cohort: zp.Cohort) -> None:
    others = [cohort["sub-01"], cohort["sub-02"]]
    state = queue_of([cohort["sub-01"], cohort["sub-02"]]).state_dict()
    queue_of(others).load_state_dict(state)
    renamed = zp.Subject.of(cohort["sub-04"].images, name="sub-02")
    with pytest.raises(OptionError, match="another stream: cohort was"):
        queue_of([cohort["sub-01"], renamed]).load_state_dict(state)


def test_a_file_outside_a_store_that_was_written_anew_is_refused(tmp_path: Path) -> None:
    def queue_after(voxels: int) -> zp.Queue:
        nib.save(nib.Nifti1Image(np.full((9, 9, 9), voxels, np.uint8), np.eye(4)), tmp_path / "seg.nii")
        os.utime(tmp_path / "seg.nii", (voxels, voxels))
        return queue_of([zp.Subject(seg=zp.LabelMap(tmp_path / "seg.nii"))])

    state = queue_after(1).state_dict()
    queue_after(1).load_state_dict(state)
    with pytest.raises(OptionError, match="another stream: cohort was"):
        queue_after(2).load_state_dict(state)


class TorchSampler(DistributedSampler[Any]):
    """One of torch's for some subjects."""

    def __init__(self, count: int, rank: int, replicas: int = 2, **options: Any) -> None:
        super().__init__(range(count), replicas, rank, **options)  # type: ignore[arg-type]


def queue_sampled_by(sampler: Any, **options: Any) -> zp.Queue:
    return queue_of(small_subjects(6), subject_sampler=sampler, shuffle_subjects=False, **options)


def test_the_state_of_one_rank_serves_all_ranks_of_a_distributed_sampler() -> None:
    """As a training program saves it on rank 0."""
    whole = [items(queue_sampled_by(TorchSampler(6, rank))) for rank in range(2)]
    assert set(whole[0]).isdisjoint(whole[1])
    state = states_of(queue_sampled_by(TorchSampler(6, 0)))[4]
    for rank in range(2):
        queue = queue_sampled_by(TorchSampler(6, rank))
        queue.load_state_dict(state)
        assert items(queue) == whole[rank][4:]


@pytest.mark.parametrize(
    "sampler",
    [TorchSampler(6, 0, 3), TorchSampler(6, 0, seed=1), TorchSampler(6, 0, shuffle=False), [0, 1, 2]],
    ids=["replicas", "seed", "shuffle", "list"],
)
def test_another_distributed_sampler_is_refused(sampler: Any) -> None:
    state = queue_sampled_by(TorchSampler(6, 0)).state_dict()
    with pytest.raises(
        OptionError, match=r"another stream: subject_sampler was 'TorchSampler\(num_replicas=2"
    ):
        queue_sampled_by(sampler).load_state_dict(state)


def test_a_state_depends_on_the_order_of_a_subject_sampler_alone() -> None:
    """Other changes are named by their own names."""
    state = queue_sampled_by([0, 1, 2]).state_dict()
    queue_sampled_by((0, 1, 2)).load_state_dict(state)
    with pytest.raises(OptionError, match=r"another stream: max_length was 7 and is 8$"):
        queue_sampled_by([0, 1, 2], max_length=8).load_state_dict(state)
    with pytest.raises(
        OptionError, match=r"another stream: subject_sampler was '[0-9a-f]+' and is '[0-9a-f]+'$"
    ):
        queue_sampled_by([0, 2, 1]).load_state_dict(state)


def test_every_change_is_named() -> None:
    other = queue_of(small_subjects(3), zp.UniformSampler(7), seed=4, max_length=8)
    with pytest.raises(OptionError) as refused:
        other.load_state_dict(queue_of(small_subjects(3)).state_dict())
    assert str(refused.value) == (
        "the state is of another stream: max_length was 7 and is 8; "
        "sampler was 'UniformSampler(patch_size=(6, 6, 6))' and is 'UniformSampler(patch_size=(7, 7, 7))'; "
        "seed was 3 and is 4"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 2},
        {"num_workers": 1, "start_method": "spawn"},
        {"transform": None},
        {"transform": streams.halved},
        {"dtype": torch.float16},
        {"timeout": 3},
    ],
    ids=lambda change: " ".join(change),
)
def test_options_that_do_not_change_the_stream_may_change(change: dict[str, Any]) -> None:
    def places(found: list[Item]) -> list[Any]:
        return [one[:2] for one in found]

    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), **OPTIONS)
    state = states_of(queue_of(subjects))[4]
    with queue_of(subjects, **change) as queue:
        queue.load_state_dict(state)
        assert places(items(queue)) == places(whole[4:])


GOOD: dict[str, Any] = queue_of(small_subjects(3)).state_dict()


@pytest.mark.parametrize(
    "state",
    [
        None,
        5,
        "state",
        [1, 2],
        {},
        {"version": 1},
        {key: GOOD[key] for key in GOOD if key != "consumed"},
        {key: GOOD[key] for key in GOOD if key != "fingerprint"},
        {key: GOOD[key] for key in GOOD if key != "seed"},
        {**GOOD, "version": 2},
        {**GOOD, "version": None},
        {**GOOD, "fingerprint": None},
        {**GOOD, "fingerprint": "abc"},
        {**GOOD, "fingerprint": {1: 2}},
        {**GOOD, "fingerprint": {}},
        {**GOOD, "epoch": -1},
        {**GOOD, "epoch": "1"},
        {**GOOD, "epoch": 1.5},
        {**GOOD, "epoch": float("inf")},
        {**GOOD, "epoch": 2**70},
        {**GOOD, "consumed": -1},
        {**GOOD, "consumed": 16},
        {**GOOD, "consumed": 2**70},
        {**GOOD, "consumed": float("nan")},
        {**GOOD, "consumed": [1]},
        {**GOOD, "seed": "3"},
    ],
    ids=str,
)
def test_an_invalid_state_is_refused_and_the_position_stays(state: Any) -> None:
    with queue_of(small_subjects(3)) as queue:
        iterator = iter(queue)
        next(iterator)
        before = queue.state_dict()
        with pytest.raises(OptionError, match="state"):
            queue.load_state_dict(state)
        assert queue.state_dict() == before
        assert len(list(iterator)) == 14


# The functions themselves


def test_a_state_returns_the_position_that_it_was_made_of() -> None:
    state = queue_state({"sampler": "S"}, 7, 3, 11)
    assert epoch_and_consumed(state, {"sampler": "S"}, 7) == (3, 11)
    assert epoch_and_consumed(json.loads(json.dumps(state)), {"sampler": "S"}, 7) == (3, 11)


def test_different_subjects_have_different_digests() -> None:
    kinds = [small_subjects(n) for n in range(1, 4)] + [small_subjects(2)[::-1], cohort_with(name="x")]
    assert len({subjects_digest(subjects) for subjects in kinds}) == len(kinds)
    assert subjects_digest(small_subjects(3)) == subjects_digest(tuple(small_subjects(3)))


# With torchdata


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's own
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_through_a_stateful_dataloader_the_stream_resumes(batch_size: int, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    subjects = small_subjects(3)
    whole = stream(subjects, zp.UniformSampler(6), epochs=[0, 1, 2, 3], **OPTIONS)

    def loader_over(queue: zp.Queue) -> Any:
        return stateful(queue, batch_size=batch_size, num_workers=0, collate_fn=zp.collate)

    wanted = values_in(whole)
    with queue_of(subjects, num_workers=workers) as queue:
        loader = loader_over(queue)
        states = []
        for _ in range(2):
            states += [pickle.dumps(loader.state_dict()) for _ in loader]
    per_epoch = -(-15 // batch_size)
    for number in range(0, 2 * per_epoch, 1 if batch_size > 1 else 7):
        given, ended = divmod(number + 1, per_epoch)[::-1]
        consumed = 15 * ended + given * batch_size
        with queue_of(subjects, num_workers=2 - workers) as queue:
            loader = loader_over(queue)
            loader.load_state_dict(pickle.loads(states[number]))
            rest = values_of(loader)  # nothing, where torchdata knows that the epoch had come to its end
            found = rest + values_of(loader)
            assert len(found) >= 15
            assert found == wanted[consumed : consumed + len(found)]
            assert consumed + len(found) == 15 * (ended + (2 if rest else 1))
