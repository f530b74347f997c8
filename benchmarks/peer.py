"""What a contender is called, and whether its library is there."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version


class Peer:
    """A contender that tells its peers from zpatch: by its ``name``, and by the ``package`` that it needs."""

    name: str
    package: str

    @property
    def installed(self) -> bool:
        """Whether its library is installed."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def distribution(self) -> str:
        """The name under which its library is installed."""
        return self.package

    def __str__(self) -> str:
        peer = self.package != "zpatch" and self.installed
        return f"{self.name}, {version(self.distribution)}" if peer else self.name
