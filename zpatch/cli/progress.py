"""Progress of long commands: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

import click

from zpatch.runtime.byte_sizes import format_bytes

REDRAW_S = 0.1
PLAIN_LINE_S = 10.0
BAR_CELLS = 24
RATE_S = 30.0


class Progress:
    """Counts what is done of ``total`` and shows it on stderr; call it with each amount done.

    ``unit`` is ``"bytes"`` or the plural of what is counted. The rate is that of the last half minute; the
    first amount is not in it, as it may have been done by an earlier command.
    """

    def __init__(self, label: str, total: int, unit: str = "bytes") -> None:
        self._label = label
        self._total = max(total, 1)
        self._unit = unit
        self._done = 0
        self._quiet = bool(click.get_current_context().ensure_object(dict).get("quiet"))
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque()  # when so much was done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and not self._quiet:
            self._show()
            click.echo(err=True)

    def __call__(self, amount: int) -> None:
        """So much more is done."""
        self._done += amount
        now = time.monotonic()
        if not self._marks:
            self._marks.append((now, self._done))
        pause_s = REDRAW_S if self._terminal else PLAIN_LINE_S
        if not self._quiet and now - self._shown >= pause_s:
            self._show()

    def _show(self) -> None:
        self._shown = now = time.monotonic()
        while len(self._marks) > 1 and now - self._marks[0][0] > RATE_S:
            self._marks.popleft()
        line = self._line(now)
        self._marks.append((now, self._done))
        click.echo(f"\r\x1b[K{line}" if self._terminal else line, err=True, nl=not self._terminal)

    def _line(self, now: float) -> str:
        share = min(self._done / self._total, 1.0)
        since, before = self._marks[0] if self._marks else (now, self._done)
        rate = (self._done - before) / max(now - since, 1e-9)
        left_s = (self._total - self._done) / rate if rate and share < 1 else 0.0
        filled = round(share * BAR_CELLS)
        bar = "#" * filled + "-" * (BAR_CELLS - filled)
        done = self._amount(self._done).removesuffix(f" {self._unit}")
        counts = f"{done} of {self._amount(self._total)}"
        return f"{self._label} [{bar}] {share:4.0%}  {counts}  {self._amount(rate)}/s  {_clock(left_s)} left"

    def _amount(self, count: float) -> str:
        return format_bytes(count) if self._unit == "bytes" else f"{count:.0f} {self._unit}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
