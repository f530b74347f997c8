"""The output of commands: bars and tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from zpatch.cli.progress import Progress, show_table

LOADED = "import sys; print('rich' in sys.modules)"
BAR = """
import click, time
from zpatch.cli.progress import Progress, say
with click.Context(click.Command("predict"), obj={"quiet": QUIET}):
    with Progress("predicting", 1000, "patches") as progress:
        progress(400)
        say("sub-07 is odd [bold]", always=True)
        progress(600)
        END
"""
TABLE = """
import click
from zpatch.cli.progress import show_table
with click.Context(click.Command("info")):
    show_table([("image", "voxels", "file"), ("t1", "64x64x8", "F" * 30), ("[b]seg", "4", "F")])
"""


def on_a_terminal(program: str, columns: int = 100) -> str:
    """The whole output of a program on a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": str(columns)}
    environment |= {"TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # of Linux, when the other end is closed
            pass
        os.close(ours)
    return shown.decode().replace("\r\n", "\n")


def test_the_rate_is_of_the_last_half_minute_without_the_work_of_an_earlier_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with click.Context(click.Command("predict")), Progress("predicting", 1000, "patches") as progress:
        progress(400)
        for amount in (20, 20, 20, 20, 50, 50, 50, 50, 50):
            now += 10
            progress(amount)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(" 42%  420 of 1000 patches  2 patches/s  4:50 left")
    assert lines[3].endswith(" 48%  480 of 1000 patches  2 patches/s  4:20 left")
    assert lines[8].endswith(" 73%  730 of 1000 patches  5 patches/s  0:54 left")


def test_without_a_terminal_nothing_is_shown_before_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(click.Command("predict")), Progress("predicting", 1000, "patches") as progress:
        progress(1000)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("unit", "amounts"),
    [
        ("bytes", "2.0 KiB of 4.0 KiB  0 B/s  -:-- left"),
        ("ms", "2.0 s of 4.1 s  -:-- left"),
        ("subjects", "2048 of 4096 subjects  0 subjects/s  -:-- left"),
    ],
)
def test_amounts_are_shown_in_their_unit(unit: str, amounts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    with click.Context(click.Command("predict")), Progress("drawing", 4096, unit) as progress:
        progress(2048)
        assert str(progress) == amounts


def test_a_terminal_shows_a_bar_that_ends_at_all_and_lines_above_it() -> None:
    shown = on_a_terminal(BAR.replace("QUIET", "False").replace("END", "time.sleep(0.1)"))
    assert "predicting" in shown
    assert "1000 of 1000 patches" in shown.split("sub-07 is odd [bold]\n")[1]
    assert "\x1b[?25l" in shown  # the cursor is hidden
    assert shown.rindex("\x1b[?25h") > shown.rindex("100%")  # and is shown again


def test_a_bar_of_a_command_that_fails_leaves_the_cursor_and_the_amount_done() -> None:
    shown = on_a_terminal(BAR.replace("QUIET", "False").replace("END", "raise KeyboardInterrupt"))
    assert "1000 of 1000 patches" in shown
    assert shown.index("\x1b[?25h") < shown.index("Traceback")


def test_with_q_a_terminal_shows_no_bar_and_rich_is_not_loaded() -> None:
    shown = on_a_terminal(BAR.replace("QUIET", "True").replace("END", "") + LOADED)
    assert shown == "sub-07 is odd [bold]\nFalse\n"


def test_a_table_without_a_terminal_is_plain_text_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([("image", "voxels"), ("t1", "64x64x8"), ("[b]seg", "4")])
    assert capsys.readouterr().out.splitlines() == ["image   voxels", "t1      64x64x8", "[b]seg  4"]


def test_a_table_on_a_terminal_has_numbers_flush_right_and_wraps_the_last_column_only() -> None:
    lines = on_a_terminal(TABLE, columns=30).splitlines()
    assert [line.rstrip() for line in lines[1:]] == [
        f"t1      64x64x8  {'F' * 24}",
        f"                 {'F' * 6}",
        "[b]seg        4  F",
    ]


def test_info_in_json_does_not_load_rich(cohort_store: Path) -> None:
    program = f"import zpatch.cli; zpatch.cli.run(['info', {str(cohort_store)!r}, '--json']); {LOADED}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"
