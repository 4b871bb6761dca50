"""The baselines on SQLite: the bare driver, and aiosqlite.

Both write the same rows as our store into a table with the same indexes, each row made when it is
wanted, with the event encoded by msgspec.

- *bare*: the standard library's driver, a transaction an append, no event loop: the limit of what
  one caller can do, so it is the same for any number of tasks.
- *aiosqlite*: `BEGIN`, `INSERT`, `COMMIT` under a lock over one connection, as any append that has
  to check something first must do.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeAlias

import aiosqlite
import anyio
import msgspec

from eventsource_anyio.ids import uuid7

from .events import PLACED, Placed
from .suite import Found, per_second
from .work import BATCH, LOADED, Filled

Synchronous: TypeAlias = Literal["FULL", "NORMAL"]
Row: TypeAlias = tuple[object, ...]

TABLE = """
CREATE TABLE events (
    position INTEGER PRIMARY KEY, aggregate_type TEXT NOT NULL, aggregate_id BLOB NOT NULL,
    version INTEGER NOT NULL, event_id BLOB NOT NULL UNIQUE, event_type TEXT NOT NULL,
    schema_version INTEGER NOT NULL, recorded_at INTEGER NOT NULL, occurred_at INTEGER,
    metadata TEXT, payload TEXT NOT NULL, UNIQUE (aggregate_id, aggregate_type, version)
)"""
INSERT = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PAGE = 500
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Placed).decode


def _row(stream: str, version: int) -> Row:
    payload = _encode(PLACED).decode()
    event_id = uuid7().bytes
    return (None, "Order", stream, version, event_id, "Placed", 1, 1, None, None, payload)


@contextmanager
def _opened(path: Path, synchronous: Synchronous = "FULL") -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    try:
        yield connection
    finally:
        connection.close()


def appends(path: Path, synchronous: Synchronous, events: int, seconds: float) -> Found:
    with _opened(path, synchronous) as connection:
        connection.execute(TABLE)
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            if events == 1:
                connection.execute(INSERT, _row("order", done + 1))
            else:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(INSERT, (_row("order", done + n) for n in range(events)))
                connection.execute("COMMIT")
            done += events
        return per_second(done, now - begun)


async def aiosqlite_appends(
    path: Path, synchronous: Synchronous, tasks: int, seconds: float
) -> Found:
    """Each task to a stream of its own; none begins an append after the end, but the first."""
    async with aiosqlite.connect(path, isolation_level=None) as connection:
        await connection.execute("PRAGMA journal_mode = WAL")
        await connection.execute(f"PRAGMA synchronous = {synchronous}")
        await connection.execute(TABLE)
        lock = anyio.Lock()
        done = 0

        async def append(number: int) -> None:
            nonlocal done
            version = 0
            while perf_counter() < begun + seconds:
                async with lock:
                    if done and perf_counter() > begun + seconds:
                        return
                    version += 1
                    await connection.execute("BEGIN IMMEDIATE")
                    await connection.execute(INSERT, _row(f"order-{number}", version))
                    await connection.execute("COMMIT")
                    done += 1

        begun = perf_counter()
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(append, number)
        return per_second(done, perf_counter() - begun)


def fill(path: Path, what: Filled) -> None:
    with _opened(path, "NORMAL") as connection:
        connection.execute(TABLE)
        names = [f"order-{size}" for size in what.sizes if size == LOADED]
        names += [f"other-{number}" for number in range(what.streams - len(names))]
        shares = dict.fromkeys(names, BATCH)
        shares |= {f"order-{size}": size * BATCH // LOADED for size in what.sizes if size != LOADED}
        connection.execute("BEGIN")
        for step in range(LOADED // BATCH):
            for name, share in shares.items():
                rows = (_row(name, step * share + n + 1) for n in range(share))
                connection.executemany(INSERT, rows)
        connection.execute("COMMIT")


def loads(path: Path, size: int, seconds: float) -> Found:
    """The stream's payloads as typed objects, and their sum."""
    select = (
        "SELECT payload FROM events WHERE aggregate_id = ? AND aggregate_type = 'Order' "
        "ORDER BY version"
    )
    with _opened(path) as connection:
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            rows = connection.execute(select, (f"order-{size}",)).fetchall()
            total = sum((_decode(payload).amount for (payload,) in rows), Decimal())
            if total != PLACED.amount * size:
                raise AssertionError(f"{total} is not the sum of {size} events")
            done += 1
        return {"ms": (now - begun) / done * 1000}


def read_all(path: Path, events: int, seconds: float) -> Found:
    """Pages of whole rows, each payload as a typed object."""
    select = "SELECT * FROM events WHERE position > ? ORDER BY position LIMIT ?"
    with _opened(path) as connection:
        read = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            position, before = 0, read
            while rows := connection.execute(select, (position, _PAGE)).fetchall():
                position = rows[-1][0]
                for row in rows:
                    _decode(row[-1])
                read += len(rows)
            if read - before != events:
                raise AssertionError(f"{read - before:,} events were read of {events:,}")
        return per_second(read, now - begun)
