"""How a projection is getting on, and who waits for it to get somewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Literal, TypeAlias

import anyio
from anyio.lowlevel import checkpoint
from attrs import frozen

from .wanted import Wanted

State: TypeAlias = Literal["stopped", "waiting", "running", "retrying", "failed"]
_WINDOW = 10.0


@frozen
class ProjectionStatistics:
    """A projection, as this coordinator saw it last.

    `state` is "running" where it has shards here, "waiting" where others have them all, "retrying"
    while something keeps failing, "failed" once it was given up, "stopped" while nothing runs.
    `position` is how far all of its shards have got, `lag_events` how many positions there are
    beyond, and `lag_seconds` how old the last handled event is, if there are. `rate` is events a
    second here, of the last ten seconds. `error` is what failed last, until something succeeds.
    """

    name: str
    version: int
    serving: bool
    state: State
    position: int
    lag_events: int
    lag_seconds: float
    handled: int
    rate: float
    shards_here: int
    shards: int
    error: str | None


class Progress:
    """What the shards of one projection have in common on this event loop."""

    def __init__(self, stir: Callable[[], None] | None = None) -> None:
        self.wanted = Wanted()
        self.handled = 0
        self.times_moved = 0
        self.retrying = False
        self.failed: BaseException | None = None
        self.error: str | None = None
        self._begun = monotonic()
        self._batches: deque[tuple[float, int]] = deque()
        self._recorded_at: datetime | None = None
        self._changed: anyio.Event | None = None
        self._stir = stir

    def batch(self, events: int, recorded_at: datetime | None) -> None:
        """So many events were committed; the last of them was recorded then."""
        now = monotonic()
        self.handled += events
        self.recovered()
        self._recorded_at = recorded_at or self._recorded_at
        self._batches.append((now, events))
        while self._batches[0][0] < now - _WINDOW:
            self._batches.popleft()

    def failure(self, error: BaseException) -> None:
        self.retrying = True
        self.error = f"{type(error).__name__}: {error}"

    def recovered(self) -> None:
        """What failed works again, though nothing was handled yet."""
        self.retrying = False
        if self.failed is None:
            self.error = None

    def give_up(self, error: BaseException) -> None:
        self.failure(error)
        self.failed = error
        self.moved()

    def begin_again(self) -> None:
        self.failed = None
        self.retrying = False
        self.error = None

    @property
    def rate(self) -> float:
        now = monotonic()
        events = sum(count for at, count in self._batches if at >= now - _WINDOW)
        return events / max(min(now - self._begun, _WINDOW), 0.1)

    @property
    def age(self) -> float:
        """Seconds since the last handled event was recorded; 0 if there was none."""
        if self._recorded_at is None:
            return 0.0
        return max((datetime.now(UTC) - self._recorded_at).total_seconds(), 0.0)

    def saved(self) -> None:
        """A shard's document has moved."""
        if self.wanted and self._stir is not None:
            self._stir()

    def moved(self) -> None:
        """Something has changed that somebody may wait for."""
        self.times_moved += 1
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def wait(self, times_moved: int | None = None) -> None:
        """Return when something has changed since this was called, or since it was so often."""
        if times_moved not in (None, self.times_moved):
            await checkpoint()
            return
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()
