"""What tests of compat share: a cache of converted files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NIfTI files are converted into a folder of the test module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZPATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
