"""The contract between the store and a driver: a handful of calls.

- A connection runs one call at a time. What is not inside `BEGIN` and `COMMIT` is committed when
  the call returns.
- A cancelled call is stopped on the server, and the connection can be used again. Whether it was
  committed is not known: who must know shields it.
- A driver raises its own errors as `DriverError`, and nothing else but cancellation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, TypeAlias

# What a column holds is known to the statement alone.
Row: TypeAlias = Sequence[Any]


class DriverError(Exception):
    """What the server or the network said. `sqlstate` is empty where the server said nothing."""

    def __init__(self, message: str, sqlstate: str = "", *, lost: bool = False) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.lost = lost  # the connection is gone, and with it the answer


class Fetch(Protocol):
    """Runs a statement in whatever transaction it belongs to."""

    async def __call__(self, statement: str, *values: object) -> Sequence[Row]: ...


class Connection(ABC):
    """One connection to the server."""

    @property
    @abstractmethod
    def usable(self) -> bool:
        """False once it is known to be broken."""

    @abstractmethod
    async def fetch(self, statement: str, *values: object) -> Sequence[Row]:
        """Run one statement with `$1` and so on, prepared when it is first used; all its rows."""

    @abstractmethod
    async def run(self, script: str) -> None:
        """Run statements without values, separated by semicolons."""

    @abstractmethod
    async def listen(self, channel: str) -> None:
        """Ask for the notifications of a channel."""

    @abstractmethod
    async def heard(self) -> AbstractSet[str]:
        """Wait for notifications: what was said since the last call; nothing if the connection is
        gone. Cancelled, it has heard nothing. Of very many, some may be left out."""

    @abstractmethod
    async def close(self) -> None:
        """Say good-bye and close. Never fails."""

    @abstractmethod
    def abandon(self) -> None:
        """Close at once, without waiting for anything."""


class Driver(ABC):
    """Makes connections."""

    @abstractmethod
    async def connect(self) -> Connection:
        """A new connection."""


_SAID_AT_MOST = 1000


def add_said(said: set[str], message: str) -> None:
    """Keep what was heard, unless it is too much; the empty one, of an append, in any case."""
    if not message or len(said) < _SAID_AT_MOST:
        said.add(message)
