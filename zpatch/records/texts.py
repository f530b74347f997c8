"""Many short texts as two arrays that can be mapped: all of them in one, and where each ends."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray


class Texts(Sequence[str]):
    """Texts by their numbers; each is made when it is asked for.

    ``joined`` are the UTF-8 bytes of all of them, ``ends`` where each ends.

    >>> names = Texts.of(["ann", "bob", "eve"])
    >>> names[1], names.number_of("eve"), names.number_of("carl")
    ('bob', 2, None)
    """

    def __init__(self, joined: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.joined, self.ends = joined, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """Some texts, in order."""
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @property
    def is_sound(self) -> bool:
        """Whether the ends are in order and within the bytes."""
        before = np.concatenate([[0], self.ends])
        return bool((np.diff(before) >= 0).all()) and int(before[-1]) == len(self.joined)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        start = int(self.ends[index - 1]) if index else 0
        return self.joined[start : int(self.ends[index])].tobytes().decode()

    def number_of(self, text: str) -> int | None:
        """The number of a text among texts that are sorted; None if it is none of them."""
        number = bisect.bisect_left(self, text)
        return number if number < len(self) and self[number] == text else None

    def taken(self, numbers: NDArray[np.integer]) -> list[str]:
        """The texts of some numbers."""
        stops = self.ends[numbers]
        starts = np.where(numbers > 0, self.ends[numbers - 1], 0)
        joined = self.joined
        return [joined[a:b].tobytes().decode() for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
