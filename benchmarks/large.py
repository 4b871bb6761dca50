"""Five million events: what an append costs then, and how much memory it takes to read them all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import md5
from itertools import cycle
from random import Random
from time import perf_counter
from uuid import UUID

import anyio
import attrs
from rich.console import Console

from eventsource_anyio import EventStore

from . import memory, work
from .events import KINDS, PLACED
from .plan import Plan
from .server import checkpoint, sql
from .subject import migrate, opened
from .suite import Found, Piece, Suite, on, ours, per_second

EVENTS, STREAMS = 5_000_000, 50_000
FULL = "large"
ACTIVE = 1000
CASES = ((1, ACTIVE), (1000, ACTIVE), (1000, STREAMS))
"""How many tasks, and how many of the streams they append to."""

_CHUNK = 250_000
_TYPES = ("Order", "Invoice", "Shipment", "Account")

# Through the store's own table, so with its trigger, its sequence and every index; the streams grow
# side by side, and their names are as random as UUIDs are.
_FILL = f"""
INSERT INTO {FULL}.events (version, recorded_at, event_id, schema_version, event_type,
    aggregate_type, aggregate_id, payload)
SELECT (n - 1) / {STREAMS} + 1,
    timestamptz '2026-01-01' + n * interval '10 milliseconds',
    (lpad(to_hex(1767225600000 + n * 10), 12, '0') || '7' || substr(md5(n::text), 1, 3)
        || '8' || substr(md5(n::text), 4, 15))::uuid,
    1,
    (ARRAY{[kind.__name__ for kind in KINDS]})[1 + n % {len(KINDS)}],
    (ARRAY{list(_TYPES)})[1 + (n - 1) % {STREAMS} % {len(_TYPES)}],
    md5(((n - 1) % {STREAMS})::text)::uuid::text,
    '{{"customer":"customer-' || n % 10000 || '","amount":"' || n % 500 || '.90",'
        '"items":["A-1000-blue","B-2000-red","C-3000-green"],"at":"2026-01-02T03:04:05Z",'
        '"note":"please ring twice, the dog is friendly"}}'
FROM"""


def fill(dsn: str, events: int, console: Console) -> None:
    begun = perf_counter()
    anyio.run(migrate, dsn, FULL)
    for first in range(1, events, _CHUNK):
        last = min(first + _CHUNK - 1, events)
        sql(dsn, f"{_FILL} generate_series({first}::bigint, {last}) n")
        console.print(f"{last:,} events, {perf_counter() - begun:.0f} s")
    sql(dsn, f"VACUUM ANALYZE {FULL}.events")
    checkpoint(dsn)


@attrs.define
class _Stream:
    aggregate_id: str
    aggregate_type: str
    version: int


def _streams(version: int) -> list[_Stream]:
    """All of them, in an order that has nothing to do with where they are stored."""
    numbers = Random(1).sample(range(STREAMS), STREAMS)
    return [_Stream(_name(n), _TYPES[n % len(_TYPES)], version) for n in numbers]


def _name(number: int) -> str:
    return str(UUID(bytes=md5(str(number).encode()).digest()))


async def appends(
    store: EventStore, streams: Sequence[_Stream], tasks: int, seconds: float
) -> Found:
    """Each task has streams of its own, and appends to one after another at an exact version."""
    done = 0

    async def append(number: int) -> None:
        nonlocal done
        for stream in cycle(streams[number::tasks]):
            if perf_counter() >= begun + seconds:
                return
            at = (stream.aggregate_id, stream.aggregate_type)
            result = await store.append_events(*at, [PLACED], stream.version)
            stream.version = result.version
            done += 1

    async with store:
        await work.warm(store)
        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(append, number)
        return per_second(done, perf_counter() - begun)


def add(suite: Suite, plan: Plan, dsn: str, console: Console) -> None:
    fill(dsn, EVENTS, console)
    grown = _streams(EVENTS // STREAMS)

    def run(tasks: int, among: int, schema: str) -> Found:
        streams = grown if schema else _streams(0)
        if not schema:
            sql(dsn, "TRUNCATE eventsource.events")
        store = opened(dsn, schema)
        return on("asyncio", appends, store, streams[:among], tasks, plan.seconds)

    for tasks, among in CASES:
        for schema, where in (("", "0"), (FULL, "5 M")):
            what = f"append at {where} events"
            piece = Piece(what, "PostgreSQL", _case(tasks, among), ours("asyncio"))
            suite.add(piece, partial(run, tasks, among, schema))
    for loop in ("asyncio", "Trio"):
        case = f"{EVENTS:,} events"
        piece = Piece("memory of a long stream", "PostgreSQL", case, ours(loop))
        suite.add(piece, partial(memory.in_a_process, "stream", loop, dsn, 0, FULL))


def _case(tasks: int, among: int) -> str:
    return f"{tasks:,} task{'s' if tasks > 1 else ''}, {among:,} streams"
