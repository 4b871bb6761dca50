"""What the tests of projections run: read models that show what was missed or done twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select, update
from sqlalchemy.schema import CreateTable

from eventsource_anyio import ANY, EventStore, StoredEvent, Transaction
from eventsource_anyio.projections.base import Projection
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.stores.sql_transaction import SQLTransaction
from eventsource_anyio.testing.samples import Happened

LEASE = 0.3

_tables = MetaData()
LEDGER = Table(
    "ledger",
    _tables,
    Column("number", Integer, primary_key=True),
    Column("event_id", String(36), unique=True, nullable=False),
)
TOTALS = Table(
    "totals",
    _tables,
    Column("stream_id", String(300), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("total", Integer, nullable=False),
)


def number_of(event: StoredEvent) -> int:
    assert isinstance(event.event, Happened)
    return event.event.number


class Seen(Projection[Transaction]):
    """A document for each event, which cannot be added twice; `calls` are the positions."""

    name = "seen"

    def __init__(self, **settings: object) -> None:
        self.calls: list[int] = []
        for name, value in settings.items():
            setattr(self, name, value)

    async def before(self, event: StoredEvent) -> None:
        """What a test does before an event is handled."""

    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        self.calls.append(event.position)
        await self.before(event)
        place = [event.stream_id, event.version, number_of(event)]
        await tx.documents.add(f"read/{self.name}", f"{event.position:09}", place)

    async def reset(self, tx: Transaction) -> None:
        for document in await tx.documents.list(f"read/{self.name}", limit=10**6):
            await tx.documents.delete(f"read/{self.name}", document.key)


class Summing(Projection[Transaction]):
    """The sum of all events in one document, which a batch of each shard adds to."""

    name = "summing"

    def __init__(self, **settings: object) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    async def before(self, event: StoredEvent) -> None:
        """What a test does before an event is handled."""

    async def handle_batch(self, events: Iterable[StoredEvent], tx: Transaction) -> None:
        for event in events:
            await self.before(event)
        numbers = [number_of(event) for event in events]
        document = await tx.documents.get("read", "sum")
        if document is None:
            await tx.documents.add("read", "sum", sum(numbers))
        else:
            assert isinstance(document.value, int)
            total = document.value + sum(numbers)
            await tx.documents.save("read", "sum", total, expected=document.revision)

    async def reset(self, tx: Transaction) -> None:
        await tx.documents.delete("read", "sum")


class SQLTotals(Projection[SQLTransaction]):
    """By SQL, a sum for each stream, a ledger of all events, and an error where one is missing."""

    name = "totals"

    def __init__(self, **settings: object) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    async def before(self, event: StoredEvent) -> None:
        """What a test does before an event is handled."""

    async def handle(self, event: StoredEvent, tx: SQLTransaction) -> None:
        await self.before(event)
        entry = {"number": event.position, "event_id": str(event.event_id)}
        await tx.execute(insert(LEDGER), entry)
        row = {"version": event.version, "total": number_of(event)}
        if event.version == 1:
            await tx.execute(insert(TOTALS), {"stream_id": event.stream_id, **row})
        else:
            before = (TOTALS.c.stream_id == event.stream_id) & (
                TOTALS.c.version == event.version - 1
            )
            total = TOTALS.c.total + number_of(event)
            change = update(TOTALS).where(before).values(version=event.version, total=total)
            done: Any = await tx.execute(change)
            assert done.rowcount == 1, f"{event.stream_id} is not at version {event.version - 1}"

    async def reset(self, tx: SQLTransaction) -> None:
        await tx.execute(LEDGER.delete())
        await tx.execute(TOTALS.delete())


async def create_tables(store: Any) -> None:
    async with store.transaction() as tx:
        await tx.execute(CreateTable(LEDGER))
        await tx.execute(CreateTable(TOTALS))


def by_stream(events: Iterable[StoredEvent]) -> dict[str, tuple[int, int]]:
    """The version and the sum of each stream."""
    versions: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for event in events:
        versions[event.stream_id] += 1
        totals[event.stream_id] += number_of(event)
    return {stream: (versions[stream], totals[stream]) for stream in versions}


async def assert_totals(store: Any) -> int:
    """Every event is in the ledger and in the sums once; how many there are."""
    events = [event async for event in store.read_all()]
    async with store.transaction() as tx:
        entries = (await tx.execute(select(LEDGER).order_by(LEDGER.c.number))).all()
        rows = (await tx.execute(select(TOTALS))).all()
    assert [tuple(entry) for entry in entries] == [(e.position, str(e.event_id)) for e in events]
    assert {stream: (version, total) for stream, version, total in rows} == by_stream(events)
    return len(events)


async def seen(store: EventStore, name: str = "seen") -> list[int]:
    """The positions that a `Seen` has seen."""
    return [int(one.key) for one in await store.documents.list(f"read/{name}", limit=10**6)]


async def positions(store: EventStore) -> list[int]:
    return [event.position async for event in store.read_all()]


async def assert_seen(store: EventStore, name: str = "seen") -> None:
    """Every event, once."""
    assert await seen(store, name) == await positions(store)


async def summed(store: EventStore) -> object:
    document = await store.documents.get("read", "sum")
    return 0 if document is None else document.value


async def append(store: EventStore, streams: int, events: int = 1, *, first: int = 0) -> int:
    """Append to each of so many streams, in turns; the last position."""
    for number in range(first, first + events):
        for stream in range(streams):
            await store.append_events(f"s{stream}", "Thing", [Happened(number + 1)], ANY)
    return await store.last_position()


@asynccontextmanager
async def running(*coordinators: ProjectionCoordinator) -> AsyncIterator[TaskGroup]:
    """They have started; they are stopped at the end of the block."""
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for coordinator in coordinators:
                await tasks.start(coordinator.run)
            yield tasks
            for coordinator in coordinators:
                coordinator.stop()


async def until(condition: Callable[[], Awaitable[object] | object], seconds: float = 30) -> None:
    """Return once something is so, of which nobody tells."""
    with anyio.fail_after(seconds):
        while True:
            result = condition()
            if await result if isinstance(result, Awaitable) else result:
                return
            await anyio.sleep(0.01)


async def shard_documents(store: EventStore, name: str, version: int = 1) -> list[dict[str, Any]]:
    collection = f"projections/{name}/{version}/shards"
    return [dict(one.value) for one in await store.documents.list(collection, limit=2000)]  # type: ignore[call-overload]
