"""Each input that the fuzzers of the parsers found is parsed again: only errors of zpatch, in little time."""

from __future__ import annotations

from pathlib import Path

import pytest
from parsers import PARSERS, fresh_folders, parse
from record import Some
from seeds import SEEDS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_each_input_that_was_found(name: str, tmp_path: Path, some: Some) -> None:
    inputs = {file.name: file.read_bytes() for file in sorted((CORPUS / name).iterdir())}
    inputs |= {f"seed {number}": data for number, data in enumerate(SEEDS[name]())}
    with fresh_folders(tmp_path) as fresh:
        for place in some(list(inputs), quick=40):
            try:
                parse(name, inputs[place], fresh())
            except Exception as error:
                error.add_note(place)
                raise
