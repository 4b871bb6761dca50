"""The PostgreSQL store, held to the contract, and what only it does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from eventsource_anyio.stores.postgresql import PostgreSQLEventStore
from eventsource_anyio.testing import EventStoreContract


class TestPostgreSQL(EventStoreContract):
    @pytest.fixture
    async def store(self, postgresql_dsn: str) -> AsyncIterator[PostgreSQLEventStore]:
        store = PostgreSQLEventStore(postgresql_dsn)
        await store.migrate()
        async with store:
            yield store
