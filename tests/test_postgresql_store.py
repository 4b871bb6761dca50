"""The PostgreSQL store, held to the contract, and what only it does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from eventsource_anyio import ANY, PostgreSQLEventStore
from eventsource_anyio.testing import EventStoreContract
from eventsource_anyio.testing.samples import Happened


class TestPostgreSQL(EventStoreContract):
    @pytest.fixture
    async def store(self, postgresql_dsn: str) -> AsyncIterator[PostgreSQLEventStore]:
        store = PostgreSQLEventStore(postgresql_dsn)
        await store.migrate()
        async with store:
            yield store


class TestLibpq(EventStoreContract):
    @pytest.fixture
    async def store(self, postgresql_dsn: str) -> AsyncIterator[PostgreSQLEventStore]:
        store = PostgreSQLEventStore(postgresql_dsn, driver="psycopg")
        await store.migrate()
        async with store:
            yield store


async def test_inside_the_guest_the_store_refuses_to_wait(
    postgresql_dsn: str, anyio_backend_name: str
) -> None:
    store = PostgreSQLEventStore(postgresql_dsn)
    await store.migrate()
    async with store:

        async def append() -> object:
            return await store.append_events("a", "Thing", [Happened(1)], ANY)

        async def get() -> object:
            return await store.get_events("a", "Thing")

        async def read() -> object:
            return await anext(store.read_all())

        async def look_up() -> object:
            return await store.checkpoints.get("reader")

        for call in (append, get, read, look_up, store.last_position):
            if anyio_backend_name == "trio":
                with pytest.raises(RuntimeError, match="outside"):
                    await store.guest.run(call())
            else:  # where there is no inside
                await store.guest.run(call())
        assert (await store.append_events("a", "Thing", [Happened(2)], ANY)).version >= 1
