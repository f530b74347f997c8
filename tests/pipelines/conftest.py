"""Fixtures of tests against TorchIO."""

from __future__ import annotations

from typing import Any

import pytest

from zpatch.compat.transforms import is_torchio_2


@pytest.fixture(scope="session")
def tio() -> Any:
    """TorchIO 1."""
    torchio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    if is_torchio_2(torchio):
        pytest.skip("the TorchIO that is installed is not TorchIO 1")
    return torchio
