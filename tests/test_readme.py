"""The README is run as written: console blocks as commands, python blocks as one program."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

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


def test_every_file_the_readme_names_exists() -> None:
    for name in set(re.findall(r"`((?:tests|scripts)/[\w./]+)`", README.read_text())):
        assert (ROOT / name).exists(), name
    tree = README.read_text().split("## Where things are")[1]
    named = set(re.findall(r"^      (\w+)/ ", tree, re.MULTILINE))
    assert named == {file.parent.name for file in (ROOT / "zpatch").glob("*/__init__.py")}
