"""Pages of Markdown, run as they are written: each fenced block in turn, in one folder and one namespace.

``python`` is executed, and where it begins with ``>>>`` its output is compared. With ``title="name.py"`` it
is written to that file, as ``toml`` is, for a later command. Lines of ``console`` that begin with ``$`` are
commands, and those below are their output, where ``...`` stands for anything and spaces do not count; without
a ``$`` all lines are commands. A command must succeed, unless the next one is ``echo $?``. ``zpatch`` runs in
this process, ``pip install`` is only compared with pyproject.toml, and anything else is given to the shell.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zpatch.cli import run

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)```(.*)$", re.MULTILINE)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
KINDS = ("python", "console", "toml")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is the text of, and its first line on the page."""

    kind: str
    title: str | None
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text, blocks = page.read_text(), []
    fences = FENCE.finditer(text)
    for start in fences:
        stop = next(fences)
        kind, _, rest = start[2].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        body = textwrap.dedent(text[start.end() + 1 : stop.start()])
        blocks.append(Block(kind, title and title[1], body, text.count("\n", 0, start.end()) + 1))
    return blocks


def commands_of(text: str) -> Iterator[tuple[str, str | None]]:
    """The commands of a console block, each with its output; None where none is shown."""
    if not text.startswith("$ "):
        yield from ((line, None) for line in text.strip().splitlines())
    for command, output in COMMAND.findall(text):
        yield command.replace("\\\n", ""), output if output.strip() else None


class Page:
    """A page that runs in a folder; ``kinds`` are the languages of its blocks, ``printed`` their output."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict[str, Any] = {"__name__": "page"}
        self.kinds: list[str] = []
        self.printed = ""
        self._code = 0
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}

    def run(self) -> None:
        """Run all blocks, in the working directory, which must be the folder."""
        for block in blocks_of(self.page):
            where = f"{self.page.name}:{block.line}"
            assert block.kind in KINDS, f"{where}: a fenced block of {block.kind!r} is not run"
            self.kinds.append(block.kind)
            if block.title:
                (self.folder / block.title).write_text(block.text)
            elif block.kind == "console":
                self._console(block, where)
            else:
                assert block.kind == "python", f"{where}: the block has no title"
                self._python(block, where)

    def _python(self, block: Block, where: str) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.text.lstrip().startswith(">>>"):
                self._doctest(block, where)
            else:
                code = compile("\n" * block.line + block.text, self.page.name, "exec")
                exec(code, self.names)  # the code of the page, on purpose
        self.printed += printed.getvalue()

    def _doctest(self, block: Block, where: str) -> None:
        test = doctest.DocTestParser().get_doctest(block.text, self.names, where, self.page.name, block.line)
        report = io.StringIO()
        failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write, clear_globs=False)
        assert not failed, report.getvalue()
        self.names.update(test.globs)

    def _console(self, block: Block, where: str) -> None:
        for command, expected in commands_of(block.text):
            if command == "echo $?":
                got, self._code = f"{self._code}\n", 0
            else:
                assert self._code == 0, f"{where}: the command before {command!r} exited with {self._code}"
                self._code, got = self._command(command, where)
            self.printed += got
            if expected is not None:
                assert matches(expected, got), f"{where}: {command}\nexpected:\n{expected}\ngot:\n{got}"
        assert self._code == 0, f"{where}: {command} exited with {self._code}:\n{got}"

    def _command(self, command: str, where: str) -> tuple[int, str]:
        words = shlex.split(command)
        if words[0] == "zpatch" and not set(words) & {"|", ">", "&&", "&"}:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = run(words[1:])
            return code, err.getvalue() + out.getvalue()
        if words[:2] == ["pip", "install"]:
            check_installed_by_name(words[2:], where)
            return 0, ""
        shell = ["bash", "-c", command]
        done = subprocess.run(
            shell, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr + done.stdout


def matches(expected: str, got: str) -> bool:
    """Whether an output is as a page shows it."""
    return doctest.OutputChecker().check_output(expected.strip() + "\n", got.strip() + "\n", FLAGS)


def check_installed_by_name(words: list[str], where: str) -> None:
    """A line of pip must install this package, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [package] = [word for word in words if not word.startswith("-")]
    named = re.fullmatch(r"(zpatch|\.)(?:\[([\w,]+)\])?", package)
    assert named, f"{where}: pip install {package}"
    unknown = set((named[2] or "").split(",")) - {""} - set(project["optional-dependencies"])
    assert not unknown, f"{where}: no extra {unknown}"
