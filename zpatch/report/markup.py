"""HTML that escapes by construction: what is not ``Html`` is text, and text can never become markup."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

_VOID = {"img", "input", "link", "meta"}  # elements without an end


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Content = Html | str | int


def tag(name: str, /, *content: Content, **attributes: object) -> Html:
    """An element. Attributes that are None or False are left out; underscores stand for hyphens.

    >>> tag("p", "1 < 2", tag("b", "!"), class_="sum", hidden=True)
    '<p class="sum" hidden>1 &lt; 2<b>!</b></p>'
    """
    start = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        start += f" {key.rstrip('_').replace('_', '-')}"
        start += "" if value is True else f'="{_escaped(str(value))}"'
    return Html(f"<{start}>" if name in _VOID else f"<{start}>{joined(content)}</{name}>")


def joined(content: Iterable[Content]) -> Html:
    """Some content, one after the other.

    >>> joined(["<", tag("i", "x")])
    '&lt;<i>x</i>'
    """
    return Html("".join(part if isinstance(part, Html) else _escaped(str(part)) for part in content))


def _escaped(text: str) -> str:
    """Text for any place in a page; what cannot be seen, or would turn the direction of writing, is shown."""
    return html.escape("".join(c if _is_seen(c) else c.encode("unicode_escape").decode() for c in text))


def _is_seen(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"
