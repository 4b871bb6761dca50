"""Short messages to whoever has the same store open. Any of them may be lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Never

import anyio
from anyio.lowlevel import checkpoint


class Hints:
    """These reach those who have the same store object; a store may have some that reach further.

    They only make somebody look: whoever waits for one looks by itself too, again and again. An
    empty one says that others may have been missed.
    """

    everywhere: bool
    """Whether they reach everybody who has the store open, as long as none is lost."""

    def __init__(self, *, everywhere: bool = False) -> None:
        self.everywhere = everywhere
        self._hearing: set[Callable[[str], None]] = set()

    async def tell(self, message: str) -> None:
        """Say it to everybody who hears, this one among them."""
        await checkpoint()
        self.pass_on(message)

    async def hear(self, heard: Callable[[str], None]) -> Never:
        """Have it called with every message, until this is cancelled."""
        self._hearing.add(heard)
        try:
            while True:
                await self._listen()
        finally:
            self._hearing.discard(heard)

    def pass_on(self, message: str) -> None:
        """Call everybody who hears, on this event loop."""
        for heard in [*self._hearing]:
            heard(message)

    async def _listen(self) -> None:
        await anyio.sleep_forever()
