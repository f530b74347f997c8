"""A griffe extension: examples and ``::`` blocks of docstrings become fenced blocks of Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)
LITERAL = re.compile(r"::\n\n((?: {4}.*\n|\n)+)")


class DocstringBlocks(griffe.Extension):
    """Rewrites the docstring of each object before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Fence the blocks of one docstring."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    r"""A docstring with its doctests as ``pycon`` blocks, and literal blocks as ``text``.

    >>> print(as_markdown("Adds.\n\n>>> 1 + 1\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    text = LITERAL.sub(lambda found: ":\n\n```text\n" + _unindented(found[1]) + "\n```\n\n", text + "\n")
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", text).rstrip()


def _unindented(block: str) -> str:
    return "\n".join(line[4:] for line in block.strip("\n").splitlines())
