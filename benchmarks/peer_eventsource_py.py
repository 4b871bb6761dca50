"""eventsource-py on PostgreSQL, in an environment of its own; prints JSON.

PYTHON peer_eventsource_py.py fill DSN EVENTS        an aggregate of 1,000 events, and others
PYTHON peer_eventsource_py.py measure DSN FILLED SECONDS

As its guides have it: one AsyncEngine of SQLAlchemy on asyncpg, its own schema, the store's
defaults, expected versions given exactly. Nothing here imports eventsource_anyio.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import version
from time import perf_counter
from typing import Any, cast
from uuid import UUID, uuid4

from eventsource import (  # type: ignore[import-not-found]
    AggregateRepository,
    DeciderAggregate,
    DomainEvent,
    register_event,
)
from eventsource.adapters.postgresql import PostgreSQLEventStore  # type: ignore[import-not-found]
from eventsource.domain import StreamId  # type: ignore[import-not-found]
from eventsource.ports import ExpectedVersion, FeedReadOptions  # type: ignore[import-not-found]
from pydantic import BaseModel  # type: ignore[import-not-found,unused-ignore]
from sqlalchemy.ext.asyncio import create_async_engine

CONNECTIONS = 20
ORDER = UUID(int=1)  # the aggregate of 1,000 events
LOADED, BATCH = 1000, 100
PAGE = 1000


@register_event
class Placed(DomainEvent):  # type: ignore[misc]
    aggregate_type: str = "Order"
    customer: str
    amount: Decimal
    items: list[str]
    at: datetime
    note: str = ""


class OrderState(BaseModel):  # type: ignore[misc,unused-ignore]
    amount: Decimal = Decimal(0)


class Order(DeciderAggregate):  # type: ignore[misc]
    aggregate_type = "Order"

    @staticmethod
    def initial_state() -> OrderState:
        return OrderState()

    @staticmethod
    def decide(command: object, state: OrderState) -> list[Placed]:
        return []

    @staticmethod
    def evolve(state: OrderState, event: Placed) -> OrderState:
        amount = state.amount + event.amount
        return cast("OrderState", state.model_copy(update={"amount": amount}))


def placed(order: UUID, number: int) -> Placed:
    return Placed(
        aggregate_id=order,
        aggregate_version=number,
        customer="customer-4711",
        amount=Decimal("129.90"),
        items=["A-1000-blue", "B-2000-red", "C-3000-green"],
        at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        note="please ring twice, the dog is friendly",
    )


def opened(dsn: str) -> tuple[Any, Any]:
    engine = create_async_engine(
        dsn.replace("postgresql://", "postgresql+asyncpg://", 1),
        pool_size=CONNECTIONS,
        max_overflow=0,
    )
    return engine, PostgreSQLEventStore(engine, create_schema=True)


async def append(store: Any, order: UUID, first: int, count: int) -> None:
    """Append events to an order that has `first` of them."""
    events = [placed(order, first + 1 + n) for n in range(count)]
    await store.append(StreamId(order, "Order"), events, ExpectedVersion.exact(first))


async def fill(dsn: str, events: int) -> None:
    engine, store = opened(dsn)
    orders = [ORDER, *(uuid4() for _ in range(events // LOADED - 1))]
    for first in range(0, LOADED, BATCH):
        for order in orders:
            await append(store, order, first, BATCH)
    await engine.dispose()


async def appends(store: Any, tasks: int, seconds: float) -> float:
    """Appends a second, each task to a stream of its own."""
    await asyncio.gather(*(append(store, uuid4(), 0, 1) for _ in range(CONNECTIONS)))
    done = 0

    async def one(order: UUID) -> None:
        nonlocal done
        count = 0
        while perf_counter() < begun + seconds:
            await append(store, order, count, 1)
            count += 1
        done += count

    begun = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(one(uuid4()))
    return done / (perf_counter() - begun)


async def load(store: Any, seconds: float) -> float:
    """Milliseconds to load the aggregate of 1,000 events."""
    repository = AggregateRepository(event_store=store, aggregate_factory=Order)
    assert (await repository.load(ORDER)).version == LOADED
    done = 0
    begun = perf_counter()
    while (now := perf_counter()) < begun + seconds:
        await repository.load(ORDER)
        done += 1
    return (now - begun) / done * 1000


async def read_all(store: Any) -> float:
    """Events a second, all of them, in pages as its configuration for catching up has them."""
    position, read = None, 0
    begun = perf_counter()
    while True:
        page = [e async for e in store.read_all(position, FeedReadOptions(limit=PAGE))]
        read += len(page)
        if len(page) < PAGE:
            return read / (perf_counter() - begun)
        position = page[-1].position


async def missed(store: Any, writers: int, appended: int) -> tuple[int, int]:
    """Events that a reader who follows the feed, as its runners do, never sees; and how many of."""
    position = await store.current_position()
    seen: set[UUID] = set()
    sizes = [1 + n % 5 for n in range(appended)]
    over = asyncio.Event()

    async def follow() -> None:
        nonlocal position
        last = False
        while True:
            page = [e async for e in store.read_all(position, FeedReadOptions(limit=BATCH))]
            seen.update(envelope.event.event_id for envelope in page)
            if page:
                position = page[-1].position
            elif last:
                return
            else:
                last = over.is_set()
                await asyncio.sleep(0.001)

    async def write(order: UUID) -> None:
        first = 0
        for size in sizes:
            await append(store, order, first, size)
            first += size

    reader = asyncio.create_task(follow())
    await asyncio.gather(*(write(uuid4()) for _ in range(writers)))
    over.set()
    await reader
    committed = writers * sum(sizes)
    return committed - len(seen), committed


async def measure(dsn: str, filled: str, seconds: float) -> dict[str, object]:
    engine, store = opened(dsn)
    found: dict[str, object] = {"version": version("eventsource-py")}
    found["1 task, appends/s"] = await appends(store, 1, seconds)
    found["64 tasks, appends/s"] = await appends(store, 64, seconds)
    lost, of = await missed(store, 8, 50)
    found["missed by a reader that follows"], found["of events"] = lost, of
    await engine.dispose()
    engine, store = opened(filled)
    found["load 1,000 events, ms"] = await load(store, seconds)
    found["read everything, events/s"] = await read_all(store)
    await engine.dispose()
    return found


if __name__ == "__main__":
    match sys.argv[1:]:
        case "fill", dsn, events:
            asyncio.run(fill(dsn, int(events)))
        case "measure", dsn, filled, seconds:
            print(json.dumps(asyncio.run(measure(dsn, filled, float(seconds)))))
        case _:
            sys.exit(__doc__)
