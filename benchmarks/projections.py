"""Projections on PostgreSQL: how fast they catch up, how far behind they are, what writers pay.

- *no handler's work*: reading, typing, the loop, and the checkpoint of each batch.
- *one statement a batch*: a table of totals, in the transaction of the checkpoint.
- *one statement an event*: the same table, as the peers have it; they also commit each event alone.
- *bare*: what anybody can do with asyncpg alone: read a page, upsert, save the position, commit.
  It decodes the JSON into dicts and checks nothing.
- Latency ends when somebody who waits for the append has been told that its projection committed.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from time import perf_counter
from typing import Any, cast

import anyio
import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import text

from eventsource_anyio import (
    ANY,
    EventStore,
    Projection,
    ProjectionCoordinator,
    ReadOptions,
    StoredEvent,
)
from eventsource_anyio.stores.sql_transaction import SQLTransaction
from eventsource_anyio.stores.transaction import Transaction

from .events import PLACED, Placed
from .latency import follower, say_ready
from .subject import Driver, Subject, opened
from .suite import Found, on, per_second
from .work import warm

TABLES = """
CREATE TABLE totals (order_id text PRIMARY KEY, amount numeric NOT NULL, events bigint);
CREATE TABLE by_hand AS SELECT 0::bigint AS position;
"""
_UPSERT = (
    "INSERT INTO totals AS t (order_id, amount, events) "
    "SELECT * FROM unnest(CAST({0} AS text[]), CAST({1} AS numeric[]), CAST({2} AS bigint[])) "
    "ON CONFLICT (order_id) DO UPDATE SET amount = t.amount + excluded.amount, "
    "events = t.events + excluded.events"
)
_BY_NAME = text(_UPSERT.format(":ids", ":amounts", ":counts"))
_ONE = text(
    "INSERT INTO totals AS t (order_id, amount, events) VALUES (:id, :amount, 1) "
    "ON CONFLICT (order_id) DO UPDATE SET amount = t.amount + excluded.amount, "
    "events = t.events + 1"
)
_PAGE = 500
NOTHING, BY_BATCH, BY_EVENT = "no work", "one statement a batch", "one statement an event"


class Nothing(Projection[Transaction]):
    """The handler of which there is the least."""

    name = "nothing"

    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        pass

    async def reset(self, tx: Transaction) -> None:
        pass


class Totals(Projection[SQLTransaction]):
    name = "totals"

    async def handle(self, event: StoredEvent, tx: SQLTransaction) -> None:
        assert isinstance(event.event, Placed)
        await tx.execute(_ONE, {"id": str(event.aggregate_id), "amount": event.event.amount})

    async def reset(self, tx: SQLTransaction) -> None:
        await tx.execute(text("TRUNCATE totals"))


class TotalsByBatch(Totals):
    async def handle_batch(self, events: Sequence[StoredEvent], tx: SQLTransaction) -> None:
        amounts: dict[str, Decimal] = defaultdict(Decimal)
        counts: dict[str, int] = defaultdict(int)
        for event in events:
            assert isinstance(event.event, Placed)
            amounts[str(event.aggregate_id)] += event.event.amount
            counts[str(event.aggregate_id)] += 1
        values = {"ids": [*amounts], "amounts": [*amounts.values()], "counts": [*counts.values()]}
        await tx.execute(_BY_NAME, values)


KINDS: Mapping[str, Callable[[], Projection[Any]]] = {
    NOTHING: Nothing,
    BY_BATCH: TotalsByBatch,
    BY_EVENT: Totals,
}
_FEW = 2000  # so many are enough, where each is a statement


def empty(schema: str) -> str:
    """Nothing was projected yet."""
    return f"TRUNCATE totals, {schema}.documents; UPDATE by_hand SET position = 0"


async def catch_up(store: EventStore, kind: Callable[[], Projection[Any]], events: int) -> Found:
    """From the beginning of the store to its end."""
    projection = kind()
    async with store:
        coordinator = ProjectionCoordinator(store, [projection])
        last = await store.last_position()
        if type(projection) is Totals:
            events = min(events, _FEW)
            options = ReadOptions(limit=events)
            last = [stored.position async for stored in store.read_all(options)][-1]
        begun = perf_counter()
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(last)
            seconds = perf_counter() - begun
            coordinator.stop()
        (found,) = coordinator.statistics()
        missed = max(events - found.handled, 0)
        return {**per_second(found.handled, seconds), "missed": missed, "committed": events}


async def by_hand(dsn: str, schema: str, case: str) -> Found:
    connection: Any = await asyncpg.connect(dsn)
    read = (
        f"SELECT position, aggregate_id, payload FROM {schema}.events "
        "WHERE position > $1 ORDER BY position LIMIT $2"
    )
    upsert = _UPSERT.format("$1", "$2", "$3")
    position = done = 0
    try:
        begun = perf_counter()
        while rows := await connection.fetch(read, position, _PAGE):
            found = [(row[1], Decimal(json.loads(row[2])["amount"])) for row in rows]
            async with connection.transaction():
                if case == BY_EVENT:
                    for order, amount in found:
                        await connection.execute(upsert, [order], [amount], [1])
                elif case == BY_BATCH:
                    amounts: dict[str, Decimal] = defaultdict(Decimal)
                    counts: dict[str, int] = defaultdict(int)
                    for order, amount in found:
                        amounts[order] += amount
                        counts[order] += 1
                    values = [*amounts], [*amounts.values()], [*counts.values()]
                    await connection.execute(upsert, *values)
                position = rows[-1][0]
                await connection.execute("UPDATE by_hand SET position = $1", position)
            done += len(rows)
            if case == BY_EVENT and done >= _FEW:
                break
        return per_second(done, perf_counter() - begun)
    finally:
        await connection.close()


async def latency(store: EventStore, seconds: float) -> Found:
    """One writer, who waits each time until the read model has its event."""
    took: list[float] = []
    async with store, anyio.create_task_group() as tasks:
        coordinator = ProjectionCoordinator(store, [TotalsByBatch()])
        await warm(store)
        await tasks.start(coordinator.run)
        await coordinator.wait_for(await store.last_position())
        end = perf_counter() + seconds
        while (begun := perf_counter()) < end:
            result = await store.append_events("order-0", "Order", [PLACED], ANY)
            await coordinator.wait_for(result)
            took.append(1000 * (perf_counter() - begun))
        coordinator.stop()
    took.sort()
    return {"p50 ms": took[len(took) // 2], "p99 ms": took[len(took) * 99 // 100]}


async def in_one_process(store: EventStore, seconds: float) -> Found:
    """50 writers alone, and then with a projection in the same process."""
    async with store:
        await warm(store)
        alone, _ = await _write(store, None, seconds)
        coordinator = ProjectionCoordinator(store, [TotalsByBatch()])
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(await store.last_position())
            beside, lag = await _write(store, coordinator, seconds)
            coordinator.stop()
    return {"appends/s": beside, "alone, appends/s": alone, "events behind": lag}


def in_two_processes(dsn: str, subject: Subject, seconds: float) -> Found:
    """50 writers here, alone, and then with a projection in another process."""
    return on(subject.loop, _beside, opened(dsn, driver=subject.driver), dsn, subject, seconds)


async def _beside(store: EventStore, dsn: str, subject: Subject, seconds: float) -> Found:
    async with store:
        await warm(store)
        alone, _ = await _write(store, None, seconds)
        with follower("benchmarks.projections", dsn, subject.loop, subject.driver) as found:
            beside, _ = await _write(store, None, seconds)
            return {"appends/s": beside, "alone, appends/s": alone, **found()}


async def _project(store: EventStore) -> dict[str, float]:
    """Until standard input ends; how far behind it is then, and that it gets there."""
    async with store, anyio.create_task_group() as tasks:
        coordinator = ProjectionCoordinator(store, [TotalsByBatch()])
        await tasks.start(coordinator.run)
        await coordinator.wait_for(await store.last_position())
        say_ready()
        await anyio.to_thread.run_sync(sys.stdin.read)
        position = coordinator.statistics()[0].position
        last = await store.last_position()
        await coordinator.wait_for(last)
        coordinator.stop()
    return {"events behind": last - position}


async def _write(
    store: EventStore, coordinator: ProjectionCoordinator | None, seconds: float
) -> tuple[float, float]:
    worst = 0.0
    done = 0
    begun = perf_counter()

    async def write(number: int) -> None:
        nonlocal done, worst
        while perf_counter() < begun + seconds:
            result = await store.append_events(f"order-{number}", "Order", [PLACED], ANY)
            done += 1
            if coordinator is not None and done % 100 == 0:
                worst = max(worst, result.position - coordinator.statistics()[0].position)

    async with anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(write, number)
    return done / (perf_counter() - begun), worst


if __name__ == "__main__":
    dsn, loop, driver = sys.argv[1:]
    print(json.dumps(on(loop, _project, opened(dsn, driver=cast("Driver", driver)))))
