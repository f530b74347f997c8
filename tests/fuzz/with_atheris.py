"""Fuzz one parser with atheris: with_atheris.py NAME, then folders and options of libFuzzer."""

from __future__ import annotations

import sys


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["zpatch"]):
        import parsers
    name = sys.argv[1]
    command = f"{sys.executable} {__file__} {name}"  # with which libFuzzer starts itself to merge corpora
    with parsers.fresh_folders() as fresh, parsers.bounded_memory():
        atheris.Setup([command, *sys.argv[2:]], lambda data: parsers.parse(name, data, fresh()))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
