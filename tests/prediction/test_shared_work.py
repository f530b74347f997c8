"""The file with code for other processes: nobody else can open it, and another in its place is refused."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from zpatch.errors import StoreError
from zpatch.networks.network import Network
from zpatch.planning.prediction_options import PredictOptions
from zpatch.prediction.shared_work import SentNetwork, WorkFile


@pytest.fixture
def work(tmp_path: Path) -> WorkFile:
    """The file of a prediction without subjects."""
    options = PredictOptions.of(image="t1", patch_size=8, device="cpu")
    return SentNetwork.of(Network.of(torch.nn.ReLU(), options), options).write(tmp_path / "out" / "work", ())


def test_the_file_is_for_its_user_alone(work: WorkFile) -> None:
    assert stat.S_IMODE(work.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(work.path.parent.stat().st_mode) == 0o700
    assert isinstance(work.load().network.model, torch.nn.ReLU)


def test_a_folder_that_is_there_already_is_refused(work: WorkFile) -> None:
    options = PredictOptions.of(image="t1", patch_size=8, device="cpu")
    with pytest.raises(FileExistsError):
        SentNetwork.of(Network.of(torch.nn.ReLU(), options), options).write(work.path.parent, ())


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("way", ["written over", "replaced", "a link"])
def test_another_file_in_its_place_is_refused_and_not_loaded(
    work: WorkFile, tmp_path: Path, way: str
) -> None:
    evil = tmp_path / "evil.pickle"
    evil.write_bytes(cloudpickle.dumps(Evil(tmp_path / "ran")))
    if way == "written over":
        work.path.write_bytes(evil.read_bytes())
    else:
        work.path.unlink()
        work.path.symlink_to(evil) if way == "a link" else evil.rename(work.path)
    with pytest.raises((StoreError, OSError), match=r"was changed after it was written|is a link"):
        work.load()
    assert not (tmp_path / "ran").exists()
