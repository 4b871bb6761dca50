"""The event store: what every implementation guarantees, and what one has to supply.

The public methods are written here once, over five protected ones (`_open`, `_close`, `_write`,
`_read`, `_wait`) and six look-ups, which are all that a store implements. A store that passes
`eventsource_anyio.testing.EventStoreContract` is a store.

Guarantees of every store:
- An append is atomic: all of its events, with consecutive versions, or none.
- Positions are given out in an order that no reader can fall between: once a reader has seen a
  position, nothing is ever added before it.
- No task is started and no task group is opened around the caller's code, so errors arrive as they
  are, never inside an `ExceptionGroup`.
- Every awaited call is a checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from types import TracebackType
from typing import Final, Self, overload

import attrs

from ..events import DomainEvent, NewEvent, StoredEvent, registered
from ..ids import (
    SLICES,
    AggregateId,
    check_aggregate_type,
    normalize_aggregate_id,
    parse_stream_id,
    slice_of,
)
from ..metadata import Metadata
from ..repositories.checkpoint import CheckpointRepository, SaveCheckpoint
from ..repositories.document import (
    DeleteDocument,
    DeleteDocuments,
    Document,
    DocumentRepository,
    EncodedDocument,
    SaveDocuments,
    decode_document,
)
from ..repositories.outbox import (
    AddMessages,
    OutboxHint,
    OutboxRepository,
    RemoveMessages,
    StoredMessage,
    decode_message,
)
from .hints import Hints
from .reading import EventIterator, Page, PageRequest, Subscription, readable
from .records import Append, AppendResult, ExpectedVersion, Step, decode_stored, encode_append
from .transaction import AppendHandler, LookUps, Transaction

__all__ = [
    "ANY",
    "NO_STREAM",
    "STREAM_EXISTS",
    "AddMessages",
    "Append",
    "AppendHandler",
    "AppendResult",
    "DeleteDocument",
    "DeleteDocuments",
    "Document",
    "EncodedDocument",
    "EventIterator",
    "EventStore",
    "EventStream",
    "ExpectedVersion",
    "Page",
    "PageRequest",
    "ReadOptions",
    "RemoveMessages",
    "SaveCheckpoint",
    "SaveDocuments",
    "Step",
    "StoredMessage",
    "Subscription",
    "Transaction",
    "decode_document",
    "decode_message",
    "decode_stored",
    "slice_of",
]

ANY: Final = ExpectedVersion.ANY
NO_STREAM: Final = ExpectedVersion.NO_STREAM
STREAM_EXISTS: Final = ExpectedVersion.STREAM_EXISTS


@attrs.frozen
class EventStream(Sequence[StoredEvent]):
    """A stream, or its end, as it was when it was read; a sequence of its events.

    `version` is that of the stream, 0 if there is none, also where `events` leaves the beginning
    out. `aggregate_type` is None where no type was asked for and nothing was found.
    """

    aggregate_id: AggregateId
    aggregate_type: str | None
    events: tuple[StoredEvent, ...] = attrs.field(repr=False)
    version: int

    @overload
    def __getitem__(self, index: int) -> StoredEvent: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StoredEvent, ...]: ...
    def __getitem__(self, index: int | slice) -> StoredEvent | tuple[StoredEvent, ...]:
        return self.events[index]

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[StoredEvent]:
        return iter(self.events)


def _names(values: Iterable[str | type[DomainEvent]]) -> tuple[str, ...]:
    if isinstance(values, str | type):
        raise TypeError(f"give a tuple of types, not a single one: ({values!r},)")
    return tuple(value if isinstance(value, str) else registered(value).name for value in values)


@attrs.frozen(kw_only=True)
class ReadOptions:
    """What to read, and how. Bounds are included; the defaults read everything, in order.

    `from_version` and `to_version` bound the read of a stream, `from_position` and `to_position`
    that of the whole store. A backwards read starts at the upper bound. `event_types` are event
    classes or their names, `aggregate_types` names; empty means all. `slices` are those of a range,
    such as `range(0, 256)`, of the 1,024 that streams are divided into by a hash of their ids:
    readers of ranges that do not overlap share the events among them, each stream in its order.
    `batch_size` events are read at a time, and held in memory.
    """

    from_version: int = 0
    to_version: int | None = None
    from_position: int = 0
    to_position: int | None = None
    backwards: bool = False
    limit: int | None = None
    event_types: tuple[str, ...] = attrs.field(default=(), converter=_names)
    aggregate_types: tuple[str, ...] = attrs.field(default=(), converter=_names)
    slices: range | None = None
    batch_size: int = 500

    def __attrs_post_init__(self) -> None:
        for name in ("from_version", "to_version", "from_position", "to_position", "limit"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be a number from 0, not {value!r}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size must be a number from 1, not {self.batch_size!r}")
        if self.slices is not None and not _is_of_slices(self.slices):
            raise ValueError(
                f"slices must be a range within range(0, {SLICES}), of one slice or more and in "
                f"steps of 1, such as range(0, {SLICES // 4}), not {self.slices!r}"
            )


def _is_of_slices(value: object) -> bool:
    if not isinstance(value, range) or value.step != 1:
        return False
    return 0 <= value.start < value.stop <= SLICES


_DEFAULTS = ReadOptions()


def _refuse(options: ReadOptions, call: str, *names: str) -> None:
    """Raise `ValueError` for an option that has no meaning in this call."""
    for name in names:
        if getattr(options, name) != getattr(_DEFAULTS, name):
            raise ValueError(f"{name} has no meaning for {call}")


class EventStore(ABC):
    """Streams of events, in one global order. An async context manager, open inside its block."""

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def append_events(
        self,
        aggregate_id: AggregateId,
        aggregate_type: str,
        events: Iterable[DomainEvent | NewEvent],
        expected_version: ExpectedVersion | int,
        *,
        metadata: Metadata | None = None,
    ) -> AppendResult:
        """Append to the end of a stream, all of the events or none, and return once it is durable.

        `expected_version` is the version that the stream must be at (0: it does not exist), or
        `ANY` (never a conflict), `NO_STREAM`, `STREAM_EXISTS`. `metadata` is given to every event,
        over the context's and under the event's own.

        Appending events with the same ids to the same stream again stores nothing and returns the
        original result, whatever the expected version.

        Cancelled while it waits for its turn, nothing was stored. Once it is being written it is
        finished first, and if it was stored its result is returned; the cancelled scope raises at
        the next checkpoint. asyncio's own `Task.cancel()` cannot be put off like that: it is raised
        though the events may be stored, and a repeat with the same event ids finds out.

        Raises:
            ConcurrencyError: the stream is at another version.
            DuplicateEventError: an event id is stored with another stream, payload or order.
            EventEncodeError: a value of an event would not come back the same.
            StorageError: the database failed.
            ValueError, TypeError: there is nothing to append, or an argument cannot be stored.
        """
        append = encode_append(aggregate_id, aggregate_type, events, expected_version, metadata)
        (result,) = await self._write((append,))
        return result

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Appends to any streams, checkpoints, messages and documents, stored together or not.

        They are written when the block ends without an exception, so that no lock is held while
        the caller's code runs: `ConcurrencyError` and the others are raised at its end.
        """
        return Transaction(self._write, self._look_ups())

    def _look_ups(self) -> LookUps:
        return LookUps(
            self._checkpoint,
            self._pending,
            self._documents_by_key,
            self._documents_after,
            self._outbox_hint,
        )

    @cached_property
    def _outbox_hint(self) -> OutboxHint:
        return OutboxHint()

    @property
    def checkpoints(self) -> CheckpointRepository:
        """The checkpoints of readers of this store; it holds nothing, and needs no keeping."""
        return CheckpointRepository(self._checkpoint, self._write)

    @property
    def outbox(self) -> OutboxRepository:
        """The messages that wait to be delivered; it holds nothing, and needs no keeping."""
        return OutboxRepository(self._pending, self._write, self._outbox_hint)

    @property
    def documents(self) -> DocumentRepository:
        """Small JSON values by collection and key; it holds nothing, and needs no keeping."""
        return DocumentRepository(self._documents_by_key, self._documents_after, self._write)

    @property
    def hints(self) -> Hints:
        """Messages to whoever has this store open, which may be lost; for coordinators."""
        return self._own_hints

    @cached_property
    def _own_hints(self) -> Hints:
        return Hints()

    async def get_events(
        self,
        aggregate_id: AggregateId,
        aggregate_type: str | None = None,
        from_version: int = 0,
    ) -> EventStream:
        """The whole stream, from a version on. A stream that does not exist is empty.

        Without `aggregate_type` it is the one stream of this id; `ValueError` if there are several.
        Raises `EventDecodeError` at the first event that cannot be read; `read_stream` can read
        the others.
        """
        aggregate_id = normalize_aggregate_id(aggregate_id)
        if aggregate_type is None:
            types = await self._aggregate_types(aggregate_id)
            if len(types) > 1:
                raise ValueError(
                    f"{aggregate_id} is the id of {len(types)} aggregates: {', '.join(types)}. "
                    "Give the aggregate_type too."
                )
            if not types:
                return EventStream(aggregate_id, None, (), 0)
            (aggregate_type,) = types
        options = ReadOptions(from_version=from_version, batch_size=1000)
        request = _stream_request(check_aggregate_type(aggregate_type), aggregate_id, options)
        events: list[StoredEvent] = []
        batches = EventIterator(self._read, request, None)
        while batch := await batches.next_batch():
            events += readable(batch)
        version = events[-1].version if events else 0
        if not events and from_version > 1:
            last = attrs.evolve(options, from_version=0, backwards=True, limit=1)
            request = _stream_request(aggregate_type, aggregate_id, last)
            async for event in EventIterator(self._read, request, 1):
                version = event.version
        return EventStream(aggregate_id, aggregate_type, tuple(events), version)

    def read_stream(self, stream_id: str, options: ReadOptions | None = None) -> EventIterator:
        """The events of one stream by version, a page at a time: an async iterator.

        The iterator holds nothing between pages and needs no closing. It raises `EventDecodeError`
        for an event that cannot be read, and goes on after it if it is asked again. It checkpoints
        once a page.
        """
        options = options or _DEFAULTS
        _refuse(options, "read_stream", "from_position", "to_position", "aggregate_types", "slices")
        request = _stream_request(*parse_stream_id(stream_id), options)
        return EventIterator(self._read, request, options.limit)

    def read_all(self, options: ReadOptions | None = None) -> AsyncIterator[StoredEvent]:
        """The events of the whole store by position; otherwise as `read_stream`."""
        options = options or _DEFAULTS
        _refuse(options, "read_all", "from_version", "to_version")
        low, high = max(options.from_position, 1), options.to_position
        start, stop = (high, low) if options.backwards else (low, high)
        request = _request(None, start, stop, options)
        return EventIterator(self._read, request, options.limit)

    def subscribe(
        self, *, after: int = 0, options: ReadOptions | None = None
    ) -> AbstractAsyncContextManager[Subscription]:
        """Every event after a position, then each new one, for as long as the block lasts.

        `after` is a position, such as a checkpoint, or `await store.last_position()` for what is
        new only. Of the options it takes the filters and `batch_size`. Read in the caller's task:
        a subscriber that is slow delays nobody, and is never too late for an event.
        """
        if not isinstance(after, int) or after < 0:
            raise ValueError(f"after must be a position from 0, not {after!r}")
        options = options or _DEFAULTS
        _refuse(
            options,
            "subscribe",
            *("from_version", "to_version", "from_position", "to_position", "backwards", "limit"),
        )
        request = _request(None, after + 1, None, options)
        return Subscription(self._read, request, after, self._wait)

    @abstractmethod
    async def last_position(self) -> int:
        """The position that a reader can get to now; 0 if there is no event."""

    @abstractmethod
    async def _open(self) -> None:
        """Connect. `StorageError` says what is wrong with the database."""

    @abstractmethod
    async def _close(self) -> None:
        """Let go of everything, shielded from cancellation; waiting readers are woken."""

    @abstractmethod
    def _write(self, steps: Sequence[Step]) -> Awaitable[Sequence[AppendResult]]:
        """Store all of the steps or none, in order, durably; the results of the appends, in order.

        For each `Append`: if `append.expects(version)` says no, or an event id is stored already,
        return `append.repeated(…)` where there is any of its ids, else raise `append.conflict(…)`;
        otherwise store its events and return `append.result(…)`. `SaveCheckpoint` is stored if
        `check(…)` of where the checkpoint is does not raise; so are `SaveDocuments`, each by the
        revision it is at, `DeleteDocument`, and `DeleteDocuments`. A step sees those before it. A
        cancelled call stores nothing unless it was being written.
        """

    @abstractmethod
    async def _read(self, request: PageRequest) -> Page:
        """One page, decoded by `decode_stored`. Cancelled, it has read nothing."""

    @abstractmethod
    async def _wait(self, after: int) -> None:
        """Return once there may be an event after this position; `StoreClosedError` on closing."""

    @abstractmethod
    async def _aggregate_types(self, aggregate_id: AggregateId) -> Sequence[str]:
        """The types of the aggregates that have this id, sorted."""

    @abstractmethod
    async def _checkpoint(self, name: str) -> int:
        """Where a checkpoint is; 0 if it was never saved."""

    @abstractmethod
    async def _pending(self, limit: int, after: int) -> Sequence[StoredMessage]:
        """The first messages of the outbox after a position, in order, by `decode_message`."""

    @abstractmethod
    async def _documents_by_key(self, collection: str, keys: Sequence[str]) -> Sequence[Document]:
        """Those of the documents that exist, in any order, made by `decode_document`."""

    @abstractmethod
    async def _documents_after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        """The first documents whose key is greater, by key in code-point order."""


def _stream_request(
    aggregate_type: str, aggregate_id: AggregateId, options: ReadOptions
) -> PageRequest:
    low, high = max(options.from_version, 1), options.to_version
    start, stop = (high, low) if options.backwards else (low, high)
    return _request((aggregate_type, aggregate_id), start, stop, options)


def _request(
    stream: tuple[str, AggregateId] | None,
    start: int | None,
    stop: int | None,
    options: ReadOptions,
) -> PageRequest:
    slices = options.slices
    return PageRequest(
        stream,
        start,
        stop,
        options.backwards,
        options.batch_size,
        options.event_types,
        options.aggregate_types,
        None if slices is None or len(slices) == SLICES else (slices[0], slices[-1]),
    )
