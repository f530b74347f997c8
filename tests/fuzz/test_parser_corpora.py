"""Each input that the fuzzers of the parsers found is parsed again: only errors of zpatch, in little time."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import C_TARGETS, targets
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


def test_each_fuzzer_has_seeds_and_a_small_corpus() -> None:
    names = {target.name for target in targets()}
    assert names == set(SEEDS) == {folder.name for folder in CORPUS.iterdir()}
    assert {target.name for target in C_TARGETS} == {file.stem for file in CORPUS.with_name("c").glob("*.c")}
    sizes = [file.stat().st_size for file in CORPUS.glob("*/*")]
    assert len(sizes) < 1000
    assert sum(sizes) < 2**20
