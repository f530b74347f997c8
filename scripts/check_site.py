#!/usr/bin/env python
"""Open every page of the built site in headless Chromium, at the widths of a desktop and of a phone.

    python scripts/check_site.py site --shots shots

It fails on errors in the console, on links, anchors and pictures inside the site that do not exist, on pages
that are wider than a phone, and if the search does not find `LabelSampler`. With `--shots` a picture of some
pages is written. Needs playwright and any Chromium: its own, or one that is installed.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import click
from playwright.sync_api import Browser, Error, Page, sync_playwright

WIDTHS = {"desktop": 1280, "phone": 390}
HEIGHT = 900
SHOWN = ("", "tutorials/segmentation/", "concepts/blending-law/", "reference/python/", "measured/results/")
WANTED = "LabelSampler"
INSTALLED = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def opened_browser() -> Iterator[Browser]:
    """Headless Chromium: playwright's own, or one that is installed."""
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, INSTALLED)), None)
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            sys.exit(
                f"no Chromium: apt-get install chromium, or playwright install chromium ({error.message})"
            )
        try:
            yield browser
        finally:
            browser.close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder that is served on this machine."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@click.command()
@click.argument("site", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--shots", type=click.Path(path_type=Path), help="A folder for pictures of some pages.")
def main(site: Path, shots: Path | None) -> None:
    """Check the built SITE."""
    problems: list[str] = []
    pages = sorted(page.parent.relative_to(site).as_posix() for page in site.rglob("index.html"))
    with served(site) as address, opened_browser() as browser:
        targets: dict[str, set[str]] = {}
        links: list[tuple[str, str]] = []
        for name, width in WIDTHS.items():
            tab = browser.new_page(viewport={"width": width, "height": HEIGHT})
            tab.on(
                "console",
                lambda said: problems.append(f"console: {said.text}") if said.type == "error" else None,
            )
            tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
            for page in pages:
                problems.extend(visit(tab, address, page, targets, links))
            if shots is not None:
                take_shots(tab, address, shots, name)
        problems.extend(broken(address, links, targets, site))
        if not found_by_search(tab, address):
            problems.append(f"the search does not find {WANTED}")
    for problem in dict.fromkeys(problems):
        click.echo(problem, err=True)
    click.echo(f"{len(pages)} pages, {len(links)} links, {len(problems)} problems")
    sys.exit(bool(problems))


def visit(
    tab: Page, address: str, page: str, targets: dict[str, set[str]], links: list[tuple[str, str]]
) -> Iterator[str]:
    """Open a page, note its anchors and links, and give what is wrong with it."""
    url = address if page == "." else f"{address}{page}/"
    tab.goto(url, wait_until="load")
    targets[url] = set(
        tab.evaluate("[...document.querySelectorAll('[id],a[name]')].map(e => e.id || e.name)")
    )
    links += [(url, link) for link in tab.evaluate("[...document.links].map(a => a.href)")]
    for picture in tab.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"):
        yield f"{page}: the picture {picture} is not shown"
    wide, width = tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    if wide > width:
        yield f"{page}: it is {wide} pixels wide on a screen of {width}"


def broken(
    address: str, links: list[tuple[str, str]], targets: dict[str, set[str]], site: Path
) -> Iterator[str]:
    """The links inside the site that lead nowhere."""
    for page, link in links:
        url, anchor = urldefrag(link)
        if url.startswith(address):
            exists = url in targets or (site / unquote(url.removeprefix(address))).is_file()
            if not exists or (anchor and url in targets and unquote(anchor) not in targets[url]):
                yield f"{page}: the link {link} leads nowhere"


def found_by_search(tab: Page, address: str) -> bool:
    """Whether the search of the site finds an object of the reference."""
    tab.set_viewport_size({"width": WIDTHS["desktop"], "height": HEIGHT})
    tab.goto(address, wait_until="load")
    tab.keyboard.press("/")
    tab.wait_for_timeout(500)
    tab.keyboard.type(WANTED, delay=20)
    with contextlib.suppress(Error):
        tab.wait_for_selector("a[href*='reference/python']:visible >> text=LabelSampler", timeout=5000)
        return True
    return False


def take_shots(tab: Page, address: str, folder: Path, name: str) -> None:
    """Pictures of some pages at the width of the tab."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in SHOWN:
        tab.goto(address + page, wait_until="load")
        tab.wait_for_timeout(300)
        tab.screenshot(path=folder / f"{page.strip('/').replace('/', '-') or 'start'}-{name}.png")


if __name__ == "__main__":
    main()
