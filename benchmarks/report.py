"""`results.md`: the machine, a section for each stage, rewritten when the stage runs, and the caveats."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results.md"
PACKAGES = ("zpatch", "numpy", "zarr", "numcodecs", "isal", "nibabel", "dask", "torch")
PEERS = (
    "nifti-zarr",
    "ngff-zarr",
    "blosc2",
    "tensorstore",
    "monai",
    "torchio",
    "patchly",
    "scipy",
    "simpleitk",
    "scikit-image",
    "openslide-python",
    "tiffslide",
    "tifffile",
    "imagecodecs",
    "pyarrow",
)

TITLE = "# Results"
LAST_HEADING = "## What the figures do not show"
ALWAYS_NOT_SHOWN = (
    "Absolute figures belong to this machine, which may be a virtual one with noisy neighbours. Ratios are "
    "medians over repetitions that alternate in one run, pair by pair, and hold better on other machines.",
    "Each section states when it was measured; sections may be of different days and commits.",
)


def write_results(stage: str, section: str, not_shown: Mapping[str, Sequence[str]]) -> None:
    """Replace the section of a stage, and keep the sections of other stages."""
    sections = _sections(RESULTS.read_text()) if RESULTS.exists() else {}
    sections[stage] = f"{_when()}\n\n{section}"
    caveats = [*ALWAYS_NOT_SHOWN, *(text for name in sorted(sections) for text in not_shown.get(name, ()))]
    parts = [
        TITLE,
        "Written by `scripts/bench`; [README.md](README.md) says what is compared, and why that is fair.",
        _machine(),
        *(f"## {name}\n\n{sections[name]}" for name in sorted(sections)),
        LAST_HEADING,
        "\n".join(f"- {text}" for text in caveats),
    ]
    partial = RESULTS.with_suffix(".partial")
    partial.write_text("\n\n".join(parts) + "\n")
    partial.replace(RESULTS)


def _sections(text: str) -> dict[str, str]:
    body = text.partition(LAST_HEADING)[0]
    pieces = re.split(r"^## (.+)$", body, flags=re.MULTILINE)[1:]
    return {name: section.strip() for name, section in zip(pieces[::2], pieces[1::2], strict=True)}


def _machine() -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "\n".join(
        [
            f"- Machine: {len(os.sched_getaffinity(0))} cores, {_cpu_model()}, {memory / 2**30:.1f} GiB "
            f"of memory, {platform.system()} {platform.release()}",
            f"- Versions: Python {platform.python_version()}, {', '.join(map(_version, PACKAGES))}",
            f"- Peers: {', '.join(map(_version, PEERS))}",
            f"- Last run: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        ]
    )


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _when() -> str:
    commit = _git("rev-parse", "--short", "HEAD")
    changed = " with changes not committed" if _git("status", "--porcelain", "zpatch") else ""
    load = os.getloadavg()[0]
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC at {commit}{changed}; load at the end {load:.1f}."
    )


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no commit" * (arguments[0] == "rev-parse")
