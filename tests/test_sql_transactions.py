"""SQL in transactions: both stores that have it, held to one contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eventsource_anyio import PostgreSQLEventStore, SQLiteEventStore
from eventsource_anyio.testing.sql_transacting import SQLTransactContract


class TestSQLite(SQLTransactContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[SQLiteEventStore]:
        async with SQLiteEventStore(tmp_path / "events.db", synchronous="NORMAL") as store:
            yield store


class TestPostgreSQL(SQLTransactContract):
    @pytest.fixture
    async def store(self, migrated_dsn: str) -> AsyncIterator[PostgreSQLEventStore]:
        async with PostgreSQLEventStore(migrated_dsn) as store:
            yield store
