"""Whatever is lost of a finished prediction, the same command computes that again, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record import Some
from test_faults import assert_whole, contents
from test_prediction_faults import Commands, Net, cohort, commands, plans_of, predict, store

import zpatch as zp
import zpatch.cli
from zpatch.networks import network
from zpatch.prediction import shard_ledger
from zpatch.records.names import MANIFEST

pytestmark = pytest.mark.usefixtures("one_thread")
assert all((cohort, commands, store))  # fixtures

SHARD = "ann/prediction/0/c/0/3/0/0"
HEADER = "bob/prediction/nifti/c/0"

Harm = Callable[[Path], Any]


@pytest.fixture
def done(cohort: zp.Cohort, out: Path) -> Path:
    """A finished prediction."""
    predict(cohort, out, Net())
    return out


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def be_a_folder(file: Path) -> None:
    file.unlink()
    (file / "inner").mkdir(parents=True)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shards that are computed from now on."""
    real, found = shard_ledger.ShardLedger.write, []

    def noted(self: Any, record: Any, shard: Any, *args: Any, **options: Any) -> None:
        found.append((record.subject, record.image, shard))
        real(self, record, shard, *args, **options)

    monkeypatch.setattr(shard_ledger.ShardLedger, "write", noted)
    return found


@pytest.mark.parametrize("harm", [Path.unlink, shorten, be_a_folder], ids=lambda harm: harm.__name__)
def test_a_lost_shard_is_found_by_the_same_command_and_only_that_one_is_computed(
    cohort: zp.Cohort, done: Path, computed: list[Any], harm: Harm
) -> None:
    expected, manifest = contents(done), (done / MANIFEST).read_bytes()
    harm(done / SHARD)
    again, reported = Net(), list[int]()
    predict(cohort, done, again, progress=reported.append)
    assert computed == [("ann", "prediction", (0, 3, 0, 0))]
    ann, bob = plans_of(cohort)
    assert 1 < again.patches < ann.patches // 2
    assert sum(reported) == ann.patches_run + bob.patches_run
    assert_whole(done, expected)
    assert (done / MANIFEST).read_bytes() == manifest
    last = Net()
    predict(cohort, done, last)
    assert last.patches == 1


def test_changed_bytes_are_found_with_verify(cohort: zp.Cohort, done: Path, computed: list[Any]) -> None:
    expected = contents(done)
    flip(done / SHARD)
    predict(cohort, done, Net())
    assert computed == []
    assert not zp.verify(done).ok
    predict(cohort, done, Net(), verify=True)
    assert computed == [("ann", "prediction", (0, 3, 0, 0))]
    assert_whole(done, expected)


def test_a_subject_with_a_lost_shard_is_compared_in_every_byte(
    cohort: zp.Cohort, done: Path, computed: list[Any]
) -> None:
    expected = contents(done)
    (done / SHARD).unlink()
    flip(done / "ann/prediction/0/c/0/0/0/0")
    predict(cohort, done, Net())
    assert [shard for *_, shard in computed] == [(0, 0, 0, 0), (0, 3, 0, 0)]
    assert_whole(done, expected)


@pytest.mark.parametrize(
    "lost", [HEADER, "bob/prediction/zarr.json", "bob/prediction/0/zarr.json", "bob/zarr.json", "bob"]
)
def test_any_lost_file_of_a_subject_is_made_again_and_the_network_runs_for_shards_only(
    cohort: zp.Cohort, done: Path, computed: list[Any], lost: str
) -> None:
    expected, manifest = contents(done), (done / MANIFEST).read_bytes()
    (shutil.rmtree if lost == "bob" else Path.unlink)(done / lost)
    again = Net()
    predict(cohort, done, again)
    assert len(computed) == (5 if lost == "bob" else 0)
    assert lost == "bob" or again.patches == 1
    assert_whole(done, expected)
    assert (done / MANIFEST).read_bytes() == manifest


def two_heads(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "two": torch.cat([batch, 500 - batch], dim=1),
        "three": torch.cat([batch, -batch, batch * 2], dim=1),
    }


@pytest.mark.parametrize("options", [{}, {"reduce": "argmax"}, {"mask": "mask", "fill": -1.0}])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_mended_store_is_byte_identical_for_every_kind_of_output(
    cohort: zp.Cohort, out: Path, options: dict[str, Any], jobs: int
) -> None:
    predict(cohort, out, two_heads, **options)
    expected = contents(out)
    for number, file in enumerate(sorted(out.glob("*/*/0/c/**/0"))):
        if file.is_file() and number % 3 == 0:
            file.unlink()
    assert not zp.verify(out, quick=True).ok
    predict(cohort, out, two_heads, jobs=jobs, **options)
    assert_whole(out, expected)


def test_a_damaged_store_is_read_right_in_the_process_that_mends_it(cohort: zp.Cohort, done: Path) -> None:
    expected = zp.Cohort(done)["ann"].prediction.data.copy()
    flip(done / SHARD)
    with contextlib.suppress(zp.ZpatchError):
        zp.Cohort(done)["ann"].prediction.data.copy()
    predict(cohort, done, Net(), verify=True)
    assert np.array_equal(zp.Cohort(done)["ann"].prediction.data, expected)


def test_shards_that_come_out_otherwise_than_before_are_entered_as_they_are(
    cohort: zp.Cohort, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another processor may give other last bits: then statistics and seals are those of the new bytes."""
    (done / SHARD).unlink()
    other = Net(seed=1)
    monkeypatch.setattr(network.Network, "__call__", lambda _, batch, *__: {"prediction": other(batch)})
    predict(cohort, done, Net())
    assert zp.verify(done).ok
    found = zp.Cohort(done)["ann"].prediction
    assert found.record is not None
    assert found.record.stats["mean"] == pytest.approx(found.data.mean(dtype=np.float64), rel=1e-5)


class Killed(BaseException):
    """Stands for the end of the process."""


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[Callable[[], int]]:
    """From the step of that number on nothing more is done to any file; gives the number of steps so far."""
    done = 0

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def killed_or_called(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done >= step:
                raise Killed
            return call(*args, **options)

        return killed_or_called

    with pytest.MonkeyPatch.context() as patch:
        for place, names in ((Path, ("replace", "rename")), (os, ("fsync", "link", "unlink", "rmdir"))):
            for name in names:
                patch.setattr(place, name, killing(getattr(place, name)))
        yield lambda: done


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # generators are killed too
def test_a_repair_that_is_killed_at_any_step_leaves_no_more_damage_and_is_finished_by_the_same_command(
    cohort: zp.Cohort, done: Path, some: Some
) -> None:
    expected, sound = contents(done), done.with_name("sound.zarr")
    shutil.copytree(done, sound)

    def damaged() -> set[str]:
        shutil.rmtree(done)
        shutil.copytree(sound, done)
        for lost in (SHARD, HEADER):
            (done / lost).unlink()
        return {damage.file for damage in zp.verify(done).damages}

    damaged()
    with killed_at(10**9) as steps:
        predict(cohort, done, Net())
    assert steps() > 100
    for step in some(range(1, steps() + 1), 4):
        before = damaged()
        with killed_at(step), pytest.raises(Killed):
            predict(cohort, done, Net())
        assert {damage.file for damage in zp.verify(done).damages} <= before, step
        predict(cohort, done, Net())
        assert_whole(done, expected)


@pytest.mark.slow
def test_a_repair_killed_at_any_moment_is_finished_by_the_same_command(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path, some: Some
) -> None:
    assert commands.predict(store, out).code == 0
    expected = contents(out)
    lost = [file for file in sorted(out.glob("*/*/0/c/**/0")) if file.is_file()][::2]
    for number in some(range(20), 3):
        for file in lost:
            file.unlink()
        pid = commands.start_prediction(store, out)
        time.sleep(0.02 + number * 0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        commands.wait()
        assert {str(out / damage.file) for damage in zp.verify(out).damages} <= set(map(str, lost))
        assert commands.predict(store, out).code == 0
        assert_whole(out, expected)


def test_the_command_line_mends_and_verify_advises_the_command_that_does(
    commands: Commands, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.predict(store, out).code == 0
    expected = contents(out)
    flip(out / SHARD)
    assert zpatch.cli.run(["verify", str(out)]) == 4
    said = capsys.readouterr().err
    assert f"damaged: {out / SHARD}: its contents have changed" in said
    assert "1 faults; run the same 'zpatch predict' command with --verify again" in said
    assert "convert" not in said
    assert commands.predict(store, out, "--verify").code == 0
    assert_whole(out, expected)
    (out / SHARD).unlink()
    assert zpatch.cli.run(["verify", str(out), "--quick"]) == 4
    assert "run the same 'zpatch predict' command again" in capsys.readouterr().err
    (out / "zarr.json").unlink()
    assert zpatch.cli.run(["verify", str(out)]) == 4
    assert "restore zarr.json from a copy, then run the same 'zpatch predict'" in capsys.readouterr().err


def test_a_read_of_a_damaged_prediction_names_the_command_that_mends_it(done: Path) -> None:
    (done / SHARD).unlink()
    with pytest.raises(zp.ZpatchError, match="the same 'zpatch predict' command, with --verify, repairs it"):
        zp.Cohort(done)["ann"].prediction.data.copy()
