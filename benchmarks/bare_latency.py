"""The same latency of what one writes by hand: an INSERT that notifies, a listener that reads on.

It is told beside ours, to know what the machine and the server take. It loses events as soon as
there are two writers, so there is one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from itertools import count

import asyncpg  # type: ignore[import-untyped]
import msgspec

from eventsource_anyio import DomainEvent
from eventsource_anyio.ids import uuid7

from .events import AllSent, Sent
from .latency import Load, collect, follower, say_ready, write
from .suite import Found, on

_INSERT = """
WITH stored AS (
    INSERT INTO bare.events (version, recorded_at, event_id, schema_version, event_type,
        aggregate_type, aggregate_id, payload)
    VALUES ($1, clock_timestamp(), $2, 1, $3, 'Latency', $4, $5) RETURNING position
)
SELECT pg_notify('bare', '') FROM stored
"""
_PAGE = """
SELECT position, event_type, payload FROM bare.events
WHERE position > $1 ORDER BY position LIMIT 500
"""


def two_processes(dsn: str, load: Load, seconds: float) -> Found:
    assert load.writers == 1
    with follower("benchmarks.bare_latency", dsn) as found:
        sent = on("asyncio", _write_in, dsn, load, seconds)
        return {**found(), "committed": sent, "appends/s": sent / seconds}


async def _write_in(dsn: str, load: Load, seconds: float) -> int:
    connection = await asyncpg.connect(dsn)
    versions = count(1)

    async def append(stream: str, event: DomainEvent) -> None:
        payload = msgspec.json.encode(event).decode()
        values = (next(versions), uuid7(), type(event).__name__, stream, payload)
        await connection.fetch(_INSERT, *values)

    try:
        return await write(append, load, seconds)
    finally:
        await connection.close()


async def _follow(dsn: str) -> dict[str, float]:
    connection = await asyncpg.connect(dsn)
    heard = asyncio.Event()
    await connection.add_listener("bare", lambda *_: heard.set())

    async def events() -> AsyncIterator[DomainEvent]:
        last = 0
        while True:
            heard.clear()
            rows = await connection.fetch(_PAGE, last)
            for position, kind, payload in rows:
                last = position
                yield msgspec.json.decode(payload, type=Sent if kind == "Sent" else AllSent)
            if not rows:
                await heard.wait()

    say_ready()
    try:
        return await collect(events())
    finally:
        await connection.close()


if __name__ == "__main__":
    (dsn,) = sys.argv[1:]
    print(json.dumps(on("asyncio", _follow, dsn)))
