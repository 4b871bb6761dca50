"""Reading by pages: finite iterators, and subscriptions that never end.

- Nothing is held between two pages: no connection, no scope, no task. An iterator may be abandoned
  at any point, on any loop.
- Reading a page is a checkpoint, and nothing is consumed before it has succeeded; the events of a
  page that is there are handed out without another one (a checkpoint an event would cost more than
  the event). A subscription's batch is decoded in parts, with a checkpoint between, and consumed as
  a whole.
- An event that cannot be decoded is raised in its turn; asked again, the reader goes on after it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Generic, Self, TypeAlias, TypeVar, overload

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
from msgspec import Struct
from msgspec.structs import replace

from ..errors import EventDecodeError
from ..events import StoredEvent
from ..ids import AggregateId
from .records import Read


class PageRequest(Struct, frozen=True):
    """At most `limit` events of a stream, by version, or of the whole store, by position.

    `start` and `stop` are the first and the last version or position to read, both included, in the
    direction of reading; None is the end of the store in that direction. Empty filters let
    everything through. `slices` are the first and the last slice, both included, of the streams to
    read, by `slice_of` their ids; None means all.
    """

    stream: tuple[str, AggregateId] | None
    start: int | None
    stop: int | None
    backwards: bool
    limit: int
    event_types: tuple[str, ...]
    aggregate_types: tuple[str, ...]
    slices: tuple[int, int] | None


_AT_ONCE = 64  # events decoded before others have their turn: about as many as a batch of appends
Row = TypeVar("Row")


class DecodedRows(Sequence[Read], Generic[Row]):
    """The events of rows, each decoded when it is its turn.

    So those of a page are not all there at once, unless somebody keeps them: thousands of young
    objects would have the garbage collector run, which costs as much as to decode them.
    """

    __slots__ = ("_decode", "_rows")

    def __init__(
        self, rows: Sequence[Row], decode: Callable[[Sequence[Row]], Iterator[Read]]
    ) -> None:
        self._rows = rows
        self._decode = decode

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Read]:
        return self._decode(self._rows)

    @overload
    def __getitem__(self, index: int) -> Read: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Read]: ...
    def __getitem__(self, index: int | slice) -> Read | Sequence[Read]:
        if isinstance(index, slice):
            return list(self._decode(self._rows[index]))
        return next(self._decode([self._rows[index]]))


def readable(events: Iterable[Read]) -> Iterator[StoredEvent]:
    """They, until one that could not be read, whose error is raised."""
    for event in events:
        if isinstance(event, EventDecodeError):
            raise event
        yield event


class Page(Struct, frozen=True):
    """Events in the order asked for. `resume` is where the next page starts.

    `at_end` is true if there was nothing more to read. A page that is empty and not at the end is
    allowed: a store may bound how much it searches for one page.
    """

    events: Sequence[Read]
    resume: int
    at_end: bool


ReadPage: TypeAlias = Callable[[PageRequest], Awaitable[Page]]
WaitAppended: TypeAlias = Callable[[int], Awaitable[None]]


class _PageReader(AsyncIterator[StoredEvent]):
    """Hands out the events of one page after another; `_turn` gets the next one."""

    __slots__ = ("_events", "_guard", "_left", "_read", "_request")

    def __init__(self, read: ReadPage, request: PageRequest) -> None:
        self._read = read
        self._request = request
        self._events: Iterator[Read] = iter(())
        self._left = 0  # of the page
        self._guard = anyio.ResourceGuard("reading from")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StoredEvent:
        while not self._left:
            with self._guard:
                await self._turn()
        self._left -= 1
        event = next(self._events)
        self._passed(event)
        if isinstance(event, EventDecodeError):
            raise event
        return event

    @abstractmethod
    async def _turn(self) -> None:
        """Get the next page, wait for one, or raise `StopAsyncIteration`."""

    def _begin(self, page: Page) -> None:
        self._events, self._left = iter(page.events), len(page.events)

    def _passed(self, event: Read) -> None:
        """An event is handed out."""


class EventIterator(_PageReader):
    """A finite read. It needs no closing."""

    __slots__ = ("_ended", "_limit", "_page")

    def __init__(self, read: ReadPage, request: PageRequest, limit: int | None) -> None:
        super().__init__(read, request)
        self._page: Sequence[Read] = ()
        self._limit = limit
        self._ended = False

    async def next_batch(self) -> Sequence[Read]:
        """The next events, at most `batch_size`, and none at the end.

        One that cannot be read comes as its error. They are decoded while they are iterated over,
        so whoever keeps none of them needs no memory for all.
        """
        with self._guard:
            if self._left:
                await checkpoint()
            while not self._left:
                try:
                    await self._turn()
                except StopAsyncIteration:
                    return ()
        left, self._left = self._left, 0
        return self._page if left == len(self._page) else list(self._events)

    async def _turn(self) -> None:
        left, request = self._limit, self._request
        if self._ended or (left is not None and left <= 0):
            await checkpoint()
            raise StopAsyncIteration
        page = await self._read(
            request if left is None or left >= request.limit else replace(request, limit=left)
        )
        self._begin(page)
        self._page = page.events
        self._request = replace(request, start=page.resume)
        self._ended = page.at_end
        if left is not None:
            self._limit = left - len(page.events)


class Subscription(_PageReader):
    """A read that never ends: every event after a position, in order, then each new one.

    An async context manager, usable once, and an async iterator inside its block. It reads the
    store only, so nothing that was committed is missed, whatever happens to the hints that wake it.

    `position` is how far it has got: every event up to it was handed out or filtered out. It is
    what to store as a checkpoint, and to give as `after` next time.
    """

    __slots__ = ("_open", "_wait", "position")

    def __init__(
        self, read: ReadPage, request: PageRequest, after: int, wait: WaitAppended
    ) -> None:
        super().__init__(read, request)
        self.position = after
        self._wait = wait
        self._open: bool | None = None

    async def __aenter__(self) -> Self:
        await checkpoint()
        if self._open is not None:
            raise RuntimeError("a subscription is entered once; call subscribe() for another one")
        self._open = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        self._events, self._left = iter(()), 0
        await cancel_shielded_checkpoint()

    async def next_batch(self) -> Sequence[Read]:
        """The events there are, at most `batch_size`; one that cannot be read comes as its error.

        Waits until there is one, or until `position` has moved over what was filtered out: then
        there may be none. After it, `position` is behind all of them.
        """
        with self._guard:
            if self._left:
                await checkpoint()
            before = self.position
            while not self._left and self.position == before:
                if await self._look() and self.position == before:
                    await self._wait(before)
            events = await self._decoded()
        self._left = 0
        if events:
            self._passed(events[-1])
        return events

    async def _decoded(self) -> Sequence[Read]:
        """What is left of the page; other tasks have their turn between."""
        events: list[Read] = []
        try:
            for event in self._events:
                events.append(event)
                if len(events) % _AT_ONCE == 0:
                    await checkpoint()
        except BaseException:
            self._events = iter([*events, *self._events])
            raise
        return events

    async def _turn(self) -> None:
        if await self._look():
            await self._wait(self.position)

    async def _look(self) -> bool:
        """Get the next page; whether there is nothing in it, and nothing more to look for."""
        if not self._open:
            raise RuntimeError(
                "a subscription is read inside its block: "
                "async with store.subscribe(after=…) as subscription: …"
            )
        page = await self._read(self._request)
        self._begin(page)
        self._request = replace(self._request, start=page.resume)
        if page.events:
            return False
        self.position = max(self.position, page.resume - 1)
        return page.at_end

    def _passed(self, event: Read) -> None:
        last = (self._request.start or 1) - 1
        self.position = event.position if self._left else last
