"""Exports are refused or fail with one line that names the file."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_a_full_disk_is_one_line_that_names_the_file(
    cohort_store: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zpatch.conversion.store_export.write_nifti", full)
    monkeypatch.setattr("zpatch.report.report.page_html", full)
    code, _, stderr = run("export", cohort_store, tmp_path / "out")
    assert code != 0
    assert re.search(r"out/sub-01/\w+.nii.gz: it cannot be written to \(No space left on device\);", stderr)
    code, _, stderr = run("report", cohort_store, "--output", tmp_path / "page.html")
    assert code == 1
    assert f"{tmp_path}/page.html: it cannot be written to (No space left on device)" in stderr
