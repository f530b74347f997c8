"""The README and all pages of the documentation, run as they are written; see pages.py."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT, Page, blocks_of, matches
from PIL import Image
from slides_made import picture, write_svs

import zpatch as zp

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(page for page in DOCS.rglob("*.md") if not page.is_symlink())]
FAKE_SLURM = {
    "sbatch": 'cp "${@: -1}" job.$$ && { setsid bash job.$$ >job.log 2>&1 & echo "Submitted batch job $!"; }',
    "scancel": 'for job; do kill -- "-$job"; done 2>/dev/null; true',
}


SHOWN_ON = {  # objects whose example is a page
    "zpatch.compat.transforms.from_torchio": "how-to/from-torchio.md",
    "zpatch.compat.transforms.from_monai": "how-to/from-monai.md",
}


def make_slide(folder: Path) -> None:
    write_svs(folder / "case.svs", picture())


def make_scans(folder: Path, source: Path) -> None:
    shutil.copytree(source, folder / "scans")


def make_slurm(folder: Path) -> None:
    """Commands that do what those of SLURM do, on this machine."""
    for name, script in FAKE_SLURM.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)


@pytest.fixture
def folder_of(
    tmp_path: Path, cohort_source: Path, cohort_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Path]:
    """The folder that a page runs in, with the files that it begins with, as the working directory."""

    def make(page: Path) -> Path:
        if page.name == "index.md":
            (tmp_path / "scripts").symlink_to(ROOT / "scripts")
        elif page.name == "slide.md":
            make_slide(tmp_path)
        else:
            make_scans(tmp_path, cohort_source)
            if page != README:
                shutil.copytree(cohort_store, tmp_path / "cohort.zarr")
        if page.name == "cluster.md":
            make_slurm(tmp_path)
            monkeypatch.setenv("DASK_JOBQUEUE__SLURM__INTERFACE", "lo")
            monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("COLUMNS", "80")  # help texts are as wide
        monkeypatch.setenv("ZPATCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


@pytest.mark.timeout(300)  # a cluster starts many processes
@pytest.mark.filterwarnings("ignore")  # of torch and TorchIO, about themselves
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_block_of_a_page_runs_as_written(page: Path, folder_of: Callable[[Path], Path]) -> None:
    folder = folder_of(page)
    shown = Page(page, folder)
    shown.run()
    if page == README:
        assert shown.kinds == ["console", "python"]
        assert "LabelMap(" in shown.printed
        assert [file.name for file in (folder / "results").rglob("*.nii.gz")] == ["prediction.nii.gz"]
    if page.name == "slide.md":
        check_slide(shown, folder)


def check_slide(shown: Page, folder: Path) -> None:
    assert "read by tifffile" in shown.printed
    assert "torch.Size([5, 3, 128, 128, 1])" in shown.printed
    with Image.open(folder / "overlay.png") as overlay:
        assert overlay.size == (237, 162)
        colours = np.asarray(overlay).reshape(-1, 3).astype(int)
    is_brown, is_blue = colours[:, 0] > colours[:, 2] + 40, colours[:, 2] > colours[:, 0] + 40
    assert min(is_brown.mean(), is_blue.mean()) > 0.05


def test_a_page_that_says_another_output_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, message in (
        ("```python\n>>> 1 + 1\n3\n```", "Expected:\n    3"),
        ("```console\n$ zpatch --version\nzpatch, version 99\n```", "expected:\nzpatch, version 99"),
        ("```console\n$ zpatch info nothing.zarr\n```", "exited with 1"),
        ("```console\n$ zpatch info nothing.zarr\n$ echo $?\n0\n```", "expected:\n0"),
        ("```console\n$ pip install 'zpatch[nothing]'\n```", "no extra"),
        ("```yaml\na: 1\n```", "is not run"),
        ("```toml\na = 1\n```", "no title"),
    ):
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(AssertionError, match=re.escape(message)):
            Page(tmp_path / "page.md", tmp_path).run()


def test_an_ellipsis_stands_for_any_output() -> None:
    assert matches("a ... c\n", "a  b b\nc")
    assert not matches("a ... c\n", "a b\n")


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_command_and_its_help_is_on_the_page_of_commands() -> None:
    """Their texts are compared where the page runs; ``scripts/docs --commands`` writes them."""
    from zpatch.cli import COMMANDS

    page = DOCS / "reference" / "commands.md"
    shown = re.findall(r"^\$ zpatch (?:(\w+) )?--help$", page.read_text(), re.MULTILINE)
    assert shown == ["", *COMMANDS]
    assert all(block.kind in ("console", "toml") for block in blocks_of(page))


def test_the_readme_has_fewer_than_120_lines() -> None:
    assert len(README.read_text().splitlines()) < 120


def test_every_file_the_readme_names_exists() -> None:
    for name in set(re.findall(r"`((?:tests|scripts|docs)/[\w./-]+)`", README.read_text())):
        assert (ROOT / name).exists(), name
    tree = README.read_text().split("## Where things are")[1]
    named = set(re.findall(r"^      (\w+)/ ", tree, re.MULTILINE))
    assert named == {file.parent.name for file in (ROOT / "zpatch").glob("*/__init__.py")}


def shown_objects() -> list[str]:
    """The names of all objects on the pages of the reference, and of the facade."""
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)
    members = [
        (name, rest)
        for name, rest in re.findall(r"^::: ([\w.]+)\n.*\n +members: \[(.+)\]", pages, re.MULTILINE)
    ]
    inner = [f"{name}.{member}" for name, rest in members for member in rest.split(", ")]
    return sorted({*shown, *inner, *(f"zpatch.{name}" for name in zp.__all__)})


@pytest.mark.parametrize("name", shown_objects())
def test_each_object_of_the_reference_has_a_docstring_with_an_example(name: str) -> None:
    found = pkgutil.resolve_name(name)
    text = inspect.getdoc(found) or ""
    assert text.strip(), name
    if page := SHOWN_ON.get(name):
        text = (DOCS / page).read_text().replace(f" = {found.__name__}(", ">>> ")
    assert ">>> " in text or inspect.ismodule(found), f"{name} has no example"
    for member, value in vars(found).items() if inspect.isclass(found) else ():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and not member.startswith("_"):
            assert function.__doc__, f"{name}.{member} has no docstring"


def test_each_name_of_the_facade_is_on_a_page_of_the_reference() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    assert set(re.findall(r"^::: zpatch\.(\w+)$", page, re.MULTILINE)) >= set(zp.__all__)


def test_the_site_is_built_without_a_broken_link_or_reference(tmp_path: Path) -> None:
    """As ``scripts/docs`` builds it; links and pictures of pages are compared with what there is."""
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    for name in ("docs", "scripts", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        for name in re.findall(r"!\[.*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / name).is_file(), f"{page.name}: {name}"
            assert (page.parent / name).stat().st_size < 100_000
    reference = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    assert 'id="zpatch.Queue"' in reference
    assert reference.count("&gt;&gt;&gt;") > 100


def test_the_checks_before_a_commit_are_those_of_the_project() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"^ +entry: (.+)$", hooks, re.MULTILINE) == ["scripts/check"]
    version = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == zp.__version__
