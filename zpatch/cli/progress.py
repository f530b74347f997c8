"""The output of commands: bars and tables on a terminal, plain lines elsewhere. The door to rich.

rich is imported only if a bar or a table is drawn on a terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from zpatch.errors import visible
from zpatch.runtime.byte_sizes import format_bytes

if TYPE_CHECKING:
    import rich.progress

REDRAW_S = 0.1
PLAIN_LINE_S = 10.0
RATE_S = 30.0
LEAST_CELLS = 24  # of the last column of a table


class Progress:
    """Shows on stderr how much of ``total`` is done; call it with each amount done.

    A terminal shows a bar; elsewhere a line is printed every ten seconds, and with ``-q`` there is neither.
    ``unit`` is ``"bytes"``, ``"ms"`` (shown in seconds, without a rate) or a plural noun such as
    ``"patches"``. The rate is that of the last half minute, without the first amount, which may have been
    done by an earlier command.
    """

    def __init__(self, label: str, total: int, unit: str = "bytes") -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._marks: deque[tuple[float, int]] = deque()  # times, and the amounts done by then
        self._shown = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        if self._total and not is_quiet() and sys.stderr.isatty():
            self._bar = _bar(self._label, self._total, self)
            self._bar.start()
            _state()["bar"] = self._bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            _state()["bar"] = None
            self._show()
            self._bar.stop()

    def __call__(self, amount: int) -> None:
        """Report that ``amount`` more is done."""
        self._done += amount
        now = time.monotonic()
        if not self._marks:
            self._marks.append((now, self._done))
        if now - self._shown >= (PLAIN_LINE_S if self._bar is None else REDRAW_S):
            self._shown = now
            self._show()

    def _show(self) -> None:
        now = time.monotonic()
        while len(self._marks) > 1 and now - self._marks[0][0] > RATE_S:
            self._marks.popleft()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, refresh=True)
        else:
            say(f"{self._label} {min(self._done / max(self._total, 1), 1.0):4.0%}  {self}")
        self._marks.append((now, self._done))

    def __str__(self) -> str:
        """The amounts, the rate and the time left, as of now."""
        now = time.monotonic()
        since, before = self._marks[0] if self._marks else (now, self._done)
        rate = (self._done - before) / max(now - since, 1e-9)
        left = clock(max(self._total - self._done, 0) / rate) if rate else "-:--"
        done = self._amount(self._done).removesuffix(f" {self._unit}")
        speed = "" if self._unit == "ms" else f"{self._amount(rate)}/s  "
        return f"{done} of {self._amount(self._total)}  {speed}{left} left"

    def _amount(self, count: float) -> str:
        if self._unit == "ms":
            return f"{count / 1000:.1f} s"
        return format_bytes(count) if self._unit == "bytes" else f"{count:.0f} {self._unit}"


def clock(seconds: float) -> str:
    """A time as minutes and seconds, or hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _bar(label: str, total: int, amounts: Progress) -> rich.progress.Progress:
    """A bar on stderr, drawn without a thread: a fork while a thread holds a lock would block a worker."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[amounts]}"),
        console=Console(stderr=True),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task(label, total=total, amounts=amounts)
    return bar


def _state() -> dict[str, Any]:
    """The state of the running command: ``quiet``, ``verbose``, its ``bar`` and its ``command``."""
    state: dict[str, Any] = click.get_current_context().ensure_object(dict)
    return state


def is_quiet() -> bool:
    """Whether only errors and results are shown (``-q``)."""
    return bool(_state().get("quiet"))


def say(text: str, *, always: bool = False) -> None:
    """Print a line to stderr, above the bar if there is one; nothing with ``-q`` unless ``always``."""
    if is_quiet() and not always:
        return
    text = visible(text)
    if (bar := _state().get("bar")) is not None:
        bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        click.echo(text, err=True)


def show(text: str = "", *, err: bool = False) -> None:
    """Print a line to stdout or stderr, with control characters escaped."""
    click.echo(visible(text), err=err)


def print_json(value: Any) -> None:
    """Print a value to stdout as JSON."""
    click.echo(json.dumps(value, indent=2))


def show_table(rows: Sequence[Sequence[str]], *, err: bool = False) -> None:
    """Print rows in columns to stdout or stderr; the first row is the heading.

    On a terminal columns of numbers are flush right, and long cells of the last column are wrapped. Control
    characters are escaped.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    if (sys.stderr if err else sys.stdout).isatty():
        _show_rich_table(rows, err)
    else:
        click.echo(_plain_table(rows), err=err)


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, two spaces or more between cells.

    >>> print(_plain_table([("image", "size"), ("seg", "16x16x16")]))
    image  size
    seg    16x16x16
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _show_rich_table(rows: Sequence[Sequence[str]], err: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = list(zip(*rows, strict=True))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, *cells in columns:
        figures = all(not cell or cell == "-" or cell[0].isdigit() for cell in cells)
        table.add_column(Text(name), justify="right" if figures else "left", no_wrap=True)
    table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console = Console(stderr=err)
    *widths, last = (max(map(len, column)) for column in columns)
    console.width = max(console.width, sum(widths) + 2 * len(widths) + min(last, LEAST_CELLS))
    console.print(table, crop=False)
