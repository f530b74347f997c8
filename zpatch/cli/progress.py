"""Progress of long commands: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

import click

from zpatch.memory import format_bytes

REDRAW_S = 0.1
PLAIN_LINE_S = 10.0
BAR_CELLS = 24


class Progress:
    """Counts what is done of ``total`` and shows it on stderr; call it with each amount done.

    ``unit`` is ``"bytes"`` or the plural of what is counted.
    """

    def __init__(self, label: str, total: int, unit: str = "bytes") -> None:
        self._label = label
        self._total = max(total, 1)
        self._unit = unit
        self._done = 0
        self._quiet = bool(click.get_current_context().ensure_object(dict).get("quiet"))
        self._terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()

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
        pause_s = REDRAW_S if self._terminal else PLAIN_LINE_S
        if not self._quiet and time.monotonic() - self._shown >= pause_s:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        line = self._line(self._shown - self._started)
        click.echo(f"\r\x1b[K{line}" if self._terminal else line, err=True, nl=not self._terminal)

    def _line(self, elapsed_s: float) -> str:
        share = min(self._done / self._total, 1.0)
        rate = self._done / max(elapsed_s, 1e-9)
        left_s = (self._total - self._done) / rate if rate and share < 1 else 0.0
        filled = round(share * BAR_CELLS)
        bar = "#" * filled + "-" * (BAR_CELLS - filled)
        counts = f"{self._amount(self._done)} of {self._amount(self._total)}"
        return f"{self._label} [{bar}] {share:4.0%}  {counts}  {self._amount(rate)}/s  {_clock(left_s)} left"

    def _amount(self, count: float) -> str:
        return format_bytes(count) if self._unit == "bytes" else f"{count:.0f} {self._unit}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
