from collections.abc import Sequence
from typing import Any

def gather(
    rows: Any,
    checks: Any,
    start: int,
    maps: Sequence[Any],
    files: Any,
    outs: Sequence[Any],
    streams: bool,
    chunk_shape: tuple[int, int, int, int],
    itemsize: int,
    codec: str,
    scaled_from: str,
    slope: float,
    inter: float,
    low: float,
    high: float,
    /,
) -> tuple[int, int, int, int, int, int]: ...
def copy(source: Any, out: Any, /) -> bool: ...
def scale(
    voxels: Any, out: Any, scaled_from: str, slope: float, inter: float, low: float, high: float, /
) -> None: ...
