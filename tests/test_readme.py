"""The README and the how-tos are run as written: console blocks as commands, python blocks as one program."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from slides_made import picture, write_svs

from zpatch.cli import run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_readme_has_fewer_than_120_lines() -> None:
    assert len(README.read_text().splitlines()) < 120


def test_each_block_of_the_readme_runs_as_written(
    cohort_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cohort_source, tmp_path / "scans")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    kinds = []
    for kind, text in BLOCK.findall(README.read_text()):
        kinds.append(kind)
        if kind == "python":
            exec(compile(text, "README.md", "exec"), names)  # the code of the README, on purpose
            continue
        for line in text.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "zpatch"
            assert run(arguments) == 0, line
    assert kinds == ["console", "python"]
    printed = capsys.readouterr().out
    assert "LabelMap(" in printed
    assert sorted(file.name for file in (tmp_path / "results").rglob("*.nii.gz")) == ["prediction.nii.gz"]


def test_each_block_of_the_how_to_of_slides_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_svs(tmp_path / "case.svs", picture())
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "how_to"}
    for kind, text in BLOCK.findall((ROOT / "docs/slides.md").read_text()):
        if kind == "python":
            exec(compile(text, "slides.md", "exec"), names)
            continue
        for line in text.strip().splitlines():
            assert run(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    assert "read by tifffile" in printed
    assert "torch.Size([5, 3, 128, 128, 1])" in printed
    with Image.open("overlay.png") as overlay:
        assert overlay.size == (237, 162)
        colours = np.asarray(overlay).reshape(-1, 3).astype(int)
    is_brown, is_blue = colours[:, 0] > colours[:, 2] + 40, colours[:, 2] > colours[:, 0] + 40
    assert min(is_brown.mean(), is_blue.mean()) > 0.05


def test_each_block_of_the_how_to_of_sampling_runs_as_written(
    cohort_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cohort_store, tmp_path / "cohort.zarr")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for _, text in BLOCK.findall((ROOT / "docs/sampling.md").read_text()):
        exec(compile(text, "sampling.md", "exec"), names)
    for name, count in (("balanced", 16), ("weighted", 16), ("listed", 3), ("bright", 16)):
        assert len(list(names[name])) == count, name
    for name in ("pos_neg", "nnunet"):
        assert len(list(names[name](names["cohort"][0], 5))) == 5, name


def test_every_file_the_readme_names_exists() -> None:
    for name in set(re.findall(r"`((?:tests|scripts)/[\w./]+)`", README.read_text())):
        assert (ROOT / name).exists(), name
    tree = README.read_text().split("## Where things are")[1]
    named = set(re.findall(r"^      (\w+)/ ", tree, re.MULTILINE))
    assert named == {file.parent.name for file in (ROOT / "zpatch").glob("*/__init__.py")}
