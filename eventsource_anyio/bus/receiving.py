"""Receive streams over a broker: everybody has all events, and reads them in their own task.

- A stream is an offset in each partition. Nothing is sent to it, so it delays nobody.
- It checkpoints before it takes events, never after, so a cancelled `receive` has consumed nothing.
- What the broker has dropped before the stream got to it is read in the store, by position and only
  in the slices of that partition, before what comes next; or it is told once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

import anyio
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
from attrs import frozen

from ..errors import EventDecodeError, FellBehindError, StorageError, StoreClosedError
from ..events import StoredEvent
from ..stores.interface import EventStore, ReadOptions, Subscription
from .broker import Broker, ReceivedMessage
from .encoding import decode, opened, slices_of
from .filtering import EventFilter
from .recent import RecentIds
from .waiting import Backoff

_PAGE = 500
_WAIT = 5.0


@frozen
class _Gap:
    """Events that the broker has dropped, and what follows them."""

    partition: int
    after: int
    until: int


class BrokerStream(ObjectReceiveStream[StoredEvent]):
    """What is published from when the block is entered on, or after a position."""

    def __init__(
        self,
        broker: Broker,
        partitions: int,
        wanted: EventFilter,
        catch_up: EventStore | None,
        after: int | None,
        remembered: int,
        check_open: Callable[[], None],
        streams: set[BrokerStream],
    ) -> None:
        self._broker = broker
        self._partitions = partitions
        self._filter = wanted
        self._catch_up = catch_up
        self._after = after
        self._check_open = check_open
        self._streams = streams
        self._guard = anyio.ResourceGuard("receiving from")
        self._offsets: dict[int, str] = {}
        self._positions: dict[int, int] = {}
        self._recent = RecentIds(remembered)
        self._batch: Sequence[StoredEvent | EventDecodeError] = ()
        self._index = 0
        self._gaps: deque[_Gap] = deque()
        self._held: Sequence[ReceivedMessage] = ()
        self._reading: Subscription | None = None
        self._until = 0
        self._backoff = Backoff("a receive stream waits")
        self._ended = False
        self._waiting: anyio.CancelScope | None = None

    async def __aenter__(self) -> Self:
        self._check_open()
        everywhere = range(self._partitions)
        if self._after is None or self._catch_up is not None:
            self._offsets = dict(await self._broker.ends(everywhere))
        else:
            await checkpoint()
            self._offsets = dict.fromkeys(everywhere, "")
        if self._catch_up is None:
            since = self._after or 0
        else:
            since = await self._catch_up.last_position()
            if self._after is not None and since > self._after:
                self._gaps.append(_Gap(-1, self._after, since))
        self._positions = dict.fromkeys(everywhere, since)
        self._check_open()
        self._streams.add(self)
        return self

    async def receive(self) -> StoredEvent:
        if self._index >= len(self._batch):
            await self._turn()
        stored = self._batch[self._index]
        self._index += 1
        if isinstance(stored, EventDecodeError):
            raise stored
        return stored

    async def aclose(self) -> None:
        self._streams.discard(self)
        self._batch, self._index = (), 0
        if self._waiting is not None:
            self._waiting.cancel()
        await cancel_shielded_checkpoint()

    def end(self) -> None:
        """The bus is closed: what is here already can still be had."""
        self._ended = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def _turn(self) -> None:
        """Have something to hand out."""
        with self._guard:
            self._batch, self._index = (), 0
            while not self._batch:
                if self not in self._streams:
                    raise anyio.ClosedResourceError
                if self._ended:
                    raise anyio.EndOfStream
                with anyio.CancelScope() as self._waiting:
                    try:
                        await self._read_some()
                    except StorageError as error:
                        await self._backoff.wait(error)
                    except StoreClosedError:
                        if not self._ended:
                            raise
                    else:
                        self._backoff.reset()
                self._waiting = None

    async def _read_some(self) -> None:
        if self._reading is not None:
            await self._read_on(self._reading)
        elif self._gaps:
            await self._begin_reading(self._gaps[0])
        elif self._held:
            await checkpoint()
            messages, self._held = self._held, ()
            self._hand_out(messages)
        else:
            reading = await self._broker.read(self._offsets, _PAGE, _WAIT)
            for partition in reading.lost:
                self._find_gap(partition, reading.messages)
            for message in reading.messages:
                self._offsets[message.partition] = message.offset
            if self._gaps:
                self._held = reading.messages
            else:
                self._hand_out(reading.messages)

    def _hand_out(self, messages: Sequence[ReceivedMessage]) -> None:
        found: list[StoredEvent | EventDecodeError] = []
        wants_name, wants = self._filter.wants_name, self._filter.wants
        after = self._after or 0
        for message in messages:
            if not self._recent.add(message.message_id):
                continue
            envelope = opened(message)
            if envelope is None or envelope.position <= after:
                continue
            partition, position = message.partition, envelope.position
            self._positions[partition] = max(self._positions[partition], position)
            if wants_name(envelope.event_type):
                stored = decode(envelope)
                if isinstance(stored, EventDecodeError) or wants(stored):
                    found.append(stored)
        self._batch = found

    # What the broker has dropped -----------------------------------------------------------------

    def _find_gap(self, partition: int, messages: Sequence[ReceivedMessage]) -> None:
        first = next((one for one in messages if one.partition == partition), None)
        envelope = opened(first) if first is not None else None
        after = self._positions[partition]
        if envelope is not None and envelope.position - 1 > after:
            self._gaps.append(_Gap(partition, after, envelope.position - 1))

    async def _begin_reading(self, gap: _Gap) -> None:
        if self._catch_up is None:
            await checkpoint()
            after = min(one.after for one in self._gaps)
            until = max(one.until for one in self._gaps)
            self._gaps.clear()
            raise FellBehindError(after, until)
        slices = None if gap.partition < 0 else slices_of(gap.partition, self._partitions)
        options = ReadOptions(event_types=self._filter.names(), slices=slices)
        subscription = self._catch_up.subscribe(after=gap.after, options=options)
        self._reading = await subscription.__aenter__()
        self._until = gap.until
        self._gaps.popleft()

    async def _read_on(self, reading: Subscription) -> None:
        batch = await reading.next_batch()
        found = [
            one
            for one in batch
            if isinstance(one, EventDecodeError) or self._recent.add(str(one.event_id))
        ]
        if reading.position >= self._until:
            self._reading = None
        self._batch = found
