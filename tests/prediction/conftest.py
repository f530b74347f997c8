"""Fixtures of predictions."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import zpatch.prediction.regions
from zpatch.chunks.layout import plan_output_layout


@pytest.fixture(scope="module")
def small_chunks() -> Any:
    """Output in chunks of 8 voxels and small shards, so that small volumes have many shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            zpatch.prediction.regions,
            "plan_output_layout",
            functools.partial(plan_output_layout, chunk=8),
        )
        patch.setattr(zpatch.prediction.regions, "SHARD_BYTES", 2**16)
        patch.setattr(zpatch.prediction.regions, "SMALLEST_SHARD_BYTES", 2**12)
        yield
