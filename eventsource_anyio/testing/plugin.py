"""Fixtures for the tests of applications, loaded by pytest wherever this package is installed.

They work with anyio's plugin: each store is open on the loop that the test runs on.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from ..stores.in_memory import InMemoryEventStore
from ..stores.sqlite import SQLiteEventStore
from . import nats, postgresql, redis

T = TypeVar("T")


@contextmanager
def _running(entered: AbstractContextManager[T], unavailable: type[Exception]) -> Generator[T]:
    """A server, or a skipped test with the reason; in CI a failed one."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(entered)
        except unavailable as error:
            if os.environ.get("CI"):
                pytest.fail(str(error), pytrace=False)
            pytest.skip(str(error))
        yield server


@pytest.fixture
async def event_store(anyio_backend: object) -> AsyncIterator[InMemoryEventStore]:
    """An empty, open in-memory store."""
    async with InMemoryEventStore() as store:
        yield store


@pytest.fixture
async def sqlite_event_store(
    anyio_backend: object, tmp_path: Path
) -> AsyncIterator[SQLiteEventStore]:
    """An empty, open SQLite store in the test's temporary directory."""
    async with SQLiteEventStore(tmp_path / "events.db") as store:
        yield store


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[postgresql.PostgreSQLDatabases]:
    """A PostgreSQL server for all tests: see `eventsource_anyio.testing.postgresql`.

    Where there is none to be had, tests that use it are skipped; with `CI` in the environment they
    fail.
    """
    with _running(postgresql.postgresql_server(), postgresql.PostgreSQLUnavailableError) as server:
        yield server


@pytest.fixture
def postgresql_dsn(postgresql_server: postgresql.PostgreSQLDatabases) -> Iterator[str]:
    """The DSN of an empty PostgreSQL database, which is dropped after the test."""
    dsn = postgresql_server.create_database()
    yield dsn
    postgresql_server.drop_database(dsn)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[redis.RedisDatabase]:
    """A Redis server for all tests: see `eventsource_anyio.testing.redis`.

    Where there is none to be had, tests that use it are skipped; with `CI` in the environment they
    fail.
    """
    with _running(redis.redis_server(), redis.RedisUnavailableError) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: redis.RedisDatabase) -> str:
    """The URL of a Redis server; give each bus a `prefix` of its own."""
    return redis_server.url


@pytest.fixture(scope="session")
def nats_server() -> Iterator[nats.NATSAccount]:
    """A NATS server for all tests: see `eventsource_anyio.testing.nats`.

    Where there is none to be had, tests that use it are skipped; with `CI` in the environment they
    fail.
    """
    with _running(nats.nats_server(), nats.NATSUnavailableError) as server:
        yield server


@pytest.fixture
def nats_url(nats_server: nats.NATSAccount) -> str:
    """The URL of a NATS server with JetStream; give each bus a `name` of its own."""
    return nats_server.url
