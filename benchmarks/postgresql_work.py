"""What our store does on PostgreSQL, each piece in a store of its own, which is warmed up first."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Literal, TypeAlias

import anyio
import attrs

from eventsource_anyio import ANY, AggregateRepository, EventStore, PostgreSQLEventStore

from .events import PLACED, Order
from .suite import LOOPS, Measured

Driver: TypeAlias = Literal["", "asyncpg", "psycopg"]

BATCH = 100
LOADED = 1000  # events of the aggregate that is loaded
_WARM_TASKS = 40


@attrs.frozen
class Subject:
    """Our store on one event loop, by one driver."""

    loop: str
    driver: Driver = ""

    def __str__(self) -> str:
        return f"{self.loop}, {self.driver}" if self.driver else self.loop


OURS: Mapping[str, Subject] = {loop: Subject(loop) for loop in LOOPS}
"""By the default driver, psycopg on Trio and asyncpg otherwise: what the claims are about."""

OTHERS = [Subject(loop, "asyncpg" if loop == "trio" else "psycopg") for loop in LOOPS]


def opened(dsn: str, schema: str = "", driver: Driver = "") -> PostgreSQLEventStore:
    return PostgreSQLEventStore(dsn, schema=schema or "eventsource", driver=driver or None)


async def migrate(dsn: str, schema: str = "") -> None:
    await opened(dsn, schema).migrate()


async def warm(store: EventStore) -> None:
    """Open its connections, and have its statements prepared."""
    async with anyio.create_task_group() as group:
        for number in range(_WARM_TASKS):
            group.start_soon(store.append_events, f"warm-{number}", "Order", [PLACED], ANY)
    await store.append_events("warm-0", "Order", [PLACED], ANY)
    await store.append_events("warm-1", "Order", [PLACED], ANY)


async def appends(store: EventStore, tasks: int, seconds: float) -> Measured:
    """Each task appends to its own stream, one event at a time, at an exact version."""
    done = 0

    async def append(number: int) -> None:
        nonlocal done
        version = 0
        while perf_counter() < begun + seconds:
            await store.append_events(f"order-{number}", "Order", [PLACED], version)
            version += 1
        done += version

    async with store:
        await warm(store)
        begun = perf_counter()
        if tasks == 1:
            await append(0)
        else:
            async with anyio.create_task_group() as group:
                for number in range(tasks):
                    group.start_soon(append, number)
        return done, perf_counter() - begun


async def batches(store: EventStore, seconds: float) -> Measured:
    """One task, 100 events at a time to one stream, at an exact version."""
    async with store:
        await warm(store)
        version = 0
        events = [PLACED] * BATCH
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            result = await store.append_events("order-0", "Order", events, version)
            version = result.version
        return version, now - begun


async def loads(store: EventStore, seconds: float) -> Measured:
    """An aggregate of 1,000 events, loaded and folded."""
    async with store:
        repository = AggregateRepository(store, Order)
        loaded = await repository.load("order-0")
        assert loaded.version == LOADED
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            await repository.load("order-0")
            done += 1
        return done, now - begun


async def read_all(store: EventStore, events: int) -> Measured:
    """The whole store, as typed objects."""
    async with store:
        await anext(store.read_all())
        read = 0
        begun = perf_counter()
        async for _ in store.read_all():
            read += 1
        seconds = perf_counter() - begun
        if read != events:
            raise AssertionError(f"{read:,} events were read of {events:,}")
        return read, seconds


async def fill(store: EventStore, events: int) -> None:
    """Streams of 1,000 events each, whose events are not side by side."""
    streams = events // LOADED
    async with store:
        for version in range(0, LOADED, BATCH):
            for number in range(streams):
                await store.append_events(f"order-{number}", "Order", [PLACED] * BATCH, version)
