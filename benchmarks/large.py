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

from . import memory, postgresql_work
from .events import KINDS, PLACED
from .postgresql_work import opened
from .server import checkpoint, sql
from .suite import Claim, Measured, Suite, on

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
    anyio.run(postgresql_work.migrate, dsn, FULL)
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
) -> Measured:
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
        await postgresql_work.warm(store)
        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(append, number)
        return done, perf_counter() - begun


def measure(dsn: str, seconds: float, rounds: int, console: Console) -> tuple[Suite, list[Claim]]:
    fill(dsn, EVENTS, console)
    suite = Suite("Five million events")
    grown = _streams(EVENTS // STREAMS)

    def run(tasks: int, among: int, schema: str) -> Measured:
        streams = grown if schema else _streams(0)
        if not schema:
            sql(dsn, "TRUNCATE eventsource.events")
        store = opened(dsn, schema)
        return on("asyncio", appends, store, streams[:among], tasks, seconds)

    for tasks, among in CASES:
        for schema, where in (("", "0"), (FULL, "5 M")):
            work = partial(run, tasks, among, schema)
            suite.add(f"appends at {where} events, {_case(tasks, among)}", work)
    suite.run(rounds, console)
    return suite, [*_cost(suite), *_memory(dsn)]


def _case(tasks: int, among: int) -> str:
    return f"{tasks:,} task{'s' if tasks > 1 else ''}, {among:,} streams"


def _cost(suite: Suite) -> list[Claim]:
    found: list[Claim] = []
    for tasks, among in CASES:
        case = _case(tasks, among)
        cost = suite.ratio(f"appends at 0 events, {case}", f"appends at 5 M events, {case}")
        bound = 1.2 if among == ACTIVE else None
        found.append(Claim(f"cost of an append at 5 M events ÷ at 0, {case}", cost, "≤", bound))
    return found


def _memory(dsn: str) -> list[Claim]:
    return [
        Claim(
            f"PostgreSQL: MB above the start, {EVENTS:,} events streamed, {loop}",
            memory.in_a_process("stream", loop, dsn, FULL),
            "≤",
            50,
        )
        for loop in ("asyncio", "trio")
    ]
