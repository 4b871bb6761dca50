"""The baselines: what one can do with asyncpg alone, with the same events, rows and indexes.

- The table is `LIKE` our store's: the same columns, types, defaults, compression and indexes. It
  has a sequence of its own and no trigger.
- Each row is made as any user of asyncpg has to make it: a new uuid7 and the event encoded by
  msgspec, in the task that wants the row stored.
- The limit is `INSERT`: one statement that asyncpg has prepared before, a transaction of its own,
  with `unnest` where an append is of several events. Nothing is checked, and nothing is answered.
- More are told. `our function` is what our store calls, a transaction an append, so that what is
  left between it and the store is its Python, and the grouping of appends. `our function, our
  encoding` also has the events encoded as our store does it, which reads each back. `checked
  transaction` is what one writes who needs the version checked: BEGIN, the stream's version,
  INSERT, COMMIT.
- `gathered` is grouping and nothing else, the most that any store could reach on the machine:
  rows that wait are inserted together, as many at a time as our store does, and again nothing is
  checked, answered or ordered. `gathered, our function` has them checked, by our store's function.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any, TypeAlias, cast

import anyio
import asyncpg  # type: ignore[import-untyped]
import msgspec

from eventsource_anyio.ids import uuid7
from eventsource_anyio.stores.postgresql.schema import Schema
from eventsource_anyio.stores.postgresql.statements import Statements, events_values
from eventsource_anyio.stores.records import encode_append

from .events import PLACED, Placed
from .suite import Found, per_second

CONNECTIONS = 20

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
_STATEMENTS = Statements(Schema("eventsource", ""))
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

_INSERT_ROWS = """
INSERT INTO bare.events (version, recorded_at, occurred_at, event_id, schema_version, event_type,
    aggregate_type, aggregate_id, metadata, payload)
SELECT version, clock_timestamp(), NULL, event_id, 1, $1, $2, aggregate_id, NULL, payload
FROM unnest($3::text[], $4::bigint[], $5::uuid[], $6::text[])
    AS row(aggregate_id, version, event_id, payload)
"""

Row: TypeAlias = tuple[object, ...]
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Placed).decode
_PAGE = 1000
_GATHERED_AT_MOST = 128
_LANES = 2


def _row(stream: str, version: int) -> Row:
    return (version, None, uuid7(), 1, "Placed", "Order", stream, None, _encode(PLACED).decode())


def _rows(stream: str, first: int, events: int) -> Row:
    """The columns of a batch."""
    return (
        "Order",
        stream,
        list(range(first, first + events)),
        [uuid7() for _ in range(events)],
        [1] * events,
        ["Placed"] * events,
        [_encode(PLACED).decode() for _ in range(events)],
    )


def _made(stream: str, first: int, events: int) -> Row:
    return _row(stream, first) if events == 1 else _rows(stream, first, events)


@asynccontextmanager
async def _connections(
    dsn: str, how_many: int, way: str, events: int
) -> AsyncIterator[Sequence[Any]]:
    """Connections that have prepared what they are going to say."""
    connections: list[Any] = [await asyncpg.connect(dsn) for _ in range(how_many)]
    try:
        for number, connection in enumerate(connections):
            await WAYS[way](connection, _made("warm", 1 + number * events, events))
        yield connections
    finally:
        for connection in connections:
            await connection.close()


async def _insert(connection: Any, row: Row) -> None:
    await connection.fetch(INSERT if isinstance(row[0], int) else INSERT_UNNEST, *row)


async def _insert_together(connection: Any, *rows: Row) -> None:
    versions, _, ids, _, kinds, types, streams, _, payloads = zip(*rows, strict=True)
    await connection.fetch(_INSERT_ROWS, kinds[0], types[0], streams, versions, ids, payloads)


async def _append(connection: Any, row: Row) -> None:
    if not isinstance(row[0], int):
        kind, stream, versions, ids, _, types, payloads = cast("tuple[Any, ...]", row)
        await _append_rows(connection, [kind], [stream], [versions[0] - 1], ids, types, payloads)
        return
    version, occurred_at, event_id, schema_version, kind, aggregate_type, stream, *rest = row
    values = (aggregate_type, stream, cast("int", version) - 1, event_id, kind, schema_version)
    ((status, *_),) = await connection.fetch(_STATEMENTS.append_event, *values, occurred_at, *rest)
    if status != 0:
        raise AssertionError(f"append_event answered {status}")


async def _append_together(connection: Any, *rows: Row) -> None:
    versions, _, ids, _, types, kinds, streams, _, payloads = zip(*rows, strict=True)
    expected = [cast("int", version) - 1 for version in versions]
    await _append_rows(connection, kinds[:1], streams, expected, ids, types, payloads)


async def _append_rows(
    connection: Any,
    kinds: Sequence[object],
    streams: Sequence[object],
    expected: Sequence[int],
    ids: Sequence[object],
    types: Sequence[object],
    payloads: Sequence[object],
) -> None:
    """Of one type, with the arguments that our store gives for these."""
    values = (kinds, streams, (), expected, (), (), (), ids, types[:1], (), (), (), payloads)
    ((statuses, *_),) = await connection.fetch(_STATEMENTS.append_events, *values, False, False)
    if any(statuses):
        raise AssertionError(f"append_events answered {statuses}")


async def _append_encoded(connection: Any, row: Row) -> None:
    _, stream, versions, *_ = cast("tuple[Any, ...]", row)
    encoded = encode_append(stream, "Order", [PLACED] * len(versions), versions[0] - 1, None)
    values = events_values([encoded], wait=False, atomic=False)
    ((statuses, *_),) = await connection.fetch(_STATEMENTS.append_events, *values)
    if any(statuses):
        raise AssertionError(f"append_events answered {statuses}")


async def _checked(connection: Any, row: Row) -> None:
    async with connection.transaction():
        version = await connection.fetchval(VERSION, row[6], row[5])
        if version + 1 != row[0]:
            raise AssertionError(f"the stream is at version {version}")
        await connection.fetch(INSERT, *row)


WAYS: Mapping[str, Callable[[Any, Row], Awaitable[None]]] = {
    "checked transaction": _checked,
    "our function": _append,
    "our function, our encoding": _append_encoded,
    "INSERT": _insert,
    "gathered": _insert_together,
    "gathered, our function": _append_together,
}


async def appends(
    dsn: str, tasks: int, events: int, contended: bool, seconds: float, way: str = "INSERT"
) -> Found:
    if way.startswith("gathered"):
        return await _gathered(dsn, tasks, seconds, way)
    if tasks == 1:
        return await _one_by_one(dsn, events, seconds, way)
    return await _queue(dsn, tasks, events, contended, seconds, way)


async def _one_by_one(dsn: str, events: int, seconds: float, way: str) -> Found:
    """One task, one append after another, each a transaction."""
    store = WAYS[way]
    async with _connections(dsn, 1, way, events) as (connection,):
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            await store(connection, _made("order-0", done + 1, events))
            done += events
        return per_second(done, now - begun)


async def _queue(
    dsn: str, tasks: int, events: int, contended: bool, seconds: float, way: str
) -> Found:
    """Many tasks before a queue that is served by 20 connections, a transaction an append.

    Each task awaits its own rows, as an append has to be awaited, before it makes the next ones.
    Versions of one stream are counted here, as no two processes could.
    """
    store = WAYS[way]
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[Row, asyncio.Future[None]]] = asyncio.Queue()
    versions = count(1, events)

    async def serve(connection: Any) -> None:
        while True:
            row, stored = await waiting.get()
            await store(connection, row)
            stored.set_result(None)

    done = 0

    async def append(number: int, end: float) -> None:
        nonlocal done
        own = count(1, events)
        first = True
        while first or perf_counter() < end:
            first = False
            stored: asyncio.Future[None] = loop.create_future()
            if contended:
                row = _made("order", next(versions), events)
            else:
                row = _made(f"order-{number}", next(own), events)
            waiting.put_nowait((row, stored))
            await stored
            done += events

    async with _connections(dsn, CONNECTIONS, way, events) as connections:
        servers = [partial(serve, connection) for connection in connections]
        took = await _served(servers, append, tasks, seconds)
        return per_second(done, took)


async def _served(
    servers: Sequence[Callable[[], Coroutine[Any, Any, None]]],
    append: Callable[[int, float], Coroutine[Any, Any, None]],
    tasks: int,
    seconds: float,
) -> float:
    """Run the tasks until the time is over; how long it took them."""
    async with anyio.create_task_group() as serving:
        for serve in servers:
            serving.start_soon(serve)
        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(append, number, begun + seconds)
        ended = perf_counter()
        serving.cancel_scope.cancel()
    return ended - begun


async def _gathered(dsn: str, tasks: int, seconds: float, way: str) -> Found:
    """Each connection stores what has come together while it was busy."""
    store = WAYS[way]
    loop = asyncio.get_running_loop()
    waiting: list[list[tuple[Row, asyncio.Future[None]]]] = [[] for _ in range(_LANES)]
    something = [asyncio.Event() for _ in waiting]

    async def serve(connection: Any, lane: int) -> None:
        mine = waiting[lane]
        while True:
            await something[lane].wait()
            something[lane].clear()
            while mine:
                together = mine[:_GATHERED_AT_MOST]
                del mine[:_GATHERED_AT_MOST]
                await store(connection, *(row for row, _ in together))
                for _, stored in together:
                    stored.set_result(None)
                await asyncio.sleep(0)  # whoever was woken now comes along

    done = 0

    async def append(number: int, end: float) -> None:
        nonlocal done
        lane = number % _LANES
        for version in count(1):
            stored: asyncio.Future[None] = loop.create_future()
            waiting[lane].append((_row(f"order-{number}", version), stored))
            something[lane].set()
            await stored
            done += 1
            if perf_counter() >= end:
                return

    async with _connections(dsn, _LANES, way, 1) as connections:
        servers = [partial(serve, one, lane) for lane, one in enumerate(connections)]
        took = await _served(servers, append, tasks, seconds)
        return per_second(done, took)


async def loads(dsn: str, schema: str, size: int, seconds: float) -> Found:
    """The stream's payloads as typed objects, and their sum."""
    select = (
        f"SELECT payload FROM {schema}.events WHERE aggregate_id = $1 "
        "AND aggregate_type = 'Order' ORDER BY version"
    )
    connection = await asyncpg.connect(dsn)
    try:
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            rows = await connection.fetch(select, f"order-{size}")
            total = sum((_decode(payload).amount for (payload,) in rows), Decimal())
            if total != PLACED.amount * size:
                raise AssertionError(f"{total} is not the sum of {size} events")
            done += 1
        return {"ms": (now - begun) / done * 1000}
    finally:
        await connection.close()


async def read_all(dsn: str, schema: str, events: int, seconds: float) -> Found:
    """Pages of whole rows, each payload as a typed object."""
    select = f"SELECT * FROM {schema}.events WHERE position > $1 ORDER BY position LIMIT {_PAGE}"
    connection = await asyncpg.connect(dsn)
    try:
        read = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            position, before = 0, read
            while rows := await connection.fetch(select, position):
                position = rows[-1]["position"]
                for row in rows:
                    _decode(row["payload"])
                read += len(rows)
            if read - before != events:
                raise AssertionError(f"{read - before:,} events were read of {events:,}")
        return per_second(read, now - begun)
    finally:
        await connection.close()
