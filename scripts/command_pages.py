#!/usr/bin/env python
"""Write the page of the commands: the ``--help`` of each, as its page of the documentation shows it.

    python scripts/command_pages.py docs/reference/commands.md

What stands above the first command is kept.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from zpatch.cli import COMMANDS, run

FIRST = "## zpatch\n"


def main(page: Path) -> None:
    """Rewrite the page from the first command on."""
    intro, first, _ = page.read_text().partition(FIRST)
    if not first:
        sys.exit(f"{page} has no line {FIRST.strip()!r}, below which the commands are written")
    page.write_text(intro + "\n".join(section(words) for words in ([], *([name] for name in COMMANDS))))


def section(words: list[str]) -> str:
    """The section of a command: its name, and a console block with its help."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run([*words, "--help"])
    name = " ".join(["zpatch", *words])
    return f"## {name}\n\n```console\n$ {name} --help\n{shown.getvalue().rstrip()}\n```\n"


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    main(Path(sys.argv[1]))
