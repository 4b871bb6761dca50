"""A clock that stands still until a test moves it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import anyio
from anyio.lowlevel import checkpoint

from ..projections.timers import Clock


class ManualClock(Clock):
    """The time of a process manager's timers, in a test: `clock.advance(timedelta(days=60))`.

    It begins at the time of the machine, unless it is given another one with a time zone.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self._now = now or datetime.now(UTC)
        self._moved = anyio.Event()

    def now(self) -> datetime:
        return self._now

    def advance(self, by: timedelta) -> None:
        """Move on; whoever waits for a moment that is over now is woken."""
        self._now += by
        self._moved.set()
        self._moved = anyio.Event()

    async def wait_until(self, moment: datetime) -> None:
        await checkpoint()
        while self._now < moment:
            await self._moved.wait()
