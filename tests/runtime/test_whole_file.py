"""A file appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zpatch.runtime.whole_file import whole_file


def test_a_file_appears_with_its_whole_contents_and_no_partial_file_is_left(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.txt"
    with whole_file(file) as partial:
        partial.write_text("all of it")
        assert not file.exists()
        assert partial.parent == file.parent
    assert file.read_text() == "all of it"
    assert list(file.parent.iterdir()) == [file]


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with whole_file(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def write_half(file: Path, error: BaseException) -> None:
    with whole_file(file) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_unchanged(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(type(error)):
        write_half(file, error)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_synced_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"), whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("all of it")
    assert list(tmp_path.iterdir()) == []


def test_contents_are_synced_before_the_file_is_renamed_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, bool]] = []

    def note(handle: int) -> None:
        steps.append((Path(f"/proc/self/fd/{handle}").resolve().name, (tmp_path / "a.txt").exists()))

    monkeypatch.setattr(os, "fsync", note)
    with whole_file(tmp_path / "a.txt", tmp_path / "b.partial") as partial:
        partial.write_text("all of it")
    assert steps == [("b.partial", False), (tmp_path.name, True)]


def test_a_partial_file_may_be_in_another_folder(tmp_path: Path) -> None:
    with whole_file(tmp_path / "one" / "a.txt", tmp_path / "other" / "b") as partial:
        partial.write_text("all of it")
    assert (tmp_path / "one" / "a.txt").read_text() == "all of it"
    assert list((tmp_path / "other").iterdir()) == []
