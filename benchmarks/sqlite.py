"""SQLite: our store beside the bare driver and aiosqlite, all with tables and indexes alike."""

from __future__ import annotations

import sqlite3
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal
from uuid import uuid4

import aiosqlite
import anyio
from rich.console import Console

from eventsource_anyio import ANY, EventStore, SQLiteEventStore

from . import memory
from .events import PLACED
from .suite import LOOPS, Claim, Measured, Suite, on

PART = "sqlite"

Synchronous = Literal["FULL", "NORMAL"]
MODES: tuple[Synchronous, ...] = ("NORMAL", "FULL")
TASKS = 1000

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


def bare(path: Path, synchronous: Synchronous, appends: int) -> Measured:
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
    path: Path, synchronous: Synchronous, appends: int, explicit: bool
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
            for number in range(first, appends, TASKS):
                if not explicit:
                    await connection.execute(INSERT, _row(number))
                    continue
                async with lock:
                    await connection.execute("BEGIN IMMEDIATE")
                    await connection.execute(INSERT, _row(number))
                    await connection.execute("COMMIT")

        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for first in range(TASKS):
                group.start_soon(append, first)
        return appends, perf_counter() - begun


async def store_tasks(store: EventStore, appends: int) -> Measured:
    """Our store: each task appends to its own stream, one event at a time, at an exact version."""
    async with store:

        async def append(number: int) -> None:
            for version in range(appends // TASKS):
                await store.append_events(f"order-{number}", "Order", [PLACED], version)

        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for number in range(TASKS):
                group.start_soon(append, number)
        return appends, perf_counter() - begun


async def fill(path: Path, events: int) -> None:
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        for number in range(events // 1000):
            await store.append_events(f"order-{number % 100}", "Order", [PLACED] * 1000, ANY)


async def stream(path: Path) -> Measured:
    """Read the whole file as typed objects."""
    async with SQLiteEventStore(path) as store:
        begun = perf_counter()
        read = 0
        async for _ in store.read_all():
            read += 1
        return read, perf_counter() - begun


def _suite(folder: Path, scale: float) -> Suite:
    suite = Suite("SQLite")
    read = folder / "read.db"
    anyio.run(fill, read, int(100_000 * scale) // 1000 * 1000)
    appends = max(int(20_000 * scale) // TASKS, 2) * TASKS
    numbers = count()

    def path() -> Path:
        return folder / f"{next(numbers)}.db"

    for mode in MODES:
        few = appends if mode == "NORMAL" else appends // 4  # each waits for the disk

        def alone(mode: Synchronous = mode, few: int = few) -> Measured:
            return bare(path(), mode, few)

        suite.add(f"bare sqlite3, {mode}", alone)
        for explicit, name in ((True, "transaction"), (False, "one INSERT")):

            def peer(
                mode: Synchronous = mode, few: int = few, explicit: bool = explicit
            ) -> Measured:
                return on("asyncio", aiosqlite_tasks, path(), mode, few, explicit)

            suite.add(f"aiosqlite {name}, {mode}", peer)
        for loop in LOOPS:

            def ours(loop: str = loop, mode: Synchronous = mode) -> Measured:
                store = SQLiteEventStore(path(), synchronous=mode)
                return on(loop, store_tasks, store, appends)

            suite.add(f"SQLite, 1,000 tasks, {mode}, {loop}", ours)
    for loop in LOOPS:
        suite.add(f"SQLite, stream, {loop}", partial(on, loop, stream, read))
    return suite


def _claims(suite: Suite) -> list[Claim]:
    ratio = suite.ratio
    found: list[Claim] = []
    for loop in LOOPS:
        normal, full = (f"SQLite, 1,000 tasks, {mode}, {loop}" for mode in MODES)
        streamed = suite.median(f"SQLite, stream, {loop}")
        aio = ratio(normal, "aiosqlite transaction, NORMAL")
        found += [
            Claim(f"SQLite NORMAL, {loop} ÷ aiosqlite", aio, "≥", 5),
            Claim(
                f"SQLite NORMAL, {loop} ÷ bare driver",
                ratio(normal, "bare sqlite3, NORMAL"),
                "≥",
                0.4,
            ),
            Claim(f"SQLite FULL, {loop} ÷ bare driver", ratio(full, "bare sqlite3, FULL"), "≥", 5),
            Claim(f"SQLite: streamed events/s, {loop}", streamed, "≥", 200_000),
        ]
    for what in (*(f"SQLite, 1,000 tasks, {mode}" for mode in MODES), "SQLite, stream"):
        relation = ratio(f"{what}, trio", f"{what}, asyncio")
        found.append(Claim(f"Trio ÷ asyncio: {what}", relation, "≥", 0.85))
    return found


def _limits(folder: Path, events: int) -> list[Claim]:
    large = folder / "large.db"
    anyio.run(fill, large, events)
    found: list[Claim] = []
    for loop in ("asyncio", "trio"):
        streamed = memory.in_a_process("stream", loop, str(large))
        what = f"SQLite: MB above the start, {events:,} events streamed, {loop}"
        found.append(Claim(what, streamed, "≤", 50))
        appended = memory.in_a_process("appends", loop, str(folder / f"appends-{loop}.db"))
        what = f"SQLite: kB for each of 10,000 concurrent appends, {loop}"
        found.append(Claim(what, appended, "≤", 10))
    return found


def measure(scale: float, rounds: int, console: Console) -> tuple[Suite, list[Claim]]:
    with TemporaryDirectory() as name:
        suite = _suite(Path(name), scale)
        suite.run(rounds, console)
        return suite, [*_claims(suite), *_limits(Path(name), int(1_000_000 * scale))]
