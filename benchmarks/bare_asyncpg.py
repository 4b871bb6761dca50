"""The baselines: what one can do with asyncpg alone, with the same events, rows and indexes.

- The table is `LIKE` our store's: the same columns, types, defaults, compression and indexes. It
  has a sequence of its own and no trigger.
- Each row is made as any user of asyncpg has to make it: a new uuid7 and the event encoded by
  msgspec, in the task that wants the row stored.
- The claims are held to `INSERT`: one statement that asyncpg has prepared before, a transaction of
  its own. Nothing is checked, and nothing is answered.
- Two more are told. `append_event` is our store's function, a transaction a row, so that what is
  left between it and the store is the grouping of appends. `checked transaction` is what one writes
  who needs the version checked: BEGIN, the stream's version, INSERT, COMMIT.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, TypeAlias, cast

import anyio
import asyncpg  # type: ignore[import-untyped]
import msgspec

from eventsource_anyio.ids import uuid7

from .events import PLACED
from .suite import Measured

CONNECTIONS = 20
BATCH = 100

TABLE = """
CREATE SCHEMA bare;
CREATE SEQUENCE bare.positions AS bigint CACHE 1;
CREATE TABLE bare.events (LIKE eventsource.events INCLUDING ALL);
ALTER TABLE bare.events ALTER COLUMN position SET DEFAULT nextval('bare.positions');
"""
INSERT = """
INSERT INTO bare.events (version, recorded_at, occurred_at, event_id, schema_version, event_type,
    aggregate_type, aggregate_id, metadata, payload)
VALUES ($1, clock_timestamp(), $2, $3, $4, $5, $6, $7, $8, $9)
"""
APPEND_EVENT = """
SELECT * FROM eventsource.append_event($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
# By comparing rows, as our store does: no statistics can talk the planner into another index.
VERSION = """
SELECT coalesce((
    SELECT CASE WHEN aggregate_id = $1 AND aggregate_type = $2 THEN version END FROM bare.events
    WHERE (aggregate_id, aggregate_type, version) <= ($1, $2, 9223372036854775807)
    ORDER BY aggregate_id DESC, aggregate_type DESC, version DESC LIMIT 1), 0)
"""
INSERT_UNNEST = """
INSERT INTO bare.events (version, recorded_at, occurred_at, event_id, schema_version, event_type,
    aggregate_type, aggregate_id, metadata, payload)
SELECT version, clock_timestamp(), NULL, event_id, schema_version, event_type, $1, $2, NULL, payload
FROM unnest($3::bigint[], $4::uuid[], $5::int[], $6::text[], $7::text[])
    AS row(version, event_id, schema_version, event_type, payload)
"""

Row: TypeAlias = tuple[object, ...]
_encode = msgspec.json.Encoder().encode


def _row(stream: str, version: int) -> Row:
    return (version, None, uuid7(), 1, "Placed", "Order", stream, None, _encode(PLACED).decode())


def _rows(stream: str, first: int) -> Row:
    """The columns of a batch."""
    return (
        "Order",
        stream,
        list(range(first, first + BATCH)),
        [uuid7() for _ in range(BATCH)],
        [1] * BATCH,
        ["Placed"] * BATCH,
        [_encode(PLACED).decode() for _ in range(BATCH)],
    )


@asynccontextmanager
async def _connections(dsn: str, count: int, way: str = "INSERT") -> AsyncIterator[Sequence[Any]]:
    """Connections that have prepared what they are going to say."""
    connections: list[Any] = [await asyncpg.connect(dsn) for _ in range(count)]
    try:
        for number, connection in enumerate(connections, 1):
            await WAYS[way](connection, _row("warm", number))
        yield connections
    finally:
        for connection in connections:
            await connection.close()


async def _insert(connection: Any, row: Row) -> None:
    await connection.fetch(INSERT, *row)


async def _append_event(connection: Any, row: Row) -> None:
    version, occurred_at, event_id, schema_version, kind, aggregate_type, stream, *rest = row
    values = (aggregate_type, stream, cast("int", version) - 1, event_id, kind, schema_version)
    ((status, *_),) = await connection.fetch(APPEND_EVENT, *values, occurred_at, *rest)
    if status != 0:
        raise AssertionError(f"append_event answered {status}")


async def _checked(connection: Any, row: Row) -> None:
    async with connection.transaction():
        version = await connection.fetchval(VERSION, row[6], row[5])
        if version + 1 != row[0]:
            raise AssertionError(f"the stream is at version {version}")
        await connection.fetch(INSERT, *row)


WAYS: Mapping[str, Callable[[Any, Row], Awaitable[None]]] = {
    "checked transaction": _checked,
    "append_event": _append_event,
    "INSERT": _insert,  # the last, so that it stands next to ours
}


async def one_by_one(dsn: str, seconds: float, way: str) -> Measured:
    """One task, one row after another, each a transaction."""
    store = WAYS[way]
    async with _connections(dsn, 1, way) as (connection,):
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            done += 1
            await store(connection, _row("order-0", done))
        return done, now - begun


async def queue(dsn: str, tasks: int, seconds: float, way: str) -> Measured:
    """Many tasks before a queue that is served by 20 connections, a transaction a row.

    Each task awaits its own row, as an append has to be awaited, before it makes the next one.
    """
    store = WAYS[way]
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[Row, asyncio.Future[None]]] = asyncio.Queue()

    async def serve(connection: Any) -> None:
        while True:
            row, stored = await waiting.get()
            await store(connection, row)
            stored.set_result(None)

    done = 0

    async def append(number: int) -> None:
        nonlocal done
        version = 0
        while perf_counter() < begun + seconds:
            version += 1
            stored: asyncio.Future[None] = loop.create_future()
            waiting.put_nowait((_row(f"order-{number}", version), stored))
            await stored
            done += 1

    async with _connections(dsn, CONNECTIONS, way) as connections:
        async with anyio.create_task_group() as servers:
            for connection in connections:
                servers.start_soon(serve, connection)
            begun = perf_counter()
            async with anyio.create_task_group() as group:
                for number in range(tasks):
                    group.start_soon(append, number)
            ended = perf_counter()
            servers.cancel_scope.cancel()
        return done, ended - begun


async def unnest(dsn: str, seconds: float, encoded: bool) -> Measured:
    """Batches of 100 rows of one stream, a statement and a transaction each.

    `encoded`: making the rows counts, as it does for whoever stores events. Otherwise only the
    statement does, which leaves nothing but the driver and the server.
    """
    async with _connections(dsn, 1) as (connection,):
        await connection.fetch(INSERT_UNNEST, *_rows("warm-100", 1))
        done, spent = 0, 0.0
        end = perf_counter() + seconds
        while (begun := perf_counter()) < end:
            rows = _rows("order-0", 1 + done * BATCH)
            if not encoded:
                begun = perf_counter()
            await connection.fetch(INSERT_UNNEST, *rows)
            spent += perf_counter() - begun
            done += 1
        return done * BATCH, spent
