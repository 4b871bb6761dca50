"""A fixture for tests of what is built on stores: each runs on every one of them.

from .every_store import open_store as _  # and take `store`, or `make_store`
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from eventsource_anyio import EventStore, InMemoryEventStore, PostgreSQLEventStore, SQLiteEventStore

STORES = ["in memory", "SQLite", "PostgreSQL"]
# psycopg waits for its socket by anyio alone, and so uvloop is to it what asyncio is: that it
# works there show the contracts of drivers and of stores.
DRIVERS = ["asyncpg", pytest.param("psycopg", marks=pytest.mark.not_on_uvloop)]


@pytest.fixture(params=STORES, name="which")
def which_store(request: pytest.FixtureRequest) -> str:
    which: str = request.param
    return which


@pytest.fixture
async def make_store(
    anyio_backend: object, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[], EventStore]:
    """Makes stores of one database, which is empty at first; in memory it is always the same."""
    if which == "in memory":
        one = InMemoryEventStore()
        return lambda: one
    if which == "SQLite":
        return lambda: SQLiteEventStore(tmp_path / "events.db", synchronous="NORMAL")
    dsn: str = request.getfixturevalue("migrated_dsn")
    return lambda: PostgreSQLEventStore(dsn)


@pytest.fixture(name="store")
async def open_store(make_store: Callable[[], EventStore]) -> AsyncIterator[EventStore]:
    async with make_store() as store:
        yield store
