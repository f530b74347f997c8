"""Ranks: the shares of processes are equal, disjoint and always the same.

Run by torchrun this file is the program of one rank.
"""

from __future__ import annotations

import datetime
import faulthandler
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import click.testing
import pytest
import streams
import torch
import torch.distributed
import train_ddp
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import items, small_subjects
from torch.utils.data.distributed import DistributedSampler

import zpatch as zp
from zpatch.epochs.epoch_plan import Uneven
from zpatch.errors import OptionError, QueueError

COUNTS = (3, 5, 7)
WORKERS = (0, 1, 2)
EPOCHS = 3
UNEVEN = ("pad", "drop")
TIMEOUT_S = 60

Seen = list[tuple[str, list[int], str]]  # subject, location and voxels of each patch, in order


def queue_of(count: int, sampler: Any = None, **options: Any) -> zp.Queue:
    """The queue of a training run with ``count`` subjects."""
    defaults: dict[str, Any] = {"max_length": 5, "patches_per_volume": 3, "seed": count}
    defaults |= {"transform": streams.noisy, "timeout": TIMEOUT_S / 2}
    sampler = zp.UniformSampler(6) if sampler is None else sampler
    return zp.Queue(small_subjects(count), sampler, **{**defaults, **options})


def seen_in(batch: zp.PatchBatch) -> Seen:
    voxels = [hashlib.md5(streams.voxel_bytes(image)).hexdigest() for image in batch.t1.data]
    places = [list(place.index) for place in batch.patch_location]
    return list(zip(batch.subjects, places, voxels, strict=True))


def epochs_of(queue: zp.Queue, step: Any = lambda batch: None) -> list[Seen]:
    """The patches of each epoch of a training run."""
    seen = []
    with queue:
        loader = zp.SubjectsLoader(queue, 2)
        for epoch in range(EPOCHS):
            queue.set_epoch(epoch)
            seen.append([])
            for batch in loader:
                step(batch)
                seen[-1] += seen_in(batch)
    return seen


# The program of one rank


def train(folder: Path) -> None:
    """Iterate over the epochs of each queue as training does, and write the patches to a file."""
    faulthandler.dump_traceback_later(TIMEOUT_S - 10)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def step(batch: zp.PatchBatch) -> None:
        torch.distributed.all_reduce(batch.t1.data.sum())  # waits for all ranks, as a step of training does

    found: dict[str, Any] = {}
    for count in COUNTS:
        for workers in WORKERS:
            for uneven in UNEVEN:
                queue = queue_of(count, num_workers=workers, uneven=uneven)  # type: ignore[arg-type]
                found[f"{count} {workers} {uneven}"] = epochs_of(queue, step)
            sampler: DistributedSampler[Any] = DistributedSampler(range(count))  # type: ignore[arg-type]
            options: dict[str, Any] = {"subject_sampler": sampler, "shuffle_subjects": False}
            queue = queue_of(count, num_workers=workers, **options)
            found[f"{count} {workers} sampler"] = epochs_of(queue, step)
    try:
        queue_of(world_size - 1)
    except OptionError as error:
        found["refused"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The patches of each rank."""
    if request.param == 3 and not request.config.getoption("--full"):
        pytest.skip("three ranks of torchrun need --full; shares of any number are computed below")
    base = tmp_path_factory.getbasetemp()
    is_shared = os.environ.get("PYTEST_XDIST_WORKER") is not None  # with the other processes of this run
    folder = (base.parent if is_shared else base) / f"ranks-{request.param}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            run_ranks(folder, request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def run_ranks(folder: Path, ranks: int) -> None:
    folder.mkdir()
    paths = [str(Path(zp.__file__).parent.parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*torchrun, str(ranks), __file__, str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr


# Ranks that run side by side


@pytest.mark.parametrize("uneven", [*UNEVEN, "sampler"])
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("count", COUNTS)
def test_ranks_of_torchrun_see_disjoint_shares_of_equal_size(
    trained: list[dict[str, Any]], count: int, workers: int, uneven: str
) -> None:
    world_size = len(trained)
    rest = count % world_size
    repeated = (world_size - rest) % world_size if uneven != "drop" else 0
    for epoch in range(EPOCHS):
        shares = [rank[f"{count} {workers} {uneven}"][epoch] for rank in trained]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) == 3 * (-(-count // world_size) if uneven != "drop" else count // world_size)
        times = Counter(name for share in shares for name in {subject for subject, *_ in share})
        assert sum(times.values()) == count + repeated - (rest if uneven == "drop" else 0)
        assert set(times.values()) <= {1, 2}
        assert sum(number - 1 for number in times.values()) == repeated
        for share in shares:
            assert set(Counter(subject for subject, *_ in share).values()) == {3}


@pytest.mark.parametrize("uneven", UNEVEN)
@pytest.mark.parametrize("count", COUNTS)
def test_ranks_of_torchrun_get_their_share_with_any_number_of_workers(
    trained: list[dict[str, Any]], count: int, uneven: Uneven
) -> None:
    for rank, found in enumerate(trained):
        share = queue_of(count, rank=rank, world_size=len(trained), uneven=uneven)
        wanted = json.loads(json.dumps(epochs_of(share)))
        assert len({json.dumps(epoch) for epoch in wanted}) == EPOCHS
        for workers in WORKERS:
            assert found[f"{count} {workers} {uneven}"] == wanted


@pytest.mark.parametrize("count", COUNTS)
def test_a_distributed_sampler_in_torchrun_gives_the_same_with_any_number_of_workers(
    trained: list[dict[str, Any]], count: int
) -> None:
    for found in trained:
        first, *others = (found[f"{count} {workers} sampler"] for workers in WORKERS)
        assert others == [first, first]
        assert len({json.dumps(epoch) for epoch in first}) == EPOCHS


def test_fewer_subjects_than_ranks_of_torchrun_are_refused(trained: list[dict[str, Any]]) -> None:
    ranks = len(trained)
    for found in trained:
        assert (
            found["refused"]
            == f"{ranks - 1} subjects cannot be dealt out to {ranks} ranks; use fewer processes"
        )


# Ranks one after the other


@settings(max_examples=25)
@given(
    world_size=st.integers(1, 4),
    more=st.integers(0, 5),
    uneven=st.sampled_from(UNEVEN),
    grid=st.booleans(),
    epoch=st.integers(0, 100),
    shuffle=st.booleans(),
)
def test_shares_are_disjoint_and_equal_for_grids_of_unequal_counts_too(
    world_size: int, more: int, uneven: Uneven, grid: bool, epoch: int, shuffle: bool
) -> None:
    count = world_size + more
    subjects = [small_subjects(number + 1, size=9 + 2 * number)[number] for number in range(count)]
    sampler = zp.GridSampler(patch_size=8, patch_overlap=4) if grid else zp.UniformSampler(6)
    shares: list[Counter[Any]] = []
    for rank in range(world_size):
        options: dict[str, Any] = {"rank": rank, "world_size": world_size, "uneven": uneven}
        options |= {"shuffle_subjects": shuffle, "shuffle_patches": shuffle}
        queue = zp.Queue(subjects, sampler, 5, 3, **options)
        queue.set_epoch(epoch)
        length = len(queue)
        shares.append(Counter((patch.subject, patch.location.index) for patch in queue))
        assert length == shares[-1].total()
    assert len({share.total() for share in shares}) == 1
    names = [{name for name, _ in share} for share in shares]
    twice = sum(map(len, names)) - len(set().union(*names))
    if uneven == "drop":
        assert twice == 0
    else:
        assert twice <= -count % world_size
        assert len(set().union(*names)) == count


@pytest.mark.parametrize("grid", [True, False])
def test_an_even_share_is_the_same_for_each_value_of_uneven(grid: bool) -> None:
    sampler = zp.GridSampler(patch_size=8) if grid else zp.UniformSampler(6)
    found = []
    for uneven in ("pad", "drop", "error"):
        queue = queue_of(6, sampler, rank=1, world_size=3, uneven=uneven)
        found.append(items(queue))
    assert found[0] == found[1] == found[2]


def test_an_uneven_number_of_subjects_can_be_refused() -> None:
    with pytest.raises(OptionError, match="5 subjects cannot be divided evenly among 2 ranks"):
        queue_of(5, rank=0, world_size=2, uneven="error")


def test_an_uneven_number_of_grid_patches_can_be_refused() -> None:
    subjects = [*small_subjects(3), small_subjects(4, size=20)[3]]
    options: dict[str, Any] = {"rank": 0, "world_size": 2, "uneven": "error"}
    with pytest.raises(OptionError, match=r"the ranks' subjects have \d+ to \d+ patches; say uneven="):
        list(zp.Queue(subjects, zp.GridSampler(patch_size=8), **options))


def test_the_shares_of_an_epoch_are_the_epoch_of_a_single_process() -> None:
    whole = set(items(queue_of(6)))
    shares = [items(queue_of(6, rank=rank, world_size=2)) for rank in range(2)]
    assert set(shares[0]) | set(shares[1]) == whole
    assert len(shares[0]) + len(shares[1]) == len(whole)


def test_subjects_change_ranks_from_epoch_to_epoch() -> None:
    queue = queue_of(6, rank=0, world_size=2)
    shares = {tuple(sorted(queue.plan(epoch).visits.subjects)) for epoch in range(20)}
    assert len(shares) > 5


def test_a_subject_that_a_rank_visits_twice_gives_other_patches_the_second_time() -> None:
    """If grids are uneven, a rank with fewer patches repeats subjects, but not its random transforms."""
    subjects = [small_subjects(1, size=8)[0], small_subjects(2, size=20)[1]]
    seen = []
    for rank in range(2):
        options: dict[str, Any] = {"rank": rank, "world_size": 2, "transform": streams.noisy}
        found = items(zp.Queue(subjects, zp.GridSampler(patch_size=8), **options))
        assert len(set(found)) == len(found) == 27
        seen.append({(name, place) for name, place, _ in found})
    assert sorted(map(len, seen)) == [1, 27]


def test_the_rank_is_that_of_torch_distributed_if_it_is_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = items(queue_of(5, rank=1, world_size=2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert items(queue_of(5)) == wanted
    assert len(items(queue_of(5, rank=0, world_size=1))) == 15  # arguments take precedence
    with pytest.raises(OptionError, match="1 subjects cannot be dealt out to 2 ranks"):
        queue_of(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_queue_that_was_made_before_torch_distributed_is_refused(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    options: dict[str, Any] = {"num_workers": workers}
    found, given = queue_of(5, **options), queue_of(5, rank=0, world_size=1, **options)
    sampled = queue_of(5, subject_sampler=[1, 2], shuffle_subjects=False, **options)
    with found, given, sampled:
        next(iter(found))
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(
            QueueError, match=r"as rank 0 of 1, and this is rank 1 of 2; make the queue after"
        ):
            next(iter(found))
        assert len(list(given)) == 15  # its share was given as arguments
        assert len(list(sampled)) == 6
        with queue_of(5, **options) as late:
            assert len(list(late)) == 9
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
            assert len(list(late)) == 9  # the share is kept after torch.distributed has ended


@pytest.mark.parametrize("workers", [0, 1])
def test_all_patches_of_an_even_epoch_before_an_uneven_one_are_given(workers: int) -> None:
    subjects = [small_subjects(n + 1, size=8 + 4 * (n % 2))[n] for n in range(4)]
    options: dict[str, Any] = {"rank": 0, "world_size": 2, "uneven": "error", "num_workers": workers}

    def is_even(epoch: int) -> bool:
        with suppress(OptionError):
            return queue.plan(epoch).total > 0
        return False

    with zp.Queue(subjects, zp.GridSampler(patch_size=4), **options) as queue:
        epoch = next(n for n in range(100) if is_even(n) and not is_even(n + 1))
        queue.set_epoch(epoch)
        assert len(list(queue)) == 8 + 27
        with pytest.raises(OptionError, match=r"the ranks' subjects have 16 to 54 patches; say uneven="):
            list(queue)


def test_a_distributed_sampler_divides_subjects_and_shuffles_them_in_each_epoch() -> None:
    shares = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(range(6), num_replicas=2, rank=rank)  # type: ignore[arg-type]
        options: dict[str, Any] = {"subject_sampler": sampler, "shuffle_subjects": False}
        alone = epochs_of(queue_of(6, **options))
        assert epochs_of(queue_of(6, num_workers=2, **options)) == alone
        shares.append([{name for name, *_ in epoch} for epoch in alone])
    for one, other in zip(*shares, strict=True):
        assert len(one) == len(other) == 3
        assert not one & other
    assert shares[0][0] != shares[0][1] or shares[0][1] != shares[0][2]


# The example script


@pytest.mark.parametrize("side", ["30", "50"])
def test_the_training_script_refuses_patches_that_its_network_cannot_halve(tmp_path: Path, side: str) -> None:
    arguments = [str(tmp_path), str(tmp_path / "unet.pt"), "--patch-size", side]
    answer = click.testing.CliRunner().invoke(train_ddp.main, arguments)
    assert answer.exit_code == 2
    assert "'--patch-size': " in answer.output
    assert not isinstance(answer.exception, RuntimeError)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
