"""The last events that were published, and streams that follow them.

- Publishing is synchronous: it cannot be cancelled half-way, and costs nothing for those who listen
  until they look.
- A stream is a place in the ring. What leaves the ring before a stream has got to it is remembered
  as a range of positions, which the stream reads in the store, or is told of.
- A stream checkpoints before it takes events, never after, so a cancelled `receive` has consumed
  nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Self

import anyio
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from ..errors import EventDecodeError, FellBehindError
from ..events import StoredEvent
from ..stores.interface import EventStore, ReadOptions, Subscription
from .filtering import EventFilter


class Ring:
    """At least the last `size` events, and at most twice as many."""

    __slots__ = ("_closed", "_events", "_room", "_wake", "first", "size", "streams")

    def __init__(self, size: int) -> None:
        self.size = size
        self.first = 0
        self.streams: set[RingStream] = set()
        self._events: list[StoredEvent] = []
        self._wake: anyio.Event | None = None
        self._room: anyio.Event | None = None
        self._closed = False

    @property
    def end(self) -> int:
        return self.first + len(self._events)

    def publish(self, events: Sequence[StoredEvent]) -> None:
        if self.streams:
            self._events.extend(events)
            if len(self._events) > 2 * self.size:
                self._trim()
            self._wake_up()

    def close(self) -> None:
        self._closed = True
        self._wake_up()

    def take(self, start: int) -> Sequence[StoredEvent]:
        """The events from there on; none if there are none yet."""
        return self._events[start - self.first :]

    async def wait(self) -> bool:
        """Wait until there is more; whether there will ever be."""
        if not self._closed:
            if self._wake is None:
                self._wake = anyio.Event()
            await self._wake.wait()
        return not self._closed

    def has_room(self, count: int) -> bool:
        """Whether those that publishers wait for are near enough to the end."""
        end = self.end + count - self.size
        return not any(one.backpressure and one.place < end for one in self.streams)

    def make_room(self) -> None:
        """Somebody that publishers may wait for has taken something, or left."""
        if self._room is not None:
            self._room.set()
            self._room = None

    async def wait_for_room(self) -> None:
        if self._room is None:
            self._room = anyio.Event()
        await self._room.wait()

    def leave(self, stream: RingStream) -> None:
        self.streams.discard(stream)
        if not self.streams:
            self.first = self.end
            self._events = []
        self.make_room()
        self._wake_up()

    def _trim(self) -> None:
        cut = len(self._events) - self.size
        for stream in self.streams:
            stream.lose(self._events[max(stream.place - self.first, 0) : cut])
        del self._events[:cut]
        self.first += cut

    def _wake_up(self) -> None:
        if self._wake is not None:
            self._wake.set()
            self._wake = None


class RingStream(ObjectReceiveStream[StoredEvent]):
    """What is published from when the block is entered on."""

    def __init__(
        self, ring: Ring, wanted: EventFilter, catch_up: EventStore | None, backpressure: bool
    ) -> None:
        self.place = ring.end
        self.backpressure = backpressure
        self._ring = ring
        self._filter = wanted
        self._catch_up = catch_up
        self._guard = anyio.ResourceGuard("receiving from")
        self._batch: Sequence[StoredEvent | EventDecodeError] = ()
        self._index = 0
        # Positions, ends included: what was missed, and what was read in the store instead.
        self._missed: tuple[int, int] | None = None
        self._read = (0, -1)
        self._reading: Subscription | None = None
        self._until = 0
        # What the ring has given lately, since the store is in another order than publishers are.
        self._given: deque[Sequence[StoredEvent]] = deque()
        self._seen = frozenset[int]()

    async def __aenter__(self) -> Self:
        await checkpoint()
        self.place = self._ring.end
        self._ring.streams.add(self)
        return self

    async def __anext__(self) -> StoredEvent:
        try:
            if self._index >= len(self._batch):
                await self._turn()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        return self._next()

    async def receive(self) -> StoredEvent:
        if self._index >= len(self._batch):
            await self._turn()
        return self._next()

    def _next(self) -> StoredEvent:
        stored = self._batch[self._index]
        self._index += 1
        if isinstance(stored, EventDecodeError):
            raise stored
        return stored

    async def aclose(self) -> None:
        self._ring.leave(self)
        self._batch, self._index = (), 0
        await cancel_shielded_checkpoint()

    def lose(self, events: Sequence[StoredEvent]) -> None:
        """These leave the ring, and the stream has not got to them."""
        self.place += len(events)
        for event in events:
            position = event.position
            if not self._filter.wants(event) or self._has_read(position):
                continue
            if self._reading is not None and position > self._read[1]:
                self._until = max(self._until, position)
            else:
                first, last = self._missed or (position, position)
                self._missed = (min(first, position), max(last, position))

    async def _turn(self) -> None:
        """Have something to hand out."""
        with self._guard:
            self._batch, self._index = (), 0
            if self.place < self._ring.end:
                await checkpoint()
            while not self._batch:
                if self not in self._ring.streams:
                    raise anyio.ClosedResourceError
                if self._reading is not None:
                    await self._read_on(self._reading)
                elif self._missed is not None:
                    await self._begin_reading(*self._missed)
                elif self.place < self._ring.end:
                    self._take()
                elif not await self._ring.wait():
                    raise anyio.EndOfStream

    def _take(self) -> None:
        events = self._ring.take(self.place)
        self.place += len(events)
        self._ring.make_room()
        if self._read[1] > 0:
            events = [one for one in events if not self._has_read(one.position)]
        wants = self._filter.wants
        self._batch = events if self._filter.everything else [one for one in events if wants(one)]
        if self._catch_up is not None and self._batch:
            self._given.append(events)
            if sum(map(len, self._given)) - len(self._given[0]) >= self._ring.size:
                self._given.popleft()

    def _has_read(self, position: int) -> bool:
        """Whether it is among what was read in the store, so that it does not come again."""
        first, last = self._read
        return first <= position <= last

    async def _begin_reading(self, first: int, last: int) -> None:
        if self._catch_up is None:
            self._missed = None
            raise FellBehindError(first - 1, last)
        after = first - 1
        options = ReadOptions(event_types=self._filter.names())
        reading = await self._catch_up.subscribe(after=after, options=options).__aenter__()
        if self._missed is not None and self._missed[0] == first:  # else it grew meanwhile
            self._until, self._missed, self._reading = self._missed[1], None, reading
            self._read = (first, after)
            self._seen = frozenset(one.position for batch in self._given for one in batch)

    async def _read_on(self, reading: Subscription) -> None:
        events = await reading.next_batch()
        seen = self._seen
        self._batch = [
            one for one in events if isinstance(one, EventDecodeError) or one.position not in seen
        ]
        self._read = (self._read[0], reading.position)
        if reading.position >= self._until:
            self._reading = None
