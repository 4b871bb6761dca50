"""Both stores, held to the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eventsource_anyio import InMemoryEventStore, SQLiteEventStore
from eventsource_anyio.testing import EventStoreContract


class TestInMemory(EventStoreContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryEventStore]:
        async with InMemoryEventStore() as store:
            yield store


class TestSQLite(EventStoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[SQLiteEventStore]:
        async with SQLiteEventStore(tmp_path / "events.db", synchronous="NORMAL") as store:
            yield store
