"""What ``python -m build`` makes is installed into a clean environment, and converts a cohort there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import zpatch as zp

ROOT = Path(zp.__file__).parent.parent
BUILT = ("pyproject.toml", "README.md", "LICENSE")
LOOPS = {"_gather", "_halve", "_count", "_blend", "_resample"}
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", "LDSHARED": "/bin/false"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    """The source distribution, made of the files that are kept in the repository."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "zpatch", source / "zpatch", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in BUILT:
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", source, cwd=tmp_path)
    [made] = (source / "dist").iterdir()
    return made


def install(wheel: Path, folder: Path) -> Path:
    """The scripts of a clean environment that has the wheel, and the libraries of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    own = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, *pip, wheel, cwd=folder)
    where = run(python, "-c", "import zpatch; print(zpatch.__file__)", cwd=folder).strip()
    assert Path(where).is_relative_to(own)
    return python.parent


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["without a compiler", "with a compiler"])
def test_the_built_package_runs_in_a_clean_environment(
    sdist: Path, cohort_source: Path, tmp_path: Path, full: bool, compiler: str
) -> None:
    has_compiler = compiler.startswith("with ")
    if has_compiler and not full:
        pytest.skip("compiled loops are built with --full")
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, *pip, "-w", tmp_path, sdist, cwd=tmp_path, **({} if has_compiler else NO_COMPILER))
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"zpatch-{zp.__version__}-cp311-abi3-")
    files = zipfile.ZipFile(wheel).namelist()
    loops = {Path(name).name.removesuffix(".abi3.so") for name in files if name.endswith(".so")}
    assert loops == (LOOPS if has_compiler else set())
    assert {"zpatch/py.typed", "zpatch/report/templates/page.html.j2"} <= set(files)

    scripts = install(wheel, tmp_path)
    assert zp.__version__ in run(scripts / "zpatch", "--version", cwd=tmp_path)
    options = ("--chunk", "16", "--include", "sub-01", "-q")
    run(scripts / "zpatch", "convert", cohort_source, "cohort.zarr", *options, cwd=tmp_path)
    assert zp.verify(tmp_path / "cohort.zarr").ok
    zp.convert(cohort_source, tmp_path / "here.zarr", chunk=16, include=["sub-01"])
    there, here = (zp.Cohort(tmp_path / name)["sub-01"].t1.record for name in ("cohort.zarr", "here.zarr"))
    assert there is not None
    assert here is not None
    assert (there.stats, there.contents) == (here.stats, here.contents)


def test_every_loop_is_compiled_for_the_stable_interface() -> None:
    """An abi3 wheel runs on all later versions of Python only if C sees no more than that."""
    sources = {path.stem: path.read_text() for path in (ROOT / "zpatch").glob("*/_*.c")}
    assert set(sources) == LOOPS
    assert [name for name, text in sources.items() if "#define Py_LIMITED_API 0x030B0000" not in text] == []
