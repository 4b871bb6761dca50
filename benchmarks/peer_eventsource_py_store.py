"""What eventsource-py needs to be measured: its events, its aggregate, its stores, and their fill.

As its guides have it: one AsyncEngine of SQLAlchemy on asyncpg, its own schema, the stores'
defaults, exact expected versions (`any_()` where many append to one stream, redone on a conflict).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from time import perf_counter
from typing import Any, TypeAlias, cast
from uuid import UUID, uuid4

import asyncpg  # type: ignore[import-untyped]
from eventsource import (  # type: ignore[import-not-found]
    AggregateRepository,
    DeciderAggregate,
    DomainEvent,
    InMemoryEventStore,
    InMemorySnapshotStore,
    OptimisticLockError,
    register_event,
)
from eventsource.adapters.postgresql import (  # type: ignore[import-not-found]
    PostgreSQLEventStore,
    PostgreSQLSnapshotStore,
)
from eventsource.adapters.sql.schemas import get_schema  # type: ignore[import-not-found]
from eventsource.adapters.sqlite import (  # type: ignore[import-not-found]
    SQLiteEventStore,
    SQLiteSnapshotStore,
)
from eventsource.domain import StreamId  # type: ignore[import-not-found]
from eventsource.ports import ExpectedVersion  # type: ignore[import-not-found]
from pydantic import BaseModel  # type: ignore[import-not-found,unused-ignore]
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

Found: TypeAlias = Mapping[str, float]

CONNECTIONS = 20
LOADED, BATCH = 1000, 100
logging.disable(logging.CRITICAL)


@register_event
class Placed(DomainEvent):  # type: ignore[misc]
    aggregate_type: str = "Order"
    customer: str
    amount: Decimal
    items: list[str]
    at: datetime
    note: str = ""


@register_event
class Sent(DomainEvent):  # type: ignore[misc]
    aggregate_type: str = "Latency"
    given: int


class OrderState(BaseModel):  # type: ignore[misc,unused-ignore]
    amount: Decimal = Decimal(0)


class Order(DeciderAggregate[OrderState, object]):  # type: ignore[misc]
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


# -- where ------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(where: str) -> AsyncIterator[tuple[Any, Any, Any]]:
    """The store, its snapshots, and the engine, where there is one."""
    if not where:
        yield InMemoryEventStore(), InMemorySnapshotStore(), None
        return
    if "://" not in where:
        async with SQLiteEventStore(where) as store:
            snapshots = SQLiteSnapshotStore(where)
            try:
                yield store, snapshots, None
            finally:
                await snapshots.close()
        return
    url = where.replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = create_async_engine(url, pool_size=CONNECTIONS, max_overflow=0)
    try:
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        yield (
            PostgreSQLEventStore(engine, create_schema=True),
            PostgreSQLSnapshotStore(sessions),
            engine,
        )
    finally:
        await engine.dispose()


def schema(where: str) -> Found:
    async def create() -> Found:
        async with opened(where) as (store, _, _):
            await store.current_position()  # creates what belongs to the store
        connection = await asyncpg.connect(where)
        # One of its functions, which nobody calls here, is refused by PostgreSQL as it is written.
        await connection.execute("SET check_function_bodies = off")
        for name in ("checkpoints", "snapshots"):
            await connection.execute(get_schema(name))
        await connection.close()
        return {}

    return asyncio.run(create())


async def append(store: Any, order: UUID, first: int, count: int) -> list[Any]:
    """Append events to an order that has `first` of them."""
    events = [placed(order, first + 1 + n) for n in range(count)]
    await store.append(StreamId(order, "Order"), events, ExpectedVersion.exact(first))
    return events


async def append_to_one(store: Any, order: UUID, count: int, end: float) -> int:
    """Append to a stream that others append to; again on a conflict; not after the end."""
    events = [placed(order, 1 + n) for n in range(count)]
    while perf_counter() < end:
        with suppress(OptimisticLockError):
            await store.append(StreamId(order, "Order"), events, ExpectedVersion.any_())
            return count
    return 0


async def put_in(store: Any, streams: int, sizes: Sequence[int]) -> None:
    names = [UUID(int=size) for size in sizes if size == LOADED]
    names += [uuid4() for _ in range(streams - len(names))]
    for step in range(LOADED // BATCH):
        for name in names:
            await append(store, name, step * BATCH, BATCH)
        for size in sizes:
            if size != LOADED:
                share = size * BATCH // LOADED
                await append(store, UUID(int=size), step * share, share)


async def take_snapshots(store: Any, snapshots: Any, sizes: Sequence[int]) -> None:
    for size in sizes:
        repository = repository_of(store, snapshots)
        await repository.create_snapshot(await repository.load(UUID(int=size)))


def fill(where: str, streams: int, sizes: Sequence[int]) -> Found:
    async def put() -> Found:
        async with opened(where) as (store, snapshots, _):
            await put_in(store, streams, sizes)
            await take_snapshots(store, snapshots, sizes)
        return {}

    return asyncio.run(put())


def repository_of(store: Any, snapshots: Any) -> Any:
    if snapshots is None:
        return AggregateRepository(event_store=store, aggregate_factory=Order)
    return AggregateRepository(
        event_store=store,
        aggregate_factory=Order,
        snapshot_store=snapshots,
        snapshot_mode="manual",
    )
