"""What is measured: each function does its work once, and returns how many and in what time."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Literal
from uuid import uuid4

import aiosqlite
import anyio

from eventsource_anyio import ANY, EventStore, InMemoryEventStore, SQLiteEventStore, StoredEvent

from .events import PLACED, STEPS, Counter

Measured = tuple[int, float]
Synchronous = Literal["FULL", "NORMAL"]

# The baselines write the same rows as our store, into a table with the same indexes.
TABLE = """
CREATE TABLE events (
    position INTEGER PRIMARY KEY, aggregate_type TEXT NOT NULL, aggregate_id BLOB NOT NULL,
    version INTEGER NOT NULL, event_id BLOB NOT NULL UNIQUE, event_type TEXT NOT NULL,
    schema_version INTEGER NOT NULL, recorded_at INTEGER NOT NULL, occurred_at INTEGER,
    metadata TEXT, payload TEXT NOT NULL, UNIQUE (aggregate_id, aggregate_type, version)
)"""
INSERT = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
PAYLOAD = (
    '{"customer":"customer-4711","amount":"129.90","items":["A-1000-blue","B-2000-red",'
    '"C-3000-green"],"at":"2026-01-02T03:04:05Z","note":"please ring twice, the dog is friendly"}'
)


def _row(number: int) -> tuple[object, ...]:
    stream, version = f"order-{number % 1000}", number // 1000 + 1
    return (None, "Order", stream, version, uuid4().bytes, "Placed", 1, 1, None, None, PAYLOAD)


def bare_sqlite(path: Path, synchronous: Synchronous, appends: int) -> Measured:
    """The bare synchronous driver: a transaction a row, no event loop at all."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(TABLE)
    begun = perf_counter()
    for number in range(appends):
        connection.execute(INSERT, _row(number))
    seconds = perf_counter() - begun
    connection.close()
    return appends, seconds


async def aiosqlite_tasks(
    path: Path, synchronous: Synchronous, appends: int, tasks: int, explicit: bool
) -> Measured:
    """aiosqlite: a transaction a row, from many tasks over one connection.

    `explicit` is BEGIN, INSERT, COMMIT under a lock, as more than one statement has to be; else it
    is one INSERT, which is a transaction of its own.
    """
    async with aiosqlite.connect(path, isolation_level=None) as connection:
        await connection.execute("PRAGMA journal_mode = WAL")
        await connection.execute(f"PRAGMA synchronous = {synchronous}")
        await connection.execute(TABLE)

        lock = anyio.Lock()

        async def append(first: int) -> None:
            for number in range(first, appends, tasks):
                if not explicit:
                    await connection.execute(INSERT, _row(number))
                    continue
                async with lock:
                    await connection.execute("BEGIN IMMEDIATE")
                    await connection.execute(INSERT, _row(number))
                    await connection.execute("COMMIT")

        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for first in range(tasks):
                group.start_soon(append, first)
        return appends, perf_counter() - begun


async def store_tasks(store: EventStore, appends: int, tasks: int) -> Measured:
    """Our store: each task appends to its own stream, one event at a time, at an exact version."""
    async with store:

        async def append(number: int) -> None:
            for version in range(appends // tasks):
                await store.append_events(f"order-{number}", "Order", [PLACED], version)

        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(append, number)
        return appends, perf_counter() - begun


async def memory_one_by_one(appends: int) -> Measured:
    async with InMemoryEventStore() as store:
        begun = perf_counter()
        for number in range(appends):
            await store.append_events(f"order-{number % 100}", "Order", [PLACED], ANY)
        return appends, perf_counter() - begun


async def fill(path: Path, events: int) -> None:
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        for number in range(events // 1000):
            await store.append_events(f"order-{number % 100}", "Order", [PLACED] * 1000, ANY)


async def stream(path: Path) -> Measured:
    """Read the whole file as typed objects."""
    async with SQLiteEventStore(path) as store:
        begun = perf_counter()
        count = 0
        async for _ in store.read_all():
            count += 1
        return count, perf_counter() - begun


def fold(events: int) -> Measured:
    """Rebuild an aggregate with eight event types."""
    now = datetime.now(UTC)
    stored = [
        StoredEvent(STEPS[n % 8](n), uuid4(), "", "a", "Counter", n + 1, n + 1, now, now, {}, 1)
        for n in range(events)
    ]
    counter = Counter("a")
    begun = perf_counter()
    counter.replay(stored)
    seconds = perf_counter() - begun
    if counter.total != sum(range(events)):
        raise AssertionError("the fold is wrong")
    return events, seconds
