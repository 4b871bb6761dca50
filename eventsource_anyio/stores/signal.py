"""How appenders tell waiting readers, on one event loop, that there is something to look at."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.lowlevel import checkpoint

from ..errors import StoreClosedError


class AppendSignal:
    """The last position that is known of, and an event that is replaced each time it grows.

    `advance` is synchronous: it cannot be cancelled half-way, and costs nothing if nobody waits.
    """

    __slots__ = ("_changed", "_closed", "position", "waiting")

    def __init__(self) -> None:
        self.position = 0
        self.waiting = 0
        self._closed = ""
        self._changed: anyio.Event | None = None

    def advance(self, position: int) -> None:
        if position > self.position:
            self.position = position
            self.wake()

    def close(self, store: str) -> None:
        """Make everybody who waits, or comes later, raise `StoreClosedError`."""
        self._closed = store
        self.wake()

    def wake(self) -> None:
        """Make everybody who waits look for themselves."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def wait(self, after: int, begun: Callable[[], None] | None = None) -> None:
        """Return when the position has grown, at once if it is beyond `after` already.

        `begun` is called when the waiting begins, with `waiting` counted up.
        """
        if self.position > after and not self._closed:
            await checkpoint()
            return
        self.waiting += 1
        try:
            if begun is not None:
                begun()
            if not self._closed:
                if self._changed is None:
                    self._changed = anyio.Event()
                await self._changed.wait()
        finally:
            self.waiting -= 1
        if self._closed:
            raise StoreClosedError(self._closed)
